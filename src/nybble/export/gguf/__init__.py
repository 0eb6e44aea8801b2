"""GGUF: one file for llama.cpp with 4-bit blocks, tokenizer and chat template.

exporter.py          the exporter: what is refused, order of the steps
architectures.py     what llama.cpp computes for each architecture, and the fields of a configuration
experts.py           mixtures of experts as fields, and where the rows of each expert are
latent.py            latent attention as fields, and where the rows of its heads are
rope.py              rotary embeddings as fields and tensors
tensors.py           names of tensors, order of rows, norms
blocks.py            codes to blocks Q4_1, Q4_0 and Q8_0, and back
file.py              write a file tensor by tensor, and read it
tokenizer.py         the tokenizer as fields; pretokenizers.py names its pre-tokenizer
tokenizer_check.py   llama.cpp's tokenizer compared with that of transformers
llama_cpp.py         llama.cpp by ctypes
runtime.py           an exported model with the interface of transformers
"""
