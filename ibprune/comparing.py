"""Audits two checkpoints on disk or from the Hub: loads both, encodes the data, writes the folder."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from ibprune.audit_output import write_audit
from ibprune.auditing import Side
from ibprune.auditing import audit as audit_models
from ibprune.console import Quiet
from ibprune.errors import BadData, UnsupportedModel
from ibprune.export import check_output, staged
from ibprune.features import default_pooling
from ibprune.feeding import find_data
from ibprune.inputs import MOST_INPUTS, Inputs, encode_inputs
from ibprune.loading import load
from ibprune.measures import AuditSettings
from ibprune.mi.probes import Probe
from ibprune.models import find_source, load_config, load_dense
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe
from ibprune.sites import find_family, reads_pictures
from ibprune.surgery import SPEC


def audit(
    dense: str,
    pruned: str,
    *,
    data: str | None = None,
    task: str | None = None,
    text_columns: tuple[str, ...] = (),
    label_column: str = "",
    layers: tuple[str, ...] = (),
    pooling: str | None = None,
    probe: str = "logistic",
    tokens: int = 0,
    pair: bool = False,
    max_inputs: int = MOST_INPUTS,
    max_length: int = 128,
    seed: int = 0,
    output: str | None = None,
    console: Quiet | None = None,
) -> dict:
    """What each layer of a dense and of a pruned model knows of its input and its labels, in bits.

    Args:
        dense, pruned: Hub ids, folders or aliases; the pruned one may be any checkpoint of the same family.
        data, task, text_columns, label_column: As for `prune`; the held-out rows are used.
        layers: Blocks ("encoder.layer.3") or module paths; default: the residual stream after every block.
        pooling: Of tokens: mean, cls, last or random; default: last for decoders, mean otherwise.
        probe: Family of predictors of the V-information: logistic, or mlp, which takes some ten times as long.
        tokens: So many of the most frequent tokens become targets too (current and next token); 20 is plenty.
        pair: Whether to estimate I(dense layer; pruned layer) too.
        max_inputs: At most so many distinct texts.
        max_length: Tokens of a text that are read.
        output: A folder for audit.json and the plots; nothing is written without it.

    Returns:
        The dict of `audit.json` (schema ibprune.mi_audit/1).

    Raises:
        IBPruneError: Models, data or layers that cannot be used or do not belong together.

    Example:
        >>> found = audit("minilm", "pruned", data="prose")  # doctest: +SKIP
        >>> found["layers"][-1]["I_XL"]["retained"]  # doctest: +SKIP
    """
    console = console or Quiet()
    folder = check_output(output) if output else None
    source = find_source(dense)
    if reads_pictures(load_config(source).model_type):
        raise UnsupportedModel(f"the audit does not cover models that read pictures yet, and '{source.name}' is one.")
    loaded = load_dense(source)
    before, after = loaded.model.float(), _load(pruned)
    if before.config.model_type != after.config.model_type:
        raise BadData(
            f"expected two models of one family, found '{before.config.model_type}' and '{after.config.model_type}'."
        )
    plan = _plan(pruned)
    if plan is not None and len(plan.keep.get("vocab", ())) < plan.n_units.get("vocab", 0):
        raise BadData(
            f"expected two models that read the same tokens, but the vocabulary of '{pruned}' was cut: it cannot be "
            "audited yet."
        )
    recipe = Recipe(model=dense, budget=1.0, data=data, task=task, text_columns=text_columns,
                    label_column=label_column, max_length=max_length, seed=seed)  # fmt: skip
    rows = find_data(recipe, console)
    if rows.note:
        console.say(rows.note)
    family = find_family(before.config.model_type)
    limits = [family.max_tokens(model.config) or max_length for model in (before, after)]
    inputs = encode_inputs(rows, loaded.tokenizer, max_length=min(max_length, *limits), most=max_inputs)
    _check_vocabulary(inputs, before, after)
    if pooling and inputs.columns is not None:
        raise BadData("--pooling: layers are read at one tagged word of each text: leave it out.")
    settings = AuditSettings(
        pooling=pooling or default_pooling(before), probe=Probe(probe), tokens=tokens, pair=pair, seed=seed
    )
    found = audit_models(
        Side(source.name, before), Side(pruned, after), inputs, layers=layers, settings=settings, plan=plan,
        console=console,
    )  # fmt: skip
    if folder is not None:
        with staged(folder) as temporary:
            write_audit(found, temporary)
    return found


def _load(name: str) -> PreTrainedModel:
    source = find_source(name)
    config = Path(source.location) / "config.json"
    try:
        raw = json.loads(config.read_text()) if config.exists() else {}
        pruned = isinstance(raw, dict) and SPEC in raw
    except (UnicodeDecodeError, json.JSONDecodeError):
        pruned = False  # the loader of dense models says what is wrong with it
    return (load(source.location) if pruned else load_dense(source).model).float()


def _plan(name: str) -> PruningPlan | None:
    """The plan that an exported folder carries."""
    path = Path(find_source(name).location) / "plan.json"
    return PruningPlan.load(path) if path.exists() else None


def _check_vocabulary(inputs: Inputs, *models: PreTrainedModel) -> None:
    largest = max(int(batch["input_ids"].max()) for batch in inputs.batches)
    for model in models:
        rows = model.get_input_embeddings().num_embeddings
        if largest >= rows:
            raise BadData(
                f"expected models that read the same tokens, found one with {rows:,} and a token {largest:,}."
            )
