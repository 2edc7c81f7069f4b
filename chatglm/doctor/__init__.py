"""`python -m chatglm.doctor [FOLDER]`: whether this installation computes what it should, and what a folder holds."""
