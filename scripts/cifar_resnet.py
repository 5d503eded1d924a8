"""The trained CIFAR-10 ResNet-20 or -56 pruned by several methods at equal MACs and steps.

    python scripts/cifar_resnet.py --data ../shared/data/cifar10 --budget 0.5 --output cifar.json \\
        --weights ../shared/data/models/resnet_cifar10/resnet20-12fca82f.th

The trained shortcuts pad with widths written into the forward (option A): only the inner channels of the blocks can be
cut, and the report says so. `--shortcut conv` writes them as the 1x1 convolutions that compute the same, so that the
streams can be cut too. Torch-Pruning (group L1, BN scale; one shot, global or uniform) is bisected to at most the
budget's MACs and recovers with the same loop. Test error is on the first 1,000 test images (standard error about 0.9
points), so methods are compared in pairs, image by image: log-likelihood and McNemar's test against the first method.
`--validate` judges on the last 2,000 training images, held out.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from PIL import Image
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import ibprune
from ibprune.console import Terminal
from ibprune.costs import count_params, module_macs_model
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.losses import Objective
from ibprune.scores import LEARNED
from ibprune.timing import time_forward
from ibprune.trainer import TrainSettings, train

WITNESSES = {  # Torch-Pruning: the importance, and whether all layers are ranked together or each loses the same share
    "torch-pruning l1": (torch_pruning.importance.GroupMagnitudeImportance(p=1), True),
    "torch-pruning bn": (torch_pruning.importance.BNScaleImportance(), True),
    "torch-pruning l1 uniform": (torch_pruning.importance.GroupMagnitudeImportance(p=1), False),
}
LR = 1e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.side, self.shortcut = stride, (out - into) // 2, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if isinstance(self.shortcut, nn.Conv2d) or not self.side:
            return F.relu(y + self.shortcut(x))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.side, self.side)))

    def convolve_(self) -> None:
        """Writes the padded shortcut as the 1x1 convolution that computes the same."""
        into, out = self.conv1.in_channels, self.conv2.out_channels
        self.shortcut = nn.Conv2d(into, out, 1, self.stride, bias=False)
        with torch.no_grad():
            self.shortcut.weight.zero_()
            self.shortcut.weight[torch.arange(into) + self.side, torch.arange(into)] = 1.0


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


def load_dense(path: Path, *, shortcut: str) -> ResNet:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    blocks = len({name.split(".")[1] for name in state if name.startswith("layer1.")})
    model = ResNet(blocks)
    model.load_state_dict(state, strict=True)
    for block in model.modules():
        if shortcut == "conv" and isinstance(block, Block) and block.side:
            block.convolve_()
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


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Of one image, in convolutions and linear layers."""
    return module_macs_model(model, {}, x[:1])({})


def torch_prune(dense: ResNet, name: str, limit: int, example: torch.Tensor) -> nn.Module:
    """One shot over all layers that may be cut, its ratio bisected to at most `limit` MACs."""
    streams = [module.conv2 for module in dense.modules() if isinstance(module, Block)] + [dense.conv1]
    padded = any(isinstance(m, Block) and m.side and isinstance(m.shortcut, nn.Identity) for m in dense.modules())
    fixed = [dense.linear] + (streams if padded else [])
    spot = {id(module): path for path, module in dense.named_modules()}
    importance, together = WITNESSES[name]

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        pruner = torch_pruning.pruner.BasePruner(
            model, example, importance=importance, pruning_ratio=ratio, max_pruning_ratio=0.95,
            global_pruning=together, ignored_layers=[model.get_submodule(spot[id(module)]) for module in fixed],
        )  # fmt: skip
        pruner.step()
        return model

    low, high = 0.0, 0.99
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if count_macs(at(middle), example) <= limit else (middle, high)
    return at(high)


def recover(model: nn.Module, dense: nn.Module, batches: Augmented, steps: int, seed: int) -> nn.Module:
    """The recovery of `ibprune.prune`: cross entropy and the dense model's logits."""
    accelerator = make_accelerator("fp32", seed=seed)
    teacher = copy.deepcopy(dense).to(accelerator.device).eval()
    settings = TrainSettings(steps=steps, lr=LR, weight_decay=1e-4, seed=seed)
    loss_of = loss_with(Objective("classification"), teacher, accelerator)

    def loader(epoch: int):
        return DataLoader(_Epoch(batches), batch_size=None)

    train(
        model.to(accelerator.device), loss_of, loader, settings, accelerator=accelerator, phase="recovering",
        console=Terminal(),
    )  # fmt: skip
    return model.eval()


class _Epoch(IterableDataset):
    def __init__(self, batches: Augmented):
        self.batches = batches

    def __iter__(self):
        for x, y in self.batches:
            yield {"inputs": x, "labels": y}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--shortcut", choices=("pad", "conv"), default="conv")
    parser.add_argument("--budget", type=float, required=True, help="share of the dense MACs to keep")
    parser.add_argument(
        "--methods", default="vib,fisher,magnitude,random,torch-pruning l1,torch-pruning bn,torch-pruning l1 uniform"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--mask-steps", type=int, default=390)
    parser.add_argument("--total-steps", type=int, default=1170, help="mask learning and recovery together")
    parser.add_argument("--limit", type=int, help="training images, for a quick look")
    parser.add_argument("--validate", action="store_true", help="judge on 2,000 training images held out, not the test")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    x, y = load_images(arguments.data, list(range(25)), slice(0, 25_000))
    x_test, y_test = load_images(arguments.data, [50], slice(50_000, 51_000))
    if arguments.validate:
        x, y, x_test, y_test = x[:-2000], y[:-2000], x[-2000:], y[-2000:]
    dense, rows = load_dense(arguments.weights, shortcut=arguments.shortcut), []
    batches, example = Augmented(x[: arguments.limit], y[: arguments.limit]), x[:32]
    limit = int(arguments.budget * count_macs(dense, x))
    print(json.dumps({"dense error": 100 * float(1 - log_likelihoods(dense, x_test, y_test)[1].mean())}), flush=True)
    for seed in map(int, arguments.seeds.split(",")):
        first = None
        for method in arguments.methods.split(","):
            kept = refused = None
            if method in WITNESSES:
                torch.manual_seed(seed)
                model = torch_prune(dense, method, limit, x[:1])
                model = recover(model, dense, batches, arguments.total_steps, seed)
            else:
                masks = arguments.mask_steps if method in LEARNED else 0
                result = ibprune.prune(
                    dense, arguments.budget, cost="macs", score=method, seed=seed, train_loader=batches,
                    example=example, lr=LR, mask_steps=masks, recover_steps=arguments.total_steps - masks,
                    console=Terminal(),
                )  # fmt: skip
                model, kept, refused = result.model, result.report["kept"], result.report["refused"]
            likelihood, right = log_likelihoods(model, x_test, y_test)
            first = first or (likelihood, right)
            gain = likelihood - first[0]
            better, worse = int((right & ~first[1]).sum()), int((~right & first[1]).sum())
            latency = time_forward(dense, model, {"inputs": example}, console=Terminal())
            rows.append({
                "method": method, "seed": seed, "error": 100 * float(1 - right.mean()),
                "macs": count_macs(model, x), "params": count_params(model),
                "log_likelihood": float(likelihood.mean()),
                "log_likelihood_gain": [float(gain.mean()), float(gain.std() / len(gain) ** 0.5)],
                "mcnemar": [better, worse, binomtest(better, better + worse).pvalue if better + worse else 1.0],
                "latency_ms": [each["median"] for each in latency], "kept": kept, "refused": refused,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            settings = {key: str(value) for key, value in vars(arguments).items()}
            arguments.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
