"""How far V-information is from a known I(L; Y), raw and with its twin's error taken off, Gaussian features and others.

    python scripts/probe_twins.py --output benchmarks/probe_twins.json

Ten classes (two where said) with Gaussian class means in a random subspace of `means` dimensions. The truth is found by
Monte Carlo over exact densities. The others: an injective ReLU layer on top (same truth), each feature warped by sinh
or a cube root (same truth), Laplace or Student noise, and classes of two modes. There a linear probe cannot use all
that is known, however many samples it has, so its value at forty thousand samples stands beside the truth: the twin
answers for the samples, not for the family of the probe.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from ibprune.mi.probes import Probe, v_information
from ibprune.mi.twins import probe_twin

DRAWS = 40_000
MANY = 40_000  # samples at which a probe shows what its family can use


@dataclass(frozen=True)
class Setting:
    """n samples of d features, class means `apart` from each other, the other features `nuisance` times as wide."""

    kind: str
    d: int
    apart: float
    nuisance: float = 1.0
    classes: int = 10
    n: int = 3000
    means: int = 8


GAUSSIAN = tuple(
    Setting("gaussian", d, apart, nuisance) for d in (8, 64, 256) for apart in (1.0, 0.5) for nuisance in (1.0, 3.0)
)
WIDE = (Setting("gaussian", 384, 0.7, classes=2, n=2400), Setting("gaussian", 768, 1.0))
OTHERS = tuple(
    Setting(kind, d, 1.0)
    for kind in ("relu", "sinh", "cube root", "laplace", "student 5", "two modes")
    for d in (64, 256)
)
LINEAR = Probe(dims=(512,), penalties=(1e-3,))
NOISES = {"laplace": stats.laplace(scale=np.sqrt(0.5)), "student 5": stats.t(df=5, scale=np.sqrt(0.6))}


def draw(setting: Setting, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Features (n, d), labels (n,) and the true information in nats."""
    rng = np.random.default_rng([seed, setting.d, 7_919])
    modes = 2 if setting.kind == "two modes" else 1
    means = setting.apart * rng.standard_normal((setting.classes, modes, setting.means))
    noise = NOISES.get(setting.kind, stats.norm())
    y = rng.integers(setting.classes, size=setting.n)
    signal = means[y, rng.integers(modes, size=setting.n)] + noise.rvs((setting.n, setting.means), random_state=rng)
    inner = setting.d // 2 if setting.kind == "relu" else setting.d
    features = setting.nuisance * rng.standard_normal((setting.n, inner))
    features[:, : setting.means] = signal
    rotation, _ = np.linalg.qr(rng.standard_normal((inner, inner)))
    features = features @ rotation
    if setting.kind == "relu":  # a basis and its negative: injective
        other, _ = np.linalg.qr(rng.standard_normal((inner, inner)))
        features = np.maximum(np.hstack([features @ other, -features @ other]), 0.0)
    if setting.kind in ("sinh", "cube root"):
        features = np.sinh(features) if setting.kind == "sinh" else np.cbrt(features)
    return features, y, truth(means, noise, rng)


def truth(means: np.ndarray, noise, rng: np.random.Generator) -> float:
    classes, modes, dims = means.shape
    y = rng.integers(classes, size=DRAWS)
    points = means[y, rng.integers(modes, size=DRAWS)] + noise.rvs((DRAWS, dims), random_state=rng)
    log_p = np.stack(
        [
            np.logaddexp.reduce([noise.logpdf(points - mode).sum(axis=1) for mode in of_class], axis=0) - np.log(modes)
            for of_class in means
        ],
        axis=1,
    )
    return float((log_p[np.arange(DRAWS), y] - np.logaddexp.reduce(log_p, axis=1)).mean() + np.log(classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = []
    print("| features | d | apart | nuisance | classes | true | usable | raw error | predicted | corrected, to truth "
          "| corrected, to the usable |\n|" + "---|" * 11, flush=True)  # fmt: skip
    for setting in (*GAUSSIAN, *WIDE, *OTHERS):
        for seed in seeds:
            x, y, true = draw(setting, seed)
            raw, bias = v_information(x, y, seed=seed).value - true, probe_twin(x, y, seed=seed).error
            usable = true
            if setting in OTHERS:
                many = draw(replace(setting, n=MANY), seed)
                usable = v_information(*many[:2], probe=LINEAR, folds=2, seed=seed).value
            rows.append(asdict(setting) | {"seed": seed, "true": true, "usable": usable, "raw": raw, "bias": bias})
        mine = rows[-len(seeds) :]
        means = [np.mean([row[key] for row in mine]) for key in ("true", "raw", "bias")]
        usable = np.mean([row["usable"] for row in mine])
        worst = max((row["raw"] - row["bias"] for row in mine), key=abs)
        print(
            f"| {setting.kind} | {setting.d} | {setting.apart:g} | {setting.nuisance:g} | {setting.classes} | "
            f"{means[0]:.3f} | {usable:.3f} | {means[1]:+.3f} | {means[2]:+.3f} | "
            f"{means[1] - means[2]:+.3f} (worst {worst:+.3f}) | {means[0] + means[1] - means[2] - usable:+.3f} |",
            flush=True,
        )
    Path(arguments.output).write_text(json.dumps(rows, indent=1) + "\n")
    for what, chosen in (("Gaussian", False), ("others", True)):
        mine = [row for row in rows if (row["kind"] != "gaussian") == chosen]
        errors = {
            "raw": [row["raw"] for row in mine],
            "corrected": [row["raw"] - row["bias"] for row in mine],
            "corrected, to the usable": [row["true"] + row["raw"] - row["bias"] - row["usable"] for row in mine],
        }
        within = ", ".join(f"{name} {int((np.abs(e) <= 0.1).sum())}" for name, e in errors.items())
        print(f"{what}, within 0.10 nats of {len(mine)}: {within}")


if __name__ == "__main__":
    main()
