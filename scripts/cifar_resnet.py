"""The trained CIFAR-10 ResNet-20 or -56 (option-A shortcuts) pruned by several scores at equal MACs and steps.

    python scripts/cifar_resnet.py --data ../shared/data/cifar10 --budget 0.5 --output cifar.json \\
        --weights ../shared/data/models/resnet_cifar10/resnet20-12fca82f.th

The shortcuts pad with widths written into the forward, so that only the inner channels of the blocks can be cut; the
report says so. Test error is on the first 1,000 test images (standard error about 0.9 points), so methods are
compared in pairs, image by image: log-likelihood and McNemar's test against the first score.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

import ibprune
from ibprune.console import Terminal

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.side = stride, (out - into) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.side, self.side))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """6n + 2 layers (He et al. 2016, arXiv 1512.03385, section 4.2)."""

    def __init__(self, blocks: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        into = 16
        for stage, out in enumerate((16, 32, 64), 1):
            first = Block(into, out, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, *(Block(out, out, 1) for _ in range(blocks - 1))))
            into = out
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 3, 32, 32) -> (batch, 10)
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def load_dense(path: Path) -> ResNet:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    blocks = len({name.split(".")[1] for name in state if name.startswith("layer1.")})
    model = ResNet(blocks)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load_images(folder: Path, batches: list[int], labels: slice) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [np.asarray(Image.open(folder / f"cifar10_batch_{i}.png")).reshape(-1, 32, 32, 3) for i in batches]
    x = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(np.load(folder / "labels_51000.npy", allow_pickle=False)[labels]).long()
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), y


class Augmented:
    """Shuffled batches, padded by 4, cropped and flipped at random, by torch's generator."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, size: int = 128):
        self.x, self.y, self.size = F.pad(x, (4, 4, 4, 4)), y, size

    def __iter__(self):
        for rows in torch.randperm(len(self.x)).split(self.size):
            if len(rows) < self.size:
                return
            corners = torch.randint(9, (len(rows), 2)).tolist()
            x = torch.stack([self.x[r, :, i : i + 32, j : j + 32] for r, (i, j) in zip(rows, corners)])
            flip = torch.rand(len(rows)) < 0.5
            x[flip] = x[flip].flip(-1)
            yield x, self.y[rows]


@torch.no_grad()
def log_likelihoods(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of the right class, (n,), and whether the class was found, (n,)."""
    device = next(model.parameters()).device
    logits = torch.cat([model(part.to(device)).cpu() for part in x.split(250)])
    return -F.cross_entropy(logits, y, reduction="none").numpy(), (logits.argmax(1) == y).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--budget", type=float, required=True, help="share of the dense MACs to keep")
    parser.add_argument("--scores", default="vib,fisher,magnitude,random")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--mask-steps", type=int, default=390)
    parser.add_argument("--total-steps", type=int, default=1170, help="mask learning and recovery together")
    parser.add_argument("--limit", type=int, help="training images, for a quick look")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    x, y = load_images(arguments.data, list(range(25)), slice(0, 25_000))
    x_test, y_test = load_images(arguments.data, [50], slice(50_000, 51_000))
    dense, batches, rows = load_dense(arguments.weights), Augmented(x[: arguments.limit], y[: arguments.limit]), []
    print(json.dumps({"dense error": 100 * float(1 - log_likelihoods(dense, x_test, y_test)[1].mean())}))
    for seed in map(int, arguments.seeds.split(",")):
        first = None
        for score in arguments.scores.split(","):
            masks = arguments.mask_steps if score == "vib" else 0
            result = ibprune.prune(
                dense, arguments.budget, cost="macs", score=score, seed=seed, train_loader=batches, example=x[:2],
                mask_steps=masks, recover_steps=arguments.total_steps - masks, console=Terminal(),
            )  # fmt: skip
            likelihood, right = log_likelihoods(result.model, x_test, y_test)
            first = first or (likelihood, right)
            gain = likelihood - first[0]
            better, worse = int((right & ~first[1]).sum()), int((~right & first[1]).sum())
            rows.append({
                "score": score, "seed": seed, "error": 100 * float(1 - right.mean()),
                "macs": result.report["pruned"]["macs"], "params": result.report["pruned"]["params"],
                "log_likelihood_gain": [float(gain.mean()), float(gain.std() / len(gain) ** 0.5)],
                "mcnemar_p": binomtest(better, better + worse).pvalue if better + worse else 1.0,
                "latency_ms": [result.report[side]["latency_ms"]["median"] for side in ("dense", "pruned")],
                "kept": result.report["kept"], "refused": result.report["refused"],
            })  # fmt: skip
            print(json.dumps(rows[-1]))
            settings = {key: str(value) for key, value in vars(arguments).items()}
            arguments.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
