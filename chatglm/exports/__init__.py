"""Checkpoints in the formats of other engines, written tensor by tensor; `python -m chatglm.export` is the command."""
