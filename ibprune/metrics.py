"""Metrics with the interface of `evaluate`, the few that are needed without the Hub."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics as sk

from ibprune.errors import BadData, did_you_mean
from ibprune.hub import hub_reachable

_CLASSES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_TAGS = datasets.Features({key: datasets.List(datasets.Value("string")) for key in ("predictions", "references")})
_ANSWERS = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
)
_VALUES = datasets.Features({"predictions": datasets.Value("float32"), "references": datasets.Value("float32")})


class _Local(evaluate.Metric):
    """An `evaluate.Metric` whose computation is a function of (predictions, references)."""

    def __init__(self, name: str, features: datasets.Features, function):
        self._features, self._function, self._local_name = features, function, name
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._local_name, citation="", inputs_description="", features=self._features
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        found = self._function(predictions, references)
        return found if isinstance(found, dict) else {self._local_name: float(found)}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first and last word of each entity of a sentence in BIO tags, as conlleval reads them.

    An entity begins at B-, and at I- after another type or none.

    Example:
        >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
        [('PER', 0, 1), ('LOC', 3, 3)]
    """
    found: list[tuple[str, int, int]] = []
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and found and found[-1][0] == kind and found[-1][2] == i - 1:
            found[-1] = (kind, found[-1][1], i)
        elif prefix in ("B", "I"):
            found.append((kind, i, i))
    return found


def _entity_f1(predictions: list[list[str]], references: list[list[str]]) -> float:
    """F1 of entities whose type and both ends are right, over all sentences together; 0 where there are none."""
    ours, theirs = (
        {(i, *entity) for i, tags in enumerate(sentences) for entity in entities(tags)}
        for sentences in (predictions, references)
    )
    return 2 * len(ours & theirs) / max(len(ours) + len(theirs), 1)


def _spearman(predictions: list[float], references: list[float]) -> float:
    """Rank correlation; 0 where the predictions are all alike and order nothing."""
    if not np.ptp(references):
        raise BadData(
            f"expected more than one value in the held-out labels for spearmanr, found {references[0]:g} alone."
        )
    return stats.spearmanr(predictions, references)[0] if np.ptp(predictions) else 0.0


def normalise_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and repeated spaces.

    Example:
        >>> normalise_answer("The  Nile, (a river)")
        'nile river'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _answer_f1(prediction: str, reference: str) -> float:
    ours, theirs = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def _squad(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Shares of 1: the best over each question's answers; one without answers is met by "" alone."""
    pairs = [(answer, known or [""]) for answer, known in zip(predictions, references)]
    exact = [any(normalise_answer(a) == normalise_answer(b) for b in known) for a, known in pairs]
    overlap = [max(_answer_f1(a, b) for b in known) for a, known in pairs]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


_LOCAL = {
    "accuracy": (_CLASSES, lambda p, r: np.equal(p, r).mean()),
    "entity_f1": (_TAGS, _entity_f1),
    "f1": (_CLASSES, lambda p, r: sk.f1_score(r, p)),
    "macro_f1": (_CLASSES, lambda p, r: sk.f1_score(r, p, average="macro")),
    "squad": (_ANSWERS, _squad),
    "matthews_correlation": (_CLASSES, lambda p, r: sk.matthews_corrcoef(r, p)),
    "spearmanr": (_VALUES, _spearman),
}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric by name: local where it is known here, else from the Hub through `evaluate.load`.

    Raises:
        BadData: Unknown here, and the Hub is out of reach.

    Example:
        >>> load_metric("accuracy").compute(predictions=[1, 0], references=[1, 1])
        {'accuracy': 0.5}
    """
    if name in _LOCAL:
        return _Local(name, *_LOCAL[name])
    if not hub_reachable():
        raise BadData(f"the metric '{name}' needs the Hub, which is out of reach: {did_you_mean(name, _LOCAL)}.")
    return evaluate.load(name)
