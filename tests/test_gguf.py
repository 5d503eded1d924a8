"""GGUF files: a forward pass after llama.cpp's graphs, from the file alone, must equal torch; so must tokens."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, WORDS, build, random_keep, token_ids
from test_folders import cut, pruned, uniform
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ibprune
from ibprune import cli
from ibprune.errors import BadRecipe, PlanMismatch, UnsupportedModel
from ibprune.folders import write_model
from ibprune.gguf_files import ARCHITECTURES
from ibprune.gguf_vocab import SPLITS, merged, vocabulary
from ibprune.plans import PruningPlan
from ibprune.sites import find_sites
from ibprune.surgery import compact_

gguf = pytest.importorskip("gguf")
ROWS = 320  # of the embeddings of these models
FULL = dict(use_sliding_window=False, layer_types=["full_attention"] * 3)
BYTES = [f"<0x{i:02X}>" for i in range(256)]


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer of LLaMA's kind: characters merge, spaces are tokens' first letter, the unknown falls to bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=ROWS - 5, special_tokens=["<unk>", "<s>", "</s>", *BYTES])
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def saved(model, tokenizer, plan, folder):
    folder.mkdir()
    write_model(model, tokenizer, plan, folder)


def exported(family, keep_of, tokenizer, tmp_path, *, factorize=False, **changes):
    """A pruned language model, and the GGUF file that the verb makes of its folder."""
    head = {"llama": "Llama", "llama-tied": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    dense = build(family, f"{head}ForCausalLM", dtype=torch.float32, vocab_size=ROWS, **changes)
    model, plan = cut(dense, keep_of, factorize)
    saved(model, tokenizer, plan, tmp_path / "folder")
    return model, tmp_path / "folder"


def read(path) -> tuple[dict, dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors}


def computed(path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of token ids, (batch, length, vocabulary), as llama.cpp's graphs make them of the file."""
    fields, tensors = read(path)
    arch = fields["general.architecture"]
    of = lambda key: fields[f"{arch}.{key}"]  # noqa: E731
    n_layers, width, eps = of("block_count"), of("attention.key_length"), of("attention.layer_norm_rms_epsilon")
    by_layer = lambda key: of(key) if isinstance(of(key), list) else [of(key)] * n_layers  # noqa: E731
    heads, kv_heads, ffn = map(by_layer, ("attention.head_count", "attention.head_count_kv", "feed_forward_length"))
    assert heads[0] > 0, "llama.cpp takes the width of a head from the first layer"

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * tensors[name]

    def linear(x, name):
        out = x @ tensors[f"{name}.weight"].T
        return out + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else out

    steps = torch.arange(0, width, 2) / width
    frequencies = of("rope.freq_base") ** -steps / tensors.get("rope_freqs.weight", torch.ones(width // 2))
    angles = torch.arange(ids.shape[1])[:, None] * frequencies  # (length, width / 2)

    def rotate(x):  # (batch, heads, length, width)
        first, second = (x[..., 0::2], x[..., 1::2]) if arch in ("llama", "deci") else x.chunk(2, dim=-1)
        turned = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
        return torch.stack(turned, -1).flatten(-2) if arch in ("llama", "deci") else torch.cat(turned, -1)

    hidden = tensors["token_embd.weight"][ids]
    assert hidden.shape[-1] == of("embedding_length") and len(tensors["token_embd.weight"]) == of("vocab_size")
    future = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
    for i in range(n_layers):
        at, x = f"blk.{i}.", hidden
        if heads[i]:
            assert tensors[f"{at}attn_q.weight"].shape[0] == heads[i] * width
            y = norm(hidden, f"{at}attn_norm.weight")
            q, k, v = (linear(y, f"{at}attn_{name}").unflatten(-1, (-1, width)).transpose(1, 2) for name in "qkv")
            if f"{at}attn_q_norm.weight" in tensors:
                q, k = norm(q, f"{at}attn_q_norm.weight"), norm(k, f"{at}attn_k_norm.weight")
            q, k = rotate(q), rotate(k)
            k, v = (z.repeat_interleave(heads[i] // kv_heads[i], dim=1) for z in (k, v))
            y = ((q @ k.transpose(-1, -2)) / width**0.5 + future).softmax(-1) @ v
            x = hidden + linear(y.transpose(1, 2).flatten(2), f"{at}attn_output")
        if not ffn[i]:
            continue  # and with it what the attention has added
        assert tensors[f"{at}ffn_up.weight"].shape[0] == ffn[i]
        y = norm(x, f"{at}ffn_norm.weight")
        y = torch.nn.functional.silu(linear(y, f"{at}ffn_gate")) * linear(y, f"{at}ffn_up")
        hidden = x + linear(y, f"{at}ffn_down")
    return norm(hidden, "output_norm.weight") @ tensors.get("output.weight", tensors["token_embd.weight"]).T


def without(sites, *gone: str, seed: int = 5):
    keep = random_keep(sites, seed)
    return keep | {n: () if n in gone else (0,) for n, s in sites.items() if s.kind == "layers"}


def uneven(sites):
    return without(sites, "layers.0.attention_sublayer", "layers.1.ffn_sublayer")


@pytest.mark.parametrize(
    "family,keep_of,arch,changes",
    [
        ("llama", lambda sites: uniform(sites, kv_groups=2, ffn=8, hidden=16), "llama", {}),
        ("llama-tied", uneven, "deci", {}),
        ("llama", uneven, "deci", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", lambda sites: uniform(sites, ffn=8), "llama", {"sliding_window": 16}),
        ("qwen2", lambda sites: uniform(sites, ffn=8), "qwen2", FULL),
        ("qwen2", uneven, "deci", FULL),
        ("qwen2", lambda sites: uniform(sites, kv_groups=2), "deci", FULL),
        ("qwen3", lambda sites: uniform(sites, kv_groups=2, ffn=8, hidden=16), "qwen3", {}),
    ],
)  # fmt: skip
def test_the_file_computes_what_torch_does(family, keep_of, arch, changes, sentencepiece, tmp_path):
    model, folder = exported(family, keep_of, sentencepiece, tmp_path, **changes)
    found = ibprune.export(folder, to="gguf")
    assert found["output"] == str(tmp_path / "folder.gguf") and found["notes"][0] == f"architecture {arch}, f32"
    ids = token_ids(length=15)
    with torch.no_grad():
        expected = model(ids).logits
    assert (computed(found["output"], ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    fields, _ = read(found["output"])
    assert fields[f"{arch}.context_length"] == (16 if family == "mistral" else 64)
    stood_in = [note for note in found["notes"] if "zeros" in note]
    assert len(stood_in) == (2 if keep_of is uneven else 0), found["notes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "folder.gguf"]


def test_factors_become_one_matrix_and_llama3_s_frequencies_and_f16_are_kept(sentencepiece, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    model, folder = exported("llama-tied", lambda sites: random_keep(sites, 5), sentencepiece, tmp_path,
                             factorize=True, rope_parameters=rope)  # fmt: skip
    assert model.config.ibprune["embedding"]["rank"] < model.config.hidden_size
    found = ibprune.export(folder, to="gguf", output=tmp_path / "a.gguf")
    assert any("one matrix" in note for note in found["notes"])
    assert any("k-quants pack 256" in note for note in found["notes"])
    ids = token_ids(length=40)
    with torch.no_grad():
        expected = model(ids).logits
    _, tensors = read(tmp_path / "a.gguf")
    assert "rope_freqs.weight" in tensors and tensors["rope_freqs.weight"].max() == 8
    assert (computed(tmp_path / "a.gguf", ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ibprune.export(folder, to="gguf", output=tmp_path / "b.gguf", dtype="f16")
    apart = (computed(tmp_path / "b.gguf", ids) - expected).abs().max() / expected.abs().max()
    assert 0 < apart <= 5e-3
    assert (tmp_path / "b.gguf").stat().st_size < (tmp_path / "a.gguf").stat().st_size
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    saved(model, sentencepiece, None, tmp_path / "large")
    with pytest.raises(PlanMismatch, match="expected weights that float16 can hold, found more in 'blk.0.ffn_up"):
        ibprune.export(tmp_path / "large", to="gguf", dtype="f16")
    assert not (tmp_path / "large.gguf").exists()


def test_tokens_merge_as_llama_cpp_merges_them(sentencepiece):
    found = vocabulary(sentencepiece, ROWS)
    assert (found.model, len(found.tokens), found.adds["space_prefix"]) == ("llama", ROWS, True)
    assert found.adds["bos_token"] is False and found.special["eos"] == 2
    assert found.tokens[-1] == f"[PAD{ROWS - 1}]"
    for text in ("the plot was dull but the film is good", "a  warm\tstory: 12 €", "", "story"):
        assert merged(found, text) == sentencepiece(text, add_special_tokens=False)["input_ids"] or text == ""
    with pytest.raises(PlanMismatch, match="expected at most 9 tokens"):
        vocabulary(sentencepiece, 9)
    state = json.loads(sentencepiece.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][::-1]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert vocabulary(other, ROWS).scores != found.scores


def test_tokenizers_of_bytes_are_known_by_how_they_split():
    def of_bytes(*before):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=300)
        core.train_from_iterator(WORDS, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")

    from tokenizers import Regex

    for pattern, name in SPLITS.items():
        before = [pre_tokenizers.Split(Regex(pattern), "isolated")] if len(pattern) > 9 else []
        before = [pre_tokenizers.Digits(individual_digits=True)] if pattern == "digits" else before
        found = vocabulary(of_bytes(*before), 301)
        assert (found.model, found.pre, found.scores) == ("gpt2", name, ())
    with pytest.raises(UnsupportedModel, match=r"split as one of gpt-2, smollm, llama-bpe, qwen2 .* found Split"):
        vocabulary(of_bytes(pre_tokenizers.Split(Regex("x"), "isolated")), 301)


def test_what_llama_cpp_cannot_hold_is_refused_whole(sentencepiece, tokenizer, tmp_path, capsys):
    def refused(folder, expected, *flags):
        before = sorted(p.name for p in tmp_path.iterdir())
        assert cli.main(["export", str(folder), "--to", "gguf", *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error, error
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    (tmp_path / "q").mkdir()
    _, folder = exported("qwen3", uneven, sentencepiece, tmp_path / "q")
    refused(folder, "has layers of different widths, and 'deci', the architecture for those, has no norms")
    bert, plan = pruned("bert", "BertModel", lambda sites: uniform(sites))
    saved(bert, tokenizer, plan, tmp_path / "bert")
    refused(tmp_path / "bert", "'bert' has no GGUF architecture here: expected one of llama, mistral, qwen2, qwen3")
    base, plan = pruned("llama", "LlamaModel", lambda sites: uniform(sites, ffn=8), factorize=False)
    saved(base, tokenizer, plan, tmp_path / "base")
    refused(tmp_path / "base", "expected a causal language model for GGUF, found LlamaModel")
    words, plan = pruned("llama", "LlamaForCausalLM", lambda sites: uniform(sites, ffn=8), factorize=False)
    saved(words, tokenizer, plan, tmp_path / "words")
    refused(tmp_path / "words", "expected a BPE tokenizer for GGUF, found WordLevel")
    saved(words, None, plan, tmp_path / "none")
    refused(tmp_path / "none", "expected a tokenizer beside the model")
    refused(tmp_path / "far" / "away", "expected an exported folder with a config.json")
    refused(tmp_path / "words", "unknown --dtype 'f23': did you mean", "--dtype", "f23")
    refused(
        tmp_path / "words", "found 'Q4_K_M': quantise the file with llama.cpp's llama-quantize", "--dtype", "Q4_K_M"
    )
    (tmp_path / "there").write_text("mine")
    refused(tmp_path / "words", "expected a new file, found something", "--output", str(tmp_path / "there"))
    words.config.hidden_act = "gelu"
    saved(words, tokenizer, plan, tmp_path / "gelu")
    refused(tmp_path / "gelu", "expected an FFN with silu, llama.cpp's, found 'gelu'")


def test_without_the_package_the_error_says_what_to_install(sentencepiece, tmp_path, monkeypatch):
    _, folder = exported("llama", lambda sites: uniform(sites, ffn=8), sentencepiece, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadRecipe, match=r"expected gguf for GGUF, found none: pip install 'ibprune\[gguf\]'"):
        ibprune.export(folder, to="gguf")
    assert not (tmp_path / "folder.gguf").exists()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("plan", ["even", "uneven"])
def test_llama_cpp_itself_reads_a_trained_model_alike(plan, tmp_path):
    """Perplexity within 1 %, tokens the same; by the package xllamacpp, which brings llama.cpp built."""
    xllamacpp = pytest.importorskip("xllamacpp")
    source = DATA / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    sites = find_sites(model)
    gone = ("layers.0.attention_sublayer", "layers.3.ffn_sublayer") if plan == "uneven" else ()

    keep = {}
    for i, (name, site) in enumerate(sites.items()):
        widths = {"ffn": 160 - i if gone else 160, "layers": 0 if name in gone else 1}
        keep[name] = tuple(range(widths.get(site.kind, site.n_units)))
    compact_(model, PruningPlan("llama", {name: site.n_units for name, site in sites.items()}, keep))
    saved(model, tokenizer, None, tmp_path / "small")
    found = ibprune.export(tmp_path / "small", to="gguf")
    assert found["notes"][0] == f"architecture {'deci' if gone else 'llama'}, f32"

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.fit_params = found["output"], 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def following(prompt) -> tuple[int, dict[int, float]]:
        """Tokens of a prompt, text or ids, and the log-probability of every token behind it."""
        asked = dict(prompt=prompt, n_predict=1, n_probs=len(tokenizer), temperature=1.0, cache_prompt=False)
        answer = server.handle_completions(asked)
        first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return answer["usage"]["prompt_tokens"], {token["id"]: token["logprob"] for token in first}

    story = (DATA / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[0].strip()
    ids = tokenizer(story, add_special_tokens=False)["input_ids"]
    assert following(story) == following(ids) and following(story)[0] == len(ids)
    ids = ids[:80]
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    theirs = [following(ids[:i])[1][ids[i]] for i in range(1, len(ids))]
    ours = [float(own[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert abs(sum(theirs) - sum(ours)) / len(ours) <= 0.01


def test_the_page_on_exports_names_the_model_types():
    text = " ".join((Path(__file__).parents[1] / "docs" / "howto" / "runtimes.md").read_text().split())
    sentence = text.partition("GGUF takes ")[2].partition(" with a head")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(ARCHITECTURES)
    assert [name for name, row in ARCHITECTURES.items() if row.norms] == ["qwen3"] and "(not `qwen3`)" in text
