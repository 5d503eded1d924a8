"""Tiny models of every family row, a tokenizer made here, and the guard against the network."""

import gc
import os
import random
import socket
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where transformers copies the code of pruned folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores; so in the processes that tests start

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from ibprune.task_heads import complete, with_end

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = "the a film story actor plot good bad fine dull warm cold long short is was not very and but it".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]

_SIZES = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, intermediate_size=20, max_position_embeddings=64)
_HEADS = _SIZES | dict(num_attention_heads=4)
_ROBERTA = _HEADS | dict(max_position_embeddings=66)  # two positions are reserved
_GQA = _SIZES | dict(num_attention_heads=6, num_key_value_heads=3)
_IDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
_MODERN = dict(local_attention=4, cls_token_id=2, sep_token_id=3)
_QWEN2 = _GQA | _IDS | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
_GEMMA = _GQA | _IDS | dict(head_dim=4, sliding_window=4, tie_word_embeddings=True)
_MIXTRAL = _GQA | _IDS | dict(num_local_experts=5, num_experts_per_tok=2)
_QWEN3_MOE = _GQA | _IDS | dict(head_dim=4, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3)
_DEBERTA = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_buckets=4)
_BART = dict(
    vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=6,
    encoder_ffn_dim=20, decoder_ffn_dim=18, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    decoder_start_token_id=3, forced_eos_token_id=None,
)  # fmt: skip
_T5 = dict(
    vocab_size=61, d_model=24, d_kv=5, d_ff=20, num_layers=3, num_decoder_layers=2, num_heads=4, eos_token_id=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=6, decoder_start_token_id=0,
    initializer_factor=0.1,  # T5 starts with outputs far larger than the others'
)  # fmt: skip
_IMAGE = dict(image_size=8, patch_size=4)
_VIT = _IMAGE | {key: _HEADS[key] for key in _HEADS if key not in ("vocab_size", "max_position_embeddings")}
_DINO = {key: _VIT[key] for key in _VIT if key != "intermediate_size"} | dict(mlp_ratio=1)
_SHARED_BIAS = dict(
    use_shared_relative_position_bias=True, use_absolute_position_embeddings=True, use_mean_pooling=False
)
TINY = {
    "bert": lambda: transformers.BertConfig(**_HEADS),
    "roberta": lambda: transformers.RobertaConfig(**_ROBERTA),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_ROBERTA),
    "camembert": lambda: transformers.CamembertConfig(**_ROBERTA),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=61, dim=24, n_layers=3, n_heads=4, hidden_dim=20, max_position_embeddings=64
    ),
    "electra": lambda: transformers.ElectraConfig(**_HEADS, embedding_size=16),
    "albert": lambda: transformers.AlbertConfig(**_HEADS, embedding_size=16),
    "albert-groups": lambda: transformers.AlbertConfig(
        **_HEADS, embedding_size=16, num_hidden_groups=2, inner_group_num=2
    ),
    "deberta-v3": lambda: transformers.DebertaV2Config(
        **_HEADS, **_DEBERTA, share_att_key=True, position_biased_input=False
    ),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **_HEADS, **_DEBERTA, share_att_key=True, position_biased_input=False, conv_kernel_size=3, conv_act="gelu"
    ),
    "deberta-own": lambda: transformers.DebertaV2Config(**_HEADS, **_DEBERTA, share_att_key=False, type_vocab_size=2),
    "deberta-absolute": lambda: transformers.DebertaV2Config(**_HEADS),
    "electra-wide": lambda: transformers.ElectraConfig(**_HEADS, embedding_size=24),
    "mpnet": lambda: transformers.MPNetConfig(**_ROBERTA),
    "modernbert": lambda: transformers.ModernBertConfig(**_HEADS, **_IDS, **_MODERN),
    "llama": lambda: transformers.LlamaConfig(**_GQA, pad_token_id=0),
    "llama-tied": lambda: transformers.LlamaConfig(**_GQA, pad_token_id=0, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_GQA, **_IDS, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**_QWEN2),
    "qwen3": lambda: transformers.Qwen3Config(**_GQA, **_IDS, head_dim=4),
    "smollm3": lambda: transformers.SmolLM3Config(**_GQA, **_IDS, no_rope_layer_interval=2),
    "mixtral": lambda: transformers.MixtralConfig(**_MIXTRAL),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_QWEN3_MOE, mlp_only_layers=[1]),
    "qwen3_moe-sparse": lambda: transformers.Qwen3MoeConfig(
        **_QWEN3_MOE, norm_topk_prob=True, decoder_sparse_step=2, tie_word_embeddings=True
    ),
    "olmo2": lambda: transformers.Olmo2Config(**_GQA, **_IDS, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**{k: v for k, v in _GEMMA.items() if k != "sliding_window"}),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_GEMMA),
    "phi3": lambda: transformers.Phi3Config(**_GQA, **_IDS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_inner=20, n_positions=64, **_IDS
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_HEADS, **_IDS),
    "bart": lambda: transformers.BartConfig(**_BART),
    "bart-scaled": lambda: transformers.BartConfig(**_BART, scale_embedding=True),
    "t5": lambda: transformers.T5Config(**_T5),
    "t5-gated": lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, ffn_dim=20, word_embed_proj_dim=24,
        max_position_embeddings=64, **_IDS,
    ),
    "vit": lambda: transformers.ViTConfig(**_VIT),
    "deit": lambda: transformers.DeiTConfig(**_VIT),
    "dinov2": lambda: transformers.Dinov2Config(**_DINO),
    "dinov2-swiglu": lambda: transformers.Dinov2Config(**_DINO, use_swiglu_ffn=True),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**_DINO, num_register_tokens=2),
    "beit-shared": lambda: transformers.BeitConfig(**_VIT, **_SHARED_BIAS),
    "beit": lambda: transformers.BeitConfig(**_VIT, use_relative_position_bias=True),
    "clip_vision_model": lambda: transformers.CLIPVisionConfig(**_VIT, projection_dim=10),
    "clip": lambda: transformers.CLIPConfig(vision_config=_VIT),
    "swin": lambda: transformers.SwinConfig(
        image_size=8, patch_size=1, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=3, mlp_ratio=1.5
    ),
}  # fmt: skip
HEADS = {  # every usual head of every row
    "bert": (
        "BertModel",
        "BertForSequenceClassification",
        "BertForMaskedLM",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForPreTraining",
    ),
    "roberta": (
        "RobertaModel",
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
    ),
    "xlm-roberta": ("XLMRobertaForSequenceClassification",),
    "camembert": ("CamembertForMaskedLM",),
    "distilbert": (
        "DistilBertModel",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertForQuestionAnswering",
    ),
    "electra": (
        "ElectraModel",
        "ElectraForMaskedLM",
        "ElectraForPreTraining",
        "ElectraForSequenceClassification",
        "ElectraForTokenClassification",
        "ElectraForQuestionAnswering",
    ),
    "electra-wide": ("ElectraForMaskedLM",),
    "albert": (
        "AlbertModel",
        "AlbertForMaskedLM",
        "AlbertForPreTraining",
        "AlbertForSequenceClassification",
        "AlbertForTokenClassification",
        "AlbertForQuestionAnswering",
    ),
    "albert-groups": ("AlbertModel", "AlbertForMaskedLM", "AlbertForSequenceClassification"),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2ForMaskedLM",
        "DebertaV2ForSequenceClassification",
        "DebertaV2ForTokenClassification",
        "DebertaV2ForQuestionAnswering",
    ),
    "deberta-v3": ("DebertaV2ForSequenceClassification",),
    "deberta-own": ("DebertaV2ForMaskedLM",),
    "deberta-absolute": ("DebertaV2ForSequenceClassification",),
    "mpnet": (
        "MPNetModel",
        "MPNetForMaskedLM",
        "MPNetForSequenceClassification",
        "MPNetForTokenClassification",
        "MPNetForQuestionAnswering",
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
        "ModernBertForQuestionAnswering",
    ),
    "llama": (
        "LlamaModel",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
    ),
    "llama-tied": ("LlamaForCausalLM",),
    "mistral": ("MistralModel", "MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForTokenClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForQuestionAnswering"),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"),
    "mixtral": (
        "MixtralModel",
        "MixtralForCausalLM",
        "MixtralForSequenceClassification",
        "MixtralForTokenClassification",
        "MixtralForQuestionAnswering",
    ),
    "qwen3_moe": ("Qwen3MoeModel", "Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"),
    "qwen3_moe-sparse": ("Qwen3MoeForCausalLM",),
    "olmo2": ("Olmo2Model", "Olmo2ForCausalLM"),
    "gemma": ("GemmaModel", "GemmaForCausalLM", "GemmaForSequenceClassification"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3_text": ("Gemma3TextModel", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "phi3": ("Phi3Model", "Phi3ForCausalLM", "Phi3ForSequenceClassification"),
    "gpt2": (
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
    ),
    "bart-scaled": ("BartForConditionalGeneration",),
    "bart": (
        "BartModel",
        "BartForConditionalGeneration",
        "BartForSequenceClassification",
        "BartForQuestionAnswering",
    ),
    "t5-gated": ("T5ForConditionalGeneration",),
    "t5": (
        "T5Model",
        "T5EncoderModel",
        "T5ForConditionalGeneration",
        "T5ForSequenceClassification",
        "T5ForTokenClassification",
        "T5ForQuestionAnswering",
    ),
    "gpt_neox": (
        "GPTNeoXModel",
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        "GPTNeoXForQuestionAnswering",
    ),
    "opt": ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"),
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassificationWithTeacher", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2-swiglu": ("Dinov2ForImageClassification",),
    "beit-shared": ("BeitForImageClassification",),
    "beit": ("BeitModel", "BeitForImageClassification"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "clip": ("CLIPForImageClassification",),
    "swin": ("SwinModel", "SwinForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
}
# transformers computes these models' norms, or their softmax, in float32 whatever the model's dtype.
FLOAT32 = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma", "gemma2", "gemma3_text", "phi3"}
FLOAT32 |= {"mixtral", "qwen3_moe", "qwen3_moe-sparse", "gpt_neox", "opt", "llama-tied", "t5", "t5-gated"}
FLOAT32 |= {"vit", "deit", "clip", "clip_vision_model", "beit", "beit-shared", "swin"}
CASES = [(family, head) for family, heads in HEADS.items() for head in heads]
WRITERS = ("LM", "LMHeadModel", "ForConditionalGeneration")
# One case of each model type: a classifier, and a language model, where there is one; else the last head.
CLASSIFIERS = {TINY[f]().model_type: (f, h) for f, h in sorted(CASES, key=lambda case: "SequenceC" in case[1])}
LANGUAGE_MODELS = {TINY[f]().model_type: (f, h) for f, h in sorted(CASES, key=lambda case: case[1].endswith(WRITERS))}


def pytest_collection_finish():
    """What was imported is no garbage, and need not be looked through."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if not DATA.is_dir():
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason=f"no real data at {DATA}"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection but to this machine fails the test that tried it, even if what is tested hides the error."""
    tried = []

    def guarded(connect):
        def run(self, address):
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                tried.append(address)
                raise AssertionError(f"a test tried to reach {address}")
            return connect(self, address)

        return run

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    yield tried
    assert not tried, f"a test tried to reach {tried}"


@pytest.fixture(scope="session", autouse=True)
def _quick():
    """What would be most of a tiny run is left out of it.

    The process that checks a folder is forked, and no interpreter starts. Candidate cuts are compared on 32 samples,
    not on all that the tests have. Accelerate does not look through all objects for garbage after every phase.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibprune.folders.subprocess", fresh)
        patch.setattr("ibprune.cutting.PROBE", 32)
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture
def own_process(monkeypatch):
    """The process that checks a folder is started as a user's run starts it."""
    monkeypatch.setattr("ibprune.folders.subprocess", subprocess)


def build(family: str, head: str, *, dtype=torch.float64, seed: int = 0, **changes):
    """A tiny model, its config changed as told, with weights far from their initial values: biases and norms matter."""
    torch.manual_seed(seed)
    config = TINY[family]()
    config = type(config).from_dict(config.to_dict() | changes) if changes else config
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, head)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def written(model, *, beams: int, cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What an encoder-decoder writes after a few given tokens, and the logits of every step."""
    found = model.generate(
        token_ids(), decoder_input_ids=token_ids(length=9).flip(1), max_new_tokens=8, do_sample=False, num_beams=beams,
        use_cache=cache, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def token_ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs_of(model, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(model.dtype)}
    return complete(model, {"input_ids": with_end(model, token_ids() if ids is None else ids)})


@torch.no_grad()
def outputs(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(**inputs_of(model, ids))[0]


@torch.no_grad()
def counted_macs(model, inputs: dict[str, torch.Tensor]) -> int:
    """Multiply-accumulates that torch counts, without the frequencies of rotary positions: older transformers multiply
    matrices for them, and no weight or unit has a part in it."""
    counter = FlopCounterMode(display=False, depth=None)
    with counter:
        model(**inputs)
    counts = counter.get_flop_counts()
    turning = sum(sum(found.values()) for path, found in counts.items() if path.rpartition(".")[2].startswith("rotary"))
    return (counter.get_total_flops() - turning) // 2


def random_keep(sites, seed: int) -> dict[str, tuple[int, ...]]:
    """Different widths at every site; seed 0 keeps the least of everything but the sub-layers. The vocabulary stays."""
    rng = random.Random(seed)
    keep = {}
    for name, site in sites.items():
        least = 1 if site.kind == "layers" else site.min_units
        if site.kind == "vocab":
            keep[name] = tuple(range(site.n_units))
            continue
        count = least if seed == 0 else rng.randint(site.min_units, site.n_units)
        keep[name] = tuple(sorted(rng.sample(range(site.n_units), count)))
    return keep


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Saved tiny dense models by head name."""
    root = tmp_path_factory.mktemp("dense")
    found = {}
    for family, head in (
        ("bert", "BertModel"),
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertForMaskedLM"),
        ("llama-tied", "LlamaForCausalLM"),
        ("bart", "BartForSequenceClassification"),
        ("bart", "BartForConditionalGeneration"),
        ("t5", "T5EncoderModel"),
        ("t5", "T5ForSequenceClassification"),
    ):
        folder = root / head
        build(family, head, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[head] = str(folder)
    return found


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> str:
    """A folder with a labelled task that a tiny model can learn: is there a kind word?"""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("reviews")
    for split, rows in (("train", 160), ("dev", 64)):
        lines = ["sentence\tlabel"]
        for i in range(rows):
            words = rng.sample([w for w in WORDS if w not in ("good", "fine", "warm")], rng.randint(4, 9))
            if i % 2:
                words.insert(rng.randrange(len(words)), rng.choice(("good", "fine", "warm")))
            lines.append(f"{' '.join(words)}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> str:
    """A text file of short stories."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    path.write_text("<|endoftext|>".join(" ".join(rng.choices(WORDS, k=30)) for _ in range(80)))
    return str(path)
