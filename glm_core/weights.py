"""The files that hold a checkpoint's weights: which they are, whether they are whole, and their tensors one by one.

Nothing is executed: safetensors hold no code, and `.bin` files are read by torch's weights-only unpickler, which
builds tensors and refuses everything else.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GLMError

if TYPE_CHECKING:
    from torch import Tensor

LFS_HEAD = b"version https://git-lfs"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HEADER_LIMIT = 100_000_000  # bytes; the largest published header has some 100,000
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
TORCH_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8", "int64": "I64",
               "float64": "F64", "int32": "I32", "int16": "I16", "bool": "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it; dtype in the safetensors spelling (F32, BF16, I8, ...)."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES.get(self.dtype, 4)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; GLMError if it is missing or damaged."""
    if not path.is_file():
        raise GLMError(f"There is no {path}.", f"Choose the folder that holds {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise GLMError(
            f"{path} cannot be read: {error}.", f"Copy {path.name} again from its source."
        ) from error
    if not isinstance(content, dict):
        raise GLMError(f"{path} holds no object.", f"Copy {path.name} again from its source.")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the 130-byte note that Git LFS leaves instead of the file itself."""
    with path.open("rb") as file:
        return file.read(len(LFS_HEAD)) == LFS_HEAD


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that hold the weights, and what is wrong with them."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    single = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if single is not None:
        files = [single]
    elif index is not None:
        if is_lfs_pointer(index):
            return [], [f"{index.name} is a Git LFS pointer, not the file itself."]
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, OSError) as error:
            return [], [f"{index.name} cannot be read: {error!r}."]
        if any(Path(name).name != name for name in names):
            return [], [f"{index.name} names files outside the folder."]
        files = [folder / name for name in names]
    else:
        return [], [
            "There are no weights: neither model.safetensors, pytorch_model.bin nor an index of shards."
        ]
    problems = []
    for file in files:
        if not file.is_file():
            problems.append(
                f"The shard {file.name} named in {index.name if index else 'the folder'} is missing."
            )
        elif problem := file_problem(file):
            problems.append(problem)
    return files, problems


def file_problem(file: Path) -> str:
    """What is wrong with one weight file, from its first and last bytes; empty if nothing is."""
    if is_lfs_pointer(file):
        return f"{file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` at its source."
    missing = _safetensors_missing(file) if file.suffix == ".safetensors" else _bin_missing(file)
    return f"{file.name} is cut off: {missing}" if missing else ""


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name -> dtype, shape and data_offsets of a safetensors file, from its first bytes. Raises ValueError."""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > HEADER_LIMIT:
            raise ValueError("no safetensors header")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    header["__data__"] = 8 + length
    return header


def _safetensors_missing(file: Path) -> str:
    try:
        header = safetensors_header(file)
    except (ValueError, UnicodeDecodeError) as error:
        return f"its header cannot be read ({error})."
    data = header.pop("__data__")
    expected = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    actual = file.stat().st_size
    if actual == expected:
        return ""
    return f"it has {actual:,} bytes, its header promises {expected:,}; copy it again."


def _bin_missing(file: Path) -> str:
    """A `.bin` of torch 1.6 and later is a zip archive, whose table of contents stands at its end."""
    with file.open("rb") as stream:
        head = stream.read(4)
    if not head:
        return "it is empty; copy it again."
    if head == b"PK\x03\x04" and not zipfile.is_zipfile(file):
        return f"it has {file.stat().st_size:,} bytes and no end; copy it again."
    return ""


def listing(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of the files by name, without reading a weight. GLMError for a file that cannot be read."""
    found: dict[str, Stored] = {}
    for file in files:
        _refuse_damaged(file)
        if file.suffix == ".safetensors":
            header = safetensors_header(file)
            header.pop("__data__")
            for name, entry in header.items():
                found[name] = Stored(name, file, tuple(entry["shape"]), str(entry["dtype"]))
        else:
            for name, tensor in _unpickled(file, "meta").items():
                dtype = TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."), "F32")
                found[name] = Stored(name, file, tuple(tensor.shape), dtype)
    return found


def _refuse_damaged(file: Path) -> None:
    if problem := file_problem(file):
        raise GLMError(problem, "Copy the checkpoint again from its source.")


def can_list(files: Sequence[Path]) -> bool:
    """Whether `listing` is quick: a `.bin` from before torch 1.6 would have to be read to its end."""
    return all(file.suffix == ".safetensors" or zipfile.is_zipfile(file) for file in files)


def tensors(
    files: Sequence[Path], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one after another; each is a view of its mapped file and is to be copied or converted.

    GLMError naming the file when one cannot be read or holds anything but tensors.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        _refuse_damaged(file)
        if file.suffix == ".safetensors":
            try:
                with safe_open(str(file), framework="pt", device="cpu") as opened:
                    for name in opened.keys():  # noqa: SIM118  (no mapping: it cannot be iterated)
                        if wanted(name):
                            yield name, opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise GLMError(
                    f"{file.name} cannot be read: {error}.", "Copy the checkpoint again from its source."
                ) from error
        else:
            whole = _unpickled(file, "cpu")
            for name in list(whole):
                tensor = whole.pop(name)
                if wanted(name):
                    yield name, tensor


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a `.bin`; mapped, not read, where the file is a zip archive."""
    import pickle
    import re

    import torch

    try:
        loaded = torch.load(
            file, map_location=device, weights_only=True, mmap=True if zipfile.is_zipfile(file) else None
        )
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise GLMError(
            f"{file.name} holds something other than tensors{f' ({called[1]})' if called else ''}, so it was not opened.",
            "Get the checkpoint as safetensors, or from a source you trust.",
        ) from error
    except Exception as error:  # a damaged file surfaces as many types; the analyst needs one sentence
        raise GLMError(
            f"{file.name} cannot be read: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}.",
            "Copy the checkpoint again, or convert it to safetensors.",
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in loaded.values()
    ):
        raise GLMError(f"{file.name} holds no table of tensors.", "Choose a file of weights.")
    return loaded
