"""What a model holds in memory to infer, as an exact formula of how many units each site keeps."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import EncoderDecoderCache

from ibprune.costs import CostModel, Term, attentions, dimension_owners, dry_model, parameter_products
from ibprune.groups import Cut, Site, axis_dims, axis_width, get_tensor
from ibprune.rebuild import full_path
from ibprune.sites import find_family
from ibprune.task_heads import keeps_cache


@dataclass(frozen=True)
class Memory:
    """The bytes of a model's parameters, and of what it keeps of a text that it goes on with.

    Activations are not in it: how many live at once is the runtime's choice.

    Attributes:
        model: The cost model, in bytes.
        dtype: Of all of them, such as "bfloat16".
        batch, length: How many sequences of how many tokens the key-value cache holds; 0 where there is none.
    """

    model: CostModel
    dtype: str
    batch: int = 0
    length: int = 0

    @property
    def counts(self) -> str:
        """What is counted, for reports and plans."""
        weights = f"the weights in {self.dtype}"
        return f"{weights} and the key-value cache of {self.batch} x {self.length} tokens" if self.length else weights


def measure_memory(
    model: nn.Module, params: CostModel, sites: dict[str, Site], *, dtype: torch.dtype, batch: int, length: int
) -> Memory:
    """What weights and cache take, exactly; see `Memory`.

    A model that writes text keeps keys and values of every token; classifiers and encoders keep none. A layer with a
    sliding window keeps those that its window still needs. An encoder-decoder reads `length` tokens and writes as many:
    its cache holds what the decoder wrote, and what its attentions made of what the encoder read. One case is left out:
    a decoder that lost all attentions counts tokens by two numbers each.

    Args:
        params: The cost model of its parameters, over all `sites`.
        dtype: Of the checkpoint.
        batch, length: Sequences in the cache, and tokens of each; 0 tokens where the model reads none.
    """
    width = dtype.itemsize
    cached = _cached(model, length) if length and keeps_cache(model) else {}
    terms = [replace(term, coefficient=width * term.coefficient) for term in params.terms]
    dims, whole = dimension_owners(model, sites)
    names = {id(p): name for name, p in model.named_parameters()}
    for path, numbers in cached.items():
        # heads read equally many keys and values, so that their features share the cache as those of the output do
        module = model.get_submodule(path)
        ((name, dim),) = axis_dims(module, "in")
        features = axis_width(model, Cut(path, "in"))
        owned = {(name, 0): dims.get((names[id(get_tensor(module, name))], dim), [])}
        for coefficient, cutters in parameter_products(name, torch.Size([features]), params.n_units, owned):
            factors = (*cutters, *whole.get(path, ()))
            terms.append(Term(width * batch * numbers * coefficient // features, factors, in_blocks=True))
    kept = width * batch * sum(cached.values())
    dense = None if params.dense is None else {scope: width * n + kept for scope, n in params.dense.items()}
    found = CostModel("memory", tuple(terms), params.n_units, length if cached else 0, dense)
    return Memory(found, str(dtype).removeprefix("torch."), *((batch, length) if cached else (0, 0)))


@torch.no_grad()
def _cached(model: nn.Module, length: int) -> dict[str, int]:
    """Numbers that the cache holds of one sequence, by the layer that reads the attention's result."""
    skeleton, inputs = dry_model(model, length)
    cache = getattr(skeleton(**inputs, use_cache=True), "past_key_values", None)
    if cache is None:
        return {}
    family = find_family(model.config.model_type)
    found = {}
    for path, context in attentions(model, family):
        own = cache
        if isinstance(cache, EncoderDecoderCache):
            if not path.startswith(full_path(model, family.decoder_blocks).removesuffix("*")):
                continue
            across = path.endswith(f".{family.cross_attention}")
            own = cache.cross_attention_cache if across else cache.self_attention_cache
        layer = own.layers[model.get_submodule(path).layer_idx]
        found[context] = layer.keys.numel() + layer.values.numel()
    return found
