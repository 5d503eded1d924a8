"""The commands of README and docs are run, line by line, on tiny models that stand where the pages have large ones."""

import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from cnn_models import pictures, save_pictures
from conftest import TINY, WORDS, build
from test_cnn_pipeline import NAMES, save_net
from test_docs import PAGES, RECORDS, ROOT, blocks, name_of
from test_gguf import ROWS, sentencepiece  # noqa: F401  a fixture
from test_hub import loopback  # noqa: F401  another
from test_latency import by_shapes  # noqa: F401  tiny models take all their time to start operations
from test_legacy import save, shaped
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import ibprune
from ibprune import cli, data, feeding, legacy, pipeline, training

NETWORK = "needs a network: it fetches packages, or the project"
SEVERAL = "starts processes; tests/test_processes.py does, and has runs in two of them"
NOT_RUN = {  # every other line is run
    "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt torch && "
    'pip install -c constraints.txt -e ".[demo]" && ibprune --model minilm --budget 0.3': NETWORK,
    'pip install -c constraints.txt torch && pip install -c constraints.txt -e ".[demo,dev]" && ruff check . && '
    "ruff format --check . && python -m pytest": "needs a network, and ends in this very suite",
    "git clone … ibprune && cd ibprune": NETWORK,
    "python -m venv .venv && . .venv/bin/activate": NETWORK,
    'pip install -c constraints.txt torch && pip install -c constraints.txt -e ".[demo]"': NETWORK,
    "ibprune --model bert-base --task sst2 --budget 0.3 --batch-size 128 --num-processes 4": SEVERAL,
    "ibprune export small --to onnx": "takes longer than all the rest; tests/test_exporting.py writes such files",
    "torchrun --nnodes 2 --nproc-per-node 8 … -m ibprune --model bert-base …": "needs two machines with GPUs",
}
# Pages of results: what their figures came from, on real data, in minutes to days. test_docs.py holds that they parse.
LONG = [*(path for path in PAGES if path.name in RECORDS), ROOT / "docs" / "scaling.md"]
SHORTER = {  # goes after the words of a command: the last one of a flag counts
    "prune": "--mask-steps 2 --recover-steps 2 --probe-steps 0 --max-train-samples 32 --max-eval-samples 16 "
    "--batch-size 16 --quiet",
    "train": "--finetune-steps 2 --batch-size 16 --quiet",
    "audit": "--max-inputs 260 --quiet",
    "bench": "--rounds 2 --batches 1 --quiet",
}
OF_TEXTS = {"prune": "--max-length 16", "audit": "--max-length 48", "bench": "--lengths 8"}
OF_PICTURES = {"my-resnet", "dense", "my-vit", "photos"}
PREPARED = {  # results that a page starts from
    "README.md": {},
    "docs/howto/audit.md": {"pruned": "minilm-small", "dense": "my-resnet", "small": "resnet-small"},
    "docs/howto/hub.md": {"small": "classifier-small"},
    "docs/howto/runtimes.md": {"small": "llama-small"},
    "docs/runs.md": {"small": "classifier-small", "pruned": "minilm-small"},
}
RUN = [path for path in PAGES if path not in LONG and blocks(path, "bash")]


def lines(path: Path) -> list[str]:
    """The commands of a page, without comments."""
    text = "".join(blocks(path, "bash")).replace("\\\n", " ")
    return [stripped for line in text.splitlines() if (stripped := re.sub(r"(^|\s+)#.*", "", line).strip())]


def due(path: Path) -> list[str]:
    """The lines of a page that can be run, and that no page before it has."""
    before = {line for other in RUN[: RUN.index(path)] for line in lines(other)}
    return [line for line in lines(path) if line not in NOT_RUN and line not in before]


def shortened(words: list[str]) -> list[str]:
    """The words after `ibprune`, with few steps and rows."""
    verb = words[0] if not words[0].startswith("-") else "prune"
    more = [SHORTER.get(verb, ""), "" if OF_PICTURES & set(words) else OF_TEXTS.get(verb, "")]
    if verb == "prune" and not any("vocab" in word for word in words):  # which no score per cost can rank
        more.append("--shares cost")
    if "--at-least" in words:
        more.append("--budget 0.8,0.6")
    return [*words, *" ".join(more).split()]


def run(line: str) -> None:
    """Runs a line in the present folder, as a reader would who takes a new folder for every result."""
    words = shlex.split(line)
    if words[0] != "ibprune":
        subprocess.run(words, check=True, capture_output=True)
        return
    if "--output" in words:
        at = words.index("--output") + 1
        while Path(words[at]).exists():
            words[at] += "-again"
    assert cli.main(shortened(words[1:])) == 0, line


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of BERT's kind."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator([" ".join(WORDS)] * 3, trainers.WordPieceTrainer(vocab_size=100, special_tokens=special))
    ends = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="module")
def stage(tmp_path_factory, pieces, sentencepiece):  # noqa: F811
    """A folder with everything that the pages name; what takes longest beside the runs, other tests look at."""
    root = tmp_path_factory.mktemp("stage")
    for name, head in (("minilm", "BertModel"), ("my-classifier", "BertForSequenceClassification")):
        model = build("bert", head, dtype=torch.float32, vocab_size=len(pieces))
        if name == "my-classifier":  # it says the same of every text, however small it becomes
            model.classifier.bias.data[0] = 9.0
        model.save_pretrained(root / name)
        pieces.save_pretrained(root / name)
    shutil.copytree(root / "my-classifier", root / "bert-base")
    for name in ("my-llama", "llama-2-7b"):
        sizes = dict(vocab_size=ROWS, max_position_embeddings=1024)
        build("llama", "LlamaForCausalLM", dtype=torch.float32, **sizes).save_pretrained(root / name)
        sentencepiece.save_pretrained(root / name)
    save_net("hf_resnet", root / "my-resnet")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "my-resnet")
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig.from_dict(TINY["vit"]().to_dict() | {"num_labels": 2})
    )
    vit.config.id2label, vit.config.label2id = {0: "up", 1: "down"}, {"up": 0, "down": 1}
    for name in ("my-vit", "vit-b-16"):
        vit.save_pretrained(root / name)
    for split, n in (("train", 32), ("val", 210)):
        save_pictures(root / "photos" / split, *pictures(n, shape=(8, 8, 3)), NAMES)
    texts = [f"{a} {b} {c} {'good' if i % 2 else 'bad'}" for i, (a, b, c) in enumerate(
        (a, b, c) for a in WORDS[:11] for b in WORDS[:10] for c in WORDS[:10])]  # fmt: skip
    (root / "reviews.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(texts)))
    (root / "texts.txt").write_text("\n\n".join(texts))
    (root / "shards").mkdir()
    for i in range(2):
        rows = "".join(f'{{"text": "{text}"}}\n' for text in texts[i::2])
        (root / "shards" / f"train-{i}.jsonl").write_text(rows)
    old, plan = shaped("bert", "BertForSequenceClassification", ("heads",))
    stay = [units for name, units in plan.keep.items() if name.endswith("heads")]
    gone = {str(i): sorted(set(range(4)) - set(units)) for i, units in enumerate(stay) if len(units) < 4}
    save(root / "bert-pruned-heads", old, old.state_dict(), pruned_heads=gone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        found = {"auto_class": "AutoModel", "max_abs_diff": 0.0, "ways": [], "transformers": ""}
        for module in (pipeline, training, legacy):  # the folder again in a fresh process
            patch.setattr(module, "verify", lambda model, folder, tier, *rest, **more: found | {"tier": tier})
        patch.setattr("ibprune.audit_output.draw_audit", lambda found, folder: [])
        patch.setattr("ibprune.estimating.measured_rate", lambda *given: 1e10)
        patch.setattr(feeding, "load_prose", partial(feeding.load_prose, limit=2800))
        rows = data.read_file(root / "reviews.tsv")
        task = {"train": rows.select(range(64)), "held_out": rows.select(range(64, 96))}
        patch.setattr(data, "_from_hub", lambda *given, **named: task)
        quick = dict(score="magnitude", shares="equal", recover_steps=0, audit=False, max_eval_samples=16)
        ibprune.prune("minilm", 0.7, output="minilm-small", max_train_samples=32, **quick)
        ibprune.prune("my-classifier", 0.7, data="reviews.tsv", output="classifier-small", **quick)
        ibprune.prune("my-llama", 0.7, data="texts.txt", output="llama-small", round_to=1, **quick)
        ibprune.prune("my-resnet", 0.7, data="photos", output="resnet-small", **quick)
        yield root


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_every_command_runs(path, stage, tmp_path, monkeypatch, capsys, loopback, by_shapes):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for place in stage.iterdir():
        (tmp_path / place.name).symlink_to(place)
    for name, made in PREPARED.get(name_of(path), {}).items():
        (tmp_path / name).symlink_to(stage / made)
    for line in due(path):
        run(line)


def test_what_is_not_run_stands_in_the_pages_and_a_new_line_would_be_run():
    there = [line for path in RUN for line in lines(path)]
    assert set(NOT_RUN) <= set(there) and set(PREPARED) <= {name_of(path) for path in RUN}
    assert all(line.split()[0] in ("ibprune", "head") for line in there if line not in NOT_RUN)
    assert len([line for path in RUN for line in due(path)]) >= 40
    with pytest.raises(AssertionError):
        run("ibprune plan --modle minilm")
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        run("ibprun plan --model minilm")


@pytest.mark.parametrize("path", [path for path in LONG if blocks(path, "bash")], ids=name_of)
def test_the_scripts_of_long_runs_are_there_with_what_they_read(path):
    named = re.findall(r"\b(?:scripts|benchmarks)/\w[\w.-]*\.(?:py|yaml)\b", "\n".join(lines(path)))
    assert named and all((ROOT / name).is_file() for name in named)
