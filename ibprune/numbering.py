"""Numbers the attentions that remain of a decoder: the key-value cache goes by their numbers."""

from torch import nn

from ibprune.rebuild import CountingNoAttention, NoAttention, replace_module


def renumber_layers_(model: nn.Module, old_types: list[str] | None) -> dict[str, int]:
    """Numbers the attentions that remain 0, 1, 2…: the cache takes its length from number 0.

    Attentions at the same place of their blocks share a cache: a decoder's attentions to itself have one, those to the
    encoder another. Where the config gives each layer a type of attention (sliding or full), the cache keeps a store of
    that type under its number: then an attention takes the lowest free number of its own type. Where none is left at a
    place, the first stub counts the tokens.

    Args:
        old_types: `config.layer_types` that the present numbers count in; None where the config has none.

    Returns:
        The numbers that changed, by path.
    """
    blocks = {id(block) for child in model.modules() if isinstance(child, nn.ModuleList) for block in child}
    places, removed, changed = {}, {}, {}
    for name, module in model.named_modules():
        place = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if hasattr(module, "layer_idx") and id(module) not in blocks:
            places.setdefault(place, {})[name] = module
        elif isinstance(module, NoAttention):
            removed.setdefault(place, []).append(name)
    for place, stubs in removed.items():
        if place not in places:
            replace_module(model, stubs[0], CountingNoAttention())
    new_types = getattr(model.config, "layer_types", None) if old_types else None
    for attentions in places.values():
        numbers = sorted({module.layer_idx for module in attentions.values()})
        free = list(range(len(new_types or numbers)))
        order = {}
        for old in numbers:
            order[old] = next(new for new in free if new_types is None or new_types[new] == old_types[old])
            free.remove(order[old])
        for name, module in attentions.items():
            if order[module.layer_idx] != module.layer_idx:
                changed[f"{name}.layer_idx"] = module.layer_idx = order[module.layer_idx]
    return changed
