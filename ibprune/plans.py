"""The pruning plan: which units stay, and nothing else. Every score ends here, everything after starts here."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ibprune.errors import PlanMismatch, did_you_mean
from ibprune.groups import Site
from ibprune.json_files import read_json

FORMAT = "ibprune.plan/1"
ROTATED = "rotated_stream"  # set on a model whose residual stream was turned (`ibprune.rotation`)


@dataclass(frozen=True)
class PruningPlan:
    """Which units of which site stay.

    Attributes:
        model_type: The family's `config.model_type`, or the class name of a plain module.
        n_units: Units of each site before pruning.
        keep: Sorted indices of the units that stay, by site.
        rotated: Whether its `hidden` units are directions of a residual stream that was turned first, which the dense
            model does not have.

    Example:
        >>> PruningPlan("bert", {"hidden": 4}, {"hidden": (0, 2)}).kept()
        {'hidden': 2}
    """

    model_type: str
    n_units: dict[str, int]
    keep: dict[str, tuple[int, ...]]
    rotated: bool = False
    format: str = FORMAT

    def kept(self) -> dict[str, int]:
        """Number of kept units by site."""
        return {name: len(units) for name, units in self.keep.items()}

    def to_dict(self) -> dict:
        """The plan as JSON takes it; `from_dict` reads it."""
        return {
            "format": self.format,
            "model_type": self.model_type,
            "n_units": self.n_units,
            **({"rotated": True} if self.rotated else {}),
            "keep": {name: list(units) for name, units in self.keep.items()},
        }

    def save(self, path: str | Path) -> None:
        """Writes the plan, a line per site: a vocabulary has tens of thousands of rows."""
        data = self.to_dict()
        keep = ",\n".join(f"  {json.dumps(name)}: {json.dumps(units)}" for name, units in data.pop("keep").items())
        Path(path).write_text(json.dumps(data, indent=1).removesuffix("\n}") + f',\n "keep": {{\n{keep}\n }}\n}}\n')

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads a plan.

        Raises:
            PlanMismatch: The file is not a plan of this format.
        """
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise PlanMismatch(f"expected a pruning plan in {path}, could not read it: {error}") from error
        return cls.from_dict(data, name=str(path))

    @classmethod
    def from_dict(cls, data: object, *, name: str = "plan") -> "PruningPlan":
        """Builds a plan from parsed JSON and checks its form (not whether it fits a model)."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlanMismatch(f"{name}: expected format '{FORMAT}', found {found!r}.")
        keep, n_units, model_type = data.get("keep"), data.get("n_units"), data.get("model_type")
        rotated = data.get("rotated", False)
        if not isinstance(rotated, bool):
            raise PlanMismatch(f"{name}: expected true or false for 'rotated', found {rotated!r}.")
        if not isinstance(keep, dict) or not isinstance(n_units, dict) or not isinstance(model_type, str):
            raise PlanMismatch(f"{name}: expected 'model_type', 'n_units' and 'keep', found {sorted(data)}.")
        if set(keep) != set(n_units):
            raise PlanMismatch(f"{name}: 'keep' and 'n_units' name different sites.")
        for site, units in keep.items():
            total = n_units[site]
            if not isinstance(total, int) or isinstance(total, bool) or not isinstance(units, list):
                raise PlanMismatch(f"{name}: site '{site}' needs a number of units and a list of indices.")
            if any(not isinstance(unit, int) or isinstance(unit, bool) for unit in units):
                raise PlanMismatch(f"{name}: site '{site}' holds something that is not an index.")
            if units != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < total):
                raise PlanMismatch(f"{name}: site '{site}' needs sorted, unique indices in 0..{total - 1}.")
        return cls(model_type, dict(n_units), {site: tuple(units) for site, units in keep.items()}, rotated)


def model_type(model: nn.Module) -> str:
    """What a plan calls a model: its `config.model_type`, or the class name of a plain module."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def is_rotated(model: nn.Module) -> bool:
    """Whether the model's `hidden` units are directions of a turned residual stream."""
    return getattr(model, ROTATED, False)


def check_plan(plan: PruningPlan, model: nn.Module, sites: dict[str, Site]) -> None:
    """Checks that a plan fits a model's sites.

    Raises:
        PlanMismatch: Another model type, other sites, other unit counts, fewer units than a site needs, or directions
            of a turned residual stream where the model's is not, or the reverse.
    """
    if plan.model_type != model_type(model):
        raise PlanMismatch(f"the plan is for model_type '{plan.model_type}', the model is '{model_type(model)}'.")
    if plan.rotated != is_rotated(model):
        first, second = ("turned", "not") if plan.rotated else ("plain", "turned")
        raise PlanMismatch(
            f"the plan counts the features of a {first} residual stream, the model's is {second}: `hidden` units are "
            "directions after --rotate, features otherwise. Repeat the run by its recipe.yaml."
        )
    for name in plan.keep:
        if name not in sites:
            raise PlanMismatch(f"the plan names a site '{name}' that the model lacks: {did_you_mean(name, sites)}.")
    for name, site in sites.items():
        if name not in plan.keep:
            raise PlanMismatch(f"the plan lacks the site '{name}'.")
        if plan.n_units[name] != site.n_units:
            raise PlanMismatch(f"site '{name}': the plan counts {plan.n_units[name]} units, the model {site.n_units}.")
        kept = len(plan.keep[name])
        if kept < site.min_units:
            raise PlanMismatch(f"site '{name}' must keep at least {site.min_units} unit(s), the plan keeps {kept}.")


def full_plan(model: nn.Module, sites: dict[str, Site]) -> PruningPlan:
    """The plan that keeps everything."""
    return PruningPlan(
        model_type(model),
        {name: site.n_units for name, site in sites.items()},
        {name: tuple(range(site.n_units)) for name, site in sites.items()},
        is_rotated(model),
    )
