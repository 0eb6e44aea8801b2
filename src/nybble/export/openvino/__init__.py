"""OpenVINO: a stateful model (IR) with 4-bit weights, tokenizer and detokenizer, for openvino-genai.

exporter.py       the exporter: order of the steps, tokenizer, comparison of logits
trace.py          the float model as an OpenVINO graph whose past is state
states.py         what a model keeps of earlier tokens: keys and values, states of convolutions and recurrences
substitutes.py    functions that cannot be traced: masks, scans
recurrence.py     loops over tokens as Loop operations
constants.py      float constants to u4 and u8 codes, and back
runtime.py        an exported model with the interface of transformers

Importing this package turns off OpenVINO's telemetry in this process.
"""

from nybble.runtime import disable_openvino_telemetry

disable_openvino_telemetry()
