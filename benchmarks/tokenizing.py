"""Comments per second through the ChatGLM3 tokenizer, against a tokenizer class of transformers over the same file.

    python benchmarks/tokenizing.py

The class is written the way the released one is: transformers asks it for the pieces of every text and for the id of
every piece. Both must give the same ids. They take turns within one run, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece
from transformers.tokenization_python import PythonBackend

from glm_core.minimodel import corpus
from glm_core.settings import MINI
from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer


class PieceByPiece(PythonBackend):
    """A tokenizer in Python as transformers wants it: text to pieces, pieces to ids, one at a time."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file: str, **options) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return self.pieces.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text: str, **options) -> list[str]:
        return self.pieces.encode_as_pieces(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MINI / "tokenizer.model", help="a ChatGLM3 vocabulary")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    comments = [comment.text for comment in corpus.read_comments("train")]
    texts = random.Random(1).choices(comments, k=options.rows)
    ours = ChatGLM2Tokenizer(options.model)
    theirs = PieceByPiece(str(options.model))
    length = statistics.mean(map(len, texts))
    print(
        f"{len(texts):,} comments of {length:.0f} characters, {ours.n_pieces:,} pieces, {os.cpu_count()} cores"
    )
    fast: list[float] = []
    slow: list[float] = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        found = ours.encode_many(texts)
        between = time.perf_counter()
        expected = theirs(texts, add_special_tokens=False)["input_ids"]
        ended = time.perf_counter()
        if found != expected:
            different = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            raise SystemExit(f"Different ids for {texts[different]!r}.")
        fast.append(len(texts) / (between - started))
        slow.append(len(texts) / (ended - between))
    print(f"encode_many             {max(fast):>10,.0f} comments/s")
    print(f"tokenizer class         {max(slow):>10,.0f} comments/s")
    print(f"ratio                   {max(fast) / max(slow):>10.1f}   (ids equal in every round)")


if __name__ == "__main__":
    main()
