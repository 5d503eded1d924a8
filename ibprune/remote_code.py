"""The text of `modeling_ibprune.py`: the parts of `ibprune.rebuild` that one pruned model takes to load."""

import ast
import inspect
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from ibprune import rebuild

SOURCE = ast.parse(inspect.getsource(rebuild))
ORDER = [node.targets[0].id if isinstance(node, ast.Assign) else node.name for node in SOURCE.body
         if isinstance(node, ast.Assign | ast.FunctionDef | ast.ClassDef)]  # fmt: skip
NOTED = {
    "note_linear": (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm),
    "note_conv": (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU),
}
HEAD = '''"""Loads this pruned model by transformers alone: written by ibprune, which loads it with the same code.

What the dense architecture loses stands in config.json under "ibprune".
"""
'''


def remote_code(model: nn.Module, spec: dict, imports: Iterable[str], classes: Iterable[str]) -> str:
    """The text of a module that defines `classes` over what transformers builds.

    Args:
        spec: `config.ibprune`.
        imports: Names that the classes take from transformers.
        classes: The text of each.
    """
    stubs = dict.fromkeys(spec["stubs"].values())
    modules = {type(module) for module in model.modules()}
    notes = [name for name, known in NOTED.items() if any(issubclass(cls, known) for cls in modules)]
    steps = [name for name, needed in (
        ("pin_rotary_", any(name.endswith("inv_freq") for name, _ in model.named_buffers())),
        ("drop_blocks_", spec["dropped_blocks"]),
        ("put_stubs_", stubs),
        ("put_factors_", spec["embedding"]),
        ("reshape_", spec["shapes"]),
        ("put_sizes_", spec["sizes"]),
    ) if needed]  # fmt: skip
    tables = {
        "STUBS": "{" + ", ".join(f'"{stub}": {_named(rebuild.STUBS[stub])}' for stub in stubs) + "}",
        "NOTES": _tuple(notes),
        "STEPS": _tuple(steps),
    }
    text, wanted = {}, {"Pruned"}
    while wanted:  # and all that they name
        name = wanted.pop()
        text[name] = f"{name} = {tables[name]}" if name in tables else _shortened(getattr(rebuild, name))
        wanted |= (_names(text[name]) & set(ORDER)) - set(text)
    parts = [text[name] for name in ORDER if name in text]
    needs = _names("\n".join(parts))
    head = ["import copy", ""] if "copy" in needs else []
    head += ["import torch", "from torch import nn", f"from transformers import {', '.join(imports)}"]
    head += ["from transformers.pytorch_utils import Conv1D"] if "Conv1D" in needs else []
    return "\n\n\n".join([HEAD + "\n" + "\n".join(head), *parts, *classes]) + "\n"


def _tuple(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"


def _named(cls: type[nn.Module]) -> str:
    return cls.__name__ if cls.__module__ == rebuild.__name__ else f"nn.{cls.__name__}"


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def _shortened(part: object) -> str:
    """The source of a function or class, of every docstring the first line."""
    lines = inspect.getsource(part).rstrip().splitlines()
    nodes = [n for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    for docstring in sorted((n.body[0] for n in nodes if ast.get_docstring(n)), key=lambda d: -d.lineno):
        if docstring.end_lineno > docstring.lineno:
            first = lines[docstring.lineno - 1]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [f'{first}"""']
    return "\n".join(lines)
