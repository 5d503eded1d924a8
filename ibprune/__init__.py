"""ibprune: smaller models with a calibrated account of what was lost.

The heavy imports happen inside the functions, so that `import ibprune` stays quick.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["PruneResult", "load", "plan", "prune"]

if TYPE_CHECKING:
    from ibprune.api import PruneResult, load, plan, prune


def __getattr__(name: str):
    if name in __all__:
        from ibprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'ibprune' has no attribute '{name}'")
