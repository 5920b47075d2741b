"""The Chinese catalogue: it knows every sentence of the program, keeps what is put in, and reaches the screen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from glm_core.errors import GLMError
from glm_core.tables import sniffing
from pages.shared.chinese import SENTENCES, SHAPES, WORDS, fields, translated

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {"GLMError", "TableError", "EngineBusy", "JobLost", "_Wrong"}
# Folders and files of glm_core that are shown by the shell alone.
TERMINAL_ONLY = {"cli", "server", "doctor.py", "__main__.py"}
# Lines of the shell, and a question to the model.
NEVER_ON_SCREEN = {
    "{}: {}.", "Dev loss {}, of the base {}.", "Measured in {} s; at most {} MB of memory in use.",
    "Which of these labels fits the text below: {}? Answer with the label only.",
}  # fmt: skip
LEAST_LITERAL = 9  # characters that make a template recognisable where its parts are written out
TO_THE_MODEL = {"PROBES", "ALPACA_HEAD", "VICUNA_HEAD"}  # constants that are put into prompts, never shown
ALL = SENTENCES | WORDS
FILLED_LATER = re.compile(r"\{(rows|lines|cells|where)\}")  # constants that tables fill in with str.format


def modules() -> list[Path]:
    core = [
        path
        for path in (ROOT / "glm_core").rglob("*.py")
        if TERMINAL_ONLY.isdisjoint(path.relative_to(ROOT).parts) and "minimodel" not in path.parts
    ]
    return sorted([*core, ROOT / "Home.py", *(ROOT / "pages").rglob("*.py")])


def parsed(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def templates(node: ast.AST) -> list[str]:
    """What a text in the source can become, with {} for each part; nothing where it comes from elsewhere."""
    if isinstance(node, ast.Constant):
        return [FILLED_LATER.sub("\0", node.value).replace("{", "{{").replace("}", "}}").replace("\0", "{}")]
    if isinstance(node, ast.IfExp):
        return templates(node.body) + templates(node.orelse)
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for value in node.values:
            if isinstance(value, ast.Constant):
                ends = templates(value)
            elif isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.IfExp):
                both = (value.value.body, value.value.orelse)
                ends = [text for one in both for text in (templates(one) if is_text(one) else ["{}"])]
            else:
                ends = ["{}"]
            found = [begin + end for begin in found for end in ends]
        return found
    if isinstance(node, ast.Name):
        return [text for value in values_of(node) for text in templates(value)]
    return []


def values_of(name: ast.Name) -> Iterator[ast.expr]:
    """What is assigned to a name, in the function it is used in, else in the module."""
    scope: ast.AST = name
    while scope := getattr(scope, "parent", None):  # type: ignore[assignment]
        if isinstance(scope, ast.FunctionDef | ast.Module):
            found = [
                node.value
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign)
                and any(isinstance(target, ast.Name) and target.id == name.id for target in node.targets)
            ]
            if found:
                yield from found
                return


def to_the_model(node: ast.AST) -> bool:
    """Whether a text stands in one of the constants that are written for the model."""
    while node := getattr(node, "parent", None):  # type: ignore[assignment]
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return any(isinstance(target, ast.Name) and target.id in TO_THE_MODEL for target in targets)
    return False


def raised() -> Iterator[tuple[str, str]]:
    """(where, template) of every message and every todo."""
    for path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)][:2]
                for text in (text for one in arguments for text in templates(one) if text):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def spoken() -> Iterator[tuple[str, str]]:
    """(where, template) of everything else in glm_core that reads like a sentence: warnings, notes, job messages."""
    for path in modules():
        if path.is_relative_to(ROOT / "pages") or path.name == "Home.py":
            continue
        for node in ast.walk(parsed(path)):
            parent = getattr(node, "parent", None)
            if (
                not is_text(node)
                or isinstance(parent, ast.Expr | ast.JoinedStr | ast.List)
                or to_the_model(node)
            ):
                continue
            for text in templates(node):
                if re.match(r"[A-Z{]", text) and " " in text and re.search(r"[a-z)}]\.$", text):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def parts(template: str) -> list[str]:
    return [name for _, name, _ in fields(template) if name is not None]


def has_chinese(template: str) -> bool:
    """Whether a template is in the catalogue, or is with its parts written out: "became NaN" for "became {}"."""
    literals = template.replace("{{", "\0").replace("}}", "\1").split("{}")
    if template in ALL or max(map(len, literals)) < LEAST_LITERAL:
        return template in ALL
    expression = re.compile(".+".join(map(re.escape, literals)).replace("\0", r"\{\{").replace("\1", r"\}\}"))
    return any(expression.fullmatch(english) for english in ALL)


def test_every_error_has_its_chinese():
    found = list(raised())
    assert len(found) > 200  # the extraction itself works
    missing = [f"{where}: {text!r}" for where, text in found if not has_chinese(text)]
    assert not missing, "not in pages/shared/chinese.py:\n" + "\n".join(missing)


def test_every_warning_and_note_has_its_chinese():
    found = list(spoken())
    assert len(found) > 60
    missing = [
        f"{where}: {text!r}" for where, text in found if text not in NEVER_ON_SCREEN and not has_chinese(text)
    ]
    assert not missing, "not in pages/shared/chinese.py:\n" + "\n".join(missing)


def test_every_refused_kind_of_file_has_its_chinese():
    for _, what, todo in sniffing._REFUSED:
        assert what in WORDS
        assert todo in SENTENCES
    assert set(sniffing._NAMES.values()) <= set(WORDS)


def test_no_part_is_lost():
    for english, chinese in ALL.items():
        wanted, given = parts(english), parts(chinese)
        assert len(wanted) == len(given), english
        assert not any(wanted), english
        assert not any(given) or sorted(given) == [str(i) for i in range(len(given))], english
        assert len(SHAPES.get(english, wanted)) == len(wanted), english


def test_every_shape_is_of_a_template():
    assert set(SHAPES) <= set(ALL)


SHAPED = {
    "{} is {}.": ("top_p", "3.0"),
    "{} {}.": ("a.json", "has no key 'x'; it has y"),
    "There is no {} {}.": ("file", "/a/b.csv"),
    "The {} {} is outside the folders this workbench may read ({}).": ("folder", "/a", "/b, /c"),
    "{}: {}": ("/a", "adapter_config.json has peft_type 'IA3'."),
    "There is no {}.": ("/a/adapter_config.json",),
    "{} is missing.": ("ice_text.model",),
    "The adapter adapts {}; {} {}.": ("layer 30", "chatglm3-6b", "has 28 layers"),
    "The job is {}.": ("running",),
    "The job is {} already.": ("done",),
    "{} {} of it are not valid JSON (line {}).": ("a.jsonl is empty.", "3 lines", "2, 4, 5"),
    "{} {} tokens; there is room for {} ({} of context less {} kept for the answer).": (
        "The question takes", "9,000", "7,000", "8,192", "512",
    ),
}  # fmt: skip


def test_every_sentence_is_found_again():
    """Filled with values, alone and before another sentence, none is taken for a different one."""
    for english, chinese in SENTENCES.items():
        given = SHAPED.get(english) or tuple(f"{i}qx{i}" for i in range(len(parts(english))))
        text = english.format(*given)
        shown = translated(text)
        for value in given:
            assert "qx" not in value or value in shown, shown
        assert shown.startswith(literal(chinese)), shown
        assert not re.search("[a-z]{3,} [a-z]{2,} [a-z]", re.sub("`[^`]*`", "", shown)), shown
        if english.endswith("."):
            assert translated(f"{text} Try again in a moment.") == f"{shown}请稍后再试。"


def literal(template: str) -> str:
    return next(fields(template))[0]


EXAMPLES = [
    ("There is no folder /data/{x}/模型 1.", "没有文件夹 /data/{x}/模型 1。"),
    ("There is no folder /a. b. Check the path of the checkpoint.", "没有文件夹 /a. b。请检查检查点的路径。"),
    (
        "The template uses {txt}, but there is no such column. There are: {text}, {#2}.",
        "模板中用到了 {txt}，但表格没有这一列。现有的列：{text}, {#2}。",
    ),
    (
        "/m/x cannot be loaded. tokenizer.model is missing. model.safetensors is cut off: it has 1,000 bytes, "
        "its header promises 2,000; copy it again. Repair the folder or choose another.",
        "无法加载 /m/x。缺少 tokenizer.model。model.safetensors 不完整：实际为 1,000 字节，文件头声明为 2,000 字节；"
        "请重新复制。请修复该文件夹，或选择其他文件夹。",
    ),
    (
        "a.csv has 12 rows that do not fit the 3 columns of the header: line 2 has 4 cells, line 1,005 has text "
        "after a closing quote, and 10 more.",
        "a.csv 有 12 行与表头的 3 列不符：第 2 行有 4 个单元格，第 1,005 行在闭合引号之后还有文本，另有 10 行。",
    ),
    (
        "Left out: 12 rows with too many cells or faulty quotes (line 1, 2, 3 and 9 more).",
        "已跳过：12 行的单元格过多或引号有误（第 1, 2, 3 及其他 9 行）。",
    ),
    ("a.json has no key 'd'; it has x, y.", "a.json 没有键 'd'；现有：x, y。"),
    ("a.json has columns of different lengths (x has 3, y has 1,000).",
     "a.json 各列长度不同（x 有 3 项，y 有 1,000 项）。"),
    ("the sheet Q1 of b.xlsx is empty.", "b.xlsx 的工作表 Q1 是空的。"),
    ("running is empty.", "running 是空的。"),  # a file may be called like a word of the program
    ("There is no file /a/file.", "没有文件 /a/file。"),
    ("x.csv is a gzip archive, not a table. Unpack it first.", "x.csv 是 gzip 压缩包，不是表格。请先解压。"),
    ("x.csv could not be written: No space left on device.", "x.csv 无法写入：磁盘空间不足。"),
    ("The loaded model is in use by the job t.csv.", "已加载的模型正在被任务 t.csv 使用。"),
    (
        "Some rows were started again in a smaller batch, memory had run out.",
        "部分行：因内存不足，已改用更小的批次重新开始。",
    ),
    ("2 cells that Excel would take for a formula got a leading apostrophe.",
     "2 个单元格会被 Excel 当作公式，前面已加撇号。"),
    (
        "The disk is full. Free some space. Nothing is lost: finished rows are stored, and the job goes on from "
        "there once you resume it.",
        "磁盘已满，请清理空间。没有数据丢失：已完成的行都已保存，继续任务后会从那里接着运行。",
    ),
    (
        "a.jsonl is not valid JSON at line 3, column 7: Expecting value (after …\"a\": comes }). 3 lines of it are "
        "not valid JSON (line 3, 5, 8). Correct them, or choose to skip such rows.",
        "a.jsonl 在第 3 行第 7 列处不是有效的 JSON：缺少值（在 …\"a\": 之后是 }）。其中 3 行不是有效的 JSON"
        "（第 3, 5, 8 行）。请更正，或选择跳过这些行。",
    ),
    (
        "The model does not go onto cuda: CUDA error Choose the device cpu.",
        "模型无法放到设备 cuda 上：CUDA error。请选择设备 cpu。",
    ),
    ("There is no adapter_model.safetensors or adapter_model.bin.",
     "没有 adapter_model.safetensors 或 adapter_model.bin。"),
    (
        "The prefix was trained on a ChatGLM-6B of 28 layers, width 4096 and 32 key/value heads of 128; m is a "
        "ChatGLM2/3 of 28 layers, width 4096 and 2 key/value heads of 128. Load the base it was trained on.",
        "前缀的训练基座为 ChatGLM-6B（28 层，宽度 4096，32 个 128 维的键值头）；而 m 为 "
        "ChatGLM2/3（28 层，宽度 4096，2 个 128 维的键值头）。请加载训练时所用的基座。",
    ),
    (
        "The adapter adapts layer 29; m has 28 layers. Load the base it was trained on, THUDM/chatglm3-6b.",
        "适配器作用于第 29 层；而 m 只有 28 层。请加载训练时所用的基座：THUDM/chatglm3-6b。",
    ),
    (
        "/l cannot be loaded. adapter_config.json has use_dora=True, which changes more than the low-rank product. "
        "Merge this adapter with the program that trained it, and load the merged checkpoint. "
        "Repair the folder or choose another.",
        "无法加载 /l。adapter_config.json 中有 use_dora=True，它改变的不只是低秩乘积。"
        "请用训练该适配器的程序将其合并，再加载合并后的检查点。请修复该文件夹，或选择其他文件夹。",
    ),
    ("layers.0.dense: 5 columns cannot be stored in pairs. Choose INT8 for this model.",
     "layers.0.dense：5 列无法成对存储。此模型请选择 INT8。"),
    ("x holds an adapter alone; it was trained on /b/c. Choose its base checkpoint.",
     "x 中只有适配器；训练时所用的基座是 /b/c。请选择它的基座。"),
    ("Mystery strikes. Remove it.", "Mystery strikes. 请删除它。"),
]  # fmt: skip


def test_what_is_put_in_stays():
    for english, chinese in EXAMPLES:
        assert translated(english) == chinese


def test_anything_else_is_left_as_it_is():
    for text in (
        "",
        "Something happened.",
        "A model is a thing.  Two  spaces.",
        "你好。",
        "3 rows",
        "running",
        "x" * 9000,
        "{} {0}.",
    ):
        assert translated(text) == text


def _screen() -> None:
    from glm_core.errors import GLMError
    from pages.shared import panels

    panels.problem(GLMError("There is no folder /m.", "Check the path of the checkpoint."))


@pytest.mark.parametrize(
    ("language", "expected"),
    [("zh", ("没有文件夹", "请检查检查点的路径")), ("en", ("There is no folder", "Check the path"))],
)
def test_a_problem_is_said_in_the_language_of_the_session(language, expected):
    app = AppTest.from_function(_screen)
    app.query_params["lang"] = language
    shown = app.run().error[0].value
    assert all(words in shown for words in expected)
    assert "/m" in shown


def test_an_error_joined_with_its_way_out_is_two_sentences():
    error = GLMError("No model is loaded.", "Load one on the Models page.")
    assert translated(str(error)) == "尚未加载模型。请在“模型”页加载一个模型。"
