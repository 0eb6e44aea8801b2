"""ONNX: a graph with the operators of onnxruntime and 4-bit weights, for onnxruntime-genai.

exporter.py     the exporter: what is refused, order of the steps
graph.py        the graph, made by the model builder of onnxruntime-genai
codes.py        codes as initializers of the graph, and back
runtime.py      an exported model with the interface of transformers
"""
