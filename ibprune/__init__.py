"""ibprune: smaller models with a calibrated account of what was lost.

The heavy imports happen inside the functions, so that `import ibprune` stays quick. No module may bear a
function's name (`plans.py`, `auditing.py`): importing it would put the module in the function's place.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "MaskCallback",
    "MaskedTraining",
    "ModuleResult",
    "PruneResult",
    "audit",
    "bench",
    "convert_legacy",
    "estimate",
    "export",
    "load",
    "plan",
    "prune",
    "push",
    "sensitivity",
    "train",
]

if TYPE_CHECKING:
    from ibprune.api import (
        MaskedTraining,
        ModuleResult,
        PruneResult,
        audit,
        bench,
        convert_legacy,
        estimate,
        export,
        load,
        plan,
        prune,
        push,
        sensitivity,
        train,
    )  # fmt: skip
    from ibprune.callback import MaskCallback


def __getattr__(name: str):
    if name == "MaskCallback":  # alone takes transformers' Trainer to import
        from ibprune.callback import MaskCallback

        return MaskCallback
    if name in __all__:
        from ibprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'ibprune' has no attribute '{name}'")
