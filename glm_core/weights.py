"""The files that hold a checkpoint's weights: which they are, whether they are whole, and their tensors one by one.

Nothing is executed: safetensors hold no code, and `.bin` files are read by torch's weights-only unpickler, which
builds tensors and refuses everything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import threading
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
WINDOW_BYTES = 16 << 20  # that the system is asked to read at a time
AHEAD_BYTES = 1 << 29  # that it reads before they are needed, at most
KEPT_SHARE = 0.5  # of the free memory: files that are larger are not kept in it
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
    "F8_E4M3": 1,
    "F8_E5M2": 1,
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
        if is_lfs_pointer(path):
            raise GLMError(
                f"{path} is a Git LFS pointer, not the file itself.",
                f"Copy {path.name} again from its source.",
            )
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
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
    """The files that hold the weights, and what is wrong with them.

    Of several layouts in one folder transformers' choice is taken: safetensors before .bin, one file before shards.
    """
    index = None
    for single, shards in zip(WEIGHTS, INDEXES, strict=True):
        if (folder / single).is_file():
            files = [folder / single]
            break
        if (folder / shards).is_file():
            index = folder / shards
            names, problem = _shard_names(index)
            if problem:
                return [], [problem]
            files = [folder / name for name in names]
            break
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


def _shard_names(index: Path) -> tuple[list[str], str]:
    """The files that an index names, and what is wrong with it."""
    try:
        named = read_json(index).get("weight_map")
    except GLMError as error:
        return [], error.message
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        return [], f"{index.name} has no weight_map that gives every tensor its file."
    names = sorted(set(named.values()))
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            return [], f"{index.name} names {name!r}, which is no file of this folder."
    return names, ""


def file_problem(file: Path) -> str:
    """What is wrong with one weight file, from its first and last bytes; empty if nothing is."""
    try:
        if is_lfs_pointer(file):
            return f"{file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` at its source."
        return _safetensors_problem(file) if file.suffix == ".safetensors" else _bin_problem(file)
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}."


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name -> dtype, shape and data_offsets of a safetensors file, from its first bytes. Raises ValueError."""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > HEADER_LIMIT:
            raise ValueError("no safetensors header")
        text = stream.read(length)
    if len(text) < length:
        raise ValueError("the file ends inside it")
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(header, dict):
        raise ValueError("no table of tensors")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_described(entry):
            raise ValueError(f"nonsense about {name}")
    header["__data__"] = 8 + length
    return header


def _is_described(entry: Any) -> bool:
    """Whether a header's entry has a dtype, a shape and as many bytes as these need."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return False
    size = ITEM_BYTES.get(entry["dtype"])
    return offsets[0] <= offsets[1] and (size is None or size * math.prod(shape) == offsets[1] - offsets[0])


def _safetensors_problem(file: Path) -> str:
    actual = file.stat().st_size
    if not actual:
        return f"{file.name} is cut off: it is empty; copy it again."
    try:
        header = safetensors_header(file)
    except ValueError as error:
        return f"{file.name} is cut off: its header cannot be read ({error})."
    data = header.pop("__data__")
    expected = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if actual < expected:
        return f"{file.name} is cut off: it has {actual:,} bytes, its header promises {expected:,}; copy it again."
    if actual > expected:
        return f"{file.name} has {actual:,} bytes, more than the {expected:,} of its header; copy it again."
    return ""


def _bin_problem(file: Path) -> str:
    """A `.bin` of torch 1.6 and later is a zip archive, whose table of contents stands at its end; older ones are
    a row of pickles, and the first ones a tar archive."""
    with file.open("rb") as stream:
        head = stream.read(512)
    if not head:
        return f"{file.name} is cut off: it is empty; copy it again."
    if head.startswith(b"PK\x03\x04"):
        if zipfile.is_zipfile(file):
            return ""
        return f"{file.name} is cut off: it has {file.stat().st_size:,} bytes and no end; copy it again."
    if head.startswith(b"\x80") or _is_tar(head):
        return ""
    return f"{file.name} is no file of weights: it begins with {head[:16]!r}."


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def listing(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of the files by name, without reading a weight.

    GLMError for a file that cannot be read, and for a tensor in two files of which the index names neither.
    """
    found: dict[str, Stored] = {}
    owners = _Owners(files)
    for file in files:
        _refuse_damaged(file)
        if file.suffix == ".safetensors":
            header = safetensors_header(file)
            header.pop("__data__")
            entries = {
                name: Stored(name, file, tuple(entry["shape"]), str(entry["dtype"]))
                for name, entry in header.items()
            }
        else:
            entries = {
                name: Stored(
                    name,
                    file,
                    tuple(tensor.shape),
                    TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."), "F32"),
                )
                for name, tensor in _unpickled(file, "meta").items()
            }
        found |= {name: entry for name, entry in entries.items() if owners.take(name, file)}
    return found


class _Owners:
    """Which file a tensor is read from where two hold it: the one that the index gives it to."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.first: dict[str, Path] = {}
        self.index: dict[str, str] = {}
        if len(files) > 1:
            index = files[0].parent / INDEXES[0 if files[0].suffix == ".safetensors" else 1]
            named = read_json(index).get("weight_map") if index.is_file() else None
            self.index = named if isinstance(named, dict) else {}

    def take(self, name: str, file: Path) -> bool:
        """Whether a tensor met in this file counts; a later one that does replaces the earlier."""
        before = self.first.setdefault(name, file)
        if before == file:
            return True
        owner = self.index.get(name)
        if owner not in (before.name, file.name):
            raise GLMError(
                f"{before.name} and {file.name} both hold {name}.",
                "Copy the checkpoint again from its source.",
            )
        return owner == file.name


def _refuse_damaged(file: Path) -> None:
    if problem := file_problem(file):
        raise GLMError(problem, "Copy the checkpoint again from its source.")


def can_list(files: Sequence[Path]) -> bool:
    """Whether `listing` is quick: a `.bin` from before torch 1.6 would have to be read to its end."""
    return all(file.suffix == ".safetensors" or zipfile.is_zipfile(file) for file in files)


def tensors(
    files: Sequence[Path], wanted: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one after another; each is a view of its mapped file and is to be copied or converted.

    While one is converted, the system reads those behind it, if all are wanted. GLMError naming the file when one cannot be read or
    holds anything but tensors.
    """
    from safetensors import SafetensorError, safe_open

    owners = _Owners(files)
    with _Reading(files if wanted is None else ()) as reading:
        for file in files:
            _refuse_damaged(file)
            if file.suffix == ".safetensors":
                try:
                    with safe_open(str(file), framework="pt", device="cpu") as opened:
                        for name in opened.offset_keys():
                            if (wanted is None or wanted(name)) and owners.take(name, file):
                                tensor = opened.get_tensor(name)
                                yield name, tensor
                                reading.passed(file, tensor)
                except (SafetensorError, OSError) as error:
                    raise GLMError(
                        f"{file.name} cannot be read: {error}.", "Copy the checkpoint again from its source."
                    ) from error
            else:
                whole = _unpickled(file, "cpu")
                for name in list(whole):
                    tensor = whole.pop(name)
                    if (wanted is None or wanted(name)) and owners.take(name, file):
                        yield name, tensor
                    reading.passed(file, tensor)


class _Reading:
    """Has the system read files in their order, up to AHEAD_BYTES before what was passed, while other work goes on.

    A mapped file alone is read a few pages at a time, each time when somebody waits for them. And the system keeps all
    that it has read until memory is full. What other programs have there would go, and in a virtual machine every page
    of memory that is touched for the first time takes its host some microseconds, more than reading it from an SSD. So
    of files that would fill most of what is free, pages are given back once they were passed, and serve again.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        import psutil

        self._files = files
        self._room, self._ended = threading.Condition(), False
        self._passed = 0
        total = sum(file.stat().st_size for file in files)
        self._gives_back = total > KEPT_SHARE * psutil.virtual_memory().available
        self._thread = threading.Thread(target=self._run, name="glm-read-ahead", daemon=True)

    def __enter__(self) -> _Reading:
        if hasattr(os, "posix_fadvise"):  # not on every system
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._room:
            self._ended = True
            self._room.notify()

    def passed(self, file: Path, tensor: Tensor) -> None:
        """A tensor of this file is done with."""
        with self._room:
            self._passed += tensor.nbytes
            self._room.notify()
        if self._gives_back and tensor.nbytes >= WINDOW_BYTES:
            with contextlib.suppress(OSError, AttributeError, ValueError):  # no such thing on this system
                _give_back(file, tensor.data_ptr(), tensor.nbytes)

    def _wait_for(self, position: int) -> bool:
        """Until this byte is near enough; False where it was passed meanwhile, or nothing more is wanted."""
        with self._room:
            self._room.wait_for(lambda: self._ended or position < self._passed + AHEAD_BYTES)
            return not self._ended and position >= self._passed

    def _run(self) -> None:
        before = 0
        for file in self._files:
            with contextlib.suppress(OSError), file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                for start in range(0, size, WINDOW_BYTES):
                    if self._wait_for(before + start):
                        os.posix_fadvise(opened.fileno(), start, WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
                before += size


def _give_back(file: Path, address: int, count: int) -> None:
    """Free the pages of a file behind an address, which are read again should anybody look there.

    Nothing happens where the address is not that of this file, mapped: other memory would be lost.
    """
    last = (address + count) & -mmap.PAGESIZE
    with open("/proc/self/maps", "rb") as lines:
        for line in lines:
            span, _, start, _, _, *path = line.split(None, 5)
            begin, end = (int(part, 16) for part in span.split(b"-"))
            if begin <= address < end:
                if last <= end and path and os.fsdecode(path[0].rstrip(b"\n")) == os.path.realpath(file):
                    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
                    ctypes.CDLL(None).madvise(
                        ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
                    )
                    with file.open("rb") as opened:
                        offset = int(start, 16) + first - begin
                        os.posix_fadvise(opened.fileno(), offset, last - first, os.POSIX_FADV_DONTNEED)
                return


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a `.bin`; mapped, not read, where the file is a zip archive."""
    import pickle
    import re

    import torch

    zipped = zipfile.is_zipfile(file)
    with file.open("rb") as stream:
        if _is_tar(stream.read(512)):
            raise GLMError(
                f"{file.name} cannot be read: it is a tar archive as the first versions of torch wrote them.",
                "Get the checkpoint as safetensors, or from a source you trust.",
            )
    try:
        loaded = torch.load(file, map_location=device, weights_only=True, mmap=True if zipped else None)
    except Exception as error:  # a damaged file surfaces as many types; the analyst needs one sentence
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        called = named[1] if named else _foreign(file, zipped)
        if called or isinstance(error, pickle.UnpicklingError):
            raise GLMError(
                f"{file.name} holds something other than tensors{f' ({called})' if called else ''}, so it was not opened.",
                "Get the checkpoint as safetensors, or from a source you trust.",
            ) from error
        said = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
        raise GLMError(
            f"{file.name} cannot be read: {': '.join([type(error).__name__, *said[:1]])[:200]}.",
            "Copy the checkpoint again, or convert it to safetensors.",
        ) from error
    if not isinstance(loaded, dict):
        raise GLMError(
            f"{file.name} holds no table of tensors, it holds a {type(loaded).__name__}.",
            "Choose a file of weights.",
        )
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise GLMError(
                f"{file.name} holds no table of tensors: its {name!r} is a {type(tensor).__name__}.",
                "Save the model's state_dict alone, or choose another file of weights.",
            )
    return loaded


def _foreign(file: Path, zipped: bool) -> str:
    """The first thing that is no part of a tensor in a `.bin`, as posix.system; found without running anything."""
    import io
    import pickletools
    from itertools import islice

    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if any(name.endswith("/constants.pkl") for name in names):
                    return "a TorchScript program"
                pickled = [name for name in names if name.endswith("/data.pkl")]
                stream: Any = io.BytesIO(archive.read(pickled[0]) if pickled else b"")
        else:
            stream = file.open("rb")
        with stream:
            for _ in range(
                4
            ):  # an old file has a magic number, a version and the system's sizes before the tensors
                texts: list[str] = []
                for code, value, _ in islice(pickletools.genops(stream), 1_000_000):
                    called = str(value).replace(" ", ".") if code.name in ("GLOBAL", "INST") else ""
                    if code.name == "STACK_GLOBAL":
                        called = ".".join(texts[-2:])
                    if called and not called.startswith(("torch.", "collections.OrderedDict")):
                        return called
                    if isinstance(value, str):
                        texts.append(value)
    except Exception:  # not a pickle to its end: what was found so far is nothing
        return ""
    return ""
