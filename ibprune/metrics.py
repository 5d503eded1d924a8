"""Metrics with the interface of `evaluate`, the few that are needed without the Hub."""

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics as sk

from ibprune.errors import BadData, did_you_mean
from ibprune.hub import hub_reachable

_CLASSES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
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
        return {self._local_name: float(self._function(np.asarray(predictions), np.asarray(references)))}


_LOCAL = {
    "accuracy": (_CLASSES, lambda p, r: (p == r).mean()),
    "f1": (_CLASSES, lambda p, r: sk.f1_score(r, p)),
    "matthews_correlation": (_CLASSES, lambda p, r: sk.matthews_corrcoef(r, p)),
    "spearmanr": (_VALUES, lambda p, r: stats.spearmanr(p, r)[0]),
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
