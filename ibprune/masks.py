"""VIB masks: a Gaussian multiplier per prunable unit and what it costs to keep it."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn


def mixed(*numbers: int) -> int:
    """A seed that each of the numbers changes, below 2^63.

    Example:
        >>> mixed(0, 1) == mixed(0, 1), mixed(0, 1) == mixed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class VIBMask(nn.Module):
    """Multiplies each unit by z = hard * (mu + noise * sigma * eps), eps ~ N(0, 1) (VIBNet, arXiv 1802.10399, eq. 6).

    One eps per (sequence, unit): removing a unit removes it for all tokens at once, and noise drawn
    per token would under-count that damage. Parameters stay in float32 whatever the model's dtype.

    Attributes:
        mu, log_var: Mean and log-variance, float32, (n_units,).
        hard: 1 for units in the model, 0 for units already cut, (n_units,).
        noise: Scale of the noise while training; 0 makes the mask deterministic.
        flattened: Whether some consumer sees (batch * length) rows: there a probe is repeated to fit, and noise is
            drawn for every row, because nothing says which rows are one sequence.
        tables: Whether some consumer sees a table that all sequences share (relative positions): it takes part in
            no probe.
        mixed: Whether some consumer sees rows in an order of their own: a probe must be of one sequence.
        draw: The seed of the noise, which share of the rows is here, and of how many: with it, what a row draws does
            not depend on how many processes divide the rows, nor on how often the forward runs. None: of torch's own.
        probe: When set, (batch, n_units) multipliers in the place of the noisy mean: gate gradients are read from it.

    Example:
        >>> mask = VIBMask(4).eval()
        >>> mask(batch=2)
        tensor([[1., 1., 1., 1.]], grad_fn=<UnsqueezeBackward0>)
    """

    def __init__(
        self,
        n_units: int,
        *,
        log_alpha: float = -9.0,
        flattened: bool = False,
        tables: bool = False,
        mixed: bool = False,
    ):
        super().__init__()
        self.flattened, self.tables, self.mixed = flattened or mixed, tables, mixed
        self.mu = nn.Parameter(torch.ones(n_units))
        self.log_var = nn.Parameter(torch.full((n_units,), log_alpha))
        self.register_buffer("hard", torch.ones(n_units), persistent=True)
        self.n_kept = n_units  # sum of `hard`, without a read from the device
        self.noise = 1.0
        self.draw: tuple[int, int, int] | None = None
        self.probe: torch.Tensor | None = None

    def forward(self, batch: int) -> torch.Tensor:
        """Returns the multipliers, (batch or 1, n_units), float32."""
        if self.probe is not None:
            if self.flattened and batch > len(self.probe):
                return self.hard * self.probe.repeat_interleave(batch // len(self.probe), dim=0)
            if batch == len(self.probe) or not self.tables:
                return self.hard * self.probe
        if self.probe is not None or not self.training or self.noise == 0.0:
            return (self.hard * self.mu).unsqueeze(0)
        return self.hard * (self.mu + self.noise * torch.exp(0.5 * self.log_var) * self._eps(batch))

    def _eps(self, rows: int) -> torch.Tensor:
        if self.draw is None:
            return torch.randn(rows, len(self.mu), device=self.mu.device)
        seed, index, of = self.draw
        generator = torch.Generator(self.mu.device).manual_seed(seed)
        eps = torch.randn(rows * of, len(self.mu), generator=generator, device=self.mu.device)
        return eps[index * rows : (index + 1) * rows]

    def log_alpha(self) -> torch.Tensor:
        """log(sigma^2 / mu^2), (n_units,): large means prune, keep while below 0."""
        return self.log_var - torch.log(self.mu.square() + 1e-8)

    def kl(self) -> torch.Tensor:
        """KL to the best zero-mean Gaussian prior, 1/2 log(1 + mu^2/sigma^2), in nats, (n_units,) (VIBNet, eq. 9)."""
        return 0.5 * nn.functional.softplus(-self.log_alpha())

    def cut(self, keep: tuple[int, ...]) -> None:
        """Multiplies every unit that `keep` does not name by 0."""
        self.hard.zero_()
        self.hard[list(keep)] = 1.0
        self.n_kept = len(keep)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for tensor in (self.mu, self.log_var, self.hard):
            tensor.data = tensor.data.float()
        return self


class MaskSet(nn.Module):
    """The masks of a model by site name.

    A site name holds dots, which module names may not, and may be what a ModuleDict has of its own, such as "keys".
    """

    def __init__(self, masks: dict[str, VIBMask]):
        super().__init__()
        self.names = {_key(name): name for name in masks}
        self.by_key = nn.ModuleDict({_key(name): mask for name, mask in masks.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Passes x on: an nn.Sequential runs through all its children, and its masks are one of them."""
        return x

    def __getitem__(self, name: str) -> VIBMask:
        return self.by_key[_key(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names.values())

    def items(self) -> Iterator[tuple[str, VIBMask]]:
        return ((self.names[key], mask) for key, mask in self.by_key.items())

    def set_noise(self, scale: float, *, sites: list[str]) -> None:
        for name in sites:
            self[name].noise = scale

    def set_draw(self, *key: int, share: tuple[int, int]) -> None:
        """Keys the noise: the same numbers draw the same, and each mask its own.

        Args:
            share: Which part of a batch's rows is here, and of how many.
        """
        for number, mask in enumerate(self.by_key.values()):
            mask.draw = (mixed(*key, number), *share)

    def kept(self) -> dict[str, tuple[int, ...]]:
        """The units of each site that are not cut."""
        return {name: tuple(mask.hard.nonzero().flatten().tolist()) for name, mask in self.items()}

    def set_keep(self, keep: dict[str, tuple[int, ...]]) -> None:
        """Cuts every unit that `keep` does not name."""
        for name, mask in self.items():
            mask.cut(keep[name])


def _key(name: str) -> str:
    """The module name of a site's mask."""
    return "/" + name.replace(".", "/")
