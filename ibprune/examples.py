"""Made-up inputs that a model can read: to count its products, to time it, and to compare copies of it."""

import torch
from torch import nn

from ibprune.task_heads import complete, with_end


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a transformers model reads; None where it reads tokens."""
    if model.main_input_name != "pixel_values":
        return None
    config = getattr(model.config, "vision_config", model.config)
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return config.num_channels, height, width


def example_inputs(model: nn.Module, *, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs of a transformers model, on the CPU, the same at every call.

    Token ids (batch, length), for an encoder-decoder with those to be written; or pixels (batch, channels, height,
    width) in the model's dtype, whatever `length`.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2)
        >>> example_inputs(ViTModel(small), batch=2, length=12)["pixel_values"].shape
        torch.Size([2, 3, 4, 4])
    """
    generator = torch.Generator().manual_seed(0)
    image = image_shape(model)
    if image is not None:
        return {"pixel_values": torch.randn(batch, *image, generator=generator).to(model.dtype)}
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return complete(model, {"input_ids": with_end(model, ids)})
