"""How often the interval of a retained share holds the true share, on features whose information is known.

    python scripts/retained_coverage.py --runs 12 --output benchmarks/retained_coverage.json

Each run draws features of a dense layer and what a pruned one keeps of them, calibrates the noise on the dense ones and
asks for the retained share as an audit does. Of Gaussian features the truth is closed; of a mixture of 40 Gaussians it
is estimated from 20,000 draws. About two minutes of a processor.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from ibprune.measures import AuditSettings, measure_layer

GAUSSIAN = {  # deviations of the dense features, and what the pruned layer multiplies them by
    "half of 8": (np.ones(8), np.repeat([1.0, 0.0], 4)),
    "half of 64": (np.ones(64), np.repeat([1.0, 0.0], 32)),
    "power law, the first 10 of 40 gone": (1.0 / np.arange(1, 41), (np.arange(40) >= 10).astype(float)),
    "16 at half of their scale": (np.ones(16), np.full(16, 0.5)),
}
MIXTURE = "40 clusters in 10 dimensions, 3 stay"


def bits_of_mixture(centres: np.ndarray, deviation: float, sigma: float, rng: np.random.Generator) -> float:
    """I(X; X + noise), nats, of equally likely Gaussians around the centres, (k, d)."""
    (k, d), n = centres.shape, 20_000
    spread = deviation**2 + sigma**2
    x = centres[rng.integers(0, k, n)] + np.sqrt(spread) * rng.standard_normal((n, d))
    squares = (x**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * x @ centres.T
    log_p = logsumexp(-squares / (2 * spread), axis=1) - np.log(k) - d / 2 * np.log(2 * np.pi * spread)
    return float(-log_p.mean() - d / 2 * np.log(2 * np.pi * np.e * sigma**2))


def run(kind: str, n: int, seed: int) -> dict:
    """The true share, and what an audit says of it."""
    rng = np.random.default_rng([seed, 5])
    settings = AuditSettings(repeats=2, curve=(1.0, 2.0), seed=seed)
    if kind == MIXTURE:
        centres = 3 * np.random.default_rng(1).standard_normal((40, 10))
        before = centres[rng.integers(0, 40, n)] + 0.7 * rng.standard_normal((n, 10))
        after = before * (np.arange(10) < 3)
    else:
        deviations, kept = GAUSSIAN[kind]
        before = rng.standard_normal((n, len(deviations))) * deviations
        after = before * kept
    record = measure_layer(before, after, None, settings)
    found, sigma = record["I_XL"], record["noise"]["sigma"]
    if kind == MIXTURE:
        truth = bits_of_mixture(centres[:, :3], 0.7, sigma, rng) / bits_of_mixture(centres, 0.7, sigma, rng)
    else:
        ends = [np.log1p((deviations * scale / sigma) ** 2).sum() for scale in (kept, 1.0)]
        truth = float(ends[0] / ends[1])
    statuses = [found[side]["status"] for side in ("before", "after")]
    return {"truth": truth, **{key: found[key] for key in ("retained", "retained_ci95")}, "statuses": statuses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--samples", type=int, nargs="*", default=[400, 1000, 2400])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/retained_coverage.json"))
    args = parser.parse_args()
    cells = []
    for n in args.samples:
        for kind in (*GAUSSIAN, MIXTURE):
            runs = [run(kind, n, seed) for seed in range(args.runs)]
            held = sum(bool(low <= r["truth"] <= high) for r in runs for low, high in [r["retained_ci95"]])
            means = {key: float(np.mean([r[key] for r in runs])) for key in ("truth", "retained")}
            width = float(np.mean([np.diff(r["retained_ci95"]) for r in runs]))
            ok = sum(r["statuses"] == ["ok", "ok"] for r in runs)
            cells.append(
                {"samples": n, "features": kind, "runs": len(runs), "held": held, "ok": ok, "width": width} | means
            )
            print(cells[-1], flush=True)
    args.output.write_text(json.dumps(cells, indent=1) + "\n")


if __name__ == "__main__":
    main()
