"""The routes that turn text into token ids and back, with vLLM's paths and fields."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from .chat_engine import ChatEngine
from .errors import ApiError, validation_message
from .openai.bodies import Body
from .openai.chat import prompt_ids
from .openai.chat_body import ChatBody
from .service import Json, in_thread, service_of

#: Limits of a request: about a second of work.
MOST_CHARACTERS, MOST_TOKENS = 2**20, 2**16

router = APIRouter(tags=["tokens"])


class TokenizeBody(Body):
    """A text, or the messages of a chat completion."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MOST_CHARACTERS)] | None = None
    #: Of a text: [gMASK] and sop. The prompt of a chat always has its control tokens.
    add_special_tokens: bool | None = None
    messages: list[Any] | None = None
    tools: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    def chat_body(self) -> ChatBody:
        names = ("messages", "tools", "add_generation_prompt", "continue_final_message")
        values = {name: getattr(self, name) for name in names}
        try:
            return ChatBody.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            message, param = validation_message(error.errors())
            raise ApiError(400, message, param=param) from error


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, max_length=MOST_TOKENS)]


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """The token ids of a text, as `/v1/completions` reads it, or of the prompt that a chat completion makes."""
    service = service_of(request)
    engine = service.engine
    service.adapter_of(body.model)  # for its errors
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    ids = await in_thread(_ids, engine, body)
    names = engine.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Json({"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": names})


def _ids(engine: ChatEngine, body: TokenizeBody) -> list[int]:
    tokenizer = engine.tokenizer
    if body.prompt is not None:
        chat_only = ("tools", "add_generation_prompt", "continue_final_message")
        for name in chat_only:
            if getattr(body, name) is not None:
                raise ApiError(400, f"{name} goes with messages, not with a prompt", param=name)
        special = body.add_special_tokens is not False
        return list(tokenizer(body.prompt, add_special_tokens=special)["input_ids"])
    if body.add_special_tokens:
        raise ApiError(400, "add_special_tokens goes with a prompt, not with messages", param="add_special_tokens")
    return prompt_ids(engine, body.chat_body())


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """The text of token ids."""
    service = service_of(request)
    engine = service.engine
    service.adapter_of(body.model)  # for its errors
    vocabulary = engine.model.config.vocab_size
    if body.tokens and max(body.tokens) >= vocabulary:
        raise ApiError(400, f"token ids must be from 0 to {vocabulary - 1}", param="tokens")
    text = await in_thread(engine.tokenizer.decode, body.tokens, clean_up_tokenization_spaces=False)
    return Json({"prompt": text})
