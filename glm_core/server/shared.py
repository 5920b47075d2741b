"""What several routes need: the service, sampling settings, and what a failed answer is refused with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.responses import Response

from ..engine import GenerationSettings
from ..errors import GLMError
from .errors import Refusal
from .service import Service, stopping

if TYPE_CHECKING:
    from ..engine import Engine, Handle

COLDEST = 1e-3  # of the engine; below it every draw is the likeliest token anyway
NARROWEST = 1e-6


async def serving(request: Request) -> Service:  # a plain function would get a thread for every request
    """The service of the application."""
    found: Service = request.app.state.service
    return found


def sampling(
    engine: Engine,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> GenerationSettings:
    """What was asked for over the checkpoint's own settings."""
    asked = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "seed": seed,
    }  # fmt: skip
    values = {**engine.loaded.defaults, **{name: value for name, value in asked.items() if value is not None}}
    settings = GenerationSettings.from_json({**values, "max_new_tokens": max_new_tokens, "stop": tuple(stop)})
    values = settings.to_json() | {"top_p": max(settings.top_p, NARROWEST)}
    if settings.temperature < COLDEST:
        values["temperature"] = 0.0
    return GenerationSettings.from_json(values)


def failure(handle: Handle) -> Refusal | None:
    """What an answer that did not come about is refused with; None where it did."""
    if handle.state == "done":
        return None
    if handle.error is not None:
        code = "out_of_memory" if "Memory ran out" in handle.error.message else None
        return Refusal(503 if code else 500, str(handle.error), code=code)
    return stopping()


def gone() -> Response:
    """What a client that is no longer there would get."""
    return Response(status_code=499)


def refused(error: GLMError, param: str | None = None) -> Refusal:
    """A problem of the request in the words of the core."""
    return Refusal(400, str(error), param)
