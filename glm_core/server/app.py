"""The application: routes, what is around them, and what failed requests are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from .. import __version__
from ..errors import GLMError
from . import labels, openai, original
from .documents import described, page, refusals
from .errors import Refusal, of_validation
from .guard import Guard, internal_error
from .meters import CONTENT_TYPE
from .service import Service
from .shared import serving

GRACE_SECONDS = 10  # that answers on their way get when the server is to stop
KEEP_ALIVE_SECONDS = 30
ABOUT = (
    "A GLM on this machine: POST / as in api.py of ChatGLM-6B, the OpenAI protocol under /v1, "
    "labels with probabilities."
)
HEALTH = {"status": "ok", "model": "glm-mini", "running": 3, "waiting": 0}


def create_app(service: Service) -> FastAPI:
    """The application around a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        try:
            yield
        finally:
            service.close()
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    app = FastAPI(
        title="GLM Workbench",
        description=ABOUT,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page fetches scripts from the internet; /docs is our own
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        # Nothing about a request goes anywhere, whatever OTEL_* variables the machine has.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.state.service = service
    for router in (original.router, openai.router, labels.router):
        app.include_router(router)
    _add_own_routes(app)
    for problem, answer in (
        (Refusal, _refused),
        (GLMError, _impossible),
        (RequestValidationError, _invalid),
        (HTTPException, _http),
        (Exception, _mistaken),
    ):
        app.add_exception_handler(problem, answer)
    app.add_middleware(Guard, service=service)
    if service.options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            described(made(), service.options.api_keys is not None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def uvicorn_server(service: Service) -> uvicorn.Server:
    """A server for it, which writes nothing down but what the guard does."""
    # Its own line would hold the whole address, with a key or a text if somebody put one there.
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def _add_own_routes(app: FastAPI) -> None:
    @app.get(
        "/health",
        tags=["server"],
        summary="Whether the server answers",
        responses={
            200: {"content": {"application/json": {"example": HEALTH}}},
            503: {
                "description": "The model is loading.",
                "content": {"application/json": {"example": {"status": "loading", "share": 0.4}}},
            },
            **refusals(403, 408, 413, 500),
        },
    )
    async def health(service: Annotated[Service, Depends(serving)]) -> Response:
        """200 when it does, 503 with the share that is read while the model is loading."""
        engine = service.loaded
        if engine is None:
            share = round(service.share(), 3)
            return JSONResponse({"status": "loading", "share": share}, 503, {"Retry-After": "5"})
        state = engine.status()
        return JSONResponse(
            {
                "status": "ok",
                "model": state.name,
                "precision": state.precision,
                "device": state.device,
                "running": state.running_chat,
                "waiting": state.queued_chat,
            }
        )

    @app.get(
        "/metrics",
        tags=["server"],
        summary="Counts and times for Prometheus",
        response_class=PlainTextResponse,
        responses=refusals(401, 403, 408, 413, 500),
    )
    async def metrics(service: Annotated[Service, Depends(serving)]) -> Response:
        """Text format 0.0.4."""
        return PlainTextResponse(service.meters.text(_gauges(service)), media_type=CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return HTMLResponse(page(app.openapi(), str(request.base_url).rstrip("/")))


def _gauges(service: Service) -> dict[str, tuple[str, float]]:
    import psutil

    found = {
        "glm_model_loaded": ("1 once the model is loaded.", float(service.loaded is not None)),
        "process_resident_memory_bytes": (
            "Memory of the process.",
            float(psutil.Process().memory_info().rss),
        ),
        "process_start_time_seconds": ("When the server started.", service.started),
    }
    if (engine := service.loaded) is not None:
        state = engine.status()
        found |= {
            "glm_answers_running": ("Answers being computed.", float(state.running_chat)),
            "glm_answers_waiting": ("Answers in the queue.", float(state.queued_chat)),
            "glm_cache_bytes": ("Keys and values in memory.", float(state.cache_bytes)),
            "glm_weight_bytes": ("Weights in memory.", float(state.weight_bytes)),
        }
    return found


# ---- what failed requests are told


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _impossible(request: Request, error: Exception) -> Response:
    return Refusal(400, str(error)).response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return of_validation(error.errors()).response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing at this address.", 405: "This address takes another method."}
    text = words.get(error.status_code, "The body is not valid JSON." if error.status_code == 400 else "")
    answer = Refusal(error.status_code, text or str(error.detail)).response()
    answer.headers.update(error.headers or {})
    return answer


async def _mistaken(request: Request, error: Exception) -> Response:
    return internal_error().response()
