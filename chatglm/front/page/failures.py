"""What a visitor is told when there is no answer, in the visitor's language."""

from __future__ import annotations

import logging

from ...conversation.fitting import QuestionTooLongError
from ...decoding.choosing import NonFiniteLogitsError
from ...engine import EngineStoppedError, PromptTooLongError, QueueFullError
from ..messages import PAGE

logger = logging.getLogger(__name__)


def reason(error: Exception, language: str) -> str:
    """Returns why there is no answer. What is the server's fault goes into its log, with all details."""
    if isinstance(error, QuestionTooLongError):
        return PAGE["no_room"][language].format(needed=error.needed, room=error.room)
    if isinstance(error, PromptTooLongError):
        return PAGE["no_memory"][language]
    if isinstance(error, QueueFullError):
        return PAGE["full"][language].format(seconds=error.retry_after)
    if isinstance(error, EngineStoppedError):
        return PAGE["stopping"][language]
    if type(error).__name__ == "KernelsBusyError":  # of an optional room, which may not be importable
        return PAGE["kernels_busy"][language]
    if isinstance(error, ValueError):  # of the visitor's tools, which has a text of its own
        return str(error)
    logger.error("an answer failed", exc_info=error)
    return PAGE["not_finite" if isinstance(error, NonFiniteLogitsError) else "internal"][language]
