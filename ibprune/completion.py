"""Completion for shells: a script that completes verbs, flags and their values, made by shtab from the parsers."""

import typing

import shtab

from ibprune import flags
from ibprune.data import GLUE
from ibprune.exporting import TARGETS
from ibprune.recipe import Recipe
from ibprune.recipe_files import shipped

PARSERS = {
    "prune": flags.prune_parser, "plan": flags.plan_parser, "train": flags.train_parser,
    "compare": flags.compare_parser, "report": flags.report_parser, "push": flags.push_parser,
    "export": flags.export_parser, "audit": flags.audit_parser, "bench": flags.bench_parser,
    "convert-legacy": flags.legacy_parser, "doctor": flags.doctor_parser, "recipes": flags.recipes_parser,
    "completion": flags.completion_parser, "mi-benchmark": flags.mi_parser,
}  # fmt: skip
PLACES = ("model", "data", "recipe", "output", "latency_table", "folder", "folders", "dense", "pruned", "source", "xy",
          "target")  # fmt: skip


def script(shell: str) -> str:
    """The completion script of "bash", "zsh" or "fish".

    Example:
        >>> "complete" in script("bash")
        True
    """
    whole = flags.Parser(prog="ibprune", parents=[_valued(flags.prune_parser())], add_help=False, allow_abbrev=False)
    verbs = whole.add_subparsers()
    for verb, parser in PARSERS.items():
        verbs.add_parser(verb, parents=[_valued(parser())], add_help=False, help=flags.VERBS[verb])
    return shtab.complete(whole, shell)


def _valued(parser: flags.Parser) -> flags.Parser:
    """The parser with the values of each flag: those of the recipe's field of the same name, other names, or files."""
    names = {"name": tuple(shipped()), "to": TARGETS, "task": tuple(GLUE)}
    names |= {
        name: typing.get_args(field.annotation)
        for name, field in Recipe.model_fields.items()
        if typing.get_origin(field.annotation) is typing.Literal
    }
    for action in parser._actions:
        if action.nargs == 0:  # a switch
            continue
        if action.dest in names:
            action.choices = names[action.dest]
        elif action.dest in PLACES:
            action.complete = shtab.FILE
    return parser
