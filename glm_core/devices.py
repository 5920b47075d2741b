"""Where a model runs: the devices there are, what each of them computes in, and layers spread over several."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import GLMError

if TYPE_CHECKING:
    import torch
    from torch import nn

# What a device computes in unless it is told otherwise, and why.
PRECISION_OF: dict[str, tuple[str, str]] = {
    "cuda": ("bf16", "the range of fp32 in half its bytes; fp16 overflows above 65,504"),
    "cuda without bf16": ("fp16", "GPUs before Ampere emulate bf16, several times slower"),
    "mps": ("fp16", "every Mac computes it, bf16 only from macOS 14 on"),
    "cpu": ("bf16", "half the bytes to read, which is what an answer waits for; fp16 is slow or missing"),
    "cpu, small model": ("fp32", "exact, and so few weights that speed does not suffer"),
}
SMALL = 200_000_000  # parameters
SPARE_BYTES = 300 << 20  # for activations and the device's own library
SPARE_SHARE = 1.1
_NAME = re.compile(r"cpu|mps|cuda(:\d+)?")


def best() -> str:
    """ "cuda" or "mps" where torch can use one, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available() -> tuple[str, ...]:
    """Every device of this machine by name: "cpu", "cuda:0", "cuda:1", "mps"."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu", *(f"cuda:{number}" for number in range(count))]
    return (*found, "mps") if torch.backends.mps.is_available() else tuple(found)


def named(device: str, num_gpus: int | None = None) -> tuple[str, ...]:
    """The devices that a choice means: "auto", one name, or several with commas between; GLMError for one that is not there.

    num_gpus  with "auto" or "cuda": the first so many GPUs
    """
    if num_gpus is not None:
        if num_gpus < 1 or device not in ("auto", "cuda"):
            raise GLMError(
                f"num_gpus is {num_gpus} and the device {device}.",
                "Choose 1 or more GPUs with the device auto or cuda, or name the devices: cuda:0,cuda:1.",
            )
        device = "cuda" if num_gpus == 1 else ",".join(f"cuda:{number}" for number in range(num_gpus))
    found = (best(),) if device == "auto" else tuple(name.strip() for name in device.split(","))
    require(found)
    return found


def require(names: Iterable[str]) -> None:
    """GLMError for the first name that is no device, or none of this machine."""
    there = available()
    for name in names:
        if not _NAME.fullmatch(name):
            raise GLMError(
                f"The device {name!r} is unknown.",
                "Choose auto, cpu, cuda, cuda:1 or mps, or several: cuda:0,cuda:1.",
            )
        if (f"{name}:0" if name == "cuda" else name) not in there:
            raise GLMError(f"There is no device {name}; this machine has {', '.join(there)}.", "Choose cpu.")


def kind(device: str) -> str:
    """The row of PRECISION_OF that a device belongs to."""
    import torch

    if not device.startswith("cuda"):
        return device
    # Without the argument torch says yes wherever bf16 can be emulated.
    return "cuda" if torch.cuda.is_bf16_supported(including_emulation=False) else "cuda without bf16"


def precision_for(device: str, parameters: int) -> str:
    """What a device computes a model of so many parameters in, by PRECISION_OF."""
    found = kind(device)
    return PRECISION_OF["cpu, small model" if found == "cpu" and parameters < SMALL else found][0]


def beside_codes(device: str) -> torch.dtype:
    """What embeddings, norms and the head stay in beside INT8/INT4 weights."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[PRECISION_OF[kind(device)][0]]


def free_bytes(device: str) -> int:
    """Bytes that can be taken on a device now; a Mac's GPU shares the main memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def needed(weights: int) -> int:
    """Bytes that weights of so many bytes need on one device."""
    return int(weights * SPARE_SHARE) + SPARE_BYTES


# ---- several devices ------------------------------------------------------------------------------------------


def split(
    model: nn.Module, sizes: Mapping[str, int], names: Sequence[str], free: Sequence[int]
) -> dict[str, str] | None:
    """Which module goes onto which device: the layers in order, each device filled to the same share of its memory.

    sizes   bytes of every parameter by name
    free    bytes that can be taken on each of the devices
    Whatever is no layer (embeddings, rotary table, last norm, head) is on the first device, where ids come in and
    logits come out. None where it does not fit. The model may be on the meta device.
    """
    layers = layer_paths(model)
    weights = [sum(size for name, size in sizes.items() if name.startswith(f"{path}.")) for path in layers]
    fixed = sum(sizes.values()) - sum(weights)
    rooms = [max(0.0, (room - SPARE_BYTES) / SPARE_SHARE) for room in free]

    def filled(share: float) -> list[int] | None:
        device, used, chosen = 0, float(fixed), list[int]()
        for size in weights:
            while used + size > share * rooms[device]:
                device, used = device + 1, 0.0
                if device == len(rooms):
                    return None
            used += size
            chosen.append(device)
        return chosen if fixed <= share * rooms[0] else None

    best_found = filled(1.0)
    if best_found is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        found = filled(middle)
        if found is None:
            low = middle
        else:
            high, best_found = middle, found
    placed = {path: names[device] for path, device in zip(layers, best_found, strict=True)}
    return {path: placed.get(path, names[0]) for path in _blocks(model, layers)}


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of a model's layers in the order of computation."""
    from torch import nn

    config: Any = model.config
    count = int(config.num_hidden_layers)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{path}.{number}" for number in range(count)]
    raise GLMError(
        f"{type(model).__name__} has no list of {count} layers that could be spread over several devices.",
        "Choose one device.",
    )


def _blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The layers and the largest modules that hold none of them: together they are the whole model."""
    holders = {"", *(path[:end] for path in layers[:1] for end in range(len(path)) if path[end] == ".")}
    found: list[str] = []

    def walk(path: str, module: nn.Module) -> None:
        if path not in holders:
            found.append(path)
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def device_of(device_map: Mapping[str, str]) -> Callable[[str], str | None]:
    """A function from a parameter's name to the device its module was given; None where the map leaves it out."""

    def look(name: str) -> str | None:
        while name not in device_map:
            if not name:
                return None
            name = name.rpartition(".")[0]
        return device_map[name]

    return look


def check_map(model: nn.Module, device_map: Mapping[str, str]) -> str:
    """The device of the input embedding; GLMError for a map with a foreign device or without a place for a weight.

    Embedding and head are to be on one device: they may share their weights.
    """
    require(dict.fromkeys(device_map.values()))
    look = device_of(device_map)
    homeless = [name for name, _ in model.named_parameters() if look(name) is None]
    if homeless:
        raise GLMError(
            f"The device map has no place for {homeless[0]}.",
            'Name every part of the model, or add "" for the rest.',
        )
    holder: Any = model
    where = {id(module): path for path, module in model.named_modules()}
    ends = [
        look(where[id(module)])
        for module in (holder.get_input_embeddings(), holder.get_output_embeddings())
        if module is not None
    ]
    if len(set(ends)) > 1:
        raise GLMError(
            f"The device map has the embedding on {ends[0]} and the head on {ends[-1]}.",
            "Give both the same device.",
        )
    assert ends[0] is not None
    return ends[0]


def whole(model: nn.Module, device_map: Mapping[str, str]) -> dict[str, str]:
    """A map by module with no entry inside another's: `""` and other names that hold layers are spelled out."""
    look = device_of(device_map)
    found: dict[str, str] = {}

    def walk(path: str, module: nn.Module) -> None:
        below = f"{path}." if path else ""
        if any(name != path and name.startswith(below) for name in device_map):
            for name, child in module.named_children():
                walk(below + name, child)
        else:
            found[path] = str(look(path))

    walk("", model)
    return found


def spread(model: Any, device_map: Mapping[str, str], main: str) -> Any:
    """The model with every block on its device and its inputs brought there; ids go in and logits come out on `main`.

    A block on "cpu" beside GPUs is kept there and copied to the `main` device whenever it is computed.
    """
    from accelerate import dispatch_model

    return dispatch_model(
        model,
        dict(device_map),
        main_device=main,
        skip_keys=getattr(model, "_skip_keys_device_placement", None) or "past_key_values",
        force_hooks=True,
    )


def gather(model: Any) -> Any:
    """Undo `spread`'s bookkeeping, so that the model can be moved or freed as a whole."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for name in ("to", "cuda"):  # the wrappers that refuse to move a spread model
        model.__dict__.pop(name, None)
    return model
