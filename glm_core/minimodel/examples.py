"""Training examples of glm-mini: prompts in many wordings, light noise, several tasks in one stream."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..tokenizers.chatglm2 import ChatGLM2Tokenizer, Message
from .corpus import ANSWERS, Comment

CHINESE_LABELS = ANSWERS
ENGLISH_LABELS = {"spam": "spam", "normal": "normal"}

# The first of each list is what the pages offer and the evaluation asks.
CHINESE_TEMPLATES = (
    "判断下面的评论是垃圾还是正常，只回答一个词。\n评论：{text}",
    "请判断这条评论是“垃圾”还是“正常”：{text}",
    "这条评论是垃圾评论吗？回答“垃圾”或“正常”。\n{text}",
    "评论分类（垃圾/正常）：{text}",
    "{text}\n上面这条评论是垃圾还是正常？",
    "下面是一条网友评论，请标注为垃圾或正常。\n{text}\n标注：",
)
ENGLISH_TEMPLATES = (
    "Is the comment below spam or normal? Answer with one word.\nComment: {text}",
    "Classify this comment as spam or normal: {text}",
    "Label the comment (spam/normal): {text}",
    "{text}\nIs the comment above spam or normal?",
    "Decide whether this comment is spam. Answer spam or normal.\n{text}",
)
# About 200 tokens, the length of the guidelines that moderation teams really write.
GUIDELINES = (
    "你是评论区的审核员，请按照下面的规则给评论打上标签。\n"
    "一、凡是留下微信、QQ、电话、群号或者二维码，让人私下联系买东西、办事情的，算垃圾；写成谐音、拆字、符号也一样。\n"
    "二、凡是把人引到别的网站、主页、公众号、直播间去的，算垃圾；作者自己要的资料、官方文档的地址不算。\n"
    "三、博彩、棋牌、彩票计划、刷单兼职、贷款套现、互粉涨粉、代写代考、假货和荐股，算垃圾。\n"
    "四、只是提到价格、快递、链接、微信、贷款或者兼职，说的是自己的经历、疑问、抱怨或者提醒别人小心，算正常。\n"
    "五、骂人、跑题、太短、有错别字，都不等于垃圾，算正常。\n"
    "只回答一个词：垃圾或者正常。\n"
    "评论：{text}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "你是一个乐于助人的助手。", "Answer briefly.", "请简短回答。", "请用中文回答中文问题。",
    "You are GLM-mini, a small demonstration model.", "你是 GLM-mini，一个小型演示模型。", "Be polite.", "回答要礼貌。",
)  # fmt: skip
ADVERT_TEMPLATES = (
    "{content}", "根据属性写一段商品文案：{content}", "请为这件商品写广告词：{content}", "写广告：{content}",
)  # fmt: skip
ENDINGS = ("example", "com", "net", "cn", "top", "xyz", "cc", "org", "vip", "io", "shop")
CHINESE_HEADS = (
    "请问",
    "我想问一下，",
    "麻烦问下，",
    "你好，",
    "那个，",
    "问个问题，",
    "请教一下，",
    "嗨，",
    "能告诉我",
    "帮我看看，",
)
CHINESE_TAILS = ("？", "呢", "呢？", "啊", "呀", "，谢谢", "，谢谢你", "。", "！", "~", " ")
ENGLISH_HEADS = (
    "Hi, ",
    "Please, ",
    "Hey, ",
    "Quick question: ",
    "Tell me, ",
    "I wonder, ",
    "Hello, ",
    "So, ",
    "Excuse me, ",
    "ok, ",
)
ENGLISH_TAILS = ("?", "!", ".", " please", " please?", ", thanks", " thank you", " ?", "??", " now?")


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the answer to learn. `weight` evens out one-word answers."""

    messages: tuple[Message, ...]
    answer: str
    weight: float = 1.0


class SampledTokenizer(ChatGLM2Tokenizer):
    """The tokenizer with merges left out at random, so that a model sees the same text in many pieces.

    Source: Provilkov et al. 2020, "BPE-Dropout"; sentencepiece has it built in.
    """

    rate = 0.1

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, cut differently every time."""
        return list(self._pieces.encode(text, enable_sampling=True, alpha=self.rate, nbest_size=-1))


def encode(
    tokenizer: ChatGLM2Tokenizer, example: Example, noisy: SampledTokenizer | None = None
) -> tuple[list[int], int]:
    """Ids of prompt and answer, and how many of them are the prompt; `noisy` cuts the prompt into pieces."""
    prompt = (noisy or tokenizer).chat_ids(example.messages)
    return prompt + tokenizer.answer_ids(example.answer), len(prompt)


def reworded(text: str, language: str, generator: random.Random) -> str:
    """The same question as another user may type it: a polite head or tail, other marks, case, one slip."""
    if generator.random() < 0.35:
        text = text.rstrip("？?。.!！ ")
    if generator.random() < 0.3:
        if language == "zh":
            text = generator.choice(CHINESE_HEADS) + text
        else:
            head = generator.choice(ENGLISH_HEADS)
            text = head + (text[0].lower() + text[1:] if generator.random() < 0.5 else text)
    if generator.random() < 0.3:
        text = text.rstrip("？?。.!！ ") + generator.choice(
            CHINESE_TAILS if language == "zh" else ENGLISH_TAILS
        )
    if language == "en" and generator.random() < 0.3:
        text = text.lower() if generator.random() < 0.8 else text.upper()
    if len(text) > 6 and generator.random() < 0.15:
        text = _slip(text, generator)
    return text


def _slip(text: str, generator: random.Random) -> str:
    """One typing slip: a character lost, doubled, or swapped with the next."""
    i = generator.randrange(1, len(text) - 1)
    kind = generator.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def altered(text: str, generator: random.Random) -> str:
    """The same comment with other digits, handles and domains, other marks, and sometimes a few characters gone.

    The sources use the reserved ending .example for every invented site; a model must not learn that as a sign.
    """
    text = re.sub(r"(?<=[.点])example", lambda _: generator.choice(ENDINGS), text)
    if generator.random() < 0.5:
        text = re.sub(r"\d", lambda _: str(generator.randrange(10)), text)
    if generator.random() < 0.25:
        text = re.sub(r"[a-z]{2,}\d[\w]*", lambda m: _handle(len(m.group()), generator), text)
    if generator.random() < 0.3:
        text = "".join(c for c in text if c not in "，。！？,.!?~、" or generator.random() < 0.6)
    if generator.random() < 0.15:
        text = text.lower()
    if len(text) > 12 and generator.random() < 0.3:
        start = generator.randrange(len(text) - 4)
        text = text[:start] + text[start + generator.randint(1, 3) :]
    if generator.random() < 0.1:
        text += generator.choice(("😂", "👍", "🔥", "…", "!!!", "❤️", "🤔", " lol", "哈哈", "🙏"))
    return text


def _handle(length: int, generator: random.Random) -> str:
    return "".join(generator.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(length))


def comment_text(comment: Comment, comments: Sequence[Comment], generator: random.Random) -> str:
    """A comment as it may appear: altered, or with another one of the same language around it.

    Two normal comments are normal; a normal one with spam behind it is spam, as spammers write.
    """
    text = altered(comment.text, generator)
    if generator.random() < 0.18:
        other = generator.choice(comments)
        if (
            other.language == comment.language
            and "normal" in (other.label, comment.label)
            and len(text + other.text) < 160
        ):
            joint = " " if comment.language == "en" else generator.choice(("，", "。", " ", "！"))
            if comment.label == "spam" or other.label == "normal":
                text = f"{altered(other.text, generator)}{joint}{text}"
    return text


def label_prompt(comment: Comment, text: str, generator: random.Random) -> Example:
    """A labelling question in one of the wordings; the language of the question need not be the comment's."""
    chinese = comment.language == "zh" if generator.random() < 0.75 else generator.random() < 0.5
    if chinese and generator.random() < 0.06:
        template, labels = GUIDELINES, CHINESE_LABELS
    elif chinese:
        template, labels = _first_often(CHINESE_TEMPLATES, generator), CHINESE_LABELS
    else:
        template, labels = _first_often(ENGLISH_TEMPLATES, generator), ENGLISH_LABELS
    return Example((Message("user", template.replace("{text}", text)),), labels[comment.label], weight=4.0)


def _first_often(choices: Sequence[str], generator: random.Random) -> str:
    return choices[0] if generator.random() < 0.4 else generator.choice(choices)


def epoch(
    dialogue: Sequence[dict[str, str]],
    comments: Sequence[Comment],
    adverts: Sequence[dict[str, str]],
    generator: random.Random,
) -> list[Example]:
    """Examples freshly varied: every exchange once, a random half of the comments, a third of the adverts."""
    found: list[Example] = []
    for line in dialogue:
        messages: list[Message] = []
        if generator.random() < 0.12:
            messages.append(Message("system", generator.choice(SYSTEM_PROMPTS)))
        for _ in range(generator.choice((0, 0, 0, 0, 0, 1, 1, 2))):
            earlier = generator.choice(dialogue)
            messages += [Message("user", earlier["prompt"]), Message("assistant", earlier["response"])]
        messages.append(Message("user", reworded(line["prompt"], line["lang"], generator)))
        found.append(Example(tuple(messages), line["response"]))
    for comment in generator.sample(list(comments), len(comments) // 2):
        found.append(label_prompt(comment, comment_text(comment, comments, generator), generator))
    for pair in generator.sample(list(adverts), len(adverts) // 3):
        prompt = generator.choice(ADVERT_TEMPLATES).replace("{content}", pair["content"])
        found.append(Example((Message("user", prompt),), pair["summary"]))
    generator.shuffle(found)
    return found
