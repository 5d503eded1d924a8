"""What a pruned decoder or encoder-decoder writes: alike however it is asked, before and after save and load."""

import pytest
import torch
import transformers
from conftest import CASES, FLOAT32, TINY, build, random_keep, token_ids

import ibprune
from ibprune.embeddings import factorize_
from ibprune.folders import write_model
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_
from ibprune.task_heads import auto_class

WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
ROWS = [(f, h) for f, h in CASES if auto_class(h, TINY[f]().model_type) in WRITERS]
STEPS = 6
WAYS = {  # how a text is asked for, and with which cache
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
}
CACHES = {
    "dynamic": {"use_cache": True},
    "static": {"use_cache": True, "cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}


def without_a_block(sites) -> dict[str, tuple[int, ...]]:
    """Uneven widths in every layer; the second block of the decoder, or both its sub-layers, gone."""
    keep = random_keep(sites, 5) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
    gone = [n for n, s in sites.items() if s.kind == "layers" and ".1." in n and not n.startswith("encoder")]
    return keep | dict.fromkeys(gone, ())


def without_sublayers(sites) -> dict[str, tuple[int, ...]]:
    """Uneven widths; the first attention that can go, which numbers the cache, and the last FFN gone."""
    keep = random_keep(sites, 7) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
    layers = [n for n, s in sites.items() if s.kind == "layers" and not n.startswith("encoder")]
    attention = next(n for n in layers if n.endswith("attention_sublayer"))
    return keep | {attention: (), layers[-1]: ()}


def without_attention(sites) -> dict[str, tuple[int, ...]]:
    """Uneven widths; every attention of the decoder to itself gone that can go."""
    keep = random_keep(sites, 5) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
    layers = [n for n in keep if n.endswith(".attention_sublayer") and not n.startswith("encoder")]
    return keep | {n: () for n in layers if not n.endswith("cross.attention_sublayer")}


def pruned(family: str, head: str, keep_of, folder, tokenizer, dtype=torch.float64):
    """The compacted model, and the same from its folder."""
    model = build(family, head, dtype=dtype)
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    plan = PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, keep_of(sites))
    compact_(model, plan)
    write_model(model, tokenizer, plan, folder)
    return model, ibprune.load(folder, dtype=dtype)


def write(model, ids: torch.Tensor, mask=None, *, starts=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The written tokens (batch, steps) and what each step's choice was made from, (steps, batch, vocabulary).

    An encoder-decoder goes on from the tokens `starts`.
    """
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = token_ids(length=4).flip(1) if starts is None else starts
    torch.manual_seed(3)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=STEPS, eos_token_id=None,
        forced_eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return found.sequences[:, -STEPS:], torch.stack(found.logits)


@pytest.mark.parametrize("keep_of", [without_a_block, without_sublayers, without_attention])
@pytest.mark.parametrize("family,head", ROWS)
def test_every_way_of_writing_agrees_before_and_after_loading(family, head, keep_of, tmp_path, tokenizer):
    models = pruned(family, head, keep_of, tmp_path, tokenizer)
    tolerance = 1e-5 if family in FLOAT32 else 1e-10
    for way, options in WAYS.items():
        expected = ()
        for model in models:
            for cache in CACHES if way == "greedy" else ("dynamic", "static"):
                ids, logits = write(model, token_ids(), **options, **CACHES[cache])
                expected = expected or (ids, logits)
                assert torch.equal(ids, expected[0]), (way, cache)
                assert torch.allclose(logits, expected[1], atol=tolerance * logits.abs().max()), (way, cache)
        if way == "sampled":
            assert len(set(expected[0].flatten().tolist())) > STEPS // 2


@pytest.mark.parametrize("family,head", ROWS)
def test_texts_of_different_lengths_are_written_in_a_batch_as_alone(family, head, tmp_path, tokenizer):
    """Padded on the left, as decoders are; encoders with learned positions on the right."""
    sdpa = getattr(transformers, head)._supports_sdpa
    dtype = torch.float64 if sdpa else torch.float32  # eager attention takes its softmax in float32
    _, model = pruned(family, head, without_sublayers, tmp_path, tokenizer, dtype)
    tolerance = 1e-5 if family in FLOAT32 else 1e-10
    lengths, longest = (9, 3, 6), 9
    texts = [token_ids(1, length) for length in lengths]
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(text.shape[1]) if family.startswith("bart") else slice(longest - text.shape[1], None)
        ids[row, place], mask[row, place] = text[0], 1
    starts = token_ids(3, length=4).flip(1)
    for cache in ("dynamic", "static"):
        for way in ("greedy", "beams"):
            options = WAYS[way] | CACHES[cache]
            batch, logits = write(model, ids, mask, starts=starts, **options)
            for row, text in enumerate(texts):
                alone, single = write(model, text, starts=starts[row : row + 1], **options)
                assert torch.equal(batch[row], alone[0]), (cache, way, row)
                if way == "greedy":
                    assert torch.allclose(logits[:, row], single[:, 0], atol=tolerance * logits.abs().max())
            assert len(set(map(tuple, batch.tolist()))) > 1 or way == "beams"


@pytest.mark.parametrize("family,head", [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_a_static_cache_is_filled_in_chunks_though_layers_differ(family, head, tmp_path, tokenizer):
    """transformers reserves it by the config's heads, one number for all layers."""
    _, model = pruned(family, head, without_a_block, tmp_path, tokenizer)
    expected, _ = write(model, token_ids(), **WAYS["greedy"])
    ids, _ = write(model, token_ids(), prefill_chunk_size=3, **WAYS["greedy"], **CACHES["static"])
    assert torch.equal(ids, expected)
