"""The contract of the original `api.py`, which LangChain's ChatGLM and many scripts use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StrictStr
from starlette.responses import Response

from ..chat import ChatStep, ShownAnswer
from ..conversation.history import check_items, check_pair, messages_of_pairs, pairs_before
from ..engine import Stream
from ..pictures import read_base64
from .chat_engine import ChatEngine
from .errors import ApiError
from .openai.bodies import MOST_MESSAGES
from .openai.pictures import picturing, sees
from .service import EventStream, Json, Service, in_thread, service_of, submit, unless_gone

router = APIRouter(tags=["original"])


class Question(BaseModel):
    """Unknown keys are ignored, as in the original."""

    prompt: StrictStr | None = None
    #: VisualGLM's, whose original has `text` in place of `prompt`, and the picture as base64.
    text: StrictStr | None = None
    image: StrictStr | None = None
    history: Annotated[list[Any], Field(max_length=MOST_MESSAGES)] | None = None
    max_length: Annotated[int, Field(ge=0, le=2**31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    model: StrictStr | None = None


#: The original's defaults.
DEFAULTS = {"max_length": 2048, "top_p": 0.7, "temperature": 0.95}


class QuestionInProgress:
    """A question while it is being answered."""

    def __init__(self, engine: ChatEngine, question: Question) -> None:
        self._engine = engine
        if question.prompt is None and question.text is None:
            raise ApiError(422, "prompt: Field required", param="prompt")
        if question.prompt is not None and question.text is not None:
            raise ApiError(400, "give either prompt or text: the question", param="text")
        self.prompt = question.prompt if question.prompt is not None else question.text or ""
        self._answer_name = "response" if question.prompt is not None else "result"
        engine.check_size(self.prompt)
        given = list(question.history or [])
        # Clients of the original know only pairs: they get pairs back, even from a model that takes role messages.
        self.pairs = all(isinstance(item, (list, tuple)) for item in given)
        history: list[Any] = given
        if self.pairs:
            self.given = check_items(pairs_before(given, self.prompt), check_pair)
            history = engine.tokenizer.chat_format.from_messages(messages_of_pairs(self.given))
        values = question.model_dump(include=set(DEFAULTS), exclude_none=True)
        settings: dict[str, Any] = DEFAULTS | values
        if sees(engine):  # the original's defaults for pictures are those of its chat()
            settings = {"max_length": 1024, "image": read_base64(question.image) if question.image else None} | values
        elif question.image:
            picturing(engine)
        self.request = engine.model.prepare_turn(engine.tokenizer, self.prompt, history, **settings)
        self._shown = ShownAnswer(engine.tokenizer, self.prompt, history)

    async def steps(self, service: Service, stream: Stream) -> AsyncIterator[ChatStep]:
        async for step in service.steps(stream):
            yield self._shown.step(step)

    def body(self, last: ChatStep) -> dict[str, Any]:
        history: Sequence[Any] = last.history
        if self.pairs:
            history = [*self.given, (self.prompt, last.text)]
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        response = last.text if self.pairs else last.response
        return {self._answer_name: response, "history": history, "status": 200, "time": now}


async def _start(request: Request, question: Question) -> tuple[Service, QuestionInProgress, Stream]:
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(question.model)
    turn = await in_thread(QuestionInProgress, engine, question)
    return service, turn, submit(engine, [turn.request], adapter)[0]


@router.post("/")
async def answer(request: Request, question: Question) -> Response:
    """`{"prompt", "history", "max_length", "top_p", "temperature"}` -> `{"response", "history", "status", "time"}`

    `"model"`, which the original does not have, chooses an adapter. VisualGLM's original takes `{"image": base64,
    "text", "history"}` and answers with `result` in place of `response`.
    """
    service, turn, stream = await _start(request, question)

    async def last() -> ChatStep:
        with service.limited([stream]):
            async for step in turn.steps(service, stream):
                final = step
        return final

    return Json(turn.body(await unless_gone(request, last())))


@router.post("/stream")
async def stream_answer(request: Request, question: Question) -> Response:
    """The same as server-sent events: a `{"delta"}` for each new part, then the body of `POST /`."""
    service, turn, stream = await _start(request, question)

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        with service.limited([stream]):
            async for step in turn.steps(service, stream):
                if step.delta:
                    yield {"delta": step.delta}
            yield turn.body(step)

    return EventStream(events())
