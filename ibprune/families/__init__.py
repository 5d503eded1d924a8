"""The table: one row per architecture."""

from ibprune.families.albert import ALBERT
from ibprune.families.bart import BART
from ibprune.families.deberta import DEBERTA_V2
from ibprune.families.decoders import GEMMA, GEMMA2, LLAMA, OLMO2, PHI3, QWEN
from ibprune.families.distilbert import DISTILBERT
from ibprune.families.encoders import BERT, ELECTRA, ROBERTA
from ibprune.families.gpt import GPT2, GPT_NEOX, OPT
from ibprune.families.modernbert import MODERNBERT
from ibprune.families.moe import MIXTRAL, QWEN3_MOE
from ibprune.families.mpnet import MPNET
from ibprune.families.t5 import T5
from ibprune.families.vision import BEIT, CLIP, CLIP_VISION, DINOV2, SWIN, VIT

_ENCODERS = (BERT, ROBERTA, DISTILBERT, ELECTRA, MPNET, MODERNBERT, ALBERT, DEBERTA_V2)
_DECODERS = (LLAMA, QWEN, MIXTRAL, QWEN3_MOE, OLMO2, GEMMA, GEMMA2, PHI3, GPT2, GPT_NEOX, OPT)
_VISION = (VIT, DINOV2, BEIT, CLIP_VISION, CLIP, SWIN)
FAMILIES = (*_ENCODERS, *_DECODERS, BART, T5, *_VISION)
# Convolutional image classifiers of transformers: no rows, their channels are traced (`ibprune.channels`).
TRACED = ("resnet", "regnet", "convnext", "convnextv2", "mobilenet_v1", "mobilenet_v2", "efficientnet")
