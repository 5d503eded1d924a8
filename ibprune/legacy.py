"""Turns checkpoints that older tools pruned into usual folders: their shapes or zeros become a plan."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from ibprune.checksums import write_report
from ibprune.console import Quiet
from ibprune.costs import count_params
from ibprune.errors import BadRecipe, PlanMismatch, UnsupportedModel, first_line
from ibprune.folders import check_output, probe_inputs, probe_outputs, staged, verify, write_model
from ibprune.groups import Site, axis_dims, get_tensor
from ibprune.markdown import code, plain, quoted
from ibprune.models import REFUSED, Source, build_model, check_finite, load_config, load_tokenizer, model_class
from ibprune.plans import PruningPlan
from ibprune.pruned_config import is_pruned
from ibprune.report import versions
from ibprune.sites import find_sites, reads_pictures
from ibprune.surgery import compact_

SCHEMA = "ibprune.legacy/1"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of the first BERTs
UNREAD = re.compile(  # what a model makes itself, and CoFi's layer for distillation
    r"(position_ids|token_type_ids|rotary_emb\.inv_freq|masked_bias|layer_transformation\.(weight|bias))$"
)
ZERO_AT_ZERO = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", "relu2")
SHAPED = ("heads", "kv_groups", "ffn", "hidden")  # kinds whose units can be counted by shapes
SAME = 1e-5  # of the largest output: sums in another order


def convert_legacy(source: str, *, output: str, console: Quiet | None = None) -> dict:
    """Writes a checkpoint that an older tool pruned as a usual folder, proven in a fresh process.

    Read are folders of a config and a state dict: heads missing as `config.pruned_heads` says (old transformers,
    nn_pruning), tensors of smaller shapes (CoFi with all its sub-layers, LLaMAs of LLM-Pruner saved as a state dict),
    and units whose weights are all zero (nn_pruning), which are then really cut.

    Args:
        source: The folder.
        output: The folder to write.

    Returns:
        The dict of its report.json.

    Raises:
        BadRecipe: The source cannot be read: no folder, or a whole model saved as an object, which is never opened.
        PlanMismatch: Shapes that fit no plan, or a result that computes something else.

    Example:
        >>> convert_legacy("bert-pruned-heads", output="converted")["verify"]["tier"]  # doctest: +SKIP
        'remote_code'
    """
    console = console or Quiet()
    folder = check_output(output, model=source)
    if not (Path(source) / "config.json").is_file():
        raise BadRecipe(f"expected a folder with a config.json and weights, found none at '{source}'.")
    state, dtype = read_state(Path(source))
    origin = Source(source, source)
    config = load_config(origin)
    if is_pruned(config):
        raise BadRecipe(f"'{source}' is a folder of ibprune already: it loads as it is, and needs no conversion.")
    heads = _heads(config.__dict__.pop("pruned_heads", None), source)
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRecipe(
            f"expected names of classes as 'architectures' in the config of '{source}', found {names!r:.80}."
        )
    config.architectures = [name.removeprefix("CoFi") for name in names] or None
    cls = model_class(config, classify=False)
    model = build_model(config, cls, device="cpu").float()
    dense_params = count_params(model)
    sites = find_sites(model)
    plan = plan_of_shapes(model, sites, state, heads)
    if any(len(units) < plan.n_units[name] for name, units in plan.keep.items()):
        compact_(model, plan)
    fill_(model, state)
    check_finite(model, source)
    console.say("looking for units of zeros")
    expected = probe_outputs(model, probe_inputs(model))
    zeros = plan_of_zeros(model, find_sites(model))
    if any(len(units) < zeros.n_units[name] for name, units in zeros.keep.items()):
        compact_(model, zeros)
    off = float((probe_outputs(model, probe_inputs(model)) - expected).abs().max())
    if not off <= SAME * max(1.0, float(expected.abs().max())):
        raise PlanMismatch(f"cutting the zeros of '{source}' changed its outputs by {off:.1e}: nothing was written.")
    both = PruningPlan(plan.model_type, plan.n_units, {
        name: tuple(units[i] for i in zeros.keep[name]) if name in zeros.keep else units
        for name, units in plan.keep.items()
    })  # fmt: skip
    model.to(dtype)
    preprocessor = _preprocessor(origin, config.model_type)
    console.say("writing and checking the folder in a fresh process")
    with staged(folder) as temporary:
        tier = write_model(model, preprocessor, both, temporary)
        report = {
            "schema": SCHEMA,
            "source": source,
            "dense": {"params": dense_params},
            "pruned": {"params": count_params(model)},
            "kept": {name: [len(units), both.n_units[name]] for name, units in both.keep.items()},
            "known_units": sorted(name for name in both.keep if _known(name, plan, heads)),
            "verify": verify(model, temporary, tier),
            "versions": versions(),
        }
        report = write_report(report, temporary)
        (temporary / "README.md").write_text(_card(report, folder.name))
    return report


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """The tensors of a checkpoint in float32, under today's names, and the type that they were stored in.

    Raises:
        BadRecipe: No weights, damaged ones, or objects other than tensors.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise BadRecipe(f"expected {' or '.join(WEIGHTS)} in '{folder}', found neither: save a state dict under one.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise BadRecipe(f"'{path}' is a damaged safetensors file: {first_line(error)}") from error
    except Exception as error:  # noqa: BLE001  reading raises what it likes
        if REFUSED not in str(error) or not zipfile.is_zipfile(path):
            raise BadRecipe(f"'{path}' is no file that PyTorch writes now, or a damaged one: get it again.") from error
        raise BadRecipe(
            f"'{path}' holds more than tensors, such as a whole model (LLM-Pruner), and is not opened: opening it runs "
            "its code. Where you trust it, in the tool that wrote it: torch.save(model.state_dict(), "
            "'pytorch_model.bin'), beside the model's config.json."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise BadRecipe(f"expected a state dict, names and tensors, in '{path}', found something else.")
    packed = next((name for name, value in state.items() if value.dtype in (torch.int8, torch.uint8)), None)
    if packed is not None:
        raise BadRecipe(f"'{packed}' in '{path}' holds packed integers: convert the full-precision checkpoint.")
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    found = {}
    for name, value in state.items():
        if UNREAD.search(name):
            continue
        for old, new in RENAMED.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        found[name] = value.float() if value.is_floating_point() else value
    return found, types.pop() if len(types) == 1 else torch.float32


def plan_of_shapes(
    model: PreTrainedModel, sites: dict[str, Site], state: dict[str, torch.Tensor], heads: Mapping[int, set[int]]
) -> PruningPlan:
    """The plan whose shapes the tensors have.

    Which units stayed is known of `pruned_heads` only: of others the first are named, as many as stayed.

    Raises:
        PlanMismatch: A tensor is missing, or its size is no number of whole units.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = {_layer(site) for site in sites.values() if site.kind == "heads"}
    unknown = [layer for layer, units in heads.items() if units and layer not in layers]
    if unknown and layers:
        raise PlanMismatch(f"config.pruned_heads names layer {unknown[0]}, and the model has {len(layers)}.")
    keep = {}
    for site in sites.values():
        units = tuple(range(site.n_units))
        if site.kind in SHAPED:
            count = _count(model, site, names, state)
            gone = _gone(site, heads)
            if gone and count == site.n_units - len(gone):
                units = tuple(unit for unit in units if unit not in gone)
            elif gone:
                raise PlanMismatch(
                    f"'{site.name}': config.pruned_heads leaves {site.n_units - len(gone)} of {site.n_units} heads, "
                    f"the tensors have {count}."
                )
            else:
                units = units[:count]
        keep[site.name] = units
    return PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)


def _count(model: nn.Module, site: Site, names: dict[int, str], state: dict[str, torch.Tensor]) -> int:
    """How many units the checkpoint has, by the first of its tensors that the units cut."""
    cut = site.cuts[0]
    leaf, dim = axis_dims(model.get_submodule(cut.path), cut.axis)[0]
    tensor = get_tensor(model.get_submodule(cut.path), leaf)
    name = names[id(tensor)]
    if name not in state:
        raise PlanMismatch(
            f"expected a tensor '{name}', found none: a whole sub-layer is gone, and the tools that remove one (CoFi) "
            "leave out its norm too, which no folder of ibprune does."
        )
    dense, found = tensor.shape[dim], state[name].shape[dim]
    _, width = cut.span(site.n_units, dense)
    rest = dense - width * site.n_units
    if (found - rest) % width or not site.min_units * width <= found - rest <= dense - rest:
        raise PlanMismatch(f"'{name}': expected whole units of {width} out of {dense}, found {found}.")
    return (found - rest) // width


def _heads(found: object, source: str) -> dict[int, set[int]]:
    """`config.pruned_heads` as numbers of heads by layer.

    Raises:
        BadRecipe: It is something else.
    """
    try:
        heads = {int(layer): {*units} for layer, units in (found or {}).items()}
    except (AttributeError, TypeError, ValueError):
        heads = {0: {None}}
    if not all(type(unit) is int and unit >= 0 for units in heads.values() for unit in units):
        raise BadRecipe(
            f"expected 'pruned_heads' in the config of '{source}' to name numbers of heads by layer, such as "
            f'{{"0": [1, 3]}}, found {found!r:.80}.'
        )
    return heads


def _gone(site: Site, heads: Mapping[int, set[int]]) -> set[int]:
    """The heads that config.pruned_heads takes from a site."""
    if site.kind != "heads":
        return set()
    return heads.get(_layer(site), set())


def _layer(site: Site) -> int | None:
    """The number of the block that a site is in, None for one of the whole model."""
    return next((int(part) for part in site.block.split(".") if part.isdigit()), None)


def _known(name: str, plan: PruningPlan, heads: Mapping[int, set[int]]) -> bool:
    """Whether the indices that a plan names are those of the dense model."""
    whole = len(plan.keep[name]) == plan.n_units[name]
    return whole or (bool(heads) and name.endswith("heads"))


@torch.no_grad()
def fill_(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Loads every tensor, and none else.

    Raises:
        PlanMismatch: One is missing, left over or of another shape.
    """
    own = model.state_dict()
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        raise PlanMismatch(
            f"'{name}': expected {tuple(own[name].shape)} as its neighbours have it, found {tuple(state[name].shape)}."
        )
    missing, extra = model.load_state_dict(state, strict=False)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    absent = [name for name in missing if name not in tied]
    if absent or extra:
        raise PlanMismatch(
            f"expected the tensors of {type(model).__name__}, found "
            + (f"no '{absent[0]}'." if absent else f"'{extra[0]}' too.")
        )
    model.tie_weights()


def plan_of_zeros(model: PreTrainedModel, sites: dict[str, Site]) -> PruningPlan:
    """The plan that cuts heads and FFN units which add nothing: all that reads them, or all that makes them, is zero.

    At least as many units stay as a site needs.
    """
    activation = str(getattr(model.config, "hidden_act", None) or getattr(model.config, "activation", ""))
    keep = {}
    for site in sites.values():
        dead = torch.zeros(site.n_units, dtype=torch.bool)
        if site.kind in ("heads", "kv_groups", "ffn"):
            dead = _zeros(model, site, "in")
            if site.kind != "ffn" or activation in ZERO_AT_ZERO:
                dead |= _zeros(model, site, "out")
        units = [unit for unit in range(site.n_units) if not dead[unit]]
        for unit in range(site.n_units):
            if len(units) >= site.min_units:
                break
            units.append(unit)
        keep[site.name] = tuple(sorted(set(units)))
    return PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)


def _zeros(model: nn.Module, site: Site, axis: str) -> torch.Tensor:
    """Which units have nothing but zeros at every cut of an axis, (n_units,)."""
    dead = torch.ones(site.n_units, dtype=torch.bool)
    cuts = [cut for cut in site.cuts if cut.axis == axis]
    for cut in cuts:
        module = model.get_submodule(cut.path)
        for leaf, dim in axis_dims(module, cut.axis):
            tensor = get_tensor(module, leaf).detach().movedim(dim, 0)
            offset, width = cut.span(site.n_units, len(tensor))
            part = tensor[offset : offset + width * site.n_units].reshape(site.n_units, -1)
            dead &= (part == 0).all(1)
    return dead & bool(cuts)


def _preprocessor(source: Source, model_type: str):
    """The tokenizer or image processor beside the checkpoint, where there is one."""
    try:
        if reads_pictures(model_type):
            return AutoImageProcessor.from_pretrained(source.location, trust_remote_code=False)
        return load_tokenizer(source)
    except (BadRecipe, OSError, ValueError, UnsupportedModel):
        return None


def _card(report: dict, name: str) -> str:
    """The card: where it came from and how it loads."""
    by = "plain transformers" if report["verify"]["tier"] == "vanilla" else "trust_remote_code=True"
    cut = [f"- `{site}`: {kept} of {total}" for site, (kept, total) in report["kept"].items() if kept < total]
    ours = code(f"ibprune.load({quoted(name)})")
    return "\n".join([
        "---", "library_name: transformers", "tags: [ibprune, pruned]", "---", "",
        f"# {plain(name)}", "",
        f"Converted by ibprune {report['versions']['ibprune']} from {code(report['source'])}, which another tool "
        f"pruned: {report['pruned']['params']:,} of {report['dense']['params']:,} parameters. Nothing was trained or "
        "measured here; outputs are those of the source.", "",
        f"It loads with `{report['verify']['auto_class']}` of transformers ({by}) or {ours}.", "",
        "## What is gone", "", *cut, "",
    ])  # fmt: skip
