"""Masks in a training loop of one's own: five lines put them in, and the cut model is a folder that loads."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ibprune.budget import Keep, make_budget, solve_by_cost, solve_by_shares
from ibprune.console import Quiet
from ibprune.decisions import make_decision, make_path
from ibprune.embeddings import merge_
from ibprune.errors import BadData, BadRecipe, PlanMismatch, UnsupportedModel
from ibprune.folders import check_output
from ibprune.inject import MASKS, inject_, remove_
from ibprune.losses import Batch
from ibprune.masked_folder import write_folder
from ibprune.models import check_finite
from ibprune.optimizers import make_optimizer, update_
from ibprune.plans import PruningPlan
from ibprune.pruned_config import is_pruned
from ibprune.recipe import Recipe, make_recipe
from ibprune.scores import fisher_of_loss
from ibprune.shares import equal_pressure, probe_shares
from ibprune.sites import find_family, is_traced
from ibprune.structure import choose_kinds, prepare_
from ibprune.vib import MaskLearning

COSTS = ("params", "macs")
Loss = Callable[[nn.Module, Batch], torch.Tensor]


class MaskedTraining:
    """VIB masks in a transformer that trains in a loop of one's own, or in `transformers.Trainer` (`MaskCallback`).

    The masks learn by an optimiser of their own and are none of the model's parameters: neither the loss, nor the
    optimiser, nor the clipping of the loop changes. Made before the loop's optimiser, because the token embedding may
    become two factors. Until `begin`, the model computes what it did, up to the rounding of these factors.

    Args:
        model: A transformer of README's table, as trained; it is changed in place.
        budget: Share of the dense cost to keep, in (0, 1].
        batches: A few batches with labels, {name: tensor (batch, ...)}: they rank the units and share the cut between
            kinds. 16 batches of 32 are plenty; all of them are held on the device.
        loss: The mean loss of a batch, a scalar, by (model, batch); default: `model(**batch).loss`.
        cost, scope, kinds, round_to, shares, seed: As in `ibprune.recipe.Recipe`; the cost is "params" or "macs".

    Raises:
        BadRecipe: A budget that cannot be reached, or another argument that cannot be used. The model is as it was.
        BadData: No batches, or no loss.
        PlanMismatch: The model carries masks already, or is pruned already.
        UnsupportedModel: No row describes the model.

    Example:
        >>> masked = MaskedTraining(model, 0.5, batches=few)  # doctest: +SKIP
        >>> masked.begin(steps=len(loader))  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     masked.advance()
        ...     update(optimizer)  # as ever: its step, and zero_grad
        >>> masked.save("small", tokenizer)["budget"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: float,
        *,
        batches: Iterable[Batch],
        loss: Loss | None = None,
        cost: str = "params",
        scope: str = "model",
        kinds: tuple[str, ...] = (),
        round_to: int = 8,
        shares: str = "probe",
        seed: int = 0,
    ):
        self.model, self.loss = model, loss or own_loss
        _check_model(model)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.recipe = _checked(
            {"model": name, "budget": budget, "cost": cost, "scope": scope, "kinds": kinds, "round_to": round_to,
             "shares": shares, "seed": seed}
        )  # fmt: skip
        batches = list(batches)  # of a single batch its names
        if not all(isinstance(batch, Mapping) and all(map(torch.is_tensor, batch.values())) for batch in batches):
            raise BadData("expected a list of batches, each a dict of tensors: batches=[next(iter(loader))].")
        few = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
        if not few:
            raise BadData("expected a few batches to rank the units by, found none: batches=[next(iter(loader))].")
        training = model.training
        model.eval()
        model.disable_input_require_grads()  # which only re-entrant checkpoints of frozen embeddings need
        try:
            self._prepare(few)
        except BaseException:
            remove_(model)
            merge_(model)
            raise
        finally:
            model.train(training)
        self.learning: MaskLearning | None = None
        self.plan: PruningPlan | None = None
        self.done = 0
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def _prepare(self, batches: list[Batch]) -> None:
        """What can be cut, its masks beside the model, the ranking, and what it would keep."""
        model, recipe = self.model, self.recipe
        self.structure = prepare_(model, choose_kinds(model, recipe.kinds, cost=recipe.cost), None)
        sites, cost_model = self.structure.sites, self.structure.costs.of(recipe.cost)
        self.budget = make_budget(cost_model, sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to)
        self.masks = inject_(model, sites)
        del model._modules[MASKS]  # what is no parameter, no loop's optimiser, clipping or checkpoint takes
        model.__dict__[MASKS] = self.masks
        self.masks.eval()
        self.start = fisher_of_loss(model, self.masks, batches, self.loss)
        if not all(score.isfinite().all() for score in self.start.values()):
            raise BadData(
                "expected a finite loss on the batches that rank the units, found NaN or infinity in it or in its "
                "gradients: mend the loss or the batches."
            )
        if recipe.shares == "probe":
            self.target = probe_shares(self._loss_on(batches), self.start, sites, cost_model, self.budget,
                                       console=Quiet())  # fmt: skip
        elif recipe.shares == "cost":
            self.target = solve_by_cost(self.start, sites, cost_model, self.budget)
        else:
            self.target = solve_by_shares(self.start, sites, cost_model, self.budget, equal_pressure(sites))
        self.masks.set_keep({name: tuple(range(site.n_units)) for name, site in sites.items()})
        self.masks.set_noise(0.0, sites=list(sites))

    def _loss_on(self, batches: list[Batch]) -> Callable[[Keep, float], float]:
        @torch.no_grad()
        def loss_of(keep: Keep, at_most: float) -> float:
            self.masks.set_keep(keep)
            return float(torch.stack([self.loss(self.model, batch).float() for batch in batches]).mean())

        return loss_of

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        """The masks follow the model to its device and its mode, and draw anew."""
        if self.masks.by_key and next(self.masks.parameters()).device != self.model.device:
            self.masks.to(self.model.device)
        if self.masks.training != self.model.training:
            self.masks.train(self.model.training)
        if self.learning is not None and self.model.training:
            self.learning.draw()

    def begin(self, steps: int) -> None:
        """The masks start to learn; the budget is reached after 60 % of the steps, and noise ends after 75 %.

        Args:
            steps: Optimiser steps of the training, all of them: the ramp is laid over them.

        Raises:
            BadRecipe: Less than a step, or a training that has begun, or is over.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise BadRecipe(f"steps: expected the number of optimiser steps, at least 1, found {steps!r}.")
        self._present()
        if self.learning is not None:
            raise BadRecipe("expected masks that have not begun, found some at work: make a MaskedTraining anew.")
        self.masks.to(self.model.device)
        self.learning = MaskLearning(
            self.model, self.masks, self.structure.sites, self.structure.costs.of(self.recipe.cost), self.budget,
            self.start, self.target, steps=steps, seed=self.recipe.seed,
        )  # fmt: skip
        groups = [group | {"weight_decay": 0.0} for group in self.learning.groups()]
        self.optimizer = make_optimizer("adamw", groups, lr=self.learning.settings.lr_mu)
        self.began = time.perf_counter()
        self.learning.to_step(0)

    def penalty(self) -> torch.Tensor:
        """What the masks' units cost now, a scalar: sum of beta_j KL_j, whose gradient `advance` adds to the loss's."""
        return self._begun().penalty()

    def advance(self) -> None:
        """One step of the masks: after `loss.backward()`, once for each step of the optimiser.

        A batch that the loop leaves out, `optimizer.zero_grad()` and on, is left out here by `skip`.

        Raises:
            BadRecipe: Not begun, no gradient has reached the masks, or more steps than were announced.
            BadData: A gradient of the masks is not a number; it is forgotten, and the masks are as they were.
        """
        learning = self._begun_and_not_over()
        if all(mask.mu.grad is None for _, mask in self.masks.items()):
            raise BadRecipe("expected gradients in the masks, found none: call advance() after loss.backward().")
        penalty = learning.penalty()
        if penalty.requires_grad:
            penalty.backward()
        if not all(p.grad is None or p.grad.isfinite().all() for p in self.masks.parameters()):
            self.optimizer.zero_grad()
            raise BadData(
                "expected finite gradients in the masks, found NaN or infinity: look at the loss of this batch, and "
                "call skip() instead of advance() where the optimiser makes no step."
            )
        update_(self.optimizer)
        self._step()

    def skip(self) -> None:
        """One step of the announced ones in which neither the optimiser nor the masks learn.

        What a `loss.backward()` left in the masks is forgotten: no optimiser of the loop's does that for them.

        Raises:
            BadRecipe: Not begun, or more steps than were announced.
        """
        self._begun_and_not_over()
        self.optimizer.zero_grad()
        self._step()

    def _step(self) -> None:
        self.done += 1
        if self.done < self.learning.steps:
            self.learning.to_step(self.done)

    def _present(self) -> None:
        if self.plan is not None:
            raise PlanMismatch("expected masks, found a model that was cut already: train it on as it is.")
        if not hasattr(self.model, MASKS):
            raise PlanMismatch(
                "expected masks, found a model from which they were removed: make a MaskedTraining anew."
            )

    def _begun(self) -> MaskLearning:
        self._present()
        if self.learning is None:
            raise BadRecipe("expected masks that learn, found none yet: call begin(steps) first.")
        return self.learning

    def _begun_and_not_over(self) -> MaskLearning:
        learning = self._begun()
        if self.done >= learning.steps:
            raise BadRecipe(f"expected {learning.steps} steps, as begin() was told, found one more: tell it the whole.")
        return learning

    def cut(self) -> PreTrainedModel:
        """Removes the units that did not stay, in place: the model, exactly within the budget, in eval mode.

        It may train on afterwards, with an optimiser made anew, because its weights are other tensors.

        Raises:
            BadRecipe: Other steps were made than were announced.
            PlanMismatch: It was cut already.
            IBPruneError: A weight or a mask is not a number.
        """
        learning = self._begun()
        if self.done != learning.steps:
            raise BadRecipe(
                f"expected {learning.steps} steps before the cut, as begin() was told, found {self.done}: train on, or "
                "begin anew with the right number."
            )
        self.seconds = time.perf_counter() - self.began
        plan = self.structure.plan(self.model, learning.keep())
        self._hook.remove()
        self.model.disable_input_require_grads()
        self.structure.compact(self.model, plan)
        self.plan = plan
        check_finite(self.model, "the pruned model")
        return self.model.eval()

    def remove(self) -> PreTrainedModel:
        """Takes the masks out without a cut: the model, which goes on as if they had never been there.

        Raises:
            PlanMismatch: It was cut already.
        """
        if self.plan is not None:
            raise PlanMismatch("expected masks, found a model that was cut already: nothing can be taken back.")
        self._present()
        self._hook.remove()
        remove_(self.model)
        merge_(self.model)
        return self.model

    def save(
        self, output: str | Path, preprocessor: PreTrainedTokenizerBase | BaseImageProcessor | None = None
    ) -> dict:
        """Cuts, if that is not done, and writes a folder that loads, proven in a fresh process, with its report.

        Args:
            output: A new or empty folder.
            preprocessor: The tokenizer or image processor that goes with it.

        Returns:
            The dict of its report.json: "unknown" says what it cannot tell.

        Raises:
            BadRecipe: The folder is taken, or other steps were made than were announced.
        """
        folder = check_output(output, model=self.recipe.model)
        if self.plan is None:
            self.cut()
        notes = self.learning.notes
        path = make_path(notes["path"], [[self.done, self.budget.keep]], self.budget)
        decision = make_decision("vib", notes["kinds"], path)
        return write_folder(folder, self.model, preprocessor, self.plan, self.structure, self.budget, self.recipe,
                            decision, steps=self.done, seconds=self.seconds)  # fmt: skip


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a model computes itself from a batch with labels.

    Raises:
        BadData: It computes none.
    """
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise BadData(
            f"expected a loss from {type(model).__name__} on the batches, found none: put its labels among them "
            f"(there are {', '.join(batch)}), or say loss=lambda model, batch: …."
        )
    return found


def _check_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise BadRecipe(f"expected a transformers model, found {type(model).__name__}: use ibprune.prune(module, …).")
    if hasattr(model, MASKS):
        raise PlanMismatch("expected a model without masks, found some: call remove() of the MaskedTraining before.")
    if is_pruned(model.config):
        raise PlanMismatch("expected a dense model, found one that ibprune has pruned: start from the dense one.")
    if is_traced(model.config.model_type):
        raise UnsupportedModel(f"'{model.config.model_type}' is cut by ibprune.prune(model, …), which traces it.")
    find_family(model.config.model_type)


def _checked(values: dict) -> Recipe:
    recipe = make_recipe(values)
    if isinstance(recipe.budget, tuple) or recipe.budget is None:
        raise BadRecipe(f"budget: expected one share for one training, found {values['budget']!r}.")
    if recipe.cost not in COSTS:
        raise BadRecipe(f"cost: expected one of {', '.join(COSTS)} in a loop of one's own, found '{recipe.cost}'.")
    if "vocab" in recipe.kinds:
        raise BadRecipe("kinds: 'vocab' changes the tokenizer that the loop reads with: leave it out.")
    return recipe
