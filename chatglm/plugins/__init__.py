"""Doors of other engines: what vLLM and SGLang import, so that they run the published folders without remote code."""
