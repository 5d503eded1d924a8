"""How large a recipe's run is: parameters of all its models and what one step takes, found without weights."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ibprune.budget import make_budget
from ibprune.channels import find_channels
from ibprune.costs import count_params
from ibprune.cutting import lora_of
from ibprune.dry_steps import DryRun, Step, hollow, made_up_batch, over_depth, score_step, train_step
from ibprune.engine import native_bf16
from ibprune.errors import UnsupportedModel
from ibprune.examples import image_shape
from ibprune.feeding import filled_in
from ibprune.inject import inject_
from ibprune.lora import count_adapters
from ibprune.losses import Objective
from ibprune.models import build_model, stored_dtype
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.pruned_config import is_pruned
from ibprune.quantised import bits, packed_bytes
from ibprune.recipe import Recipe
from ibprune.sites import find_family, is_traced, reads_pictures
from ibprune.skeletons import equal_keep, prepare_skeleton_
from ibprune.structure import Structure, budgeted, prepare_traced_
from ibprune.surgery import compact_traced_
from ibprune.task_heads import auto_class

OBJECTIVES = {
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": TAGS,
    "AutoModelForQuestionAnswering": ANSWERS,
    "AutoModelForSeq2SeqLM": WRITES,
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForMaskedLM": "masked_lm",
}


@dataclass(frozen=True)
class Work:
    """What a recipe does to a model, sized.

    Attributes:
        recipe: With its defaults filled in.
        dense, student, masks, small: Parameters of the dense model, of its copy that is cut (with a factorised
            embedding), of the masks, and of what is left.
        small_share: Of the dense MACs that is left.
        kinds: How many are cut.
        rows: Sequences of a batch in one process.
        step, score: One batch of training and of scoring. What is left is taken to hold no fewer activations.
        new_head: Whether the dense model is trained first.
        processes: That train together.
        adapters: Parameters of those of the dense model, where they are all that trains in the recovery; else 0. What
            is left has fewer.
        packed: Bytes of the dense model in 4 or 8 bits, which its copy shares; 0 where both are held in float32.
    """

    recipe: Recipe
    dense: int
    student: int
    masks: int
    small: int
    small_share: float
    kinds: int
    rows: int
    step: Step
    score: Step
    new_head: bool = False
    processes: int = 1
    adapters: int = 0
    packed: int = 0


def dry_run(recipe: Recipe, device: torch.device | None) -> DryRun:
    """How a recipe's steps run on a device; None: on some GPU."""
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if device is None or native_bf16() else "fp32"
    return DryRun(precision, device is None or device.type != "cpu", recipe.gradient_checkpointing,
                  recipe.mode == "faster")  # fmt: skip


def objective_of(recipe: Recipe, cls: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """What a model would be trained for, as far as the class and the recipe tell; data may tell more."""
    if reads_pictures(config.model_type):
        return "classification"
    if recipe.task:
        return "regression" if recipe.task == "stsb" else "classification"
    return OBJECTIVES.get(auto_class(cls.__name__.removeprefix("Pruned"), config.model_type), "encoder")


def measure(
    recipe: Recipe,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    name: str,
    how: DryRun,
    *,
    processes: int = 1,
    shape: tuple[int, int, int] | None = None,
    new_head: bool = False,
) -> Work:
    """Sizes a recipe on skeletons. What `--distill hidden` and `relations` add is left out.

    Args:
        name: Of the objective.
        shape: Of a picture, where the config does not say.
    """
    traced = is_traced(config.model_type)
    if not traced and find_family(config.model_type).experts:
        raise UnsupportedModel(
            f"which experts of a '{config.model_type}' a token takes depends on what is read: there is no estimate for "
            "it."
        )
    if is_pruned(config):
        raise UnsupportedModel("the blocks of a pruned model differ from each other: there is no estimate for it.")
    defaults = name if not reads_pictures(config.model_type) else "images" if traced else "images by patches"
    recipe = filled_in(recipe, defaults, config)
    objective = Objective(name, divergence=recipe.divergence)
    teacher, student, structure, shape = _skeletons(recipe, config, cls, shape)
    dense, whole = count_params(teacher), count_params(student)
    small, share = _left(recipe, structure, dense)
    lora = lora_of(recipe)
    adapters = count_adapters(student, lora) if lora else 0
    packed = packed_bytes(teacher, bits(recipe)) if bits(recipe) else 0
    masks = inject_(student, structure.sites)
    rows = -(-recipe.batch_size // processes)
    with hollow(student, teacher):
        whole_batch, batch = (
            made_up_batch(student, objective, n, recipe.max_length or 0, shape) for n in (recipe.batch_size, rows)
        )
        taught = teacher if recipe.distill != "none" else None
        scored, step = over_depth(
            (student, teacher),
            lambda: (
                score_step(student, masks, objective, whole_batch, how),
                train_step(student, taught, objective, batch, how),
            ),
        )
    return Work(
        recipe, dense, whole, sum(p.numel() for p in masks.parameters()), small, share,
        len({site.kind for site in structure.sites.values()}), rows, step, scored, new_head, processes, adapters,
        packed,
    )  # fmt: skip


def _skeletons(
    recipe: Recipe, config: PreTrainedConfig, cls: type[PreTrainedModel], shape: tuple[int, int, int] | None
) -> tuple[PreTrainedModel, PreTrainedModel, Structure, tuple[int, int, int] | None]:
    """The dense model, what is cut of it, how, and the shape of the pictures that both read."""
    dtype = stored_dtype(config)
    if not is_traced(config.model_type):
        teacher, student = (build_model(config, cls, device="meta") for _ in range(2))
        return teacher, student, prepare_skeleton_(student, recipe, dtype)[0], image_shape(student)
    teacher, student = (build_model(config, cls, device="cpu") for _ in range(2))
    example = torch.zeros(2, *shape)
    structure = prepare_traced_(student, find_channels(student, example).sites, example, compact_traced_)
    return teacher, student, budgeted(structure, student, recipe, dtype), shape


def _left(recipe: Recipe, structure: Structure, dense: int) -> tuple[int, float]:
    """Parameters, and the share of the dense MACs, that a budget leaves where all kinds give equal shares.

    Of several budgets the largest counts; of a latency, which is not known yet, its share of both.
    """
    keep = 1.0 if recipe.budget is None or recipe.at_least else recipe.budget
    keep = max(keep) if isinstance(keep, tuple) else keep
    if recipe.cost == "latency":
        return int(keep * dense), keep
    costs, sites = structure.costs, structure.sites
    target = make_budget(costs.of(recipe.cost), sites, keep=keep, scope=recipe.scope, round_to=recipe.round_to,
                         ties=structure.ties)  # fmt: skip
    scores = {name: torch.arange(site.n_units, 0.0, -1.0) for name, site in sites.items()}
    kept = {name: len(units) for name, units in equal_keep(structure, target, scores).items()}
    return costs.params(kept), costs.macs(kept) / costs.macs.of_dense()
