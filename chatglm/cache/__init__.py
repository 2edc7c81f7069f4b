"""KV caches: one that grows in place, one of bytes, one that a chat keeps between turns, and the rows of the engine."""

from .base import ChatGLMCache, TokenRoom, reusable_tokens
from .chat import ChatCache
from .growing import GrowingLayer
from .int8 import KV_CACHE_DTYPES, Int8Layer, check_kv_cache_dtype
from .rows import RowCache

__all__ = [
    "KV_CACHE_DTYPES",
    "ChatCache",
    "ChatGLMCache",
    "GrowingLayer",
    "Int8Layer",
    "RowCache",
    "TokenRoom",
    "check_kv_cache_dtype",
    "reusable_tokens",
]
