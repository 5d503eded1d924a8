"""Masks in `transformers.Trainer`: a callback that begins with the training and moves them on with its steps."""

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ibprune.errors import BadRecipe
from ibprune.masked_training import MaskedTraining


class MaskCallback(TrainerCallback):
    """Begins and moves on a `MaskedTraining`. The Trainer's loss, optimiser and clipping stay as they are.

    Raises:
        BadRecipe: As the training begins: what cannot be had with masks (several processes or devices, fp16, torch
            compilation, a checkpoint to resume from or to go back to), another model, or an optimiser made before.

    Example:
        >>> masked = MaskedTraining(model, 0.5, batches=few)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[MaskCallback(masked)]).train()  # doctest: +SKIP
        >>> masked.save("small", tokenizer)  # doctest: +SKIP
    """

    def __init__(self, masked: MaskedTraining):
        self.masked = masked

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: object = None,
        **more: object,
    ) -> None:
        refused = {
            "one process": args.world_size > 1 and f"{args.world_size}",
            "one device": args.n_gpu > 1 and f"{args.n_gpu}",
            "bf16 or full precision": args.fp16 and "fp16",
            "torch_compile=False": args.torch_compile and "True",
            "load_best_model_at_end=False, as weights of before the cut do not fit": args.load_best_model_at_end
            and "True",
            "a training from its start, as checkpoints hold no masks": state.global_step
            and f"one resumed at step {state.global_step}",
        }
        for expected, found in refused.items():
            if found:
                raise BadRecipe(f"expected {expected}, found {found}: set it so, or leave the masks out.")
        if model is not self.masked.model:
            raise BadRecipe("expected the model that carries the masks, found another: give the Trainer that one.")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(p) not in held for p in model.parameters() if p.requires_grad):
            raise BadRecipe("expected an optimiser of all weights, found one without some: make it after the masks.")
        self.masked.begin(state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        self.masked.advance()
