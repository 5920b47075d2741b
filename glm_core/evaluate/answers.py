"""What an answer says: the label, the option or the number in it, or None where it says none or several."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

MOST_DIGITS = 400  # of a number; what is longer is none that anybody meant

_EDGES = " \t\r\n\u3000.。,，;；:：!！?？、'\"“”‘’「」『』()（）[]【】<>《》*`_"
_LEAD = re.compile(r"(?:the\s+)?(?:答案|标签|类别|分类|结果|answer|label|class|category|result)\s*(?:是|为|is)?\s*[:：]?\s*", re.I)  # fmt: skip
_DECIMAL_ZEROS = re.compile(r"([+-]?[0-9]+)\.0+")

_CURRENCY = str.maketrans("", "", "$€£¥￥")
_NUMBER = re.compile(
    r"(?<![0-9.])(?:(?<![A-Za-z0-9)\]%])[-+] ?)?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:(?<=[0-9])\.[0-9]+|(?<![0-9])\.[0-9]+|(?<=[0-9]))"
    r"(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?(?:/[0-9]+(?![0-9/.]))?"
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_TOLD = re.compile(r"(?:answer\s*(?:is|:|=)|答案\s*(?:是|为|[:：])|答\s*[:：])", re.I)


def plain(text: str) -> str:
    """A text in one width, without white space at its ends."""
    return unicodedata.normalize("NFKC", text).strip()


# ---- labels


def label_key(text: str) -> str:
    """What makes two spellings one label: width, case, marks around it and decimals of a whole number do not count."""
    key = plain(text).strip(_EDGES).casefold() or plain(text).casefold()
    whole = _DECIMAL_ZEROS.fullmatch(key)
    return whole[1] if whole else key


def label_of(text: str, labels: Mapping[str, str]) -> str | None:
    """The label an answer consists of, after "answer:" or not; None where it says anything else.

    labels   label by its `label_key`
    """
    if (found := labels.get(label_key(text))) is not None:
        return found
    if lead := _LEAD.match(plain(text).lstrip(_EDGES)):
        return labels.get(label_key(plain(text).lstrip(_EDGES)[lead.end() :]))
    return None


# ---- options


def option_of(text: str, letters: Sequence[str], options: Sequence[str] = ()) -> str | None:
    """The letter of the option an answer chooses; None where it names none or several.

    options   the texts behind the letters: an answer that is one of them counts too
    In this order: the letter alone; the last "answer is C", "选C" or the like; a letter with a mark at the
    beginning; the text of an option; the one letter that stands alone in the answer.
    """
    said = plain(text)
    bare = said.strip(_EDGES)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    span = f"[{letters[0]}-{letters[-1]}]"
    said = re.sub(r"(?:不(?:应该|应|能|可)?选|排除)\s*[A-Z]", "", said)
    told = re.findall(
        rf"(?i:答案|正确选项|选项|应选|故选|选择|选|answer|choice|option)\s*(?i:应该|应)?(?:(?i:是|为|is))?\s*[:：]?\s*"
        rf"[(\[\"'「“*]*(?<![A-Za-z])({span})(?![A-Za-z])",
        said,
    )  # fmt: skip
    if told:
        return str(told[-1])
    if first := re.match(rf"[(\[\"'「“*]*({span})[)\].:,、。*]", said):
        return first[1]
    same = [letter for letter, option in zip(letters, options, strict=False) if plain(option) and plain(option) == said]  # fmt: skip
    if len(same) == 1:
        return same[0]
    said = re.sub(r"(?<![A-Za-z])A(?=\s+(?!or\b|and\b)[a-z])", "", said)  # the article
    alone = set(re.findall(rf"(?<![A-Za-z])({span})(?![A-Za-z'])", said))
    return alone.pop() if len(alone) == 1 else None


def option_reference(text: str, letters: Sequence[str], options: Sequence[str] = ()) -> str | None:
    """The letter a file gives as the correct option: the letter, its place from 0, or the option's text."""
    said = plain(text)
    bare = said.strip(_EDGES)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    same = [letter for letter, option in zip(letters, options, strict=False) if plain(option) and plain(option) == said]  # fmt: skip
    if len(same) == 1:
        return same[0]
    if re.fullmatch(r"[0-9](?:\.0+)?", said) and int(said[0]) < len(letters):
        return letters[int(said[0])]
    return None


# ---- numbers


def number_of(text: str) -> Fraction | None:
    """The final number of an answer; None where there is none.

    In this order: the first behind ####, the last in \\boxed{}, the one behind the last "the answer is" or "答案是",
    the last of all. 1,234.0 is 1234, and units, currencies and % do not count.
    """
    said = plain(text).replace("\u2212", "-").replace("\u2044", "/").replace("{,}", ",").replace("\\$", "$")
    said = said.translate(_CURRENCY)
    for part in said.split("####")[1:]:
        if (found := _first(part.splitlines()[0] if part.strip() else "")) is not None:
            return found
    for part in reversed(_BOXED.findall(said)):
        if (found := _first(part)) is not None:
            return found
    if told := list(_TOLD.finditer(said)):
        if (found := _first(said[told[-1].end() :])) is not None:
            return found
    return next((value for value in map(_value, reversed(_found(said))) if value is not None), None)


def _found(text: str) -> list[str]:
    return [match[0] for match in _NUMBER.finditer(text) if match[0]]


def _first(text: str) -> Fraction | None:
    return next((value for value in map(_value, _found(text)) if value is not None), None)


def _value(written: str) -> Fraction | None:
    digits = written.replace(",", "").replace(" ", "")
    if len(digits) > MOST_DIGITS:
        return None
    upper, _, lower = digits.partition("/")
    if lower and not int(lower):
        return None
    return Fraction(upper) / int(lower or 1)


def shown_number(value: Fraction | None) -> str:
    """A number as it is shown and compared: 1234, -0.5, 1/3."""
    if value is None:
        return ""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    whole = str(abs((value * 10**places).numerator)).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{whole[:-places]}.{whole[-places:]}"


def spellings(values: Iterable[str]) -> dict[str, str]:
    """Label by its key, in the order of first appearance; the first spelling is the label's name."""
    found: dict[str, str] = {}
    for value in values:
        key = label_key(value)
        if key not in found:
            found[key] = key if _DECIMAL_ZEROS.fullmatch(plain(value)) else value.strip()
    return found
