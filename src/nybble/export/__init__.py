"""Export formats. Importing this package registers the built-in ones, but imports none of their runtimes."""

from nybble.export.base import EXPORTERS
from nybble.export.gguf.exporter import GGUFExporter
from nybble.export.hf import HFExporter
from nybble.export.mlx.exporter import MLXExporter
from nybble.export.onnx.exporter import OnnxExporter
from nybble.export.openvino.exporter import OpenVINOExporter
from nybble.export.vllm import VLLMExporter

for _exporter in (
    OpenVINOExporter(), GGUFExporter(), OnnxExporter(), VLLMExporter(), MLXExporter(), HFExporter(),
):  # fmt: skip
    EXPORTERS.register(_exporter.name, _exporter)
