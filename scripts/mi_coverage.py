"""How often the bracket of I(X; L + noise) holds a known truth, and whether it says when it cannot.

python scripts/mi_coverage.py --runs 40 --samples 2000
"""

import argparse
import itertools
import time

import numpy as np

from ibprune.mi.channel import readout_bracket


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="per dimension and information")
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()
    start, held, total = time.perf_counter(), 0, 0
    print("| d | I (nats) | truth in interval | median width | saturated |\n|---|---|---|---|---|")
    for d, information in itertools.product((2, 8, 32, 128, 256), (1.0, 3.0, 5.0, 10.0)):
        inner = max(2, d // 4)
        brackets = []
        for run in range(arguments.runs):
            rng = np.random.default_rng([run, d, int(information)])
            basis, _ = np.linalg.qr(rng.standard_normal((d, inner)))
            strength = np.sqrt(np.expm1(2 * information / inner))
            features = strength * rng.standard_normal((arguments.samples, inner)) @ basis.T
            brackets.append(readout_bracket(features, 1.0, repeats=2, seed=run))
        inside = [b.ci95[0] <= information <= b.ci95[1] for b in brackets]
        saturated = np.mean([b.status == "saturated" for b in brackets])
        width = np.median([b.ci95[1] - b.ci95[0] for b in brackets])
        print(f"| {d} | {information:g} | {np.mean(inside):.1%} | {width:.2f} | {saturated:.0%} |", flush=True)
        if information < 10:
            held, total = held + sum(inside), total + len(inside)
    print(f"\n{held} of {total} runs at 1, 3 and 5 nats hold the truth ({held / total:.1%}); "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
