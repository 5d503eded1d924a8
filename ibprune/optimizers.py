"""The optimisers that train: AdamW, and the same with its moments in 8 bits."""

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn

from ibprune.errors import BadRecipe, did_you_mean, first_line

OPTIMIZERS = ("adamw", "adamw-8bit")


def make_optimizer(name: str, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """An optimiser of parameter groups, at a learning rate where a group has none of its own.

    "adamw-8bit" is bitsandbytes' (Dettmers et al. 2022, arXiv 2110.02861): both moments take a byte a weight, quantised
    in blocks of 256. Tensors of fewer than 4096 values, and groups with "optim_bits": 32, keep them in 32 bits.

    Raises:
        BadRecipe: Another name, or a package that is not there.

    Example:
        >>> type(make_optimizer("adamw", [{"params": [nn.Parameter(torch.ones(2))]}], 0.1)).__name__
        'AdamW'
    """
    if name not in OPTIMIZERS:
        raise BadRecipe(f"--optimizer: found '{name}': {did_you_mean(name, OPTIMIZERS)}.")
    if name == "adamw":
        groups = [{key: value for key, value in group.items() if key != "optim_bits"} for group in groups]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadRecipe('--optimizer: adamw-8bit needs bitsandbytes: pip install "ibprune[bnb]", or use adamw.')
    from bitsandbytes.optim import AdamW8bit

    class ByGroup(AdamW8bit):
        """Reads "optim_bits" of a group; of its own, the package takes them from a table by id, for all models."""

        def get_config(self, gindex: int, pindex: int, group: dict) -> dict:
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("optim_bits", config["optim_bits"])}

    return ByGroup(groups, lr=lr, betas=(0.9, 0.999))


def update_(optimizer: torch.optim.Optimizer) -> None:
    """One step by the gradients that are there, which are gone then."""
    optimizer.step()
    optimizer.zero_grad()


def check_optimizer(name: str, device: torch.device) -> None:
    """Steps once, on a tensor of its own.

    Raises:
        BadRecipe: The optimiser cannot be had, or does not run on the device.
    """
    weight = nn.Parameter(torch.ones(4096, device=device))
    optimizer = make_optimizer(name, [{"params": [weight]}], 1e-3)
    weight.grad = torch.ones_like(weight)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        raise BadRecipe(
            f"--optimizer: {name} of the installed bitsandbytes does not run on {device.type} "
            f"({first_line(error).rstrip('.')}): it needs a GPU, or use adamw."
        ) from error


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What an optimiser remembers of each parameter, as tensors by "number/key"; whole numbers are of int64."""
    return {
        f"{number}/{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in _leaves(values)
    }


def load_moments_(optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor]) -> None:
    """Puts the moments back; rates and the rest of the groups are as the settings make them."""
    state: dict[int, dict] = {}
    for name, tensor in saved.items():
        number, *path, key = name.split("/")
        place = state.setdefault(int(number), {})
        for part in path:
            place = place.setdefault(part, {})
        place[key] = tensor.item() if tensor.dtype == torch.int64 else tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _leaves(values: dict) -> Iterator[tuple[str, torch.Tensor | int]]:
    """The values of nested dicts, by their path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", leaf) for name, leaf in _leaves(value))
        else:
            yield key, value
