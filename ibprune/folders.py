"""The only file that writes transformers: a folder that loads, proven by a fresh process before it appears."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.image_processing_utils import BaseImageProcessor

from ibprune.errors import BadRecipe, IBPruneError, PlanMismatch, first_line
from ibprune.examples import example_inputs
from ibprune.groups import Cut, axis_width
from ibprune.losses import Batch
from ibprune.plans import PruningPlan
from ibprune.remote_code import remote_code
from ibprune.sites import block_paths, find_family, find_sites, is_counted, is_traced
from ibprune.surgery import SPEC
from ibprune.task_heads import auto_class

CODE = "modeling_ibprune.py"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_output(folder: str | Path, *, model: str | None = None) -> Path:
    """The output folder as a path; never inside the folder of the dense `model`.

    Raises:
        BadRecipe: It exists and is not an empty folder, or cannot be written.
    """
    path = Path(folder)
    try:
        taken = path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))
        if taken or path.absolute() == Path.cwd():
            raise BadRecipe(
                f"expected a new or empty output folder, found something in '{folder}': choose another --output."
            )
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if model is not None and os.path.isdir(model) and Path(model).resolve() in path.resolve().parents:
            raise BadRecipe(f"expected an output outside the model's folder, found '{folder}': choose another.")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=parent):
            pass  # the same name as `staged` takes
    except OSError as error:
        raise BadRecipe(f"expected to write the output folder '{folder}', but: {error.strerror or error}.") from error
    return path


@contextmanager
def staged(folder: Path, *, kept: str = "nothing of it was left.") -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, or vanishes on any error.

    Args:
        kept: What is left where the disk is full, as the end of a message.

    Raises:
        IBPruneError: It cannot be written.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)  # temporary names are private; the folder is not
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            folder.rmdir()  # empty, or this raises
        temporary.rename(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):  # so say tokenizers' own
            reason = getattr(error, "strerror", None) or first_line(error)
            raise IBPruneError(
                f"expected to write '{folder}', but: {reason.rstrip('.')}. Make room, or choose a place that can be "
                f"written; {kept}"
            ) from error
        raise


def vanilla_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """A config from which plain transformers builds exactly this model's shapes, or None."""
    spec = getattr(model.config, SPEC, None)
    if spec is None:
        return copy.deepcopy(model.config)
    if spec["embedding"] is not None or spec["stubs"]:
        return None
    if is_traced(model.config.model_type):  # no key of a CNN's config is known to hold just these widths
        config = copy.deepcopy(model.config)
        delattr(config, SPEC)
        return None if spec["shapes"] else config
    family = find_family(model.config.model_type)
    sites = find_sites(model)
    config = copy.deepcopy(model.config)
    delattr(config, SPEC)
    sized = getattr(config, family.sizes_in) if family.sizes_in else config
    if family.sizes_in:
        sized.num_hidden_layers = len(block_paths(model, family))
    dense = {key: spec["dense"].get(key, getattr(sized, key)) for pair in family.follows for key in pair}
    for name, key in family.config_keys.items():
        found = [site for site in sites.values() if is_counted(site, name)]
        if not found:
            continue  # the model has no such units
        site, count = found[0], found[0].n_units
        if any(site.n_units != count for site in found):
            return None
        if name == "kv_groups":
            config.num_attention_heads = config.num_attention_heads // getattr(config, key) * count
            if getattr(config, "head_dim", None) is None:  # then it is the width over the number of heads
                config.head_dim = axis_width(model, site.cuts[0]) // count
        setattr(sized, key, count)
        if name == "heads" and key == "num_attention_heads":  # beside which some configs take head_dim
            width = axis_width(model, site.cuts[0]) // count
            if width * count != getattr(sized, family.config_keys["hidden"]):
                sized.head_dim = width  # ViT and its kin take it; elsewhere the shapes below differ
    for key, other in family.follows:
        if dense[key] == dense[other]:
            setattr(sized, key, getattr(sized, other))
    if family.ratio_key:
        site = next(site for site in sites.values() if site.kind == "ffn")
        read = axis_width(model, Cut(site.cuts[0].path, "in"))
        setattr(sized, family.ratio_key, (site.n_units + 1e-6) / read)  # the product is cut off to a whole number
    try:
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            plain = type(model)(config)
    except (ValueError, ArithmeticError, StrictDataclassError):  # the family's own checks refuse the widths
        return None
    return config if _form(model) == _form(plain) else None


def _form(model: PreTrainedModel) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """Shapes of all parameters, and the numbers that scale: one derived from a width is no parameter."""
    scales = find_family(model.config.model_type).scales
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    numbers = {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, float) or key in scales
    }
    return shapes, numbers


def tier_of(model: PreTrainedModel) -> str:
    """How the folder will load: "vanilla" (plain transformers) or "remote_code"."""
    return "vanilla" if vanilla_config(model) is not None else "remote_code"


def write_model(
    model: PreTrainedModel,
    preprocessor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    plan: PruningPlan | None,
    folder: Path,
) -> str:
    """Writes weights, config, tokenizer or image processor, plan and, where needed, the loading code.

    Args:
        plan: None for a dense model.

    Returns:
        The tier.
    """
    config = vanilla_config(model)
    tier = "vanilla" if config is not None else "remote_code"
    raw = (config if config is not None else model.config).to_dict()
    raw["architectures"] = [type(model).__name__]
    raw.pop("_name_or_path", None)
    for sizes in (raw, *(part for part in raw.values() if isinstance(part, dict) and "dtype" in part)):
        sizes["dtype"] = str(model.dtype).removeprefix("torch.")  # it was loaded in another
    if model.config._experts_implementation == "eager":  # not kept by itself
        raw["experts_implementation"] = "eager"
    if tier == "remote_code":
        raw = _remote_config(model, raw, folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    tied = list(model.get_expanded_tied_weights_keys(all_submodels=True))
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in _published(model, tier).items()},
        folder,
        shared_tensors_to_discard=tied,
        metadata={"format": "pt"},
    )
    if model.can_generate() and model.generation_config is not None:
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string(use_diff=True))
    if preprocessor is not None:
        preprocessor.save_pretrained(folder)
    if plan is not None:
        plan.save(folder / "plan.json")
    return tier


def _published(model: PreTrainedModel, tier: str) -> dict[str, torch.Tensor]:
    """The tensors to save: with stacked experts apart, as they are published, where no code of ours reads them."""
    state, model_type = model.state_dict(), model.config.model_type
    if tier != "vanilla" or is_traced(model_type) or not find_family(model_type).experts:
        return state
    apart = revert_weight_conversion(model, state)
    return {name: tensor if name in state else tensor.clone() for name, tensor in apart.items()}  # no views


def _remote_config(model: PreTrainedModel, raw: dict, folder: Path) -> dict:
    """Adds the generated loading code and names it in the config.

    Plain transformers refuses such a folder, because some tensor differs in shape from the dense family.
    Where only sub-layers are gone every shape fits, and it would fill the gaps with random weights and just
    print a table about it: then the folder gets a model type of its own, which it refuses too.
    """
    model_type, name = model.config.model_type, type(model).__name__
    base = type(getattr(model, "base_model", model)).__name__
    config_name = type(model.config).__name__
    module = CODE.removesuffix(".py")
    own_type = not raw[SPEC]["shapes"] and raw[SPEC]["embedding"] is None
    names, classes, body = {base, name}, [], "pass"
    if own_type:
        names.add(config_name)
        classes.append(f'class Pruned{config_name}({config_name}):\n    model_type = "ibprune_{model_type}"')
        body = f"config_class = Pruned{config_name}"
    classes += [f"class Pruned{cls}(Pruned, {cls}):\n    {body}" for cls in dict.fromkeys((base, name))]
    (folder / CODE).write_text(remote_code(model, raw[SPEC], sorted(names), classes))
    raw["architectures"] = [f"Pruned{name}"]
    auto = auto_class(name, model_type)
    raw["auto_map"] = {auto: f"{module}.Pruned{name}"}
    if auto != "AutoModel" and _whole_base(model) and auto_class(base, model_type) == "AutoModel":
        raw["auto_map"]["AutoModel"] = f"{module}.Pruned{base}"
    if own_type:
        raw["model_type"] = f"ibprune_{model_type}"
        raw["auto_map"]["AutoConfig"] = f"{module}.Pruned{config_name}"
    try:  # the family's own checks may refuse the pruned width; then the key keeps the dense one
        type(model.config).from_dict(raw | {"model_type": model_type})
    except (ValueError, StrictDataclassError):
        key = find_family(model_type).config_keys["hidden"]
        raw[key] = raw[SPEC]["dense"][key]
    return raw


def _whole_base(model: PreTrainedModel) -> bool:
    """Whether the base class alone would find all its weights: a masked LM's backbone has no pooler."""
    base = getattr(model, "base_model", model)
    config = copy.deepcopy(model.config)
    for key, value in getattr(config, SPEC)["dense"].items():
        setattr(config, key, value)
    with torch.device("meta"):
        fresh = type(base)(config)
    parts = [{name.partition(".")[0] for name, _ in m.named_parameters()} for m in (fresh, base)]
    return parts[0] <= parts[1]


def probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs on which loaded copies are compared; token ids with padding in the second row."""
    inputs = example_inputs(model, batch=2, length=12)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 8:] = 0
    return inputs


@torch.no_grad()
def probe_outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is compared: logits, or the last hidden state, on real tokens; float32."""
    output = model.eval()(**inputs)[0].float()
    if output.ndim == 3 and "attention_mask" in inputs:
        output = output * inputs["attention_mask"].unsqueeze(-1)
    return output


def verify(
    model: PreTrainedModel,
    folder: Path,
    tier: str,
    inputs: Batch | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[str] = (),
) -> dict:
    """Loads the folder in a fresh process, in every way it claims, and compares outputs.

    Args:
        inputs: What the copies read; default: what `probe_inputs` makes up.
        tokenizer, texts: The folder's tokenizer must make of the texts what this one does.

    Raises:
        PlanMismatch: A load failed, a tensor was missing, extra, of another shape or re-initialised,
            the outputs differ by more than rounding, or the tokens differ.
    """
    inputs = probe_inputs(model) if inputs is None else inputs
    inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    expected = probe_outputs(model, inputs)
    name = type(model).__name__
    auto = auto_class(name, model.config.model_type)
    if tier == "vanilla" and auto == "AutoModel" and model.base_model is not model:
        auto = name  # a head that no Auto class builds
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file({**{k: v.cpu() for k, v in inputs.items()}, "expected": expected.cpu().contiguous()}, probe)
        tokens = {
            "texts": list(texts),
            "input_ids": tokenizer(list(texts), verbose=False)["input_ids"] if texts else [],
        }
        probe.with_suffix(".json").write_text(json.dumps(tokens))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        root = str(Path(__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        found = subprocess.run(
            [sys.executable, "-m", "ibprune.verify", str(folder), str(probe), auto, tier],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise PlanMismatch(f"the exported folder does not load in a fresh process, so it was not kept: {reason}")
    result = json.loads(found.stdout.strip().splitlines()[-1])
    allowed = TOLERANCE.get(model.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
    worst = max(result.values())
    if not worst <= allowed:
        raise PlanMismatch(f"the reloaded model differs by {worst:.2e}, more than {allowed:.0e}: {result}.")
    found = {"tier": tier, "auto_class": auto, "max_abs_diff": worst, "ways": sorted(result)}
    return found | {"transformers": transformers.__version__}
