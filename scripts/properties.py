"""Tries the properties of tests/model_properties.py on random models of every family row, and counts the cases.

    python scripts/properties.py --rounds 3 --cases 4 --output benchmarks/properties.json

Every round tries so many cases of each property for each tiny row, with Hypothesis and another seed. The record is
written after every round. A case that fails is kept as Hypothesis reduced it; the exit code is then 1.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import HEADS  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from model_properties import PROPERTIES, Case, cases  # noqa: E402


def tried(name: str, row: str, *, number: int, start: int) -> tuple[list[Case], str | None]:
    """The cases of one property that were tried for a row, and what failed, if anything did."""
    check, options = PROPERTIES[name]
    found: list[Case] = []

    @seed(start)
    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(**options, chosen=lambda each: each[0] == row))
    def run(case: Case) -> None:
        found.append(case)
        check(case)

    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever a case raises is what is looked for
        return found, f"{found[-1]}: {type(error).__name__}: {error}"
    return found, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=4, help="of each property and row in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a word of the name of the properties to try")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/properties.json"))
    args = parser.parse_args()
    chosen = [name for name in PROPERTIES if not args.only or args.only in name]
    record = {name: {"cases": 0, "different": 0, "failed": []} for name in chosen}
    different: dict[str, set[Case]] = {name: set() for name in chosen}
    for turn in range(args.rounds):
        for name in chosen:
            for row in HEADS:
                found, wrong = tried(name, row, number=args.cases, start=args.seed + turn)
                different[name] |= set(found)
                record[name]["cases"] += len(found)
                record[name]["different"] = len(different[name])
                record[name]["failed"] += [wrong] if wrong else []
            print(f"round {turn}, {name}: {record[name]['different']} cases, {len(record[name]['failed'])} failed")
        data = {
            "command": f"python scripts/properties.py --rounds {args.rounds} --cases {args.cases} --seed {args.seed}",
            "rounds": turn + 1, "rows": len(HEADS), "processor_s": round(time.process_time()), "properties": record,
        }  # fmt: skip
        temporary = args.output.with_name(f".{args.output.name}")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, args.output)
    return int(any(found["failed"] for found in record.values()))


if __name__ == "__main__":
    raise SystemExit(main())
