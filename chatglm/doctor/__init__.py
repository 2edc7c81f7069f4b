"""`python -m chatglm.doctor [FOLDER]`: checks what this installation computes, and describes a folder."""
