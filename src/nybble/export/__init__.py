"""Export formats. Importing this package registers the built-in ones, but imports none of their runtimes."""

from nybble.export.base import EXPORTERS
from nybble.export.hf import HFExporter
from nybble.export.mlx.exporter import MLXExporter
from nybble.export.openvino.exporter import OpenVINOExporter
from nybble.export.vllm import VLLMExporter

EXPORTERS.register(OpenVINOExporter.name, OpenVINOExporter())
EXPORTERS.register(HFExporter.name, HFExporter())
EXPORTERS.register(VLLMExporter.name, VLLMExporter())
EXPORTERS.register(MLXExporter.name, MLXExporter())
