"""What may be asked, field by field, with the examples that /openapi.json shows."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_ANSWERS = 16  # to one prompt, and prompts of one completion
MOST_TEXTS = 1024
MOST_TOKENS = 1_000_000

Number = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[Number, Field(ge=0, le=10, description="0 takes the likeliest token every time")]
TopP = Annotated[Number, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Stop = Annotated[str, Field(min_length=1)]


def _plain_json(value: Any) -> Any:
    """A value that can be sent back; NaN and half characters cannot."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("holds NaN, an infinity or half a character") from None
    return value


class Asked(BaseModel):
    """Types are taken literally; fields that are not known say nothing."""

    model_config = ConfigDict(strict=True, extra="ignore")


# ---- the originals


class Turn(Asked):
    """One message of a history, as ChatGLM3 and GLM-4 keep it."""

    role: Literal["system", "user", "assistant", "observation"]
    content: str
    metadata: str | None = None
    tools: Annotated[list[dict[str, Any]], AfterValidator(_plain_json)] | None = None


Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class OriginalRequest(Asked):
    """What the api.py of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B takes."""

    prompt: str = Field(min_length=1)
    history: list[Pair] | list[Turn] | None = Field(
        default=None, description="Pairs of question and answer, or messages with a role"
    )
    max_length: Tokens | None = Field(default=None, description="Tokens of prompt and answer together")
    top_p: TopP | None = Field(default=None, description="0.7 where it is not given")
    temperature: Temperature | None = Field(
        default=None, description="0.95 where it is not given; 0 takes the likeliest token every time"
    )

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "你好", "history": []}]})


# ---- the OpenAI protocol


class Part(Asked):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Asked):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "observation"]
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its words."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Asked):
    """What a stream tells beside the text."""

    include_usage: bool = False


class Sampling(Asked):
    """What chat and plain completions have in common; what is left out is as the checkpoint says."""

    model: str | None = Field(default=None, description="Any name: the one loaded model answers")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=10_000_000)] | None = Field(default=None, description="0 is all")
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    seed: int | None = Field(default=None, description="Same seed, same sampled answer")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_ANSWERS)] | None = Field(
        default=None, description="Texts that end the answer; not part of it"
    )
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What would change the answer but is not offered: refused instead of left out in silence.
    frequency_penalty: Annotated[Number, Field(ge=0, le=0, description="Only 0")] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0, description="Only 0")] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0, description="Only empty")] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ResponseFormat(Asked):
    """The form of an answer."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """A conversation to be answered."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Tokens | None = Field(
        default=None, description="Longest answer; else what the context leaves"
    )
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0, description="Only empty")] | None = None
    functions: Annotated[list[Any], Field(max_length=0, description="Only empty")] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "glm-mini",
                    "messages": [{"role": "user", "content": "你好"}],
                    "max_tokens": 64,
                    "temperature": 0,
                }
            ]
        }
    )

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Text to be continued as it stands, without the frame of a conversation."""

    prompt: (
        str | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)] | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_ANSWERS)]
    ) = Field(description="A text, token ids, or a list of one of them")  # fmt: skip
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = Field(
        default=None, description="Longest answer; 16 where it is not given"
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="How many of the likeliest tokens to show at every place"
    )
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "glm-mini", "prompt": "春天", "max_tokens": 16}]}
    )


# ---- labels


class LabelAsked(Asked):
    """One allowed answer; `verbaliser` is what the model writes for it."""

    name: str = Field(min_length=1)
    verbaliser: str = ""


class ClassifyRequest(Asked):
    """Texts, and the labels of which each gets one."""

    texts: list[str] = Field(min_length=1, max_length=MOST_TEXTS)
    labels: Annotated[
        list[Annotated[str, Field(min_length=1)] | LabelAsked], Field(min_length=2, max_length=1000)
    ]
    instruction: str | None = Field(default=None, description="Put first; else a question by the labels")
    template: str | None = Field(default=None, description="The question; {text} is replaced by the text")
    system: str = ""
    content_free: bool = Field(default=False, description="Take away what the question says without a text")
    shots: list[Pair] = Field(
        default=[],
        max_length=MOST_ANSWERS,
        description="Solved examples before every text: text, name of its label",
    )

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["加微信领红包", "谢谢你"], "labels": ["正常", "垃圾"]}]}
    )
