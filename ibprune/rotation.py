"""The residual stream of an RMSNorm model turned into its principal axes: `hidden` units are then directions."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune.errors import UnsupportedModel
from ibprune.examples import example_inputs
from ibprune.groups import Cut, Site, axis_dims, get_tensor, is_norm
from ibprune.losses import Batch, forward, real_tokens
from ibprune.plans import ROTATED
from ibprune.rebuild import FactorizedUnembedding, full_path, set_parameter
from ibprune.sites import find_family, find_sites

TOLERANCE = 1e-4  # of the largest output: transformers' norms compute in float32 whatever the model's dtype


def principal_axes(model: PreTrainedModel, batches: list[Batch]) -> torch.Tensor:
    """Orthogonal directions of the residual stream, a column each, the most used first, (d, d) float64.

    They are the eigenvectors of E[u u^T], u = x / rms(x), over the rows x that each norm of the stream is given on the
    batches' real tokens, every norm counting alike: a layer reads nothing of the stream but u times its weights, so
    that what a missing direction changes there is its share of u, and not of x.

    Raises:
        UnsupportedModel: As `rotate_`, as far as the model's structure tells.
    """
    site = _stream(model)
    found: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: found.update({path: args[0]}))
        for path in _norms(model, site)
    ]
    decoder = full_path(model, find_family(model.config.model_type).decoder_blocks).partition(".*")[0]
    totals: dict[str, torch.Tensor] = {}
    try:
        for batch in batches:
            found.clear()
            with torch.no_grad():
                forward(model, batch)
            for path, rows in found.items():
                written = bool(decoder) and path.startswith(decoder.rpartition(".")[0])
                rows = rows[real_tokens(batch, written=written).bool()].double()
                unit = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
                totals[path] = totals.get(path, 0.0) + (unit.T @ unit).cpu()
    finally:
        for handle in handles:
            handle.remove()
    moment = sum(total / total.trace() for total in totals.values())
    return torch.linalg.eigh(moment).eigenvectors.flip(1)


def rotate_(model: PreTrainedModel, axes: torch.Tensor) -> None:
    """Turns the residual stream x of a model into x Q; what the model computes stays as it is.

    The norms' weights go into the layers that read the norms, which leaves norms that only divide by x's length and so
    commute with every rotation. Then each layer that writes to the stream writes in the new axes, and each that reads
    reads from them: E Q for the embedding, Q^T W for an output, W Q for an input. No matrix is added, unless an output
    layer was tied to the embedding: it reads a norm, the embedding does not, so that they part, and the config says so.
    (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024, with one Q for all layers.)

    Nothing is known of the family but which modules touch the stream: which norm each layer reads is seen in a forward
    pass, and a float64 copy must compute after the rotation what it did before.

    Args:
        model: An RMSNorm pre-norm model with a head.
        axes: Q, orthogonal, a column per new axis, (d, d).

    Raises:
        UnsupportedModel: There is no such rotation; the model is unchanged then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> rotate_(model, torch.linalg.qr(torch.randn(4, 4)).Q)
        >>> [parameter.unique().item() for name, parameter in model.named_parameters() if "norm" in name]
        [1.0, 1.0, 1.0]
    """
    site = _stream(model)
    if next(model.parameters()).is_meta:
        _untie_(model, site)
        _mark_(model)
        return
    twin = copy.deepcopy(model).double().eval()
    inputs = {key: value.to(model.device) for key, value in example_inputs(twin, batch=2, length=12).items()}
    before, norm_of = _watch(twin, site, inputs)
    _turn_(twin, site, norm_of, axes)
    with torch.no_grad():
        after = twin(**inputs)[0]
    worst, allowed = float((after - before).abs().max()), TOLERANCE * float(before.abs().max())
    if not worst <= allowed:
        raise _refusal(model, f"its output moves by {worst:.1e}, more than rounding: something reads single features")
    del twin
    _turn_(model, site, norm_of, axes)
    _mark_(model)


def any_axes(model: PreTrainedModel) -> torch.Tensor:
    """Axes for a model without weights, of which only the number matters, (d, d).

    Raises:
        UnsupportedModel: As `rotate_`, as far as the modules tell.
    """
    return torch.eye(_stream(model).n_units)


def check_rotation(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModel` as `rotate_` would, without turning anything: what only figures show is left to it."""
    inputs = {key: value.to(model.device) for key, value in example_inputs(model, batch=2, length=12).items()}
    _watch(model, _stream(model), inputs)


def _mark_(model: PreTrainedModel) -> None:
    """The mark is of this model object, whose plans are of directions; the config's word goes into the folder."""
    setattr(model, ROTATED, True)
    setattr(model.config, ROTATED, True)


def _refusal(model: nn.Module, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"--rotate: the residual stream of {type(model).__name__} cannot be turned: {why}.")


def _stream(model: nn.Module) -> Site:
    site = find_sites(model).get("hidden")
    if site is None:
        raise _refusal(model, "its width is not cut")
    if any(isinstance(module, FactorizedUnembedding) for module in model.modules()):
        raise _refusal(model, "it was pruned already, and its output shares the factors of its embedding")
    for path in _norms(model, site):
        if isinstance(model.get_submodule(path), nn.LayerNorm):
            raise _refusal(model, f"'{path}' takes a mean over the features, which a rotation changes")
    return site


def _norms(model: nn.Module, site: Site) -> list[str]:
    return [cut.path for cut in site.cuts if is_norm(model.get_submodule(cut.path))]


def _reads(model: nn.Module, cut: Cut) -> bool:
    """Whether a cut is of what a layer reads: of stacked weights that is their last dimension."""
    name, _, dim = cut.axis.rpartition(".")
    return int(dim) == get_tensor(model.get_submodule(cut.path), name).ndim - 1 if name else cut.axis == "in"


@torch.no_grad()
def _watch(model: nn.Module, site: Site, inputs: Batch) -> tuple[torch.Tensor, dict[str, str]]:
    """The model's output, and for each layer that reads the stream the norm through which it does.

    A layer reads a norm if each row that it is given is a multiple of a row that the norm gave: a head may read some
    tokens only, or a scaled stream.
    """
    norms, readers = _norms(model, site), [cut.path for cut in site.cuts if _reads(model, cut)]
    given: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, args, out, path=path: given.update({path: out}))
        for path in norms
    ] + [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: given.update({path: args[0]}))
        for path in readers
    ]
    try:
        output = model(**inputs)[0]
    finally:
        for handle in handles:
            handle.remove()
    unit = {path: nn.functional.normalize(rows.flatten(0, -2), dim=-1) for path, rows in given.items()}
    norm_of = {}
    for reader in (path for path in readers if path in unit):
        for norm in norms:
            if bool(((unit[reader] @ unit[norm].T).abs().amax(1) > 1 - 1e-6).all()):
                norm_of[reader] = norm
    for reader in readers:
        if reader not in norm_of:
            raise _refusal(model, f"'{reader}' does not read it through one of its norms")
    for norm in norms:
        weight = model.get_submodule(norm).weight
        if norm not in norm_of.values() and bool((weight != weight[0]).any()):
            raise _refusal(model, f"'{norm}' scales features that no layer reads, but that are added or returned")
    return output, norm_of


@torch.no_grad()
def _turn_(model: PreTrainedModel, site: Site, norm_of: dict[str, str], axes: torch.Tensor) -> None:
    """Folds the norms, parts tied weights and rotates, each tensor once, in float64."""
    offset = find_family(model.config.model_type).norm_offset
    _untie_(model, site)
    turned: set[tuple[int, int]] = set()
    for cut in site.cuts:
        module = model.get_submodule(cut.path)
        if is_norm(module):
            continue
        scale = model.get_submodule(norm_of[cut.path]).weight.double() + offset if _reads(model, cut) else None
        for name, dim in axis_dims(module, cut.axis):
            tensor = get_tensor(module, name)
            if (id(tensor), dim) in turned:
                continue
            turned.add((id(tensor), dim))
            value = tensor.movedim(dim, -1).double()
            value = (value if scale is None else value * scale) @ axes.to(value)
            tensor.copy_(value.movedim(-1, dim))
    for path in set(norm_of.values()):
        model.get_submodule(path).weight.fill_(1.0 - offset)


def _tied_readers(model: nn.Module, site: Site) -> list[str]:
    """Names of the parameters that read the stream and also write to it."""
    written, read = {}, {}
    for cut in site.cuts:
        module = model.get_submodule(cut.path)
        for name, _ in axis_dims(module, cut.axis) if not is_norm(module) else ():
            side = read if _reads(model, cut) else written
            side[f"{cut.path}.{name}"] = get_tensor(module, name)
    ids = {id(tensor) for tensor in written.values()}
    return [name for name, tensor in read.items() if id(tensor) in ids]


def _untie_(model: PreTrainedModel, site: Site) -> None:
    for name in _tied_readers(model, site):
        tensor = model.get_parameter(name)
        set_parameter(model, name, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
        model.config.tie_word_embeddings = False
