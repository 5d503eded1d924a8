"""Tiny models of every family row, a tokenizer made here, and the guard against the network."""

import os
import random
import socket
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 beside other work

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = "the a film story actor plot good bad fine dull warm cold long short is was not very and but it".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]

_BERT = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20)
_LLAMA = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3)
TINY = {
    "bert": lambda: BertConfig(**_BERT, max_position_embeddings=64),
    "llama": lambda: LlamaConfig(**_LLAMA, intermediate_size=20, max_position_embeddings=64, pad_token_id=0),
    "llama-tied": lambda: LlamaConfig(
        **_LLAMA, intermediate_size=20, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=True
    ),
}
HEADS = {  # every usual head of every row
    "bert": (
        "BertModel",
        "BertForSequenceClassification",
        "BertForMaskedLM",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForPreTraining",
    ),
    "llama": ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification"),
    "llama-tied": ("LlamaForCausalLM",),
}
CASES = [(family, head) for family, heads in HEADS.items() for head in heads]


def pytest_collection_modifyitems(items):
    if not DATA.is_dir():
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason=f"no real data at {DATA}"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection but to this machine fails the test that tried it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def build(family: str, head: str, *, dtype=torch.float64, seed: int = 0):
    """A tiny model with weights far from their initial values, so that biases and norms matter."""
    torch.manual_seed(seed)
    config = TINY[family]()
    config._attn_implementation = "eager"
    model = getattr(transformers, head)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def token_ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model, ids=None) -> torch.Tensor:
    return model(input_ids=token_ids() if ids is None else ids)[0]


def random_keep(sites, seed: int) -> dict[str, tuple[int, ...]]:
    """Different widths at every site; seed 0 keeps the least of everything but the sub-layers."""
    rng = random.Random(seed)
    keep = {}
    for name, site in sites.items():
        least = 1 if site.kind == "layers" else site.min_units
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
