"""POST / and POST /stream: what api.py of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B takes and gives, to the letter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse, Response

from ..errors import GLMError
from ..tokenizers.base import Message
from .asked import OriginalRequest, Turn
from .documents import EVENTS, REFUSALS
from .errors import Refusal
from .reading import Reader, Spelling
from .service import Answers, Service
from .shared import failure, gone, sampling, serving
from .streams import STILL_THERE, EventStream, event

if TYPE_CHECKING:
    from ..engine import Engine

router = APIRouter(tags=["as api.py of ChatGLM"])

MAX_LENGTH, TOP_P, TEMPERATURE = 2048, 0.7, 0.95  # of api.py, where the request does not say
LEAST_ROOM = 512  # tokens of answer, where the request does not say and the prompt is long
PAIRS = ("chatglm", "chatglm2")  # generations whose chat() keeps pairs

EXAMPLE = {
    "response": "你好！",
    "history": [["你好", "你好！"]],
    "status": 200,
    "time": "2026-11-21 09:30:00",
}
STREAMED = 'data: {"delta":"你好","finished":false}\n\ndata: {"response":"你好！","history":[["你好","你好！"]],"status":200,"time":"2026-11-21 09:30:00","finished":true}\n\n'


@router.post(
    "/",
    summary="An answer and the history with it",
    responses={200: {"content": {"application/json": {"example": EXAMPLE}}}, **REFUSALS},
)
async def answer(
    request: Request, asked: Annotated[OriginalRequest, Body()], service: Annotated[Service, Depends(serving)]
) -> Response:
    """One answer. `history` of the response is what the next request sends."""
    turn = await _begin(asked, service)
    if not await turn.answers.finished(request.receive):
        return gone()
    if (refusal := failure(turn.handle)) is not None:
        raise refusal
    return JSONResponse(turn.result())


@router.post(
    "/stream",
    summary="The same, as it is written",
    response_class=EventStream,
    status_code=200,
    responses={200: {"content": {"text/event-stream": {"example": STREAMED, "schema": EVENTS}}}, **REFUSALS},
)
async def stream(
    asked: Annotated[OriginalRequest, Body()], service: Annotated[Service, Depends(serving)]
) -> Response:
    """Server-sent events: pieces as `delta`, and at the end what `POST /` answers; `event: error` where it fails."""
    turn = await _begin(asked, service)

    async def events() -> AsyncIterator[str]:
        async for news in turn.answers.news():
            if not news:
                yield STILL_THERE
                continue
            if piece := turn.reader.more():
                yield event({"delta": piece, "finished": False})
        if (refusal := failure(turn.handle)) is not None:
            yield event(refusal.body, "error")
        else:
            yield event(turn.result() | {"finished": True})

    return EventStream(events(), turn.answers.cancel)


class _Turn:
    """A question on its way to its answer."""

    def __init__(self, asked: OriginalRequest, engine: Engine, answers: Answers) -> None:
        self._asked, self._engine, self.answers = asked, engine, answers
        self.handle = answers.handles[0]
        self.reader = Reader(self.handle, engine.tokenizer, Spelling(engine.tokenizer))

    def result(self) -> dict[str, Any]:
        """The body of the response, in the order of the originals."""
        response, history = self._told()
        return {
            "response": response,
            "history": history,
            "status": 200,
            "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        }

    def _told(self) -> tuple[Any, list[Any]]:
        """(response, history with this turn), in the shape of what was sent, else of the model's generation."""
        asked, text = self._asked, self.reader.text
        sent = asked.history or []
        pairs = isinstance(sent[0], list) if sent else self._engine.tokenizer.generation in PAIRS
        if pairs:
            return text, [*sent, [asked.prompt, text]]
        before: list[dict[str, Any]] = [_as_sent(one) for one in sent if isinstance(one, Turn)]
        before.append({"role": "user", "content": asked.prompt})
        generation = self._engine.tokenizer.generation
        if generation == "chatglm3":
            from ..tokenizers.chatglm2 import parse_response
        elif generation == "glm4":
            from ..tokenizers.glm4 import parse_response
        else:
            return text, [*before, {"role": "assistant", "metadata": "", "content": text}]
        try:
            return parse_response(self._spelt(), before)
        except GLMError:  # a call of a tool that cannot be read is an answer like any other
            return text, [*before, {"role": "assistant", "metadata": "", "content": text}]

    def _spelt(self) -> str:
        """The answer with a mark between its turns; other control tokens are left out, as in a chat."""
        tokenizer = self._engine.tokenizer
        turns: list[list[int]] = [[]]
        for one in self.handle.ids:
            if one == tokenizer.special["<|assistant|>"]:
                turns.append([])
            elif one not in tokenizer.stop_ids:
                turns[-1].append(one)
        return "<|assistant|>".join(map(tokenizer.decode, turns))


def _as_sent(turn: Turn) -> dict[str, Any]:
    return turn.model_dump(exclude_unset=True)


async def _begin(asked: OriginalRequest, service: Service) -> _Turn:
    from ..engine import Request as Continue

    engine = service.engine
    messages = _messages(asked)
    characters = sum(len(message.content) for message in messages)
    ids = await service.encode(lambda: engine.tokenizer.chat_ids(messages), characters)
    if asked.max_length is None:
        longest = min(engine.context, max(MAX_LENGTH, len(ids) + LEAST_ROOM))
    else:
        longest = min(engine.context, asked.max_length)
    if len(ids) >= longest:
        whose = "the model takes" if longest == engine.context else "max_length is"
        raise Refusal(
            400,
            f"Prompt and history have {len(ids):,} tokens; {whose} {longest:,} with the answer.",
            "history" if asked.history else "prompt",
            "context_length_exceeded",
        )
    settings = sampling(
        engine,
        max_new_tokens=longest - len(ids),
        temperature=TEMPERATURE if asked.temperature is None else asked.temperature,
        top_p=TOP_P if asked.top_p is None else asked.top_p,
    )
    return _Turn(asked, engine, service.submit([Continue(tuple(ids), settings)]))


def _messages(asked: OriginalRequest) -> list[Message]:
    messages: list[Message] = []
    for one in asked.history or []:
        if isinstance(one, Turn):
            messages.append(Message(one.role, one.content, one.metadata or "", tuple(one.tools or ())))
        else:
            messages += [Message("user", one[0]), Message("assistant", one[1])]
    return [*messages, Message("user", asked.prompt)]
