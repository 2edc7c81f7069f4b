"""Pictures in the messages of a chat completion."""

from __future__ import annotations

from typing import Any

from ..chat_engine import ChatEngine
from ..errors import ApiError
from .chat_body import ChatBody, reads_text_only


def sees(engine: ChatEngine) -> bool:
    """Whether the model sees pictures."""
    return hasattr(engine.model, "place_picture")


def picturing(engine: ChatEngine) -> Any:
    """The model. Raises ApiError (400) if it reads text only."""
    if not sees(engine):
        raise reads_text_only("image_url")
    return engine.model


def picture_url(body: ChatBody) -> str | None:
    """The picture of a conversation, as a data URL; clients send it again with every question.

    Raises:
        ApiError: (400) there are several, or it is an address on the net.
    """
    urls = list(dict.fromkeys(url for message in body.messages for url in message.image_urls))
    if len(urls) > 1:
        reason = f"the messages hold {len(urls)} pictures, and a conversation is about one: begin a new one"
        raise ApiError(400, reason, param="messages", code="unsupported_parameter")
    if urls and not urls[0].startswith("data:"):
        reason = "image_url must be a data URL with base64 (data:image/png;base64,...): nothing is fetched from the net"
        raise ApiError(400, reason, param="messages", code="unsupported_parameter")
    return urls[0] if urls else None
