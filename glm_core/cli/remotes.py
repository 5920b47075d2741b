"""python -m glm_core remotes: servers that speak the OpenAI protocol, as models under names."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ..errors import GLMError
from .output import json_text, printable, say, width

if TYPE_CHECKING:
    from ..remote import Report

LABELS = {
    "classify": "exact, by /v1/classify",
    "echo": "exact, by log-probabilities of the labels",
    "first": "by the likeliest first tokens",
    "greedy": "none: only the label that is written",
}


def remotes(options: argparse.Namespace) -> int:
    """List the servers, or add, test or remove one."""
    if options.does == "add":
        return _add(options)
    if options.does == "test":
        return _test(options)
    if options.does == "remove":
        from .. import remote

        remote.remove(options.name)
        say(f"{options.name} is forgotten.")
        return 0
    return _list(options.json)


def _list(as_json: bool) -> int:
    from .. import remote

    found = remote.known()
    if as_json:
        print(json_text([asdict(one) for one in found]))
        return 0
    for one in found:
        name = printable(one.name)
        print(f"{name}{' ' * max(1, 20 - width(name))}{one.model}  {one.url}  key: {one.key_env}")
    if not found:
        say("There are none yet: remotes add NAME --url http://host:8000/v1")
    return 0


def _add(options: argparse.Namespace) -> int:
    from .. import remote
    from ..remote.remotes import address

    if not options.no_test or options.model:
        given = {
            "key_env": options.key_env, "concurrency": options.concurrency, "tries": options.tries,
            "timeout_s": options.timeout, "patience_s": options.patience,
        }  # fmt: skip
        wanted = remote.Remote(
            "", address(options.url), options.model, **{k: v for k, v in given.items() if v is not None}
        )
    else:
        raise GLMError("The model has no name.", "Name it with --model, or leave out --no-test.")
    replace(wanted, model=wanted.model or "any").check()
    if not options.no_test:
        report = remote.test(wanted)
        wanted = replace(wanted, model=report.model)
        _print(report)
    kept = remote.add(replace(wanted, name=options.name), options.replace)
    say(f"Kept: --model remote:{kept.name}")
    return 0


def _test(options: argparse.Namespace) -> int:
    from .. import remote

    spec = options.name if remote.is_remote(options.name) else f"remote:{options.name}"
    report = remote.test(remote.find(spec, options.key_env or ""))
    if options.json:
        print(json_text(report.to_json()))
    else:
        _print(report)
    return 0 if report.chat else 1


def _print(report: Report) -> None:
    first = "" if report.first_token_s is None else f", first piece after {report.first_token_s:.2f} s"
    lines = {
        "model": f"{report.model} ({report.reported or 'no other name'}) at {report.url}",
        "server": report.server + (f", {report.context:,} tokens of context" if report.context else ""),
        "latency": f"{1000 * report.latency_s:.0f} ms",
        "chat": "yes" if report.chat else "no",
        "stream": f"yes{first}" if report.stream else "no",
        "logprobs": f"yes, {report.logprobs} per token" if report.logprobs else "no",
        "probabilities": LABELS[report.labels],
    }
    for name, text in lines.items():
        print(f"{name:14} {printable(text)}")
    for what, why in (report.problems or {}).items():
        if what in ("chat", "stream") or (what == "logprobs" and not report.logprobs):
            say(f"{what}: {why}")
