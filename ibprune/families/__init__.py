"""The table: one row per architecture."""

from ibprune.families.decoders import LLAMA
from ibprune.families.encoders import BERT

FAMILIES = (BERT, LLAMA)
