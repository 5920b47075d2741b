"""What /openapi.json and /docs say beside the fields of the requests; nothing here is fetched from anywhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

EVENTS: dict[str, Any] = {  # one event
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "JSON"}},
}
_TEXTS = {
    400: "A field is missing or wrong, or the prompt does not fit; `param` names the field.",
    401: "No valid API key.",
    403: "A page of another site asked.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "The request is too large.",
    429: "The queue is full; Retry-After says when to try again, in seconds.",
    500: "The server made a mistake.",
    503: "The model is loading or the server is stopping; see Retry-After.",
}
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error", "status"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
        "status": {"type": "integer"},
    },
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses with an error, for a route's description."""
    return {
        status: {"description": _TEXTS[status], "content": {"application/json": {"schema": ERROR}}}
        for status in statuses
    }


REFUSALS = refusals(*(_TEXTS.keys() - {404}))


def described(schema: dict[str, Any], keys: bool) -> dict[str, Any]:
    """FastAPI's description, less the 422 that is a 400 here, and with the key where one is needed."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = schema.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keys:
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


def page(schema: dict[str, Any], base: str) -> str:
    """The description as a page without a script, each route with a command to try it."""
    parts = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            command = f"curl {base}{path}"
            fields = ""
            body = operation.get("requestBody")
            if body:
                sent = body["content"]["application/json"]["schema"]
                model = schema["components"]["schemas"][sent["$ref"].rsplit("/", 1)[-1]]
                example = json.dumps(model["examples"][0], ensure_ascii=False)
                command += f" \\\n  -H 'Content-Type: application/json' \\\n  -d '{example}'"
                needed = set(model.get("required", ()))
                rows = "".join(
                    f"<tr><td><code>{escape(name)}</code>{' *' if name in needed else ''}</td>"
                    f"<td>{escape(field.get('description', ''))}</td></tr>"
                    for name, field in model["properties"].items()
                )
                fields = f"<table>{rows}</table>"
            summary, more = operation.get("summary", ""), operation.get("description", "")
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(summary)}. {escape(more)}</p>"
                f"<pre>{escape(command)}</pre>{fields}"
            )
    style = "body{font:16px/1.5 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}pre{overflow:auto;padding:.7rem;border:1px solid #8886}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
    title = escape(schema["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><p>{escape(schema['info'].get('description', ''))} "
        f'<a href="openapi.json">openapi.json</a>. * needed</p>{"".join(parts)}</html>'
    )
