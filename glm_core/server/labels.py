"""POST /v1/classify: one label of a set for every text, with the probabilities of all."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse, Response

from ..errors import GLMError
from .asked import ClassifyRequest
from .documents import REFUSALS
from .service import Service
from .shared import gone, serving

if TYPE_CHECKING:
    from ..classify import Label, LabelTask, Scored
    from ..engine import Engine

router = APIRouter(prefix="/v1", tags=["labels"])

EXAMPLE = {
    "object": "list", "model": "glm-mini",
    "data": [
        {"index": 0, "label": "垃圾", "probabilities": {"正常": 0.03, "垃圾": 0.97}, "logprobs": {"正常": -3.6, "垃圾": -0.1},
         "outside": 0.07, "margin": 0.94, "greedy": "垃圾", "reason": "", "truncated": False}
    ],
    "usage": {"prompt_tokens": 31, "total_tokens": 31},
}  # fmt: skip


@router.post(
    "/classify",
    summary="One label for every text, with probabilities",
    responses={200: {"content": {"application/json": {"example": EXAMPLE}}}, **REFUSALS},
)
async def classify(
    request: Request, asked: Annotated[ClassifyRequest, Body()], service: Annotated[Service, Depends(serving)]
) -> Response:
    """A label is scored as a whole; `outside` is the probability that the model would write none of them."""
    engine = service.engine
    task = _task(asked, engine)

    def work(stop: threading.Event) -> list[Scored] | None:
        from ..classify import UNREADABLE, Classifier

        classifier = Classifier(engine, task)
        classifier.prepare()
        prompts = [classifier.prompts.build((text,)) for text in asked.texts]
        found = dict(classifier.scorer.each([prompt.ids for prompt in prompts], stop))
        if len(found) < len(prompts):
            return None
        if not all(one.usable for one in found.values()):
            raise GLMError(UNREADABLE)
        return [classifier.read(found[place], prompt) for place, prompt in enumerate(prompts)]

    answers = await service.label(work, request.receive)
    if answers is None:
        return gone()
    used = sum(one.prompt_tokens for one in answers)
    service.meters.texts.add(len(answers))
    service.meters.prompt_tokens.add(used)
    return JSONResponse(
        {
            "object": "list",
            "model": engine.loaded.info.name,
            "data": [_shown(index, one, task) for index, one in enumerate(answers)],
            "usage": {"prompt_tokens": used, "total_tokens": used},
        }
    )


def _task(asked: ClassifyRequest, engine: Engine) -> LabelTask:
    from ..classify import Label, LabelTask, instruction_for

    labels: tuple[Label, ...] = tuple(
        Label(one) if isinstance(one, str) else Label(one.name, one.verbaliser) for one in asked.labels
    )
    instruction, template = asked.instruction or "", asked.template or "{text}"
    if asked.instruction is None and asked.template is None:
        instruction = instruction_for(labels)
        template = "Comment: {text}" if instruction.isascii() else "评论：{text}"
    task = LabelTask(
        checkpoint=str(engine.loaded.info.path),
        checkpoint_fingerprint="",
        precision=engine.loaded.precision,
        device=str(engine.device),
        template=template,
        columns=("text",),
        labels=labels,
        instruction=instruction,
        system=asked.system,
        content_free=asked.content_free,
        shots=tuple((text, name) for text, name in asked.shots),
    )
    task.check()
    return task


def _shown(index: int, one: Scored, task: LabelTask) -> dict[str, Any]:
    return {
        "index": index,
        "label": one.label,
        "probabilities": dict(zip(task.names, one.probabilities, strict=True)),
        "logprobs": dict(zip(task.names, one.scores, strict=True)),
        "outside": one.outside,
        "margin": one.margin,
        "greedy": one.greedy,
        "reason": one.reason,
        "truncated": one.truncated,
    }
