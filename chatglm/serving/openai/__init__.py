"""OpenAI's routes: models, chat completions with tools, responses, completions, embeddings."""

from __future__ import annotations

from fastapi import APIRouter

from . import chat, completions, embeddings, models, responses

router = APIRouter(prefix="/v1", tags=["OpenAI"])
for part in (models, chat, responses, completions, embeddings):
    router.include_router(part.router)
