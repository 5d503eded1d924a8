"""Spearman on STS-B dev of sentence encoders: cosine of mean-pooled embeddings against human scores.

python scripts/stsb.py --data ../shared/data/stsb/sts-dev.orig.tsv minilm pruned pruned-random
"""

import argparse
import csv
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

import ibprune
from ibprune.losses import pooled
from ibprune.models import find_source, load_dense, load_tokenizer


@torch.inference_mode()
def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Normalised mean-pooled embeddings, (n, d)."""
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        found.append(F.normalize(pooled(hidden, batch["attention_mask"]), dim=-1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="tsv: genre, file, year, id, score, sentence1, sentence2")
    parser.add_argument("models", nargs="+", help="exported folders, or what --model takes")
    arguments = parser.parse_args()
    with open(arguments.data, encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    scores = [float(row[4]) for row in rows]
    for name in arguments.models:
        if (Path(name) / "plan.json").exists():
            model, tokenizer = ibprune.load(name), load_tokenizer(find_source(name))
        else:
            loaded = load_dense(find_source(name))
            model, tokenizer = loaded.model, loaded.tokenizer
        first, second = (embed(model, tokenizer, [row[column] for row in rows]) for column in (5, 6))
        value = spearmanr((first * second).sum(1).tolist(), scores)[0]
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: Spearman {value:.4f} on {len(rows)} pairs, {size:,} parameters")


if __name__ == "__main__":
    main()
