"""Code that the tokenizers of all generations share; the classes are in `tokenization_chatglm*.py`."""
