"""The one training loop, on Accelerate: it learns masks, recovers accuracy and trains dense models alike."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ibprune.console import Quiet
from ibprune.engine import draw
from ibprune.errors import BadData, BadRecipe, IBPruneError, Stopped, did_you_mean
from ibprune.losses import Batch
from ibprune.masks import MaskSet, mixed
from ibprune.optimizers import load_moments_, make_optimizer, moments
from ibprune.processes import divided, n_processes, on_main, process_index, shared
from ibprune.resuming import NO_JOURNAL, Journal
from ibprune.saves import Entry, rng_state, set_rng_state

SCHEDULES = ("linear", "cosine", "uba")
PHI = 5.0  # of "uba": below cosine's 2 the rate stays high for longer, above it falls sooner


@dataclass(frozen=True)
class TrainSettings:
    """How one phase trains.

    Attributes:
        steps: Optimiser steps; 0 trains nothing.
        lr: Peak learning rate of the weights; linear warm-up over `warmup` of the steps, then to 0.
        before, after: Steps of the weights in earlier and later phases of one schedule: the rate falls to 0 at the end
            of all of them, with a warm-up in each, because each has an optimiser of its own.
        schedule: How it falls, one of `SCHEDULES` (`decay`).
        optimizer: One of `OPTIMIZERS`; the extra groups (masks) are always in 32 bits.
        grad_accum: Batches per optimiser step.
        max_grad_norm: Gradients of the weights are clipped to this norm.
        checkpointing: Whether a transformer's blocks run again in the backward pass, and keep nothing until then.
    """

    steps: int
    lr: float
    before: int = 0
    after: int = 0
    schedule: str = "linear"
    optimizer: str = "adamw"
    warmup: float = 0.1
    weight_decay: float = 0.01
    grad_accum: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Validation:
    """Judges a model while it trains, by its loss on rows that it does not learn from; its best weights are what stays.

    Attributes:
        batches: Makes a loader of these rows, the same at every call.
        every: Steps between two looks; the last step has one too.
        patience: Looks in a row without a lower loss after which the phase ends; None: it goes on to its last step.
    """

    batches: Callable[[], DataLoader]
    every: int
    patience: int | None = None


@dataclass
class TrainState:
    """Everything that changes while a phase runs, apart from tensors and random generators; JSON as it stands.

    Attributes:
        step: Steps done.
        epoch, batch: Epochs done, and batches taken of the present one: its order is a function of (seed, epoch).
        losses: Of each step.
        validation: Each look at the rows held back: after which step, and the loss.
        ended: Whether the phase ran out of patience before its last step.
        notes: What a caller wrote down as the phase went.
    """

    phase: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    ended: bool = False
    notes: dict = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The look with the lowest loss, the first of equals."""
        return min(range(len(self.validation)), key=lambda look: self.validation[look][1])

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "TrainState":
        return cls(**data)


def decay(left: float, schedule: str) -> float:
    """Share of the peak learning rate when `left` of the schedule is left; 1 above 1, 0 below 0.

    With c = 1 + cos(pi (1 - left)), "uba" is the budget-aware schedule of Tang et al. 2025 (arXiv 2505.24452),

        2 c / (2 phi + (2 - phi) c),   phi = `PHI`;

    phi = 2 is "cosine", c / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983), and phi towards 0 a constant rate.

    Raises:
        BadRecipe: Another schedule.

    Example:
        >>> decay(0.25, "linear"), round(decay(0.25, "cosine"), 3), round(decay(0.25, "uba"), 3)
        (0.25, 0.146, 0.064)
    """
    left = min(1.0, max(0.0, left))
    if schedule == "linear":
        return left
    if schedule not in SCHEDULES:
        raise BadRecipe(f"found the schedule '{schedule}': {did_you_mean(schedule, SCHEDULES)}.")
    phi, c = 2.0 if schedule == "cosine" else PHI, 1 + math.cos(math.pi * (1 - left))
    return 2 * c / (2 * phi + (2 - phi) * c)


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    make_batches: Callable[[int], DataLoader],
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    phase: str,
    console: Quiet,
    extra_groups: list[dict] | None = None,
    before_step: Callable[[int], None] | None = None,
    notes: dict | None = None,
    frozen: bool = False,
    validation: Validation | None = None,
    journal: Journal = NO_JOURNAL,
) -> TrainState:
    """Trains the model's weights in place, and `extra_groups` of parameters at learning rates of their own.

    Args:
        loss_of: Mean loss of a batch under the (prepared) model.
        make_batches: A loader for the given epoch seed.
        extra_groups: Optimiser groups with "params" and "lr" (masks); weight decay 0, not clipped.
        before_step: Called with the step's number, to move schedules on.
        notes: What it writes down, as JSON: saved with the phase, and put back as it was when the phase goes on.
        frozen: Whether the weights stay as they are and only the `extra_groups` are trained.
        validation: Which step's weights stay; None: the last one's.
        journal: Keeps where the phase stands, under its name; from there it goes on, or ends at once.

    Raises:
        BadRecipe: All that the journal has of the phase is damaged.
        IBPruneError: A loss, or a weight that is to be saved, is NaN or infinite. The last state stays.
        Stopped: The console says that the run is to stop; the state was written.
    """
    if settings.steps == 0:
        return TrainState(phase)
    entry = journal.read(phase, again=False)  # of what may be hours, the user decides
    state = TrainState(phase) if entry is None else TrainState.from_dict(entry.facts["state"])
    best = {} if entry is None else entry.part("best/")
    if notes is not None:
        notes |= state.notes
        state.notes = notes
    if entry is not None:
        _load_tensors_(model, entry.part("model/"))
        if state.step == settings.steps or state.ended:
            _take_back_(model, best)
            journal.restore(entry)
            model.eval()
            return state
    groups = _parameter_groups(model, settings, extra_groups or [])
    if frozen:
        groups = groups[2:]
    held = [p for p in model.parameters() if p.requires_grad] if frozen else []
    trained = {id(p) for group in groups for p in group["params"]}
    held = [p for p in held if id(p) not in trained]
    for parameter in held:  # no gradient is computed for it either
        parameter.requires_grad_(False)
    optimizer = make_optimizer(settings.optimizer, groups, settings.lr)
    flat = [lambda step: 1.0] * len(extra_groups or [])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    factors = [partial(rate, settings)] * (len(groups) - len(flat)) + flat
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors, last_epoch=state.step - 1)
    weights = [p for group in groups[: len(groups) - len(flat)] for p in group["params"]]
    if settings.checkpointing:
        checkpoint_blocks_(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if entry is not None:
        load_moments_(optimizer, entry.part("optimizer/"))
    model.train()
    console.stepping = True
    batches = _Batches(make_batches, settings.seed, accelerator, state, journal, entry)
    for step in console.track(range(state.step, settings.steps), phase, settings.steps - state.step):
        if before_step is not None:
            before_step(step)
        total, save, stop = 0.0, False, False
        for part in range(settings.grad_accum):
            batch = next(batches)
            if process_index():  # dropout of its own; the main process goes on as if it were alone
                torch.manual_seed(mixed(settings.seed, step, part, process_index()))
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared, batch)
                value, save, stop = _over_processes(loss.detach(), journal.due(), console.stopping)
                if not math.isfinite(value):  # before it reaches a weight
                    where = shared(_first_not_finite(model, partial(loss_of, prepared, batch)))
                    raise IBPruneError(
                        f"the loss became {value} at step {step} of '{phase}', first in {where}: lower --lr, or use "
                        "--precision fp32."
                    )
                total += value / settings.grad_accum
                accelerator.backward(loss)
                if accelerator.sync_gradients and weights:
                    accelerator.clip_grad_norm_(weights, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        state.step = step + 1
        state.losses.append(total)
        draw(accelerator, {f"{phase}/loss": total, f"{phase}/lr": schedule.get_last_lr()[0]}, steps=1)
        if validation is not None and (state.step % validation.every == 0 or state.step == settings.steps):
            value = _validated(model, loss_of, validation, accelerator, phase, state.step)
            state.validation.append([state.step, value])
            looks = len(state.validation) - 1 - state.best  # since the best one
            best = best if looks else {name: x.detach().to("cpu", copy=True) for name, x in _changing(model).items()}
            state.ended = validation.patience is not None and looks >= validation.patience
            draw(accelerator, {f"{phase}/validation loss": value})
            model.train()
        if stop or (save and state.step < settings.steps):
            _check_weights(model, phase, step)
            states, rng = batches.before_epoch
            tensors = _named_tensors(model) | {f"epoch/{key}": x for key, x in states.items()}
            tensors |= {f"optimizer/{key}": x for key, x in moments(optimizer).items()}
            tensors |= {f"best/{name}": x for name, x in best.items()}
            journal.write(phase, tensors, {"state": state.to_dict(), "epoch": rng})
            if stop:
                console.stepping = False
                raise Stopped(f"stopped after step {state.step} of {settings.steps} of '{phase}'; {journal.kept()}")
        if state.ended:
            break
    console.stepping = False
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if settings.checkpointing:
        _keep_blocks_(model)
    for parameter in held:
        parameter.requires_grad_(True)
    _take_back_(model, best)
    _check_weights(model, phase, settings.steps - 1)
    journal.write(phase, _named_tensors(model), {"state": state.to_dict()})
    model.eval()
    return state


def _validated(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    validation: Validation,
    accelerator: Accelerator,
    phase: str,
    step: int,
) -> float:
    """The mean loss over the rows held back, in eval mode: the main process's in all of them.

    Raises:
        IBPruneError: It is no number.
    """

    @torch.no_grad()
    def measure() -> float:
        device = next(model.parameters()).device
        total, rows = 0.0, 0
        for batch in validation.batches():
            n = len(next(iter(batch.values())))
            total += n * loss_of(model, {name: tensor.to(device) for name, tensor in batch.items()}).item()
            rows += n
        return total / rows

    model.eval()
    with accelerator.autocast():
        value = on_main(measure)
    if not math.isfinite(value):
        raise IBPruneError(
            f"the loss on the rows held back became {value} after step {step} of '{phase}': lower --lr, or use "
            "--precision fp32."
        )
    return value


def _changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes of a model, by name: trained parameters, and buffers."""
    named = _named_tensors(model)
    return {name: x for name, x in named.items() if x.requires_grad or not isinstance(x, nn.Parameter)}


@torch.no_grad()
def _take_back_(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    """Puts back what `_changing` gave at the best step."""
    own = _named_tensors(model)
    for name, tensor in best.items():
        own[name].copy_(tensor)


def checkpoint_blocks_(model: nn.Module) -> None:
    """Lets a transformer's blocks run again in the backward pass, under the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # which only re-entrant checkpoints need


def _keep_blocks_(model: nn.Module) -> None:
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def _over_processes(loss: torch.Tensor, due: bool, stopping: bool) -> tuple[float, bool, bool]:
    """The mean of a loss over the processes, whether the main one's clock says to save, and whether any is to stop."""
    if n_processes() == 1:
        return loss.item(), due, stopping
    found = torch.tensor([loss.item() / n_processes(), due and process_index() == 0, stopping], device=loss.device)
    torch.distributed.all_reduce(found)
    value, save, stop = found.tolist()
    return value, bool(save), bool(stop)


def rate(settings: TrainSettings, step: int) -> float:
    """The share of the peak learning rate at a step of a phase.

    Example:
        >>> rate(TrainSettings(steps=100, lr=1.0), 55), rate(TrainSettings(steps=50, lr=1.0, before=50), 5)
        (0.5, 0.5)
    """
    whole = settings.before + settings.steps + settings.after
    warmup, fall = (max(1, int(settings.warmup * steps)) for steps in (settings.steps, whole))
    left = whole - settings.before - step
    return min((step + 1) / warmup, decay(left / max(1, whole - fall), settings.schedule))


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once; packed weights, which nothing changes, are left out."""
    weights = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    return {f"model/{name}": tensor for name, tensor in (*weights, *model.named_buffers())}


@torch.no_grad()
def _load_tensors_(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    own = {name.removeprefix("model/"): tensor for name, tensor in _named_tensors(model).items()}
    wrong = sorted(set(own) ^ set(saved)) or [name for name in own if own[name].shape != saved[name].shape]
    if wrong:
        raise BadRecipe(
            f"--resume: the saved state does not fit the model, such as '{wrong[0]}': the model or the data are not "
            "those of the interrupted run."
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _check_weights(model: nn.Module, phase: str, step: int) -> None:
    """Raises `IBPruneError` where a weight is not a number after a step: such a state is not to be kept."""
    bad = _first_weight(model)
    if bad:
        raise IBPruneError(
            f"step {step} of '{phase}' left NaN or infinity, first in {bad}: lower --lr, or use --precision fp32."
        )


def _first_not_finite(model: nn.Module, compute: Callable[[], torch.Tensor]) -> str:
    """Where NaN or infinity is first met: in a mask, a weight, or what a module makes while the loss is computed."""
    bad = _first_weight(model)
    if bad:
        return bad
    met: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple, output: object) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if not met and any(isinstance(x, torch.Tensor) and not torch.isfinite(x).all() for x in parts):
            met.append(f"the output of '{names[module]}'")

    hooks = [module.register_forward_hook(look) for module in names if not any(True for _ in module.children())]
    with torch.no_grad():
        compute()
    for hook in hooks:
        hook.remove()
    return met[0] if met else "the loss itself"


def _first_weight(model: nn.Module) -> str:
    """A mask, or else a weight, that is not finite; "" where all are."""
    for module in model.modules():
        for site, mask in module.items() if isinstance(module, MaskSet) else ():
            if not all(torch.isfinite(tensor).all() for tensor in (mask.mu, mask.log_var)):
                return f"the mask of '{site}'"
    return next((f"'{name}'" for name, p in model.named_parameters() if not torch.isfinite(p).all()), "")


def _parameter_groups(model: nn.Module, settings: TrainSettings, extra: list[dict]) -> list[dict]:
    """Weights with decay, vectors (biases, norms) without, then the extra groups."""
    taken = {id(p) for group in extra for p in group["params"]}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    named = [(n, p) for n, p in named if not n.startswith("vib_masks")]
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        *({"weight_decay": 0.0, "optim_bits": 32} | group for group in extra),
    ]


class _Batches:
    """Batches without end, epoch after epoch; after a resumption from where the run was in its epoch.

    Attributes:
        before_epoch: Where all generators stood when the present epoch began, as `rng_state` gives it.
    """

    def __init__(
        self,
        make_batches: Callable[[int], DataLoader],
        seed: int,
        accelerator: Accelerator,
        state: TrainState,
        journal: Journal,
        entry: Entry | None,
    ):
        self.make_batches, self.seed, self.accelerator = make_batches, seed, accelerator
        self.state, self.journal = state, journal
        self.batches = self._endless(entry)

    def __next__(self) -> Batch:
        return next(self.batches)

    def _endless(self, entry: Entry | None) -> Iterator[Batch]:
        state, data = self.state, self.journal.data
        while True:
            if entry is not None:
                set_rng_state(entry.part("epoch/"), entry.facts["epoch"], data)
            self.before_epoch = rng_state(data)
            loader = divided(self.make_batches(self.seed + state.epoch), self.accelerator.device)
            if entry is not None:  # what was read already is read again, so that all generators are where they were
                for _ in range(state.batch):
                    next(loader)
                self.journal.restore(entry)
                entry = None
            for batch in loader:
                state.batch += 1
                yield batch
            if state.batch == 0:
                n = n_processes()
                each = "" if n == 1 else f" with a row for each of {n} processes"
                raise BadData(f"expected batches to train on{each}, found none.")
            state.epoch, state.batch = state.epoch + 1, 0
