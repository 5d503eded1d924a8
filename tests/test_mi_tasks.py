"""The benchmark tasks: exact information, maps that lose nothing, and estimates near the truth where that is easy."""

import numpy as np
import pytest

from ibprune.mi.gaussian import gaussian_mi
from ibprune.mi.neighbours import ksg
from ibprune.mi.samples import BadSamples
from ibprune.mi.tasks import TASKS, exact_mi, find_task, sample

EXACT = {
    "1v1-normal-0.75": 0.413339,
    "normal_cdf-1v1-normal-0.75": 0.413339,
    "1v1-bimodal-0.75": 0.413339,
    "wiggly-1v1-normal-0.75": 0.413339,
    "half_cube-1v1-normal-0.75": 0.413339,
    "swissroll-1v1-normal-0.75": 0.413339,
    "1v1-additive-0.1": 1.709438,
    "1v1-additive-0.75": 0.333333,
    "student-1x1-dof1": 0.224171,
    "asinh-student-1x1-dof1": 0.224171,
    "normal-dense-2x2": 0.293893,
    "normal-dense-3x3": 0.413339,
    "normal-dense-5x5": 0.592812,
    "normal-dense-25x25": 1.292184,
    "normal-dense-50x50": 1.624265,
    "student-2x2-dof1": 0.431946,
    "student-2x2-dof2": 0.193147,
    "student-3x3-dof2": 0.290922,
    "student-3x3-dof3": 0.178712,
    "student-5x5-dof2": 0.448151,
    "student-5x5-dof3": 0.298544,
    "asinh-student-2x2-dof1": 0.431946,
    "asinh-student-3x3-dof2": 0.290922,
    "asinh-student-5x5-dof2": 0.448151,
}


def test_the_forty_tasks_have_the_published_information():
    names = [task.name for task in TASKS]
    assert len(names) == len(set(names)) == 40
    assert set(EXACT) < set(names)
    for task in TASKS:
        if "2pair" in task.name:
            assert exact_mi(task) == pytest.approx(1.021651, abs=6e-7), task.name
        else:
            assert exact_mi(task) == pytest.approx(EXACT[task.name], abs=6e-7), task.name
    assert sum("2pair" in name for name in names) == 16


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_samples_have_their_shape_and_their_seed(task):
    x, y = sample(task, 50, seed=3)
    again, other = sample(task, 50, seed=3), sample(task, 50, seed=4)
    dim = getattr(task.source, "dim", 1)
    assert x.shape == (50, 2 if "swissroll" in task.name else dim) and y.shape == (50, dim)
    assert (x == again[0]).all() and (y == again[1]).all() and not (x == other[0]).any()
    assert np.isfinite(x).all() and np.isfinite(y).all()


def test_normal_sources_have_their_covariance():
    both = np.hstack(sample(find_task("normal-2pair-3x3"), 20000, seed=0))
    expected = np.eye(6)
    expected[[0, 1, 3, 4], [3, 4, 0, 1]] = 0.8
    assert np.allclose(np.cov(both.T), expected, atol=0.04)
    dense = np.hstack(sample(find_task("normal-dense-2x2"), 20000, seed=0))
    assert np.allclose(np.cov(dense.T), 0.5 + 0.5 * np.eye(4), atol=0.04)


def test_maps_are_what_their_names_say():
    base_x, base_y = sample(find_task("1v1-normal-0.75"), 2000, seed=1)
    uniform_x, _ = sample(find_task("normal_cdf-1v1-normal-0.75"), 2000, seed=1)
    for name in ("normal_cdf", "wiggly", "half_cube"):  # strictly increasing: the order of the samples stays
        x, y = sample(find_task(f"{name}-1v1-normal-0.75"), 2000, seed=1)
        assert (np.argsort(x[:, 0]) == np.argsort(base_x[:, 0])).all()
        assert (np.argsort(y[:, 0]) == np.argsort(base_y[:, 0])).all()
    x, y = sample(find_task("1v1-bimodal-0.75"), 2000, seed=1)
    assert (np.argsort(x[:, 0]) == np.argsort(base_x[:, 0])).all()
    assert np.mean(x < 2.5) == pytest.approx(0.3, abs=0.03) and x.mean() == pytest.approx(3.5, abs=0.2)
    assert np.mean(y < 1) == pytest.approx(0.5, abs=0.04) and y.mean() == pytest.approx(1, abs=0.2)
    roll, _ = sample(find_task("swissroll-1v1-normal-0.75"), 2000, seed=1)
    radius = np.linalg.norm(roll, axis=1)  # undone by its radius
    assert np.allclose((21 * radius / (1.5 * np.pi) - 1) / 2, uniform_x[:, 0])


def test_the_spiral_turns_two_coordinates_and_keeps_the_norm():
    (x, y), (turned_x, turned_y) = (sample(find_task(f"{s}normal-2pair-5x5"), 500, seed=2) for s in ("", "spiral-"))
    for before, after, (i, j) in ((x, turned_x, (0, 1)), (y, turned_y, (1, 2))):
        rest = [c for c in range(5) if c not in (i, j)]
        assert np.allclose(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1))
        assert (before[:, rest] == after[:, rest]).all()
        angle = (after**2).sum(axis=1) / 5
        undone = np.cos(angle) * after[:, i] + np.sin(angle) * after[:, j]
        assert np.allclose(undone, before[:, i])


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("1v1-normal-0.75", 0.06),
        ("normal_cdf-1v1-normal-0.75", 0.06),
        ("1v1-bimodal-0.75", 0.06),
        ("wiggly-1v1-normal-0.75", 0.06),
        ("swissroll-1v1-normal-0.75", 0.1),
        ("1v1-additive-0.75", 0.06),
        ("1v1-additive-0.1", 0.1),
        ("asinh-student-1x1-dof1", 0.06),
        ("normal-dense-2x2", 0.08),
        ("normal-2pair-2x2", 0.1),
        ("student-2x2-dof2", 0.12),
    ],
)
def test_ksg_comes_near_in_few_dimensions(name, tolerance):
    task = find_task(name)
    assert ksg(*sample(task, 2000, seed=0)).value == pytest.approx(exact_mi(task), abs=tolerance)


@pytest.mark.parametrize("name", ["normal-dense-5x5", "normal-dense-25x25", "normal-2pair-25x25"])
def test_the_gaussian_fit_comes_near_for_gaussian_tasks(name):
    task = find_task(name)
    estimate = gaussian_mi(*sample(task, 4000, seed=0))
    assert estimate.value == pytest.approx(exact_mi(task), abs=0.06)
    assert estimate.ci95[0] - 0.02 <= exact_mi(task) <= estimate.ci95[1] + 0.02


def test_unknown_names_are_refused():
    with pytest.raises(BadSamples, match="1v1-normal-0.75"):
        find_task("1v1-normal")
