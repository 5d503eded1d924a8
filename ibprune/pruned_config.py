"""The config of a pruned folder, read without the folder's code, and the class that builds the shapes it describes."""

import functools
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ibprune.claims import check_claims
from ibprune.errors import PlanMismatch
from ibprune.rebuild import Pruned
from ibprune.sites import check_model_type
from ibprune.surgery import FORMAT, SPEC, SPEC_KEYS


def read_spec(raw: object, path: Path) -> dict | None:
    """The description of the pruned structure in the JSON of a config, None for a plain model.

    Args:
        path: Of the config, for messages.

    Raises:
        PlanMismatch: Another kind of JSON, or a structure of another format.
    """
    spec = raw.get(SPEC) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(spec, dict | None):
        raise PlanMismatch(f"expected keys and values in {path}, found another kind of JSON.")
    missing = [] if spec is None else [key for key in SPEC_KEYS if key not in spec]
    if missing or (spec is not None and spec["format"] not in (1, FORMAT)):
        raise PlanMismatch(
            f"expected '{SPEC}' of format {FORMAT} in {path}, found "
            + (f"none of {', '.join(missing)}." if missing else f"format {spec['format']}: use a newer ibprune.")
        )
    return spec


def plain_class(raw: dict, path: Path) -> type[PreTrainedModel]:
    """The transformers class that a folder's config names, of the dense architecture where the model is pruned.

    Raises:
        IBPruneError: No such class, or one of another model type.
    """
    spec, named = raw.get(SPEC), raw.get("architectures")
    name = spec["architecture"] if spec else named[0] if isinstance(named, list) and named else ""
    model_type = spec["model_type"] if spec else raw.get("model_type")
    check_model_type(str(model_type))
    check_claims(raw, str(path.parent))
    base = getattr(transformers, str(name), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel) and base.config_class):
        raise PlanMismatch(f"{path}: expected a transformers class of model type '{model_type}', found '{name}'.")
    if base.config_class.model_type != model_type:
        raise PlanMismatch(f"{path}: expected model type '{base.config_class.model_type}' of {name}, found another.")
    return base


def plain_config(raw: dict, base: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config as the dense family's own class has it, without the names of code."""
    known = {key: value for key, value in raw.items() if key != "auto_map"}
    named = {"model_type": base.config_class.model_type, "architectures": [base.__name__]}
    return base.config_class.from_dict(known | named)


def is_pruned(config: PreTrainedConfig) -> bool:
    """Whether a config describes a structure that its family's class does not build."""
    return getattr(config, SPEC, None) is not None


def built_class(base: type[PreTrainedModel], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that builds what a config describes: `base`, or over it one that takes the pruned shapes."""
    if not is_pruned(config) or issubclass(base, Pruned):
        return base
    return _over(base)


@functools.cache
def _over(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """One class for each base. A model that is copied or stored whole names the base, as its class is in no module."""

    def reduced(model: PreTrainedModel, protocol: int) -> tuple:
        return _blank, (base,), model.__dict__

    return type(f"Pruned{base.__name__}", (Pruned, base), {"__reduce_ex__": reduced})


def _blank(base: type[PreTrainedModel]) -> PreTrainedModel:
    """A model to be filled with what was stored."""
    return object.__new__(_over(base))


def as_dense_class_(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a model that was built in the pruned shapes the class it has in the run that prunes it; returns it.

    Everything that cuts, writes and compares models goes by the names of transformers' classes.
    """
    model.__class__ = next(cls for cls in type(model).__mro__ if not issubclass(cls, Pruned))
    return model
