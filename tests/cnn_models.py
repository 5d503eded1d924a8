"""Small untrained networks of every structure that channels are found in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F


def lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 9, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9 * 16, 20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(49, 30), nn.Sigmoid(), nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 3))


class Block(nn.Module):
    """A basic residual block; shortcut "conv" (1x1, option B) or "pad" (zeros, option A)."""

    def __init__(self, into: int, out: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.extra = stride, out - into
        self.shortcut = nn.Identity()
        if shortcut == "conv" and (stride > 1 or self.extra):
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.pads = shortcut == "pad" and (stride > 1 or self.extra)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pads:
            side = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.stage1 = nn.Sequential(Block(8, 8, 1, shortcut), Block(8, 8, 1, shortcut))
        self.stage2 = nn.Sequential(Block(8, 16, 2, shortcut), Block(16, 16, 1, shortcut))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stage2(self.stage1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNetV2's block, with squeeze-excite where `squeeze` says how narrow."""

    def __init__(self, into: int, out: int, expand: int, squeeze: int = 0):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(into, expand, 1, bias=False), nn.BatchNorm2d(expand), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(expand, expand, 3, 1, 1, groups=expand), nn.BatchNorm2d(expand), nn.ReLU6()
        )
        self.squeeze = SqueezeExcite(expand, squeeze) if squeeze else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(expand, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = into == out

    def forward(self, x):
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


def mobilenet(squeeze: int = 0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(),
        InvertedResidual(8, 8, 16, squeeze), InvertedResidual(8, 12, 24, squeeze),
        nn.Conv2d(12, 24, 1), nn.PReLU(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, into: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x):
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), DenseLayer(8, 4), DenseLayer(12, 4), DenseLayer(16, 4),
        nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2), DenseLayer(10, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 3),
    )  # fmt: skip


def grouped() -> nn.Module:
    """Convolution groups, a depthwise multiplier, GroupNorm and InstanceNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3, groups=4), nn.InstanceNorm2d(24, affine=True),
        nn.ReLU(), nn.Conv2d(24, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.SiLU(), nn.Conv2d(12, 18, 1),
        nn.GroupNorm(6, 18), nn.GELU(), nn.ConvTranspose2d(18, 10, 2, 2), nn.ReLU(), nn.Conv2d(10, 2, 1),
    )  # fmt: skip


class Gated(nn.Module):
    """Halves of one layer's channels multiplied: each unit owns a channel of both."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        a, b = F.relu(self.conv1(x)), None
        a, b = self.conv2(a).chunk(2, 1)
        return self.conv3(a * torch.sigmoid(b)).mean((2, 3))


def hf(config) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_config(config)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # name: constructor, shape of one input
    "lenet5": (lenet5, (1, 28, 28)),
    "mlp": (mlp, (1, 7, 7)),
    "resnet": (lambda: ResNet("conv"), (3, 12, 12)),
    "resnet_pad": (lambda: ResNet("pad"), (3, 12, 12)),
    "mobilenet": (mobilenet, (3, 12, 12)),
    "squeeze_excite": (lambda: mobilenet(squeeze=5), (3, 12, 12)),
    "densenet": (densenet, (3, 8, 8)),
    "grouped": (grouped, (3, 12, 12)),
    "gated": (Gated, (3, 9, 9)),
    "hf_resnet": (
        lambda: hf(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], num_labels=3)),
        (3, 32, 32),
    ),
    "hf_regnet": (
        lambda: hf(
            transformers.RegNetConfig(
                embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], groups_width=4, layer_type="y", num_labels=3
            )
        ),
        (3, 32, 32),
    ),
    "hf_convnext": (
        lambda: hf(transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 1], num_stages=2, num_labels=3)),
        (3, 32, 32),
    ),
    "hf_convnextv2": (
        lambda: hf(transformers.ConvNextV2Config(hidden_sizes=[8, 12], depths=[2, 1], num_stages=2, num_labels=3)),
        (3, 32, 32),
    ),
    "hf_mobilenet_v1": (
        lambda: hf(transformers.MobileNetV1Config(depth_multiplier=0.25, num_labels=3)),
        (3, 32, 32),
    ),
    "hf_mobilenet_v2": (
        lambda: hf(transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=3)),
        (3, 32, 32),
    ),
    "hf_efficientnet": (
        lambda: hf(
            transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=3)
        ),
        (3, 32, 32),
    ),
}


def build_net(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A network with weights, biases and statistics far from their initial values."""
    torch.manual_seed(seed)
    model = NETS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.05 if parameter.ndim > 1 else 0.3) * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand_like(buffer) - 0.15)
    return model.to(dtype)


def net_input(name: str, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, *NETS[name][1], generator=torch.Generator().manual_seed(1)).to(dtype)


def pictures(samples: int, *, shape: tuple[int, ...] = (16, 16, 3), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A task that a tiny network learns: noisy uint8 pictures, brighter at the top (1) or at the bottom (0)."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 128, (samples, *shape)), np.arange(samples) % 2
    half = shape[0] // 2
    images[labels == 1, :half] += 100
    images[labels == 0, half:] += 100
    return images.astype(np.uint8), labels


def save_pictures(folder: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    """One PNG per picture in a sub-folder per class."""
    for i, (image, label) in enumerate(zip(images, labels)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{i:04}.png")
