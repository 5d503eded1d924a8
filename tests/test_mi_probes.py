"""V-information, its twin, label and attention entropies."""

import numpy as np
import pytest
import torch

from ibprune.mi.critics import Training, infonce
from ibprune.mi.entropies import attention_entropy, label_entropy
from ibprune.mi.gaussian import gaussian_mi, mixture_mi
from ibprune.mi.neighbours import ksg
from ibprune.mi.probes import Probe, online_code, shuffled_control, v_information
from ibprune.mi.samples import BadSamples
from ibprune.mi.twins import channel_twin, pair_twin, probe_twin, shrunk_eigenvalues

LIGHT = Probe(penalties=(1e-2, 1e-1))


def classes(n: int, d: int, spread: float, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Three Gaussian classes on the first axis, at 0, spread and 2 spread."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.standard_normal((n, d))
    x[:, 0] += spread * y
    return x, y


def test_a_probe_finds_what_is_there_and_no_more():
    truth = mixture_mi([0, 1.5, 3])
    assert truth == pytest.approx(0.447161, abs=1e-6)
    x, y = classes(2000, 4, 1.5)
    estimate = v_information(x, y, probe=LIGHT)
    assert truth - 0.06 < estimate.value < truth + 0.04 and estimate.status == "ok"
    control = shuffled_control(x, y, probe=LIGHT)
    assert control.value < 0.02 and control.ci95[1] > -0.05
    assert control.value < 0  # a negative estimate stays negative


def test_the_twin_predicts_the_bias_of_a_probe_in_many_dimensions():
    x, y = classes(600, 150, 1.5)
    estimate, twin = v_information(x, y, probe=LIGHT), probe_twin(x, y, probe=LIGHT)
    bias = estimate.value - mixture_mi([0, 1.5, 3])
    assert bias < -0.03  # the probe alone under-reads
    assert abs(bias - twin.error) < 0.1 and abs(estimate.value - twin.error - mixture_mi([0, 1.5, 3])) < 0.1


def test_a_small_network_sees_what_a_plane_cannot():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert v_information(x, y, probe=LIGHT).value < 0.02
    assert v_information(x, y, probe=Probe("mlp", penalties=(1e-3,))).value > 0.4
    with pytest.raises(ValueError, match="logistic or mlp"):
        Probe("forest")


def test_the_online_code_pays_for_learning():
    x, y = classes(1500, 30, 3.0)
    code, crossfit = online_code(x, y), v_information(x, y, probe=LIGHT)
    assert 0.2 < code.value < crossfit.value


def test_equal_features_give_equal_terms_and_strings_are_labels():
    x, y = classes(400, 5, 2.0)
    first = v_information(x, y, probe=LIGHT)
    second = v_information(x, np.array(["a", "b", "c"])[y], probe=LIGHT)
    assert np.array_equal(first.terms, second.terms)
    assert len(first.terms) == 400 and first.value == pytest.approx(first.terms.mean())


def test_what_cannot_be_estimated_has_no_value():
    x, y = classes(400, 3, 2.0)
    assert v_information(x, np.zeros(400, int)).value is None
    assert v_information(np.ones((400, 3)), y).value is None
    assert probe_twin(np.ones((400, 3)), y) is None
    rare = np.where(np.arange(400) < 3, 1, 0)
    assert v_information(x, rare).value is None and v_information(x, rare).status == "undersampled"
    assert v_information(x[:120], y[:120], probe=LIGHT).status == "undersampled"
    with pytest.raises(BadSamples):
        v_information(x, y[:-1])
    with pytest.raises(BadSamples):
        v_information(x, y + 0.5)


@pytest.mark.parametrize("kinds", [500, 40])
def test_copies_of_rows_are_no_information(kinds):
    """Each pair four times is not called sound; fifty times, as rows of few kinds, they pass for something discrete."""
    rng = np.random.default_rng(0)
    x, y, labels = rng.normal(size=(kinds, 5)), rng.normal(size=(kinds, 5)), rng.integers(0, 2, kinds)
    order = rng.permutation(kinds * (2000 // kinds)) % kinds
    few = Training(steps=40, folds=2)
    found = infonce(x[order], y[order], training=few), gaussian_mi(x[order], y[order])
    found += (v_information(x[order], labels[order], probe=LIGHT),)
    for estimate in found:
        assert estimate.value is not None
        assert (estimate.status == "degenerate") == (kinds == 500), estimate
        assert any("copies read as information" in note for note in estimate.notes) == (kinds == 500)
    assert v_information(x[order], labels[order], probe=LIGHT, discrete=True).status == "ok"
    assert infonce(x[order], rng.normal(size=(len(order), 5)), training=few).status != "degenerate"  # one side alone


def test_twins_of_the_bracket_and_of_pairs():
    rng = np.random.default_rng(1)
    f = rng.standard_normal((800, 40)) * np.exp(-np.arange(40) / 8)
    assert channel_twin(f, 0.5).trusted
    x = rng.standard_normal((1000, 1))
    twin = pair_twin(x, x + rng.standard_normal((1000, 1)), ksg)
    assert twin.truth == pytest.approx(0.5 * np.log(2), abs=0.05) and abs(twin.error) < 0.1


def test_label_entropy():
    assert label_entropy([0, 1] * 500).value == pytest.approx(np.log(2) + 1 / 2000)
    assert label_entropy([1] * 500).status == "degenerate"


def test_attention_entropy_runs_from_one_token_to_all():
    mask = torch.tensor([[1, 1, 1, 0]])
    even = torch.full((1, 1, 4, 4), 1 / 3) * mask
    assert attention_entropy(even, mask, causal=False).item() == pytest.approx(1.0)
    one = torch.zeros(1, 1, 4, 4)
    one[..., 0] = 1.0
    assert attention_entropy(one, mask, causal=False).item() == pytest.approx(0.0)
    lower = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]
    assert attention_entropy(lower[None, None], torch.ones(1, 4), causal=True).item() == pytest.approx(1.0)
    with pytest.raises(BadSamples):
        attention_entropy(even, torch.ones(1, 3), causal=False)


@pytest.mark.parametrize("d,n", [(64, 3000), (256, 3000), (384, 872)])
def test_shrunk_eigenvalues_find_the_few_small_ones(d, n):
    """Eight of variance 1 among many of 9: near what the sample's eigenvectors really have."""
    rng = np.random.default_rng(0)
    true = np.where(np.arange(d) < d - 8, 9.0, 1.0)
    x = rng.standard_normal((n, d)) * np.sqrt(true)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    oracle = true @ vectors**2
    found = shrunk_eigenvalues(values, n)
    assert np.abs(found / oracle - 1).mean() < 0.05 < np.abs(values / oracle - 1).mean()
    assert np.abs(found[:8] / oracle[:8] - 1).max() < 0.2
    assert np.isfinite(shrunk_eigenvalues(values, 50)).all()


def test_the_probe_sees_signal_of_low_variance():
    """A label on the least of 160 directions: 128 components lose it, all of them do not, and the twin knows."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 1500)
    x = 3 * rng.standard_normal((1500, 160))
    x[:, 0] = 4.0 * y + rng.standard_normal(1500)
    x = x @ np.linalg.qr(rng.standard_normal((160, 160)))[0]
    wide = v_information(x, y)
    assert wide.estimator == "logistic_pca160" and wide.value > 0.4
    assert v_information(x, y, probe=Probe(dims=(128,))).value < 0.3
    twin = probe_twin(x, y)
    assert abs(wide.value - twin.error - mixture_mi([0, 4.0])) < 0.05


def test_one_feature_has_a_twin_too():
    x, y = classes(600, 1, 1.5)
    assert abs(probe_twin(x, y, probe=LIGHT).error) < 0.05


def test_shrinkage_of_spectra_over_many_orders_of_magnitude():
    """A trained layer's spectrum: power law, and one direction that a normalisation left empty."""
    rng = np.random.default_rng(2)
    true = np.concatenate([[1e-9], np.geomspace(1e-4, 2.0, 127)])
    values, vectors = np.linalg.eigh(np.cov((rng.standard_normal((600, 128)) * np.sqrt(true)).T, bias=True))
    found = shrunk_eigenvalues(values, 600)
    oracle = true @ vectors**2
    assert np.abs(np.log(found / oracle))[1:].mean() < 0.1 < np.abs(np.log(values / oracle))[1:].mean()
    assert (found[1:] > 1e-4).all()
