"""MLX: a folder for mlx-lm with the codes of all quantized layers.

exporter.py      the exporter: files, and reading them back
families.py      what mlx-lm takes for granted about a model type, and config.json as it reads it
runtime.py       an exported model with the interface of transformers
"""
