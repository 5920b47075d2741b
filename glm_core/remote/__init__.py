"""Any server that speaks the OpenAI protocol as a model: vLLM, SGLang, llama.cpp, another workbench.

remotes.py says which servers are known and where their keys are, client.py asks over HTTP and asks again where that
helps, engine.py is the engine that jobs and pages use, labels.py finds probabilities of labels, probe.py what a server
can do, work.py runs a job's rows.
"""

from __future__ import annotations

from .client import KeyRefused, Refused, Unavailable
from .engine import RemoteEngine, connect, info_of
from .probe import Report, test
from .remotes import (
    DEFAULT_KEY,
    Remote,
    add,
    find,
    is_remote,
    known,
    named,
    remove,
    shown,
)
from .work import refuse_where_changed, with_remote

__all__ = [
    "DEFAULT_KEY",
    "KeyRefused",
    "Refused",
    "Remote",
    "RemoteEngine",
    "Report",
    "Unavailable",
    "add",
    "connect",
    "find",
    "info_of",
    "is_remote",
    "known",
    "named",
    "refuse_where_changed",
    "remove",
    "shown",
    "test",
    "with_remote",
]
