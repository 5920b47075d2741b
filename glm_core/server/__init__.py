"""The model over HTTP: the originals' POST /, the OpenAI protocol, labels with probabilities; one engine behind all."""

from .app import create_app, uvicorn_server
from .service import Options, Service

__all__ = ["Options", "Service", "create_app", "uvicorn_server"]
