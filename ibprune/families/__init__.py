"""The table: one row per architecture."""

from ibprune.families.decoders import GEMMA, GEMMA2, LLAMA, OLMO2, PHI3
from ibprune.families.distilbert import DISTILBERT
from ibprune.families.encoders import BERT, ELECTRA, ROBERTA
from ibprune.families.gpt import GPT2, GPT_NEOX, OPT
from ibprune.families.modernbert import MODERNBERT
from ibprune.families.mpnet import MPNET

_ENCODERS = (BERT, ROBERTA, DISTILBERT, ELECTRA, MPNET, MODERNBERT)
# Convolutional image classifiers of transformers: no rows, their channels are traced (`ibprune.channels`).
TRACED = ("resnet", "regnet", "convnext", "convnextv2", "mobilenet_v1", "mobilenet_v2", "efficientnet")
FAMILIES = (*_ENCODERS, LLAMA, OLMO2, GEMMA, GEMMA2, PHI3, GPT2, GPT_NEOX, OPT)
