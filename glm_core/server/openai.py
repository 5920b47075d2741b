"""The OpenAI protocol: models, chat completions, plain completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse, Response

from ..errors import GLMError
from ..tokenizers.base import Message
from .asked import ChatRequest, CompletionRequest, Sampling
from .documents import EVENTS, REFUSALS, refusals
from .errors import Refusal
from .reading import LEAST, Reader, Spelling
from .service import Answers, Service
from .shared import failure, gone, refused, sampling, serving
from .streams import DONE, STILL_THERE, EventStream, event

if TYPE_CHECKING:
    from ..engine import Engine, TokenScore
    from ..engine import Request as Continue

router = APIRouter(prefix="/v1", tags=["OpenAI protocol"])

COMPLETION_TOKENS = 16  # of a plain completion, where the request does not say
NO_SYSTEM = ("chatglm", "chatglm2")  # generations trained without roles

CHAT_EXAMPLE = {
    "id": "chatcmpl-0", "object": "chat.completion", "created": 1795252200, "model": "glm-mini",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "你好！"}, "logprobs": None, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10},
}  # fmt: skip
COMPLETION_EXAMPLE = {
    "id": "cmpl-0", "object": "text_completion", "created": 1795252200, "model": "glm-mini",
    "choices": [{"index": 0, "text": "来了", "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
}  # fmt: skip
MODEL_EXAMPLE = {
    "id": "glm-mini", "object": "model", "created": 1795252200, "owned_by": "glm-workbench",
    "max_model_len": 2048, "precision": "fp32", "generation": "chatglm3",
    "classify": ["shots"],
}  # fmt: skip
STREAM_NOTE = (
    "With `stream`, server-sent events that end with `data: [DONE]`; a failure is an event with `error`."
)


def _example(value: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    ok: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"example": value}}}}
    return ok | (refusals(*statuses) if statuses else REFUSALS)


def _streamed(value: Any) -> dict[int | str, dict[str, Any]]:
    found = _example(value)
    found[200]["content"]["text/event-stream"] = {"schema": EVENTS}
    return found


# ---- models


@router.get(
    "/models",
    summary="The loaded model",
    responses=_example({"object": "list", "data": [MODEL_EXAMPLE]}, 401, 403, 500, 503),
)
async def models(service: Annotated[Service, Depends(serving)]) -> Response:
    """A list of one."""
    return JSONResponse({"object": "list", "data": [_model(service)]})


@router.get(
    "/models/{model:path}",
    summary="The loaded model by its name",
    responses=_example(MODEL_EXAMPLE, 401, 403, 404, 500, 503),
)
async def model(model: str, service: Annotated[Service, Depends(serving)]) -> Response:
    """404 for every other name."""
    found = _model(service)
    if model != found["id"]:
        raise Refusal(404, f"This server serves {found['id']}.", "model", "model_not_found")
    return JSONResponse(found)


def _model(service: Service) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": engine.loaded.info.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "glm-workbench",
        "max_model_len": engine.context,
        "precision": engine.loaded.precision,
        "generation": engine.tokenizer.generation,
        "classify": ["shots"],  # what /v1/classify takes beside what it took first
    }


# ---- chat


@router.post("/chat/completions", summary="An answer to a conversation", responses=_streamed(CHAT_EXAMPLE))
async def chat_completions(
    request: Request, asked: Annotated[ChatRequest, Body()], service: Annotated[Service, Depends(serving)]
) -> Response:
    engine = service.engine
    messages = _messages(asked, engine)
    characters = sum(len(message.content) for message in messages)
    try:
        ids = await service.encode(lambda: tuple(engine.tokenizer.chat_ids(messages)), characters)
    except GLMError as error:
        raise refused(error, "messages") from error
    longest = _room(engine, len(ids), "messages", asked.max_completion_tokens or asked.max_tokens)
    requests = _requests(asked, engine, [ids], longest, (asked.top_logprobs or 0) if asked.logprobs else None)
    return await _respond(_ChatForm(engine, asked.logprobs or False), asked, requests, service, request)


chat_completions.__doc__ = f"The last message is the user's. {STREAM_NOTE}"


def _messages(asked: ChatRequest, engine: Engine) -> list[Message]:
    found: list[Message] = []
    for place, one in enumerate(asked.messages):
        if one.role in ("system", "developer"):
            found.append(Message("system", one.text))
        elif one.role == "user" or one.role == "assistant":
            found.append(Message(one.role, one.text))
        else:
            found.append(Message("observation", one.text))
        if one.content is None and one.role != "assistant":
            raise Refusal(400, f"messages.{place}.content: a text is needed.", f"messages.{place}.content")
    if found[-1].role not in ("user", "observation"):
        last = len(found) - 1
        raise Refusal(
            400, f"messages.{last}.role: the last message must be the user's.", f"messages.{last}.role"
        )
    if engine.tokenizer.generation in NO_SYSTEM and found[0].role == "system":
        # As openai_api.py of ChatGLM2-6B does: these models were trained without a system prompt.
        found[-1] = Message(found[-1].role, found[0].content + found[-1].content)
        del found[0]
    return found


class _ChatForm:
    """How answers of /v1/chat/completions look."""

    def __init__(self, engine: Engine, logprobs: bool) -> None:
        self.engine, self._logprobs = engine, logprobs
        self.id, self.name, self.piece = (
            f"chatcmpl-{uuid.uuid4().hex}",
            "chat.completion",
            "chat.completion.chunk",
        )
        self.raw = False

    def whole(self, reader: Reader, text: str) -> dict[str, Any]:
        """A choice, without its place."""
        return {
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._scores(reader),
        }

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a choice."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk(self, reader: Reader, text: str) -> dict[str, Any]:
        """A piece of a choice."""
        return {"delta": {"content": text}, "logprobs": self._scores(reader)}

    def closing(self) -> dict[str, Any]:
        """The chunk that says why a choice ended."""
        return {"delta": {}, "logprobs": None}

    def _scores(self, reader: Reader) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        spelling = reader.spelling
        return {
            "content": [
                spelling.scored(number, score.logprob)
                | {"top_logprobs": [spelling.scored(*pair) for pair in score.likeliest]}
                for number, score in reader.scores()
            ],
            "refusal": None,
        }


# ---- plain completions


@router.post("/completions", summary="A text continued as it stands", responses=_streamed(COMPLETION_EXAMPLE))
async def completions(
    request: Request,
    asked: Annotated[CompletionRequest, Body()],
    service: Annotated[Service, Depends(serving)],
) -> Response:
    engine = service.engine
    prompts = await service.encode(lambda: _prompts(asked, engine), _characters(asked))
    longest = min(_room(engine, len(ids), "prompt", asked.max_tokens or COMPLETION_TOKENS) for ids in prompts)
    requests = _requests(asked, engine, prompts, longest, asked.logprobs)
    return await _respond(_TextForm(engine, asked.logprobs), asked, requests, service, request)


completions.__doc__ = f"No frame of a conversation is put around it. {STREAM_NOTE}"


def _characters(asked: CompletionRequest) -> int:
    if isinstance(asked.prompt, str):
        return len(asked.prompt)
    return sum(len(part) for part in asked.prompt if isinstance(part, str))


def _prompts(asked: CompletionRequest, engine: Engine) -> list[tuple[int, ...]]:
    given: list[Any]
    if isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int):
        given = [asked.prompt]
    else:
        given = list(asked.prompt)
    found = []
    for one in given:
        if isinstance(one, str):
            found.append(_plain_ids(one, engine))
            continue
        vocabulary = int(engine.model.config.vocab_size)
        if (largest := max(one)) >= vocabulary:
            raise Refusal(
                400, f"prompt: {largest} is no token of this model, which has {vocabulary:,}.", "prompt"
            )
        found.append(tuple(one))
    return found


def _plain_ids(text: str, engine: Engine) -> tuple[int, ...]:
    """A text behind the tokens that every text of the model begins with; ChatGLM-6B has them at the end."""
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text)
    frame = tuple(getattr(tokenizer, "prefix_ids", ()))
    if engine.whole_prompts:
        return (*ids, *frame)
    if not frame:  # a tokenizer of transformers: what its conversations begin with, if that is a begin mark
        names = {number: name for name, number in tokenizer.special.items()}
        begun = tokenizer.chat_ids([Message("user", "a")])[:2]
        marks = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[gMASK]", "<sop>")
        frame = tuple(number for number in begun if names.get(number) in marks)
    return (*frame, *ids)


class _TextForm:
    """How answers of /v1/completions look."""

    def __init__(self, engine: Engine, logprobs: int | None) -> None:
        self.engine, self._logprobs = engine, logprobs
        self.id, self.name, self.piece = f"cmpl-{uuid.uuid4().hex}", "text_completion", "text_completion"
        self.raw = True
        self._offsets: dict[int, int] = {}

    def whole(self, reader: Reader, text: str) -> dict[str, Any]:
        """A choice, without its place."""
        return {"text": text, "logprobs": self._scores(reader)}

    chunk = whole

    def opening(self) -> dict[str, Any] | None:
        """No chunk before the first text."""
        return None

    def closing(self) -> dict[str, Any]:
        """The chunk that says why a choice ended."""
        return {"text": "", "logprobs": None}

    def _scores(self, reader: Reader) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        scores = reader.scores()
        tokens = [reader.spelling.token(number) for number, _ in scores]
        begin = self._offsets.get(id(reader), 0)
        offsets = []
        for token in tokens:
            offsets.append(begin)
            begin += len(token)
        self._offsets[id(reader)] = begin
        return {
            "tokens": tokens,
            "token_logprobs": [max(score.logprob, LEAST) for _, score in scores],
            "top_logprobs": [self._likeliest(reader.spelling, score) for _, score in scores],
            "text_offset": offsets,
        }

    @staticmethod
    def _likeliest(spelling: Spelling, score: TokenScore) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, value in score.likeliest:  # of tokens with the same text the likelier stays
            found.setdefault(spelling.token(number), max(value, LEAST))
        return found


# ---- both


def _room(engine: Engine, used: int, param: str, asked: int | None) -> int:
    """Tokens the answer may have; a Refusal with the numbers where prompt and answer do not fit."""
    context = engine.context
    if used >= context:
        raise Refusal(
            400,
            f"The model takes {context:,} tokens with the answer; {param} has {used:,}.",
            param,
            "context_length_exceeded",
        )
    if asked is not None and used + asked > context:
        raise Refusal(
            400,
            f"The model takes {context:,} tokens; {param} has {used:,}, and {asked:,} were asked for.",
            "max_tokens",
            "context_length_exceeded",
        )
    return asked or context - used


def _requests(
    asked: Sampling, engine: Engine, prompts: Sequence[tuple[int, ...]], longest: int, logprobs: int | None
) -> list[Continue]:
    from ..engine import MAX_SEED
    from ..engine import Request as Continue

    found = []
    for ids in prompts:
        for number in range(asked.n or 1):
            settings = sampling(
                engine,
                longest,
                asked.temperature,
                asked.top_p,
                asked.top_k,
                asked.repetition_penalty,
                None if asked.seed is None else (asked.seed + number) % MAX_SEED,
                asked.stops,
            )
            found.append(Continue(ids, settings, logprobs=logprobs))
    return found


async def _respond(
    form: _ChatForm | _TextForm,
    asked: Sampling,
    requests: Sequence[Continue],
    service: Service,
    request: Request,
) -> Response:
    answers = service.submit(requests)
    engine = form.engine
    spelling = Spelling(engine.tokenizer)
    readers = [Reader(handle, engine.tokenizer, spelling, form.raw) for handle in answers.handles]
    about = {
        "id": form.id,
        "object": form.name,
        "created": int(time.time()),
        "model": engine.loaded.info.name,
    }
    if asked.stream:
        about["object"] = form.piece
        return EventStream(_events(form, asked, answers, readers, about), answers.cancel)
    if not await answers.finished(request.receive):
        return gone()
    choices = []
    for index, reader in enumerate(readers):
        if (refusal := failure(reader.handle)) is not None:
            raise refusal
        choice = form.whole(reader, reader.more())
        choices.append({"index": index, **choice, "finish_reason": reader.finish_reason})
    return JSONResponse({**about, "choices": choices, "usage": _usage(answers, asked)})


async def _events(
    form: _ChatForm | _TextForm,
    asked: Sampling,
    answers: Answers,
    readers: Sequence[Reader],
    about: dict[str, Any],
) -> AsyncIterator[str]:
    rest = {"usage": None} if asked.with_usage else {}

    def chunk(index: int, choice: dict[str, Any], reason: str | None = None) -> str:
        return event({**about, "choices": [{"index": index, **choice, "finish_reason": reason}], **rest})

    for index in range(len(readers)):
        if (opening := form.opening()) is not None:
            yield chunk(index, opening)
    ended: set[int] = set()
    async for news in answers.news():
        if not news:
            yield STILL_THERE
            continue
        for index, reader in enumerate(readers):
            if index in ended:
                continue
            over = reader.handle.done
            if over and (refusal := failure(reader.handle)) is not None:
                yield event(refusal.body)
                yield DONE
                return
            if piece := reader.more():
                yield chunk(index, form.chunk(reader, piece))
            if over:
                yield chunk(index, form.closing(), reader.finish_reason)
                ended.add(index)
    if asked.with_usage:
        yield event({**about, "choices": [], "usage": _usage(answers, asked)})
    yield DONE


def _usage(answers: Answers, asked: Sampling) -> dict[str, int]:
    """Tokens read and generated, end tokens included; a prompt with several answers is read once."""
    prompt = sum(handle.n_prompt for handle in answers.handles[:: asked.n or 1])
    generated = sum(handle.n_tokens for handle in answers.handles)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
