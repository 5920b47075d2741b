"""What the makers of the models published about their memory, beside what is predicted for the same work."""

from __future__ import annotations

from dataclasses import dataclass

from .prediction import Prediction, bits_of, predict, scratch_bytes
from .shapes import BUILT_IN, shape

GIB = 1 << 30
PROMPT = 32  # tokens that are read where the rest of the context is generated


@dataclass(frozen=True)
class Published:
    """A published figure of a GPU with the reference's own code.

    size     in GiB: the steps between the levels are those of the weights in GiB, not in 10^9 bytes
    rounded  whether it is a whole number, the size of a card rather than a measurement
    source   the README it is from
    """

    model: str
    level: str
    what: str  # "inference", "tuning", "encode" or "generate"
    size: float
    context: int
    rounded: bool
    source: str

    def predicted(self) -> Prediction:
        """What our engine or trainer is predicted to take on a GPU for the same work."""
        from ..finetune.methods import Method

        training = Method("p-tuning-v2", prefix_length=128) if self.what == "tuning" else None
        prompt = PROMPT if self.what == "generate" else None
        return predict(self.model, self.level, self.context, 1, training, "cuda", prompt=prompt)

    def as_published(self) -> int:
        """The same in the reference's way, in bytes.

        It expands a layer's INT8/INT4 codes as a whole where ours does it in blocks, and "encode" was measured with
        the logits of every token. What its quantization leaves in the allocator is not counted.
        """
        of = shape(self.model)
        found = self.predicted().total
        if bits_of(of, self.level):
            widest = (2 if of.gated else 1) * of.inner * of.hidden * 2
            found += widest - (scratch_bytes(of, self.level, "cuda") if self.what != "tuning" else 0)
        if self.what == "encode":
            found += self.context * of.vocabulary * 2
        return found

    def deviation(self) -> float:
        """How far `as_published` is from the figure, as a share; a whole number stands for half a GiB around it."""
        found = self.as_published() / GIB
        if self.rounded and abs(found - self.size) <= 0.5:
            return 0.0
        nearest = self.size + (0.5 if found > self.size else -0.5) * self.rounded
        return found / nearest - 1


def _rows(
    model: str, what: str, sizes: tuple[float, ...], context: int, rounded: bool, source: str
) -> list[Published]:
    return [
        Published(model, level, what, size, context, rounded, source)
        for level, size in zip(("fp16", "int8", "int4"), sizes, strict=True)
    ]


_FIRST, _SECOND = "THUDM/ChatGLM-6B", "THUDM/ChatGLM2-6B"
FIGURES = (
    *_rows("chatglm-6b", "inference", (13, 8, 6), 2048, True, _FIRST),
    *_rows("chatglm-6b", "tuning", (14, 9, 7), 128, True, _FIRST),
    *_rows("chatglm2-6b", "encode", (13.1, 8.2, 5.5), 2048, False, _SECOND),
    *_rows("chatglm2-6b", "generate", (12.8, 8.1, 5.1), 8192, False, _SECOND),
)


def figures(model: str) -> tuple[Published, ...]:
    """The published figures of a model, by the name of a built-in shape or the family that is called so on screen."""
    wanted = model.lower()
    titles = {name: title.lower() for name, (title, _, _) in BUILT_IN.items()}
    return tuple(one for one in FIGURES if wanted in (one.model, titles[one.model]))


def same_shape(config: str) -> str:
    """The built-in shape whose config.json has the same sizes, "" where there is none."""
    from json import loads

    own = loads(config)
    for name in BUILT_IN:
        theirs = loads(shape(name).config)
        sizes = [key for key in theirs if key.endswith(("size", "num", "channels", "layers", "heads"))]
        if all(own.get(key) == theirs[key] for key in sizes):
            return name
    return ""
