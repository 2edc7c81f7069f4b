"""Code that the networks of all generations share; the networks themselves are in `chatglm/modeling_*.py`."""
