"""All commands and their options; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from .output import PROGRAM

# int4-g32 and so on: INT4 with a scale for so many columns
STORED = ("fp32", "bf16", "fp16", "int8", "int4", "int4-g32", "int4-g64", "int4-g128")
PRECISIONS = (*STORED, "int8-dynamic")
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
FORMATS: dict[str, Literal["csv", "xlsx", "jsonl", "parquet"]] = {
    ".csv": "csv",
    ".xlsx": "xlsx",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}


def parser() -> argparse.ArgumentParser:
    """All commands and their options; imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Talk to a GLM, label a table with it, see what is there. Nothing leaves this machine, unless --model names a server.",
        epilog="Exit status: 0 done, 1 a problem, 2 wrong usage, 3 some rows failed, 130 interrupted.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"GLM Workbench {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = _command(commands, "chat", "talk to a model", "Type clear to start over and stop to end.")
    _model_options(one)
    _sampling_options(one, "as the checkpoint says")
    one.add_argument("--prompt", type=_text, metavar="TEXT", help="answer this one question and end")

    one = _command(
        commands,
        "batch",
        "one answer per row of a table",
        "Finished rows are kept whatever happens: the same command goes on where it was stopped, and writes "
        "the file again once all rows are done.",
    )
    one.add_argument("file", type=Path, metavar="FILE", help="csv, tsv, xlsx, xls, json, jsonl or parquet")
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("--column", type=_text, help="the cells of this column are the prompts")
    which.add_argument("--prompt", type=_text, metavar="TEMPLATE", help='such as "Translate: {comment}"')
    one.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"where to: {', '.join(FORMATS)}"
    )
    one.add_argument("--output-column", type=_text, default="answer", metavar="NAME", help="default: answer")
    _model_options(one)
    _cluster_options(one)
    _sampling_options(one, "greedy")
    one.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    one.add_argument("--sheet", help="sheet of a workbook; default: the first")
    one.add_argument("--encoding", help="such as utf-8 or gb18030; default: found out")
    one.add_argument("--delimiter", type=_delimiter, help="one character, or tab; default: found out")
    one.add_argument("--on-bad-rows", choices=("stop", "skip", "join"), default="stop", help="default: stop")
    one.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    one.add_argument("--retry-failed", action="store_true", help="answer a finished job's failed rows anew")
    one.add_argument("--no-guard", action="store_true", help="CSV for machines: leave = + - @ as they are")
    _owner_option(one)

    _classify(commands)
    one = _command(
        commands, "models", "the checkpoints on this machine", "Without a word more it lists them."
    )
    one.add_argument("--json", action="store_true", help="for programs")
    does = one.add_subparsers(dest="does", metavar="inspect | convert | merge | export")
    two = _command(does, "inspect", "what a folder holds, and the memory it will take", "")
    two.add_argument("folder", type=Path, metavar="FOLDER")
    two.add_argument("--json", action="store_true", help="for programs")
    for name, help_, more in (
        (
            "convert",
            "rewrite a checkpoint",
            "As INT8 or INT4, in another precision, or for plain transformers.",
        ),
        ("merge", "add a LoRA adapter to its base's weights", ""),
        ("export", "write a P-tuning v2 prefix alone", ""),
    ):
        two = _command(does, name, help_, more)
        two.add_argument("folder", type=Path, metavar="FOLDER")
        two.add_argument("out", type=Path, metavar="OUT", help="a new folder")
        if name == "merge":
            two.add_argument("--base", type=Path, metavar="FOLDER", help="default: what the adapter names")
        if name == "convert":
            two.add_argument(
                "--to", choices=("released", "glm"), default="released",
                help="the layout: as published (default), or transformers' own glm",
            )  # fmt: skip
        if name != "export":
            two.add_argument("--precision", choices=STORED, default="bf16", help="default: bf16")

    _finetune(commands)
    _evaluate(commands)
    _memory(commands)
    _serve(commands)
    _users(commands)
    _remotes(commands)
    one = _command(commands, "doctor", "what is installed, what is missing, how to get it", "")
    one.add_argument("--json", action="store_true", help="for programs")
    return top


def _finetune(commands: Any) -> None:
    """The flags of the published ptuning scripts, so that a tutorial's command works; their defaults, where sane."""
    one = _command(
        commands, "finetune", "fine-tune a checkpoint",
        "The flags are those of the ptuning scripts of ChatGLM-6B and ChatGLM2-6B.",
    )  # fmt: skip
    does = one.add_argument_group("what to do")
    does.add_argument("--do_train", action="store_true")
    does.add_argument(
        "--do_predict", action="store_true", help="answer a labelled file and score the answers"
    )
    does.add_argument("--do_eval", action="store_true", help="accepted; the dev loss is always shown")
    does.add_argument("--output_dir", required=True, metavar="FOLDER")
    does.add_argument("--overwrite_output_dir", action="store_true", help="else an interrupted run goes on")
    data = one.add_argument_group("data")
    for name in ("train_file", "validation_file", "test_file"):
        data.add_argument(f"--{name}", metavar="FILE")
    for name in ("prompt_column", "response_column", "history_column"):
        data.add_argument(f"--{name}", metavar="NAME", help="default: found out")
    data.add_argument(
        "--source_prefix", type=_text, default="", metavar="TEXT", help="put before every prompt"
    )
    data.add_argument(
        "--max_source_length", type=_positive, default=64, metavar="N", help="tokens; default: 64"
    )
    data.add_argument(
        "--max_target_length", type=_positive, default=64, metavar="N", help="tokens; default: 64"
    )
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        data.add_argument(f"--{name}", type=_positive, metavar="N")
    data.add_argument(
        "--dev_share", type=float, default=0.0, metavar="X",
        help="of the training rows held back to measure with, where there is no --validation_file; default: 0",
    )  # fmt: skip
    data.add_argument(
        "--general_share", type=float, default=0.0, metavar="X",
        help="general conversations mixed in for every row, so that less is forgotten; default: 0",
    )  # fmt: skip
    data.add_argument("--general_file", metavar="FILE", help="where they are; default: those that come along")
    data.add_argument("--adapt_file", metavar="FILE", help="unlabelled texts to read before the rows")
    data.add_argument("--adapt_column", default="", metavar="NAME", help="their column")
    data.add_argument("--adapt_length", type=_positive, default=128, metavar="N", help="tokens; default: 128")
    data.add_argument("--adapt_epochs", type=float, default=1.0, metavar="X", help="default: 1")
    data.add_argument("--adapt_learning_rate", type=float, metavar="X", help="default: that of the rows")
    data.add_argument("--adapt_compare", action="store_true", help="also train without them")
    data.add_argument("--overwrite_cache", action="store_true", help="encode the rows anew")
    data.add_argument("--preprocessing_num_workers", type=int, metavar="N", help="accepted; not needed")
    model = one.add_argument_group("model and method")
    model.add_argument("--model_name_or_path", metavar="PATH", help="default: the embedded model")
    model.add_argument("--pre_seq_len", type=_positive, metavar="N", help="P-tuning v2 with so many columns")
    model.add_argument("--prefix_projection", action="store_true")
    model.add_argument("--lora_rank", type=_positive, metavar="N", help="LoRA")
    model.add_argument("--lora_alpha", type=float, default=32.0, metavar="A", help="default: 32")
    model.add_argument("--lora_dropout", type=float, default=0.1, metavar="P", help="default: 0.1")
    model.add_argument("--freeze_layers", type=_positive, metavar="N", help="train the last N layers' MLPs")
    model.add_argument(
        "--ptuning_checkpoint", metavar="FOLDER", help="an adapter to go on from, or to predict with"
    )
    model.add_argument("--quantization_bit", type=int, choices=(4, 8))
    model.add_argument(
        "--quantization_group", type=int, choices=(32, 64, 128),
        help="of --quantization_bit 4: columns that share a scale; default: all of a row",
    )  # fmt: skip
    model.add_argument("--fp16", action="store_true")
    model.add_argument("--bf16", action="store_true")
    model.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    loop = one.add_argument_group("training")
    loop.add_argument("--per_device_train_batch_size", type=_positive, default=1, metavar="N")
    loop.add_argument("--per_device_eval_batch_size", type=_positive, default=1, metavar="N", help="accepted")
    loop.add_argument("--gradient_accumulation_steps", type=_positive, default=16, metavar="N")
    loop.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    loop.add_argument("--predict_with_generate", action="store_true", help="accepted; always so")
    loop.add_argument("--max_steps", type=_positive, default=3000, metavar="N", help="default: 3000")
    loop.add_argument("--logging_steps", type=_positive, default=10, metavar="N")
    loop.add_argument("--save_steps", type=_positive, default=1000, metavar="N")
    loop.add_argument("--save_total_limit", type=_positive, default=3, metavar="N")
    loop.add_argument("--learning_rate", type=float, metavar="R", help="default: by the method")
    loop.add_argument("--warmup_steps", type=int, default=0, metavar="N")
    loop.add_argument("--lr_scheduler_type", choices=("linear", "cosine", "constant"), default="linear")
    loop.add_argument("--weight_decay", type=float, default=0.0, metavar="W")
    loop.add_argument("--max_grad_norm", type=float, default=1.0, metavar="N")
    loop.add_argument("--seed", type=int, default=42)


def _evaluate(commands: Any) -> None:
    one = _command(
        commands, "evaluate", "score a checkpoint, or predictions, on a labelled file",
        "Finished rows are kept whatever happens: the same command goes on where it was stopped.",
    )  # fmt: skip
    one.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a labelled table")
    one.add_argument(
        "--predictions", type=Path, metavar="FILE",
        help="score these instead: {labels, predict} lines, or a table with two such columns",
    )  # fmt: skip
    one.add_argument("--list", action="store_true", help="the runs there are")
    one.add_argument("--json", action="store_true", help="for programs")
    one.add_argument("--out", type=Path, metavar="DIR", help="write scores, rows and manifest into a folder")
    one.add_argument("--title", type=_text, default="", metavar="TEXT", help="name of the run")
    one.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    task = one.add_argument_group("task")
    task.add_argument("--kind", choices=("text", "label", "choice", "number"), help="default: found out")
    task.add_argument(
        "--method", choices=("generate", "likelihood", "chain"),
        help="generate an answer, take the likeliest of those possible, or think first; default: by the kind",
    )  # fmt: skip
    for name, what in (
        ("prompt", "the question"), ("response", "the correct answer"), ("prediction", "what was predicted"),
    ):  # fmt: skip
        task.add_argument(
            f"--{name}_column", f"--{name}-column", type=_text, default="", metavar="NAME",
            help=f"{what}; default: found out",
        )  # fmt: skip
    task.add_argument("--labels", type=_text, default="", metavar="A,B", help="default: those of the file")
    task.add_argument(
        "--template", type=_text, default="", metavar="TEXT", help="such as 'Translate: {text}'"
    )
    task.add_argument(
        "--few-shot", type=int, default=0, metavar="N", help="solved examples before a question"
    )
    task.add_argument("--few-shot-file", type=Path, metavar="FILE", help="default: the first rows of FILE")
    task.add_argument("--metrics", type=_text, default="", metavar="A,B", help="default: all of the kind")
    _model_options(one)
    _sampling_options(one, "greedy")
    one.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    one.add_argument("--sheet", help="sheet of a workbook; default: the first")
    one.add_argument("--encoding", help="such as utf-8 or gb18030; default: found out")
    one.add_argument("--delimiter", type=_delimiter, help="one character, or tab; default: found out")
    one.add_argument("--on-bad-rows", choices=("stop", "skip", "join"), default="stop", help="default: stop")
    _owner_option(one)

    one = _command(
        commands, "compare", "which of two runs is better, and whether that is certain",
        "Differences are those of RUN_B to RUN_A.",
    )  # fmt: skip
    one.add_argument("runs", nargs="+", metavar="RUN", help="two to four runs, by id or by name")
    one.add_argument("--metric", type=_text, default="", metavar="NAME", help="decides; default: by the kind")
    one.add_argument(
        "--delta", type=float, default=1.0, metavar="POINTS", help="what counts as no difference; default: 1"
    )
    one.add_argument("--json", action="store_true", help="for programs")
    one.add_argument("--html", type=Path, metavar="FILE", help="write a report that opens offline")


def _memory(commands: Any) -> None:
    one = _command(
        commands, "memory", "the memory a model takes at every precision, predicted or measured",
        "A prediction needs no weights: a built-in shape or a folder with a config.json is enough.",
    )  # fmt: skip
    one.add_argument(
        "--model", "--checkpoint", metavar="NAME",
        help="chatglm-6b, chatglm2-6b, chatglm3-6b, glm-4-9b, a folder or a checkpoint's name; default: the embedded model",
    )  # fmt: skip
    one.add_argument("--base", metavar="PATH", help="the checkpoint under an adapter that is measured")
    _owner_option(one)
    one.add_argument("--precision", type=_names, default=(), metavar="A,B", help="default: all")
    one.add_argument(
        "--context", type=_counts, default=(), metavar="N,M", help="tokens of a row; default: 2048"
    )
    one.add_argument("--batch", type=_counts, default=(), metavar="N,M", help="rows at a time; default: 1")
    one.add_argument(
        "--train", choices=("lora", "p-tuning-v2", "freeze", "full"), help="of a training instead of answers"
    )
    one.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                     help="a prediction needs none of it; default: cpu")  # fmt: skip
    one.add_argument("--card", type=float, metavar="GB", help="say what fits into so much")
    one.add_argument("--json", action="store_true", help="for programs")
    one.add_argument(
        "--measure", action="store_true",
        help="load it at every level, answer, and say what that took; a durable job that goes on where it was stopped",
    )  # fmt: skip
    one.add_argument("--restart", action="store_true", help="measure anew")
    one.add_argument("--retry-failed", action="store_true", help="measure the failed levels anew")


def _serve(commands: Any) -> None:
    one = _command(
        commands, "serve", "the model over HTTP",
        "POST / as in api.py of ChatGLM-6B, the OpenAI protocol under /v1, labels at /v1/classify; see /docs. "
        "Ctrl-C ends it.",
    )  # fmt: skip
    one.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="default: 127.0.0.1, this machine only"
    )
    one.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    one.add_argument(
        "--concurrency",
        type=_positive,
        default=32,
        metavar="N",
        help="answers computed together; default: 32",
    )
    one.add_argument(
        "--queue", type=int, default=64, metavar="N",
        help="requests that may wait, more are refused with 429; default: 64",
    )  # fmt: skip
    one.add_argument(
        "--max-request-bytes", type=_positive, default=4 << 20, metavar="N", help="default: 4,194,304"
    )
    one.add_argument(
        "--cors", type=_text, action="append", metavar="ORIGIN",
        help="pages of this origin may ask, such as http://localhost:3000; may repeat; default: none",
    )  # fmt: skip
    one.add_argument(
        "--api-keys", type=_text, nargs="?", const="", metavar="FILE",
        help="ask for a key whose hash is in this file; without FILE the workspace's api_keys.txt",
    )  # fmt: skip
    one.add_argument(
        "--new-key", type=_text, nargs="?", const="", metavar="NAME",
        help="make a key, print it once, add its hash to the file, and end",
    )  # fmt: skip
    group = one.add_argument_group("model")
    group.add_argument(
        "--model", "--checkpoint", metavar="PATH", help="folder or name; default: the embedded model"
    )
    group.add_argument("--adapter", metavar="PATH", help="LoRA or P-tuning v2 on top of it")
    group.add_argument(
        "--base", metavar="PATH", help="the checkpoint under --model, where that is an adapter"
    )
    group.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def _classify(commands: Any) -> None:
    one = _command(
        commands, "classify", "one label of a set per row of a table, with its probability",
        "Finished rows are kept whatever happens: the same command goes on where it was stopped.",
    )  # fmt: skip
    one.add_argument("file", type=Path, metavar="FILE", help="csv, tsv, xlsx, xls, json, jsonl or parquet")
    one.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"where to: {', '.join(FORMATS)}"
    )
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("--column", type=_text, help="the texts")
    which.add_argument(
        "--template",
        type=_text,
        help='the whole question, such as "{content}" for a checkpoint fine-tuned so',
    )
    one.add_argument(
        "--labels", type=_text, default="正常,垃圾", metavar="A,B",
        help='default: 正常,垃圾; "0=正常,1=垃圾" where data and model have different words',
    )  # fmt: skip
    one.add_argument("--instruction", type=_text, metavar="TEXT", help="put first; default: by the labels")
    one.add_argument("--positive", type=_text, default="", metavar="LABEL", help="default: the second of two")
    one.add_argument("--threshold", type=float, metavar="P", help="probability that makes a row positive")
    one.add_argument(
        "--abstain-below", type=float, default=0.0, metavar="P", help="less sure rows are to be reviewed"
    )
    one.add_argument(
        "--content-free", action="store_true", help="take away what the question says without a text"
    )
    one.add_argument("--gold", type=_text, metavar="COLUMN", help="the correct labels, to score against")
    one.add_argument(
        "--gold-value", type=_text, action="append", metavar="VALUE=LABEL",
        help="what a value of that column means; may repeat",
    )  # fmt: skip
    one.add_argument("--output-column", type=_text, default="label", metavar="NAME", help="default: label")
    one.add_argument("--json", action="store_true", help="for programs")
    _model_options(one)
    _cluster_options(one)
    one.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    one.add_argument("--sheet", help="sheet of a workbook; default: the first")
    one.add_argument("--encoding", help="such as utf-8 or gb18030; default: found out")
    one.add_argument("--delimiter", type=_delimiter, help="one character, or tab; default: found out")
    one.add_argument("--on-bad-rows", choices=("stop", "skip", "join"), default="stop", help="default: stop")
    one.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    one.add_argument("--retry-failed", action="store_true", help="label a finished job's failed rows anew")
    one.add_argument("--no-guard", action="store_true", help="CSV for machines: leave = + - @ as they are")
    _owner_option(one)


def _users(commands: Any) -> None:
    one = _command(
        commands, "users", "who may log in to the pages of this workspace",
        "As soon as there is one, every page asks for a name and a password.",
    )  # fmt: skip
    does = one.add_subparsers(dest="does", required=True, metavar="add | list | remove | passwd")
    for name, what in (
        ("add", "add a user; the password is typed, or the first line of standard input"),
        ("passwd", "give a user another password"),
        ("remove", "take a user away; what the user made stays, seen by administrators"),
    ):
        two = _command(does, name, what, "")
        two.add_argument("name", type=_text, metavar="NAME")
        if name == "add":
            two.add_argument(
                "--admin", action="store_true",
                help="sees the whole queue, changes the model, trains, opens files by path",
            )  # fmt: skip
        if name == "remove":
            two.add_argument("--data", action="store_true", help="delete what the user made as well")
    two = _command(does, "list", "who there is", "")
    two.add_argument("--json", action="store_true", help="for programs")


def _remotes(commands: Any) -> None:
    one = _command(
        commands, "remotes", "models on servers that speak the OpenAI protocol",
        "Without a word more it lists them. A key is never stored: only the name of the variable that holds it.",
    )  # fmt: skip
    one.add_argument("--json", action="store_true", help="for programs")
    does = one.add_subparsers(dest="does", metavar="add | test | remove")
    two = _command(does, "add", "keep a server under a name", "It is tested first.")
    two.add_argument("name", type=_text, metavar="NAME")
    two.add_argument("--url", type=_text, required=True, metavar="URL", help="such as http://host:8000/v1")
    two.add_argument("--model", type=_text, default="", metavar="NAME", help="default: the only one there is")
    two.add_argument(
        "--key-env", metavar="NAME", help="variable or secret with the key; default: GLM_REMOTE_KEY"
    )
    two.add_argument("--concurrency", type=_positive, metavar="N", help="requests at a time; default: 16")
    two.add_argument("--tries", type=_positive, metavar="N", help="per row; default: 6")
    two.add_argument("--timeout", type=float, metavar="S", help="seconds for an answer; default: 300")
    two.add_argument(
        "--patience", type=float, metavar="S", help="seconds for a server that is gone; default: 300"
    )
    two.add_argument("--replace", action="store_true", help="where the name is in use")
    two.add_argument("--no-test", action="store_true", help="the server need not be there now")
    two = _command(does, "test", "what a server can do", "")
    two.add_argument("name", type=_text, metavar="NAME", help="or an address: http://host:8000/v1#model")
    two.add_argument("--key-env", metavar="NAME", help="default: GLM_REMOTE_KEY")
    two.add_argument("--json", action="store_true", help="for programs")
    two = _command(does, "remove", "forget a server", "Its jobs keep what they have.")
    two.add_argument("name", type=_text, metavar="NAME")


def _owner_option(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--owner", type=_text, default="", metavar="NAME",
        help="the user who is to see the job on the pages, where there are users",
    )  # fmt: skip


def _command(commands: Any, name: str, does: str, more: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=does, description=f"{does[0].upper()}{does[1:]}. {more}", allow_abbrev=False
    )
    return made


def _model_options(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("model")
    group.add_argument(
        "--model", "--checkpoint", metavar="PATH", help="folder or name; default: the embedded model"
    )
    group.add_argument(
        "--base", metavar="PATH", help="the checkpoint under an adapter; default: what it names"
    )
    group.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    group.add_argument("--system", type=_text, default="", metavar="TEXT", help="the system prompt")
    group = one.add_argument_group(
        "a model on a server",
        "--model remote:NAME, or --model http://host:8000/v1#model; texts are sent there",
    )
    group.add_argument(
        "--key-env", metavar="NAME",
        help="environment variable or Streamlit secret with the key; default: GLM_REMOTE_KEY",
    )  # fmt: skip
    group.add_argument(
        "--concurrency", type=_positive, metavar="N", help="requests on their way at a time; default: 16"
    )


def _cluster_options(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group(
        "where",
        "one worker per GPU or per share of processors; checkpoint and packages have to be on every node",
    )
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this process (default), or Ray"
    )
    group.add_argument(
        "--address", type=_text, metavar="HOST:PORT",
        help="a Ray cluster that runs; default: one of its own on this machine, which ends with the job",
    )  # fmt: skip
    group.add_argument("--workers", type=_positive, metavar="N", help="default: as many as fit")
    group.add_argument("--cpus-per-worker", type=float, metavar="N", help="default: an equal share")


def _sampling_options(one: argparse.ArgumentParser, default: str) -> None:
    group = one.add_argument_group("answers", f"default: {default}")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0: the likeliest answer, always the same"
    )
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, help="same seed, same sampled answer")
    group.add_argument(
        "--stop", type=_text, action="append", metavar="TEXT", help="ends the answer; may repeat"
    )


def _text(value: str) -> str:
    """An argument as Unicode; bytes that are none become U+FFFD instead of an error in the tokenizer."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _positive(value: str) -> int:
    if (number := int(value)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _names(value: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in value.split(",") if one.strip())


def _counts(value: str) -> tuple[int, ...]:
    return tuple(_positive(one) for one in _names(value))


def _delimiter(value: str) -> str:
    return {"tab": "\t", "\\t": "\t"}.get(value, value)
