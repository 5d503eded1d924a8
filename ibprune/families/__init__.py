"""The table: one row per architecture."""

from ibprune.families.decoders import GEMMA, GEMMA2, LLAMA, OLMO2, PHI3
from ibprune.families.distilbert import DISTILBERT
from ibprune.families.encoders import BERT, ELECTRA, ROBERTA
from ibprune.families.gpt import GPT2, GPT_NEOX, OPT
from ibprune.families.modernbert import MODERNBERT
from ibprune.families.mpnet import MPNET
from ibprune.families.vision import BEIT, CLIP, CLIP_VISION, DINOV2, SWIN, VIT

_ENCODERS = (BERT, ROBERTA, DISTILBERT, ELECTRA, MPNET, MODERNBERT)
_VISION = (VIT, DINOV2, BEIT, CLIP_VISION, CLIP, SWIN)
_DECODERS = (LLAMA, OLMO2, GEMMA, GEMMA2, PHI3, GPT2, GPT_NEOX, OPT)
FAMILIES = (*_ENCODERS, *_DECODERS, *_VISION)
