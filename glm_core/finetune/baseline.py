"""What a plain text classifier makes of the same rows: TF-IDF and logistic regression, no language model."""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..metrics import segment

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PENALTIES = (1.0, 10.0, 100.0)  # C of the logistic regression: the larger, the closer it follows the rows
FEATURES = ("chars-2", "chars-3", "chars-and-words")
NAMES = {
    "chars-2": "1 and 2 characters",
    "chars-3": "1 to 3 characters",
    "chars-and-words": "1 and 2 characters, and of words",
}
USUAL = ("chars-2", 10.0)  # where there are too few rows to choose by
FOLDS = 3
TRIED_ROWS = 6000  # that the settings are chosen on
RARE_FROM = 2000  # rows; with so many, what occurs in one row alone is left out
MOST_STEPS = 1000


@dataclass(frozen=True)
class BaselineResult:
    """What the classifier says of the test rows.

    labels          the classes, sorted; the columns of `probabilities` (n, classes), whose rows sum to 1
    predicted       the likeliest class of every row
    seconds_fit     of choosing the settings and learning; seconds_predict of the test rows
    description     what it is, in words
    """

    labels: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    predicted: tuple[str, ...]
    seconds_fit: float
    seconds_predict: float
    description: str


def fit_predict(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str], seed: int = 0
) -> BaselineResult:
    """Learn from the training rows and say the class of the test rows; the same rows give the same result.

    The texts' features and the strength of the penalty are chosen by cross-validation on training rows.
    GLMError for no rows, for one class, and for texts without a letter.
    """
    if len(train_texts) != len(train_labels):
        raise ValueError(f"{len(train_texts)} texts, {len(train_labels)} labels")
    import numpy as np

    counts = Counter(train_labels)
    if not counts:
        raise GLMError("The baseline has no training rows.", "Choose a file with rows.")
    if len(counts) == 1:
        raise GLMError(
            f"All {len(train_labels):,} training rows have the label {train_labels[0]!r}: there is nothing to tell "
            "apart.",
            "Add rows of another label.",
        )
    started = time.perf_counter()
    texts = [_plain(text) for text in train_texts]
    truth = np.array(train_labels, dtype=object)
    kind, penalty, how = _choose(texts, truth, min(counts.values()), seed)
    vectorizer = _vectorizer(kind, len(texts))
    try:
        rows = vectorizer.fit_transform(texts)
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise GLMError(
            "The training rows hold no text that a baseline could learn from.",
            "Choose another prompt column.",
        ) from error
    model = _regression(penalty, len(counts), seed).fit(rows, truth)
    fitted = time.perf_counter()
    labels = tuple(str(label) for label in model.classes_)
    if len(test_texts):
        given = model.predict_proba(vectorizer.transform([_plain(text) for text in test_texts]))
    else:
        given = np.zeros((0, len(labels)))
    predicted = tuple(labels[i] for i in given.argmax(axis=1).tolist())
    return BaselineResult(
        labels=labels,
        probabilities=given,
        predicted=predicted,
        seconds_fit=fitted - started,
        seconds_predict=time.perf_counter() - fitted,
        description=f"TF-IDF of {NAMES[kind]} with logistic regression (C = {penalty:g}), {how}.",
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _choose(texts: Sequence[str], truth: Any, smallest: int, seed: int) -> tuple[str, float, str]:
    """(features, C, how they were chosen): the best accuracy over the folds, of equal ones the first."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split  # type: ignore[import-untyped]

    chosen = np.arange(len(texts))
    if len(texts) > TRIED_ROWS and smallest > 1:
        chosen, _ = train_test_split(chosen, train_size=TRIED_ROWS, stratify=truth, random_state=seed)
        chosen.sort()
    least = min(Counter(truth[chosen]).values())
    if least < FOLDS:
        return *USUAL, "by habit: too few rows of a label to choose the settings by"
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(chosen, truth[chosen]))
    best, found = -1.0, USUAL
    for kind in FEATURES:
        # Weighed once for all folds: the weights of the features know no label, so nothing is given away.
        try:
            rows = _vectorizer(kind, len(chosen)).fit_transform([texts[i] for i in chosen.tolist()])
        except ValueError:
            continue
        for penalty in PENALTIES:
            model = _regression(penalty, len(set(truth)), seed)
            score = float(cross_val_score(model, rows, truth[chosen], cv=folds, scoring="accuracy").mean())
            if score > best + 1e-9:
                best, found = score, (kind, penalty)
    count = len(FEATURES) * len(PENALTIES)
    how = f"the best of {count} settings in {FOLDS}-fold cross-validation on {len(chosen):,} training rows"
    return *found, how


def _vectorizer(kind: str, rows: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    from sklearn.pipeline import FeatureUnion  # type: ignore[import-untyped]

    settings: dict[str, Any] = {
        "sublinear_tf": True, "lowercase": False, "min_df": 2 if rows >= RARE_FROM else 1,
    }  # fmt: skip
    longest = 3 if kind == "chars-3" else 2
    characters = TfidfVectorizer(analyzer="char", ngram_range=(1, longest), **settings)
    if kind != "chars-and-words":
        return characters
    words = TfidfVectorizer(analyzer=_words, **settings)
    return FeatureUnion([("characters", characters), ("words", words)])


def _words(text: str) -> list[str]:
    return [word for word in segment(text) if word.strip()]


def _regression(penalty: float, classes: int, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    # liblinear's dual form is the fastest here, but for two classes only.
    solver: dict[str, Any] = {"solver": "liblinear", "dual": True} if classes == 2 else {"solver": "lbfgs"}
    return LogisticRegression(C=penalty, max_iter=MOST_STEPS, random_state=seed, **solver)
