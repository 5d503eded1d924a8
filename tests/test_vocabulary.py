"""Cut vocabularies: rewritten tokenizers, exact rows in every family, and whole runs."""

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import CASES, DATA, FLOAT32, LANGUAGE_MODELS, TINY, build, outputs, token_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

import ibprune
from ibprune import candidates, cli, cutting
from ibprune.candidates import probe_loss
from ibprune.collating import Collate
from ibprune.costs import count_params, macs_model, params_model
from ibprune.data import TextData, load_data
from ibprune.embeddings import cut_vocab_, factorize_, named_rows
from ibprune.errors import BadData, BadRecipe, IBPruneError, PlanMismatch, UnsupportedModel
from ibprune.folders import tier_of, verify, write_model
from ibprune.inject import MASKS, inject_
from ibprune.inputs import encode_inputs
from ibprune.losses import Objective, _word_means, dense_batch, distill_loss, forward
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.structure import choose_kinds
from ibprune.surgery import compact_
from ibprune.vocabulary import compare_tokenizers, keep_rows, rank_rows

WORDED = [
    model_type
    for model_type in LANGUAGE_MODELS
    if any(group.kind == "vocab" for group in find_family(model_type).groups)
]
SYLLABLES = "ba be bi bo bu da de di do du ga ge gi go gu".split()
KINDS = ("wordpiece", "byte-level", "byte-fallback", "unigram")
ODD = ["", "zzz", "ba  ba\tdu", "Ünïcödé 漢字 🙂", "bag##be ▁gu <0x41> [unused]", "dubadubadubadu" * 9]


def some_texts(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(60)]
    return [" ".join(rng.choices(words, weights=range(60, 0, -1), k=rng.randint(4, 12))) for _ in range(n)]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer of each kind, with about 150 tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    texts = some_texts(0, 300)
    options = {"special_tokens": special, "show_progress": False}
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        core.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=150, **options))
    elif kind == "byte-level":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, **options))
    elif kind == "byte-fallback":  # as SentencePiece models are converted: every pair that makes a token is a merge
        spaced = [text.replace(" ", " ▁") for text in texts]
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.train_from_iterator(spaced, trainers.BpeTrainer(vocab_size=150, show_progress=False))
        learnt = list(json.loads(core.to_str())["model"]["vocab"])
        tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(learnt, key=len)
        vocab = {token: i for i, token in enumerate(tokens)}
        merges = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
        core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(parts)
        core.add_special_tokens(special)
    else:
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        core.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **options))
    marks = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """A tokenizer and its rows, best first, ranked on its own texts."""
    tokenizer = make_tokenizer(request.param)
    counts = torch.zeros(len(tokenizer) + 5)  # five rows without a token, as padded embeddings have
    for ids in tokenizer(some_texts(0, 300))["input_ids"]:
        counts += torch.bincount(torch.tensor(ids), minlength=len(counts))
    ranked = rank_rows(tokenizer, counts)
    return tokenizer, ranked.scores.argsort(descending=True).tolist(), ranked.n_needed


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_kept_tokens_are_made_as_before_and_no_text_becomes_unknown(share, trained, tmp_path):
    tokenizer, order, needed = trained
    rows = sorted(order[: needed + int(share * (len(order) - 5 - needed))])
    small = keep_rows(tokenizer, rows)
    texts = some_texts(0, 80) + some_texts(1, 40) + ODD
    alike = 0
    for text in texts:
        before, after = tokenizer(text)["input_ids"], [rows[i] for i in small(text)["input_ids"]]
        if set(before) <= set(rows):
            assert after == before
            alike += 1
        assert after.count(tokenizer.unk_token_id) <= before.count(tokenizer.unk_token_id)
        assert (after[0], after[-1]) == (before[0], before[-1])
        if not before.count(tokenizer.unk_token_id):
            found, expected = (t.decode(t(text)["input_ids"], skip_special_tokens=True) for t in (small, tokenizer))
            assert found == expected
    assert 0 < alike < len(texts) if share == 0.0 else alike == len(texts) or share < 1.0
    specials = tokenizer.all_special_tokens
    assert [rows[i] for i in small.convert_tokens_to_ids(specials)] == tokenizer.convert_tokens_to_ids(specials)
    batch = small(["ba", "ba du ga"], ["du", "go"], padding=True)
    assert {batch["input_ids"][0][-1], small.pad_token_id} == {small.convert_tokens_to_ids("<pad>")}
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == small.get_vocab() and len(small) == len(rows)
    assert again(texts)["input_ids"] == small(texts)["input_ids"]
    compared = compare_tokenizers(tokenizer, small, texts)
    assert compared["rows"] == [len(tokenizer), len(rows)]
    assert compared["tokens_per_text"][0] <= compared["tokens_per_text"][1]
    assert compared["unknown"][0] >= compared["unknown"][1]


def test_rows_without_a_token_go_first_and_needed_ones_never(trained):
    tokenizer, order, needed = trained
    assert set(order[-5:]) == set(range(len(tokenizer), len(tokenizer) + 5))
    first = set(order[:needed])
    assert set(tokenizer.all_special_ids) <= first
    unused = rank_rows(tokenizer, torch.zeros(len(order)), named=(len(order) - 1,))
    assert unused.n_needed == needed + 1
    assert set(unused.scores.argsort(descending=True)[: needed + 1].tolist()) == first | {len(order) - 1}


def test_a_token_of_bpe_counts_for_its_parts():
    tokenizer = make_tokenizer("byte-level")
    counts = torch.zeros(len(tokenizer))
    longest = max(tokenizer.get_vocab(), key=len)
    counts[tokenizer.convert_tokens_to_ids(longest)] = 1
    ranked = rank_rows(tokenizer, counts)
    for n in range(ranked.n_needed, ranked.n_needed + len(longest)):
        rows = sorted(ranked.scores.argsort(descending=True)[:n].tolist())
        small = keep_rows(tokenizer, rows)
        for token, i in small.get_vocab().items():
            if len(token) > 1 and token not in small.all_special_tokens:
                assert small(small.decode([i]), add_special_tokens=False)["input_ids"] == [i]
    named = rank_rows(tokenizer, 0 * counts, named=(tokenizer.convert_tokens_to_ids(longest),))
    small = keep_rows(tokenizer, sorted(named.scores.argsort(descending=True)[: named.n_needed].tolist()))
    assert small.convert_ids_to_tokens(small(longest.replace("Ġ", " "), add_special_tokens=False).input_ids) == [
        longest
    ]


def test_tokenizers_that_cannot_be_rewritten_are_refused(tokenizer):
    with pytest.raises(UnsupportedModel, match="WordLevel, whose words cannot be split"):
        rank_rows(tokenizer, torch.ones(len(tokenizer)))
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(UnsupportedModel, match="found the slow Slow"):
        rank_rows(slow, torch.ones(9))
    suffixed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(end_of_word_suffix="</w>")))
    with pytest.raises(UnsupportedModel, match="prefixes and suffixes"):
        rank_rows(suffixed, torch.ones(9))
    trained = make_tokenizer("wordpiece")
    with pytest.raises(BadData, match="do not belong together"):
        rank_rows(trained, torch.ones(10))
    with pytest.raises(PlanMismatch, match="'<pad>' to stay"):
        keep_rows(trained, range(1, len(trained)))


def random_plan(model, sites, seed: int) -> PruningPlan:
    """Different widths everywhere and a third of the vocabulary gone."""
    rng = random.Random(seed)
    keep = {}
    for name, site in sites.items():
        count = rng.randint(max(site.min_units, 1), site.n_units)
        keep[name] = tuple(sorted(rng.sample(range(site.n_units), count)))
    needed = named_rows(model)
    keep["vocab"] = tuple(sorted(needed | set(rng.sample(range(sites["vocab"].n_units), 40))))
    return PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)


def new_ids(rows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids in the cut vocabulary and the same tokens' ids in the whole one."""
    ids = torch.randint(4, len(rows), (2, 7), generator=torch.Generator().manual_seed(2))
    return ids, torch.tensor(rows)[ids]


@pytest.mark.parametrize("family,head", [case for case in CASES if TINY[case[0]]().model_type in WORDED])
def test_cut_rows_alone_leave_the_outputs_as_they_are(family, head):
    model = build(family, head)
    sites = find_sites(model)
    plan = random_plan(model, sites, 1)
    rows = plan.keep["vocab"]
    keep = {name: tuple(range(site.n_units)) for name, site in sites.items()} | {"vocab": rows}
    ids, old = new_ids(rows)
    expected = outputs(model, old)
    params, macs = params_model(model, sites), macs_model(model, sites, length=7)
    compact_(model, PruningPlan(plan.model_type, plan.n_units, keep))
    found = outputs(model, ids)
    if expected.shape[-1] == 61:  # a narrower product of matrices may round otherwise in the last bit
        expected = expected[..., list(rows)]
        assert (found - expected).abs().max() < 1e-12
    else:
        assert torch.equal(found, expected)
    kept = plan.n_units | {"vocab": len(rows)}
    assert params(kept) == count_params(model)
    assert macs(kept) == counted_macs(model, ids)
    assert model.config.vocab_size == len(rows) == model.get_input_embeddings().num_embeddings
    if model.get_output_embeddings() is not None and expected.shape[-1] == len(rows):
        assert model.get_output_embeddings().weight.shape[0] == len(rows)
    assert tier_of(model) == "vanilla"


def counted_macs(model, ids: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids[:1])
    return counter.get_total_flops() // 2


def find_units(model) -> dict[str, int]:
    return {name: site.n_units for name, site in find_sites(model).items()}


@pytest.mark.parametrize("model_type", WORDED)
def test_all_kinds_at_once_cost_what_is_predicted_and_reload(model_type, tmp_path):
    family, head = LANGUAGE_MODELS[model_type]
    model = build(family, head, dtype=torch.float32)
    if find_family(model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    plan = random_plan(model, sites, 5)
    masks = inject_(model, sites)
    masks.set_keep(plan.keep)
    ids, old = new_ids(plan.keep["vocab"])
    expected = outputs(model, old)
    expected = expected[..., list(plan.keep["vocab"])] if expected.shape[-1] == 61 else expected
    params, macs = params_model(model, sites), macs_model(model, sites, length=7)
    compact_(model, plan)
    assert torch.allclose(outputs(model, ids), expected, atol=1e-4 if family in FLOAT32 else 1e-5)
    assert params(plan.kept()) == count_params(model)
    assert macs(plan.kept()) == counted_macs(model, ids)
    model(input_ids=ids)[0].square().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    write_model(model, None, plan, tmp_path)
    assert torch.allclose(outputs(ibprune.load(tmp_path), ids), outputs(model, ids), atol=1e-5)
    assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("head", ["BertForMaskedLM", "RobertaForMaskedLM", "LlamaForCausalLM", "DistilBertForMaskedLM"])
def test_untied_outputs_lose_the_same_rows(head):
    family = {"BertForMaskedLM": "bert", "RobertaForMaskedLM": "roberta", "LlamaForCausalLM": "llama"}.get(
        head, "distilbert"
    )
    config = TINY[family]()
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).double().eval()
    rows = tuple(sorted(set(range(0, 61, 2)) | named_rows(model)))
    ids, old = new_ids(rows)
    expected = outputs(model, old)[..., list(rows)]
    cut_vocab_(model, rows)
    assert (outputs(model, ids) - expected).abs().max() < 1e-12
    assert len(rows) not in (61,) and all(61 not in p.shape for p in model.parameters())


def test_the_config_names_its_tokens_by_their_new_ids():
    model = build("gpt2", "GPT2LMHeadModel")
    model.config.eos_token_id = model.generation_config.eos_token_id = [3, 50]
    model.generation_config.pad_token_id = 40
    assert named_rows(model) == {0, 2, 3, 40, 50}
    with pytest.raises(PlanMismatch, match="the row 40 "):
        cut_vocab_(model, (0, 2, 3, 50))
    assert model.config.vocab_size == 61
    cut_vocab_(model, (0, 2, 3, 40, 50, 60))
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, [2, 4])
    assert model.generation_config.pad_token_id == 3 and model.generation_config.eos_token_id == [2, 4]


def test_positions_that_count_from_the_padding_s_id_stay():
    model = build("roberta", "RobertaModel")
    model.config.pad_token_id = model.embeddings.padding_idx = model.embeddings.word_embeddings.padding_idx = 5
    assert named_rows(model) >= set(range(6))
    assert not named_rows(build("bert", "BertModel")) - {0}


@pytest.fixture(scope="module")
def spelt(tmp_path_factory):
    """Dense models with a WordPiece tokenizer, and a task: is there a `ga`?"""
    root = tmp_path_factory.mktemp("spelt")
    tokenizer = make_tokenizer("wordpiece")
    found = {}
    for family, head in (("bert", "BertModel"), ("bert", "BertForSequenceClassification"), ("gpt2", "GPT2LMHeadModel")):
        torch.manual_seed(0)
        config = TINY[family]()
        config.vocab_size, config.pad_token_id = len(tokenizer) + 2, tokenizer.pad_token_id
        getattr(transformers, head)(config).save_pretrained(root / head)
        tokenizer.save_pretrained(root / head)
        found[head] = str(root / head)
    (root / "data").mkdir()
    for split, seed, rows in (("train", 3, 160), ("dev", 4, 240)):
        texts = some_texts(seed, rows)
        lines = ["sentence\tlabel", *(f"{text}\t{int('ga' in text.split())}" for text in texts)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return found | {"data": str(root / "data")}


SHORT = dict(mask_steps=4, recover_steps=3, batch_size=16, max_length=32, seed=3)


@pytest.mark.parametrize(
    "head,kinds,shares,keep",
    [
        # equal shares: after so few steps a probe may rightly spare the rows where others can go
        ("BertForSequenceClassification", "heads,ffn,embedding_rank,vocab", "equal", 0.5),
        ("BertForSequenceClassification", "vocab", "probe", 0.9),
        ("BertModel", "ffn,hidden,vocab", "equal", 0.5),
        ("BertModel", "vocab,embedding_rank", "equal", 0.8),
        ("BertModel", "vocab", "probe", 0.9),
    ],
)
def test_a_run_that_cuts_the_vocabulary(head, kinds, shares, keep, spelt, tmp_path):
    out = tmp_path / "out"
    options = SHORT | {"kinds": kinds, "shares": shares, "audit": kinds.startswith("heads")}  # one goes through it
    result = ibprune.prune(spelt[head], keep, data=spelt["data"], output=str(out), **options)
    report = result.report
    rows = result.plan.keep["vocab"]
    assert len(rows) < result.plan.n_units["vocab"] == len(AutoTokenizer.from_pretrained(spelt[head])) + 2
    assert report["budget"]["achieved"] <= report["budget"]["limit"]
    assert report["pruned"]["params"] == sum(p.numel() for p in result.model.parameters())
    assert report["kept"]["vocab"] == len(rows) / result.plan.n_units["vocab"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert report["vocabulary"]["rows"] == [result.plan.n_units["vocab"] - 2, len(tokenizer)]
    assert len(tokenizer) == len(rows) == result.model.config.vocab_size
    assert result.model.config.pad_token_id == tokenizer.pad_token_id
    assert report["vocabulary"]["unknown"][1] <= report["vocabulary"]["unknown"][0]
    assert "vocabulary" in (out / "README.md").read_text() and PruningPlan.load(out / "plan.json") == result.plan
    batch = tokenizer(["ba du", "ga go gu"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(ibprune.load(out)(**batch)[0], result.model(**batch)[0], atol=1e-5)
    assert report["verify"]["tier"] == ("vanilla" if kinds == "vocab" else "remote_code")


def test_a_short_recovery_says_how_many_rows_stay(spelt, tmp_path, monkeypatch):
    """Candidates are the masked model at first, rows and all; the one with the least loss is what the run cuts."""
    tried, masked = [], []

    def recovered_loss(student, structure, choice, settings, *, read):
        at_once = candidates.recovered_loss(student, structure, choice, replace(settings, steps=0), read=read)
        masks, batches = getattr(student, MASKS), choice.batches
        loss_of = probe_loss(student, masks, choice.judge, batches, choice.objective, choice.accelerator, read=read)

        def fewest_rows(keep):
            tried.append(keep)
            masked.append((at_once(keep), loss_of(keep, math.inf)))
            return len(keep["vocab"])

        return fewest_rows

    monkeypatch.setattr(cutting, "recovered_loss", recovered_loss)
    options = SHORT | {"kinds": "heads,ffn,vocab", "probe_steps": 2, "score": "fisher", "audit": False, "round_to": 1}
    head = "BertForSequenceClassification"
    plan = ibprune.prune(spelt[head], 0.5, data=spelt["data"], output=str(tmp_path / "out"), **options).plan
    least = min(tried, key=lambda keep: len(keep["vocab"]))
    assert len({len(keep["vocab"]) for keep in tried}) > 2 and plan.keep["vocab"] == least["vocab"]
    for kind in ("heads", "ffn"):  # which of them is asked again, on the new tokens
        assert len({sum(len(keep[x]) for x in keep if x.endswith(kind)) for keep in (plan.keep, least)}) == 1
    assert [one for one, _ in masked] == pytest.approx([other for _, other in masked], rel=1e-4)


@pytest.mark.parametrize("kinds", ["ffn,vocab", "vocab"])
def test_a_cut_vocabulary_loads_without_code_where_that_is_asked_for(kinds, spelt, tmp_path):
    out = tmp_path / "out"
    options = SHORT | {"kinds": kinds, "shares": "equal", "vanilla": True, "audit": False}
    result = ibprune.prune(spelt["BertForSequenceClassification"], 0.9 if kinds == "vocab" else 0.8,
                           data=spelt["data"], output=str(out), **options)  # fmt: skip
    assert len(result.plan.keep["vocab"]) < result.plan.n_units["vocab"]
    assert result.report["verify"]["tier"] == "vanilla" and not list(out.glob("*.py"))
    assert result.report["budget"]["achieved"] <= result.report["budget"]["limit"]


def test_an_encoder_is_distilled_word_by_word_where_the_tokens_differ(spelt):
    tokenizer = AutoTokenizer.from_pretrained(spelt["BertModel"])
    model = ibprune.load(spelt["BertModel"])
    ranked = rank_rows(tokenizer, torch.zeros(model.config.vocab_size))
    small = keep_rows(tokenizer, sorted(ranked.scores.argsort(descending=True)[: ranked.n_needed + 9].tolist()))
    data = TextData("texts", None, None, ("text",))
    rows = [{"text": text} for text in (*some_texts(0, 3), "ba", "")]
    batch = Collate(small, data, 64, tokenizer)(rows)
    theirs = dense_batch(batch)
    assert batch["input_ids"].shape[1] > theirs["input_ids"].shape[1]
    assert torch.equal(batch["words"].amax(1), theirs["words"].amax(1)) and theirs["words"].max() > 2
    objective = Objective("encoder")
    same = theirs | {f"dense_{key}": value for key, value in theirs.items()}
    with torch.no_grad():
        out = forward(model, theirs)
        assert distill_loss(objective, out, forward(model, dense_batch(same)), same).abs().max() < 1e-5
        spelt_out = forward(model, batch | {"input_ids": batch["input_ids"] % 5})
        words = [(theirs["words"][0] == 0), (batch["words"][0] == 0)]
        means = [o.last_hidden_state[0][w].mean(0) for o, w in zip((out, spelt_out), words)]
        far = distill_loss(objective, spelt_out, out, batch)
    assert far.shape == (5,) and torch.isfinite(far).all() and (far > 0.01).all() and sum(words[1]) > sum(words[0])
    found, there = _word_means(spelt_out.last_hidden_state, batch["words"], 1 + int(batch["words"].max()))
    assert torch.allclose(found[0, 0], means[1], atol=1e-6) and there[:, 0].tolist() == [1, 1, 1, 1, 0]


def test_a_tokenizer_that_makes_other_tokens_fails_the_check(spelt, tmp_path):
    model = ibprune.load(spelt["BertModel"])
    tokenizer = AutoTokenizer.from_pretrained(spelt["BertModel"])
    sites = find_sites(model)
    plan = PruningPlan("bert", find_units(model), {n: tuple(range(s.n_units)) for n, s in sites.items()})
    tier = write_model(model, tokenizer, plan, tmp_path)
    texts = some_texts(5, 5)
    assert verify(model, tmp_path, tier, tokenizer=tokenizer, texts=texts)["max_abs_diff"] <= 1e-5
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "b"}, "content": "d"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(PlanMismatch, match="the tokenizer in the folder"):
        verify(model, tmp_path, tier, tokenizer=tokenizer, texts=texts)


@pytest.mark.parametrize(
    "head,flags,message",
    [
        ("GPT2LMHeadModel", ["--kinds", "vocab", "--data", "{stories}"], "token by token"),
        ("BertForSequenceClassification", ["--kinds", "vocab", "--shares", "cost"], "use probe or equal"),
        ("BertForSequenceClassification", ["--kinds", "ffn,vocab", "--cost", "macs"], "cost no macs"),
        (
            "BertForSequenceClassification",
            ["--kinds", "ffn,vocab", "--scope", "blocks"],
            "cost no params of the blocks",
        ),
        ("BertForSequenceClassification", ["--kinds", "vocab", "--budget", "0.2"], "cutting vocab cannot go below"),
    ],
)
def test_what_cannot_be_asked_of_a_vocabulary_is_one_line(head, flags, message, spelt, stories, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--model", spelt[head], "--data", spelt["data"], "--budget", "0.8", "--quiet", "--output", str(out)]
    assert cli.main([*argv, *(flag.format(stories=stories) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not out.exists()


def test_no_tokenizer_and_words_that_cannot_split_are_one_line(folders, reviews, spelt, tmp_path, capsys):
    shutil.copytree(spelt["BertModel"], tmp_path / "bare", ignore=shutil.ignore_patterns("tok*"))
    for model, message in ((tmp_path / "bare", "expected a tokenizer"), (folders["BertModel"], "found WordLevel")):
        argv = ["--model", str(model), "--data", reviews, "--budget", "0.8", "--kinds", "vocab", "--quiet"]
        assert cli.main([*argv, "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_the_dry_run_knows_the_kind_and_the_default_leaves_it_out():
    config = TINY["gpt2"]()
    found = ibprune.plan(config, 0.7, kinds=("ffn", "vocab"), round_to=1)
    assert found["groups"]["vocab"]["cut"] and found["predicted"]["params"] <= 0.7 * found["dense"]["params"]
    assert not ibprune.plan(config, 0.7)["groups"]["vocab"]["cut"]
    with pytest.raises(BadRecipe, match="cost no params of the blocks"):  # as a run says
        ibprune.plan(config, 0.7, kinds=("ffn", "vocab"), scope="blocks")
    for family, head in (("bert", "BertModel"), ("gpt2", "GPT2LMHeadModel")):
        assert "vocab" not in choose_kinds(build(family, head), ())


def test_a_cut_vocabulary_is_audited_text_by_text_with_each_model_s_tokenizer(spelt, tmp_path):
    out, dense = tmp_path / "out", spelt["BertForSequenceClassification"]
    steps = dict(mask_steps=0, recover_steps=0, kinds="vocab", output=str(out))
    report = ibprune.prune(dense, 0.9, data=spelt["data"], **steps).report
    assert report["audit"] == "audit.json" and report["audit_note"] == ""
    written = json.loads((out / "audit.json").read_text())
    found = ibprune.audit(dense, str(out), data=spelt["data"])
    assert found["layers"] == written["layers"] and not [c for c in found["checks"] if c["status"] == "fail"]
    assert found["checks"][0]["status"] == "not_applicable"  # no layer reads equal inputs
    for layer in found["layers"]:
        assert layer["heads"] is None and layer["V_token"] is None and layer["V_LY"]["before"]["value"] is not None
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (dense, out)]
    data, n = load_data(spelt["data"], text_columns=(), label_column="", seed=0), 240
    inputs = encode_inputs(data, tokenizers[0], max_length=64, most=n, own=tokenizers[1])
    for mine, other in zip(inputs.batches, inputs.own, strict=True):
        texts = [[t.decode(row, skip_special_tokens=True) for row in batch["input_ids"]]
                 for t, batch in zip(tokenizers, (mine, other))]  # fmt: skip
        assert [text.split() for text in texts[0]] == [text.split() for text in texts[1]]
    for options, message in (({"tokens": 5}, "leave --tokens out"), ({"pooling": "random"}, "'random' takes the same")):
        with pytest.raises(IBPruneError, match=message):
            ibprune.audit(dense, str(out), data=spelt["data"], **options)


@pytest.mark.data
def test_a_trained_llama_writes_on_in_a_smaller_vocabulary(tmp_path):
    """stories260K without rarely used rows: the same story from the new tokenizer, with and without cache."""
    folder = DATA / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = (DATA / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:200]
    ids = [i for row in tokenizer(texts)["input_ids"] for i in row]
    dense = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=40, do_sample=False)
    named = named_rows(model) | set(dense[0].tolist())
    ranked = rank_rows(tokenizer, torch.bincount(torch.tensor(ids), minlength=512), named=named)
    rows = tuple(sorted(ranked.scores.argsort(descending=True)[:400].tolist()))
    small = keep_rows(tokenizer, rows)
    cut_vocab_(model, rows)
    batch = small("Once upon a time", return_tensors="pt")
    for cache in (True, False):
        made = model.generate(**batch, max_new_tokens=40, do_sample=False, use_cache=cache)
        assert small.decode(made[0]) == tokenizer.decode(dense[0])
    model.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = token_ids()
    assert torch.equal(outputs(again, ids), outputs(model, ids))


@pytest.mark.data
def test_real_vocabularies_lose_rows_and_no_text():
    folder = DATA / "tokenizers"
    files = [str(folder / "gpt2" / name) for name in ("gpt2_vocab.json", "gpt2_merges.txt")]
    texts = [line.split("\t")[0] for line in (DATA / "sst2" / "train.tsv").read_text().split("\n")[1:3001]]
    for tokenizer in (BertTokenizer.from_pretrained(folder / "bert-base-uncased"), GPT2Tokenizer(*files)):
        ids = tokenizer(texts)["input_ids"]
        counts = torch.bincount(torch.tensor([i for row in ids for i in row]), minlength=len(tokenizer))
        ranked = rank_rows(tokenizer, counts)
        rows = sorted(ranked.scores.argsort(descending=True)[:6000].tolist())
        small = keep_rows(tokenizer, rows)
        for text, before in zip(texts, ids):
            after = [rows[i] for i in small(text)["input_ids"]]
            assert (after == before) == (set(before) <= set(rows))
        rare = ["Ünïcödé naïveté 🙂", "antidisestablishmentarianism", "3.14159 $%^&*()"]
        assert compare_tokenizers(tokenizer, small, rare)["unknown"][1] <= 0.2
