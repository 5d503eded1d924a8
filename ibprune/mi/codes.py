"""Low-dimensional codes of samples: principal components, and an autoencoder's bottleneck."""

import numpy as np
import torch
from torch import nn

from ibprune.mi.samples import as_samples

HELD_OUT = 0.15  # of the samples, which choose when the autoencoder stops
PATIENCE = 10  # epochs without a better reconstruction


def pca_codes(x, dims: int) -> np.ndarray:
    """The first `dims` principal coordinates, unwhitened, (n, min(dims, d)).

    Example:
        >>> pca_codes(layer, 4).shape
        (2000, 4)
    """
    x = as_samples(x)
    if dims < 1:
        raise ValueError(f"expected at least one dimension, found {dims}.")
    centred = x - x.mean(axis=0)
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    return centred @ directions[:, :dims]


def autoencoder_codes(x, dims: int, *, width: int = 128, epochs: int = 200, seed: int = 0) -> np.ndarray:
    """The bottleneck of a small autoencoder trained on the samples, (n, min(dims, d)), float64.

    One hidden layer on each side, mean squared error of the standardised features, Adam, stopped by the
    error on held-out samples (Butakov et al. 2024, arXiv 2305.08013, section 4, compress so). Like PCA it
    keeps what varies, curved directions included; what depends on another variable may still be lost. Training
    ends in local optima: a single code may fold a curve over.

    Args:
        x: Samples, (n, d).
        dims: Width of the bottleneck.
        width: Units of the hidden layers.
        epochs: At most, in batches of 256.
        seed: Of the weights and batches; the same seed gives the same codes.

    Raises:
        BadSamples: As in `as_samples`.
        ValueError: A dimension below 1.

    Example:
        >>> autoencoder_codes(layer, 4).shape
        (2000, 4)
    """
    x = as_samples(x)
    if dims < 1:
        raise ValueError(f"expected at least one dimension, found {dims}.")
    scale = x.std(axis=0)
    data = torch.from_numpy((x - x.mean(axis=0)) / np.where(scale > 0, scale, 1.0)).float()
    d, dims = x.shape[1], min(dims, x.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 15_485_867)
        encoder = nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, dims))
        decoder = nn.Sequential(nn.Linear(dims, width), nn.SiLU(), nn.Linear(width, d))
        order = torch.randperm(len(data))
        _fit(
            encoder, decoder, data[order[int(HELD_OUT * len(data)) :]], data[order[: int(HELD_OUT * len(data))]], epochs
        )
    with torch.no_grad():
        return encoder(data).double().numpy()


def _fit(encoder: nn.Module, decoder: nn.Module, train: torch.Tensor, held_out: torch.Tensor, epochs: int) -> None:
    """Trains in place and ends with the weights of the least held-out error."""
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    best, kept, since = float("inf"), [p.detach().clone() for p in parameters], 0
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(256):
            loss = (decoder(encoder(batch)) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = float((decoder(encoder(held_out)) - held_out).square().mean())
        since += 1
        if error < best:
            best, kept, since = error, [p.detach().clone() for p in parameters], 0
        if since >= PATIENCE:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept):
            parameter.copy_(value)
