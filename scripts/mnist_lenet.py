"""LeNet-300-100 and LeNet-5-Caffe on MNIST: trained, pruned by scores and by Torch-Pruning at equal size, one table.

    python scripts/mnist_lenet.py --data ../shared/data/mnist --net lenet300 --budget 0.05 --output mnist.json

`--data` is a folder with one npz: X_train, y_train, X_test, y_test (uint8). Every row of one seed starts from the
same dense model and takes the same total of steps; "torch-pruning" (group L1, one shot, global or uniform ratio) is
bisected to at most the parameters that "vib" reached. A LeNet-5 is cut twice: channels first, then the flattened
features that its linear layer reads.
"""

import argparse
import copy
import json
import platform
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ibprune
from ibprune.console import Quiet, Terminal
from ibprune.costs import count_params
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.losses import Objective
from ibprune.scores import LEARNED
from ibprune.trainer import TrainSettings, train

LR = 1e-3
SCORES = ("vib", "fisher", "magnitude", "random")


def lenet300() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet5_caffe() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


NETS = {"lenet300": lenet300, "lenet5": lenet5_caffe}


class Batches:
    """Shuffled batches of arrays in memory: a new order at every pass, by torch's generator."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, size: int = 128):
        self.x, self.y, self.size = x, y, size

    def __iter__(self):
        for rows in torch.randperm(len(self.x)).split(self.size):
            if len(rows) == self.size:
                yield self.x[rows], self.y[rows]


def load_mnist(folder: Path, *, limit: int | None) -> tuple[torch.Tensor, ...]:
    arrays = np.load(next(folder.glob("*.npz")), allow_pickle=False)
    found = []
    for split in ("train", "test"):
        x = torch.from_numpy(arrays[f"X_{split}"]).reshape(-1, 1, 28, 28).float() / 255
        found += [(x[:limit] - 0.1307) / 0.3081, torch.from_numpy(arrays[f"y_{split}"]).long()[:limit]]
    return tuple(found)


@torch.no_grad()
def error(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Test error in percent."""
    device = next(model.parameters()).device
    wrong = sum(int((model(a.to(device)).argmax(1).cpu() != b).sum()) for a, b in zip(x.split(1000), y.split(1000)))
    return 100 * wrong / len(x)


def fit(model: nn.Module, teacher: nn.Module | None, batches: Batches, steps: int, seed: int) -> nn.Module:
    """Trains with the package's loop, distilled from the teacher where there is one."""
    accelerator = make_accelerator("fp32", seed=seed)
    model.to(accelerator.device)
    if teacher is not None:
        teacher.to(accelerator.device).eval()
    loss_of = loss_with(Objective("classification"), teacher, accelerator)
    rows = TensorDataset(batches.x, batches.y)

    def loader(epoch: int) -> DataLoader:
        generator = torch.Generator().manual_seed(epoch)
        return DataLoader(
            rows, batches.size, shuffle=True, generator=generator,
            collate_fn=lambda pairs: dict(zip(("inputs", "labels"), map(torch.stack, zip(*pairs)))),
        )  # fmt: skip

    settings = TrainSettings(steps=steps, lr=LR, weight_decay=1e-4, seed=seed)
    train(model, loss_of, loader, settings, accelerator=accelerator, phase="training", console=Quiet())
    return model.eval()


def prune(dense: nn.Module, net: str, score: str, arguments: argparse.Namespace, batches: Batches, seed: int):
    """One call for an MLP (its pixels are units too), two for a LeNet-5."""
    common = {
        "score": score, "train_loader": batches, "seed": seed, "lr": LR, "example": batches.x[:2],
        "console": Terminal(), "round_to": 1,
    }  # fmt: skip
    masks = arguments.mask_steps if score in LEARNED else 0
    rest = arguments.total_steps - masks
    if net == "lenet300":
        kinds = ("channels", "inputs")
        return ibprune.prune(dense, arguments.budget, kinds=kinds, mask_steps=masks, recover_steps=rest, **common).model
    first = min(1.0, 1.1 * arguments.budget)  # the second cut takes of one layer's inputs only
    steps = {"mask_steps": masks // 2, "recover_steps": rest // 2}
    halfway = ibprune.prune(dense, first, **steps, **common).model
    left = arguments.budget * count_params(dense) / count_params(halfway)
    return ibprune.prune(halfway, left, kinds=("inputs",), **steps, **common).model


def torch_prune(dense: nn.Module, limit: int, example: torch.Tensor, *, everywhere: bool) -> nn.Module | None:
    """Group L1 in one shot, its ratio bisected to at most `limit` parameters; None where no ratio tried gets there."""

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        pruner = torch_pruning.pruner.BasePruner(
            model, example, importance=torch_pruning.importance.GroupMagnitudeImportance(p=1), pruning_ratio=ratio,
            max_pruning_ratio=0.999, global_pruning=everywhere, ignored_layers=[model[-1]],
        )  # fmt: skip
        pruner.step()
        return model

    low, high, found = 0.0, 0.999, None
    for _ in range(12):
        middle = (low + high) / 2
        small = at(middle)
        fits = count_params(small) <= limit  # from some ratio on it leaves layers whole that would lose everything
        low, high, found = (low, middle, small) if fits else (middle, high, found)
    return found


def widths(model: nn.Module) -> list[int]:
    """Kept features in order: what the first linear layer of an MLP reads, then every layer's outputs."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    first = [layers[0].in_features] if isinstance(layers[0], nn.Linear) else []
    return first + [getattr(m, "out_features", None) or m.out_channels for m in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--net", choices=sorted(NETS), required=True)
    parser.add_argument("--budget", type=float, required=True, help="share of the dense parameters to keep")
    parser.add_argument("--scores", default=",".join(SCORES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--dense-steps", type=int, default=9000)
    parser.add_argument("--mask-steps", type=int, default=4000)
    parser.add_argument("--total-steps", type=int, default=8000, help="mask learning and recovery together")
    parser.add_argument("--validate", action="store_true", help="judge on 10,000 held-out training images")
    parser.add_argument("--limit", type=int, help="images of each split, for a quick look")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    x, y, x_test, y_test = load_mnist(arguments.data, limit=arguments.limit)
    if arguments.validate:
        x, y, x_test, y_test = x[:-10_000], y[:-10_000], x[-10_000:], y[-10_000:]
    batches, rows = Batches(x, y), []
    for seed in map(int, arguments.seeds.split(",")):
        torch.manual_seed(seed)
        dense = fit(NETS[arguments.net](), None, batches, arguments.dense_steps, seed).cpu()
        models = {"dense": dense}
        for score in arguments.scores.split(","):
            models[score] = prune(dense, arguments.net, score, arguments, batches, seed).cpu()
        limit = count_params(models["vib" if "vib" in models else list(models)[-1]])
        for name, everywhere in (("torch-pruning global", True), ("torch-pruning uniform", False)):
            small = torch_prune(dense, limit, x[:2], everywhere=everywhere)
            if small is not None:
                models[name] = fit(small, copy.deepcopy(dense), batches, arguments.total_steps, seed).cpu()
        for name, model in models.items():
            rows.append({
                "method": name, "seed": seed, "error": error(model, x_test, y_test), "params": count_params(model),
                "share": count_params(model) / count_params(dense), "widths": widths(model),
            })  # fmt: skip
            print(json.dumps(rows[-1]))
        settings = {key: str(value) for key, value in vars(arguments).items()}
        record = {"settings": settings, "rows": rows, "machine": platform.processor() or platform.machine()}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
