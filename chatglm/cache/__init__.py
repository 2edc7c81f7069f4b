"""KV caches: one that grows in place, one that a chat keeps between its turns, and the rows of the engine."""

from .base import ChatGLMCache, TokenRoom
from .chat import ChatCache
from .growing import GrowingLayer
from .rows import RowCache

__all__ = ["ChatCache", "ChatGLMCache", "GrowingLayer", "RowCache", "TokenRoom"]
