"""The routes that list the models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..service import Service, service_of

router = APIRouter()


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "chatglm"}


@router.get("/models")
async def models(request: Request) -> Any:
    service = service_of(request)
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Any:
    service = service_of(request)
    service.check_name(name)
    return _model(service, name)
