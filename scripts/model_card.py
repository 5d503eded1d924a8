"""Keeps what a run of this project found, without the weights: the card, the report, the audit and its plots.

python scripts/model_card.py pruned model_cards/minilm-0.3
"""

import shutil
import sys
from pathlib import Path

from ibprune.checksums import CARD, REPORT
from ibprune.model_card import renamed_card


def main(run: str, kept: str) -> None:
    """Copies from a run's folder; the card takes the new folder's name."""
    source, target = Path(run), Path(kept)
    card = renamed_card(source, target.name)
    if card is None:
        raise SystemExit(f"expected a generated {CARD} and its {REPORT} in '{run}', found none.")
    shutil.rmtree(target / "audit", ignore_errors=True)  # an older run's
    target.mkdir(parents=True, exist_ok=True)
    (target / CARD).write_text(card)
    shutil.copy2(source / REPORT, target)
    if (source / "audit.json").is_file():
        shutil.copy2(source / "audit.json", target)
        shutil.copytree(source / "audit", target / "audit", ignore=shutil.ignore_patterns("*.svg"))


if __name__ == "__main__":
    main(*sys.argv[1:])
