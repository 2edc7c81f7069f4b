"""Checkpoints in the formats of other engines, written tensor by tensor; `python -m chatglm.export` is the command."""

#: What `--type` may be: how matrices are stored in a GGUF file. Vectors are always float32.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
#: The same for OpenVINO; int4 and int8 are rounded by optimum-intel.
OPENVINO_TYPES = ("fp32", "fp16", "int8", "int4")
