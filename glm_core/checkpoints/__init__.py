"""Find, inspect, load, save and convert checkpoints; nothing in a checkpoint folder is ever executed."""

from .inspecting import (
    BYTES,
    PRECISIONS,
    CheckpointInfo,
    Precision,
    find,
    fingerprint,
    inspect,
    read_config,
)
from .loading import (
    LoadedModel,
    LoadReport,
    Progress,
    base_of,
    best_device,
    best_precision,
    defaults,
    load,
    load_tokenizer,
    release,
)
from .saving import convert, convert_to_glm, export, merge, save

__all__ = [
    "BYTES",
    "PRECISIONS",
    "CheckpointInfo",
    "LoadReport",
    "LoadedModel",
    "Precision",
    "Progress",
    "base_of",
    "best_device",
    "best_precision",
    "convert",
    "convert_to_glm",
    "defaults",
    "export",
    "find",
    "fingerprint",
    "inspect",
    "load",
    "load_tokenizer",
    "merge",
    "read_config",
    "release",
    "save",
]
