"""The public Python functions: prune, plan, load, audit."""

from ibprune.comparing import audit
from ibprune.console import Quiet
from ibprune.loading import load
from ibprune.pipeline import PruneResult, run
from ibprune.planning import plan
from ibprune.recipe import make_recipe

__all__ = ["PruneResult", "audit", "load", "plan", "prune"]


def prune(
    model: str | None = None,
    budget: float | None = None,
    *,
    recipe: str | None = None,
    console: Quiet | None = None,
    **overrides: object,
) -> PruneResult:
    """Prunes a trained model to a share of its size or compute and writes a folder that loads.

    Args:
        model: Hub id, folder or alias.
        budget: Share of the dense cost to keep, in (0, 1].
        recipe: A YAML recipe; the other arguments override it.
        console: Where progress is shown; nothing by default.
        overrides: The other fields of `ibprune.recipe.Recipe`, such as score="fisher" or output="out".

    Raises:
        IBPruneError: Anything the user can mend, in one line.

    Example:
        >>> result = prune("minilm", 0.3, output="small")  # doctest: +SKIP
        >>> result.report["pruned"]["params"]  # doctest: +SKIP
    """
    values = {"model": model, "budget": budget} | overrides
    return run(make_recipe({k: v for k, v in values.items() if v is not None}, file=recipe), console or Quiet())
