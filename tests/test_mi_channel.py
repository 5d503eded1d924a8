"""The known-channel bracket: closed forms, golden values, honest statuses."""

import numpy as np
import pytest

from ibprune.mi.channel import (
    bracket_given,
    calibrate_sigma,
    difference,
    draw_noise,
    gaussian_cap,
    mask_bracket,
    penalty_bound,
    readout_bracket,
    readout_curve,
    spectrum,
)
from ibprune.mi.samples import BadSamples


def normal(n: int, d: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def latent(n: int, inner: int, d: int, information: float, seed: int) -> np.ndarray:
    """Features of `inner` equally strong latent directions in d dimensions with I(X; L + z) = information."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((d, inner)))
    strength = np.sqrt(np.expm1(2 * information / inner))
    return strength * rng.standard_normal((n, inner)) @ basis.T


def test_gaussian_features_have_the_closed_form():
    bracket = readout_bracket(normal(2000, 4), 1.0)
    assert bracket.ci95[0] <= 2 * np.log(2) <= bracket.ci95[1] + 0.02
    assert abs(bracket.lower - 2 * np.log(2)) < 0.05 and bracket.status == "ok"


@pytest.mark.parametrize("sigma,true", [(0.5, 0.632720), (1.0, 0.336831), (2.0, 0.111421)])
def test_binary_inputs(sigma, true):
    signs = np.where(np.arange(2000) % 2, 1.0, -1.0)
    bracket = readout_bracket(signs, sigma)
    assert abs(bracket.lower - true) < 0.02 and abs(bracket.loo - true) < 0.02
    assert bracket.status == "degenerate"  # two distinct inputs, 2,000 times


def test_the_brackets_hold_the_truth():
    """scripts/mi_coverage.py does the same 600 times."""
    held = []
    for inner, d in ((2, 2), (8, 64), (32, 64), (64, 256)):
        for information in (1.0, 3.0, 5.0):
            for seed in range(4):
                bracket = readout_bracket(latent(1000, inner, d, information, seed), 1.0, repeats=2, seed=seed)
                held.append(bracket.ci95[0] <= information <= bracket.ci95[1])
    assert np.mean(held) >= 0.9


def test_ten_nats_are_beyond_the_samples_and_it_says_so():
    bracket = readout_bracket(latent(1500, 8, 64, 10.0, seed=1), 1.0, repeats=1)
    assert bracket.status == "saturated" and bracket.lower < bracket.ceiling < 10
    assert abs(bracket.cap - 10.0) < 0.3  # the cap stays finite where the other bound has left


def test_masks_as_the_channel_and_what_their_penalty_leaves_out():
    f = normal(4000, 1)
    bracket = mask_bracket(f, 0.1, 1.0, floor=1e-6)
    penalty, bound = penalty_bound(f, 0.1, 1.0)
    assert bracket.ci95[0] <= 0.421 <= bracket.ci95[1] and bracket.ci95[1] - bracket.ci95[0] < 0.05
    assert penalty == pytest.approx(0.005, abs=0.0005) and bound == pytest.approx(0.612, abs=0.07)
    skewed = np.exp(0.5 * normal(4000, 4))
    bracket = mask_bracket(skewed, 0.5, 1.0, floor=1e-6)
    assert bracket.ci95[0] <= 0.736 <= bracket.ci95[1]
    assert penalty_bound(skewed, 0.5, 1.0) == pytest.approx((0.446, 1.45), abs=0.03)
    wide = np.exp(0.5 * normal(4000, 16))  # here the penalty claims twice what there is
    assert mask_bracket(wide, 2.0, 1.0, floor=1e-6).lower == pytest.approx(5.8, abs=0.4)
    assert penalty_bound(wide, 2.0, 1.0) == pytest.approx((12.9, 16.9), abs=0.2)


def test_information_falls_with_the_noise():
    curve = readout_curve(normal(800, 6), [0.1, 0.3, 1.0, 3.0, 10.0])
    for less, more in zip(curve, curve[1:]):
        assert more.cap < less.cap
        assert more.lower < less.lower


def test_equal_features_differ_by_exactly_nothing():
    f, noise = normal(500, 8), draw_noise(500, 8, repeats=2, seed=0)
    first, second = (readout_bracket(f, 0.5, noise=noise) for _ in range(2))
    assert difference(first, second) == (0.0, (0.0, 0.0))


def test_noise_is_never_the_callers_own_stream():
    f = np.random.default_rng(0).standard_normal((1000, 4))
    assert abs(readout_bracket(f, 1.0, repeats=1, seed=0).lower - 2 * np.log(2)) < 0.08


def test_calibration_reads_the_target():
    f = normal(900, 30) * np.exp(-np.arange(30) / 5)
    sigma = calibrate_sigma(f, target=0.6)
    assert readout_bracket(f[:800], sigma).lower == pytest.approx(0.6 * np.log(800), rel=0.02)


def test_calibration_is_of_all_inputs_and_not_of_the_first():
    """Audited texts lie in the order of their length, and files class by class."""
    f = normal(2000, 8) + 4.0 * (np.arange(2000) // 1000)[:, None]
    shuffled = np.random.default_rng(0).permutation(f)
    assert calibrate_sigma(f) == pytest.approx(calibrate_sigma(shuffled), rel=0.1)


def test_the_interval_holds_the_truth_where_features_outnumber_samples():
    truth, n, d, held = 0.5 * 768 * np.log1p(1 / 12.0**2), 200, 768, 0
    for seed in range(12):
        found = readout_bracket(normal(n, d, seed), 12.0, noise=draw_noise(n, d, repeats=1, seed=seed))
        held += found.ci95[0] <= truth <= found.ci95[1]
    assert held >= 10  # of 12; 55 % before the cap's own correction was counted as an error


@pytest.mark.parametrize("d", [20, 200])
def test_the_cap_is_right_for_more_features_than_samples_can_fill(d):
    values = np.linspace(0.2, 2.0, d)
    truth = 0.5 * np.log1p(values).sum()
    caps = [gaussian_cap(normal(600, d, seed) * np.sqrt(values), 1.0)[0] for seed in range(8)]
    assert np.mean(caps) == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("d", [20, 90])
def test_an_eigenvalue_is_the_mean_square_of_its_coordinate(d):
    values, squares = spectrum(normal(60, d) * np.linspace(0.2, 2.0, d))
    assert values.shape == (min(d, 60),) and squares.shape == (60, min(d, 60)) and (squares >= 0).all()
    assert squares.mean(axis=0) == pytest.approx(values, abs=1e-9)


def test_given_the_labels_only_the_rest_is_left():
    y = np.arange(1000) % 2
    f = normal(1000, 3) * 0.5
    f[:, 0] += 20 * y
    noise = draw_noise(1000, 3, repeats=2, seed=0)
    whole, rest = readout_bracket(f, 1.0, noise=noise), bracket_given(f, y, 1.0, noise=noise)
    assert whole.lower - rest.lower == pytest.approx(np.log(2), abs=0.05)
    few = bracket_given(f, np.arange(1000) < 20, 1.0, noise=noise)
    assert few.status == "undersampled"


def test_flaws_are_named_and_never_a_fine_number():
    constant = readout_bracket(np.ones((300, 4)), 1.0)
    assert constant.lower is None and constant.status == "degenerate"
    assert readout_bracket(normal(100, 4), 1.0).status == "undersampled"
    assert readout_bracket(np.repeat(normal(200, 4), 2, axis=0), 1.0).status == "degenerate"
    for bad in (np.full((50, 2), np.nan), np.zeros((50, 2, 2)), np.array(["a"] * 20), np.zeros((5, 2))):
        with pytest.raises(BadSamples):
            readout_bracket(bad, 1.0)
    for sigma in (0.0, -1.0, np.nan):
        with pytest.raises(BadSamples):
            readout_bracket(normal(50, 2), sigma)
    with pytest.raises(BadSamples, match="vary"):
        calibrate_sigma(np.ones((50, 3)))
