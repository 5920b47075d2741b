"""The rows of a choice read, split, encoded and looked at; kept, and beside the page where there are many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import finetune_data, panels
from pages.shared.reruns import live
from pages.shared.state import Background
from pages.shared.text import t

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from glm_core.checkpoints import CheckpointInfo
    from glm_core.finetune.audit import Audit
    from glm_core.finetune.examples import Columns, Example, Problem
    from glm_core.tokenizers.base import Tokenizer
    from pages.shared.finetune_data import Chosen

AT_ONCE_BYTES = (
    3_000_000  # 20,000 comments are 1.5 MB and take 0.8 s; larger files are read in the background
)
AT_ONCE_SHEET_BYTES = 600_000  # a spreadsheet is packed
KEPT = 3  # data sets read and counted
MULTIPLE = 8  # of tokens, which a batch is padded to


@dataclass(frozen=True)
class Prepared:
    """The rows read, split, encoded and looked at.

    source, target   tokens that the training rows need, sorted
    needed           the same row by row
    problems         all that was found in the files, and what prevented the split
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    problems: tuple[Problem, ...]
    columns: Columns | None
    audit: Audit
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    needed: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
    tokenizer: Tokenizer
    tokenizer_name: str
    context: int

    @property
    def history(self) -> bool:
        return bool(self.columns and self.columns.history)

    def limits(self) -> tuple[int, int]:
        """(longest prompt, longest answer) that cut fewer than one row of a hundred, rounded up to a multiple of 8.

        What a rounding adds costs nothing, since batches are padded to it; both fit into the context together.
        """
        found = []
        for needed in (self.source, self.target):
            fits = int(needed[-(-len(needed) * 99 // 100) - 1]) if len(needed) else 64
            found.append(max(16, -(-fits // MULTIPLE) * MULTIPLE))
        source, target = found
        target = min(target, self.context // 2)
        return min(source, self.context - target - 1), target

    def longest(self, limits: tuple[int, int]) -> tuple[int, int]:
        """Tokens of the longest row and of the longest answer, end tokens included, as the limits leave them."""
        import numpy as np

        source, target = (np.minimum(one, limit) for one, limit in zip(self.needed, limits, strict=True))
        return (int((source + target).max()) + 1, int(target.max()) + 1) if len(source) else (1, 1)

    @staticmethod
    def cut(needed: npt.NDArray[np.int32], limit: int) -> int:
        """Rows longer than a limit."""
        import numpy as np

        return int(len(needed) - np.searchsorted(needed, limit, side="right"))


class Preparing(Background):
    """The data sets looked at last, and the one that is being read; shared by all sessions."""

    def __init__(self) -> None:
        super().__init__("glm-finetune-data")
        self.done, self.total = 0, 0  # rows encoded
        self._found: dict[tuple[Any, ...], Prepared] = {}
        self._failed: dict[tuple[Any, ...], GLMError] = {}

    def get(self, key: tuple[Any, ...]) -> Prepared | None:
        """What was found, or None; the GLMError that it ended with is raised."""
        if key in self._failed:
            raise self._failed.pop(key)
        return self._found.get(key)

    def now(self, key: tuple[Any, ...], chosen: Chosen, base: CheckpointInfo) -> Prepared:
        """Read and look at once."""
        found = _prepare(chosen, base, self._progress)
        self._found[key] = found
        while len(self._found) > KEPT:
            del self._found[next(iter(self._found))]
        return found

    def later(self, key: tuple[Any, ...], chosen: Chosen, base: CheckpointInfo) -> None:
        """Begin to, where nothing else is being read."""

        def work() -> None:
            try:
                self.now(key, chosen, base)
            except GLMError as error:
                self._failed[key] = error

        def failed(reason: str) -> GLMError:
            self._failed[key] = GLMError(
                f"The rows could not be read: {reason}.", "The terminal shows where; try a smaller file."
            )
            return self._failed[key]

        self.begin(lambda: self._progress(0, 0), work, failed)

    def _progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total


@st.cache_resource(show_spinner=False)
def preparing() -> Preparing:
    """The one look at training data in progress."""
    return Preparing()


def prepared(chosen: Chosen, base: CheckpointInfo) -> Prepared | None:
    """The rows of a choice; None while they are still being read, or where they cannot be."""
    key = (*chosen.key, str(base.path), base.generation)
    work = preparing()
    try:
        found = work.get(key)
        if found is not None:
            return found
        size = chosen.file.path.stat().st_size + (chosen.dev.path.stat().st_size if chosen.dev else 0)
        packed = chosen.file.path.suffix.lower() in (".xlsx", ".xls", ".parquet")
        if size <= (AT_ONCE_SHEET_BYTES if packed else AT_ONCE_BYTES):
            with st.spinner(t("Reading and counting the rows …", "正在读取并统计各行……")):
                return work.now(key, chosen, base)
    except GLMError as error:
        with st.container(border=True, key="finetune_audit"):
            panels.problem(error)
        return None
    with st.container(border=True, key="finetune_audit"):
        _wait(key, chosen, base)
    return None


@live(run_every=0.5)
def _wait(key: tuple[Any, ...], chosen: Chosen, base: CheckpointInfo) -> None:
    work = preparing()
    if key in work._found or key in work._failed:
        st.rerun()
    if not work.busy:
        work.later(key, chosen, base)
    st.markdown(
        f"**:material/progress_activity: {t('Reading and counting the rows …', '正在读取并统计各行……')}**"
    )
    st.progress(min(1.0, work.done / work.total) if work.total else 0.0)
    st.caption(
        t(f"{work.done:,} of {work.total:,} rows counted", f"已统计 {work.done:,} / {work.total:,} 行")
        if work.total
        else t("Reading the file …", "正在读取文件……")
    )


@st.cache_resource(max_entries=4, show_spinner=False)
def _tokenizer(path: Path, generation: str) -> Tokenizer:
    from glm_core import checkpoints

    return checkpoints.load_tokenizer(path, generation)


def _prepare(chosen: Chosen, base: CheckpointInfo, progress: Any) -> Prepared:
    """As the training itself will: the same rows, the same split, the same tokens, only with nothing cut yet."""
    import numpy as np

    from glm_core.finetune.audit import audit
    from glm_core.finetune.encoding import encode_all
    from glm_core.finetune.examples import Problem
    from glm_core.finetune.split import split

    tokenizer = _tokenizer(base.path, base.generation)
    loaded, loaded_dev = finetune_data.read(chosen)
    problems = [*loaded.problems, *(loaded_dev.problems if loaded_dev else ())]
    train, dev = loaded.examples, loaded_dev.examples if loaded_dev else ()
    if loaded_dev is None and chosen.dev_share and train:
        try:
            parts = split(train, chosen.dev_share)
        except GLMError as error:
            problems.append(Problem("stop", error.message, error.todo))
        else:
            train, dev = tuple(train[i] for i in parts.train), tuple(train[i] for i in parts.dev)
    history = bool(loaded.columns and loaded.columns.history)
    context = base.context or 2048
    encoded = encode_all(train, tokenizer, context, context, history_column=history, progress=progress)
    encoded_dev = encode_all(dev, tokenizer, context, context, history_column=history)
    found = audit(train, dev, encoded, encoded_dev)
    needed = (encoded.source_needed, encoded.target_needed)
    # The whole file was looked at already; what is longer than the context is said where the limits are chosen.
    said = {_kind_of(problem) for problem in problems} | {"The limit"}
    problems += [one for one in found.findings if _kind_of(one) not in said]
    return Prepared(
        train=train, dev=dev, problems=tuple(problems), columns=loaded.columns, audit=found,
        source=np.sort(needed[0]), target=np.sort(needed[1]), needed=needed, tokenizer=tokenizer,
        tokenizer_name=base.name, context=context,
    )  # fmt: skip


def _kind_of(problem: Problem) -> str:
    """The first words of a finding, which it shares with one of the same kind on other rows."""
    return " ".join(problem.message.split()[:2])
