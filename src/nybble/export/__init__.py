"""Export formats. Importing this package registers the built-in ones, but imports none of their runtimes."""

from nybble.export.base import EXPORTERS
from nybble.export.gguf.exporter import GGUFExporter
from nybble.export.onnx.exporter import OnnxExporter
from nybble.export.openvino.exporter import OpenVINOExporter

for _exporter in (OpenVINOExporter(), GGUFExporter(), OnnxExporter()):
    EXPORTERS.register(_exporter.name, _exporter)
