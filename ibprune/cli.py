"""The command line: parses flags, calls the verb, prints tables; errors are one line and exit code 2."""

import argparse
import sys

from ibprune.errors import BadRecipe, IBPruneError, did_you_mean

VERBS = {
    "prune": "make a trained model smaller and write a folder that loads (the default verb)",
    "plan": "say what can be cut and what a budget reaches, from the config alone",
    "audit": "say what each layer of a dense and of a pruned model knows of its input and labels",
}

WAYS = {"vanilla": "plain transformers", "remote_code": "trust_remote_code=True or ibprune.load"}


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and names the nearest flag."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: "):
            found = message.removeprefix("unrecognized arguments: ").split()[0]
            flags = [option for action in self._actions for option in action.option_strings]
            message = f"unknown flag or argument '{found}': {did_you_mean(found, flags)}"
        raise BadRecipe(message)


def _common(parser: _Parser) -> None:
    parser.add_argument("--model", help="Hub id, local folder, or an alias such as bert-base or minilm")
    parser.add_argument("--budget", type=float, help="share of the dense cost to keep, in (0, 1]")
    parser.add_argument("--cost", help="what the budget counts: params (default) or macs")
    parser.add_argument("--scope", help="model (default) or blocks, which leaves embeddings and heads out")
    parser.add_argument("--kinds", help="comma list: heads, kv_groups, ffn, layers, hidden, embedding_rank")
    parser.add_argument("--round-to", type=int, help="wide axes become multiples of this (default 8)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _prune_parser() -> _Parser:
    parser = _Parser(prog="ibprune", description="Prune a trained model to a budget.", allow_abbrev=False)
    _common(parser)
    add = parser.add_argument
    add("--recipe", help="YAML file with these flags as keys; flags override it")
    add("--task", help="a GLUE task by name, such as sst2")
    add("--data", help="csv, tsv, jsonl, parquet or txt file, a folder of them, a Hub data set, or 'prose'")
    add("--text-columns", help="comma list of the columns with the text")
    add("--label-column", help="the column with the label")
    add("--score", help="what ranks the units: vib (default), fisher, magnitude or random")
    add("--shares", help="how the cut is shared between kinds: probe (default), cost or equal")
    add("--output", help="folder to write (default: pruned)")
    add("--seed", type=int, help="default 0")
    add("--finetune-steps", type=int, help="steps to train the dense model first (default: if its head is new)")
    add("--mask-steps", type=int, help="steps of mask learning (default: by objective)")
    add("--recover-steps", type=int, help="steps of recovery (default: by objective)")
    add("--batch-size", type=int, help="sequences per step and process (default 32)")
    add("--grad-accum", type=int, help="batches per step (default 1)")
    add("--lr", type=float, help="peak learning rate (default: by objective)")
    add("--max-length", type=int, help="tokens per sequence (default: by objective)")
    add("--no-distill", dest="distill", action="store_false", default=None, help="do not learn from the dense model")
    add("--precision", help="auto (default), fp32 or bf16")
    add("--no-audit", dest="audit", action="store_false", default=None, help="skip the information audit")
    add("--quiet", action="store_true", help="no progress, only the closing table")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    parser.epilog = "Verbs: " + "; ".join(f"{verb}: {text}" for verb, text in VERBS.items()) + "."
    return parser


def _plan_parser() -> _Parser:
    parser = _Parser(prog="ibprune plan", description=VERBS["plan"].capitalize() + ".", allow_abbrev=False)
    _common(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _audit_parser() -> _Parser:
    parser = _Parser(prog="ibprune audit", description=VERBS["audit"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("dense", help="Hub id, folder or alias of the dense model")
    add("pruned", help="the pruned folder, or any checkpoint of the same family")
    add("--task", help="a GLUE task by name, such as sst2")
    add("--data", help="csv, tsv, jsonl, parquet or txt file, a folder of them, a Hub data set, or 'prose'")
    add("--text-columns", help="comma list of the columns with the text")
    add("--label-column", help="the column with the label")
    add("--layers", help="comma list of blocks or modules (default: the residual stream after every block)")
    add("--pooling", help="mean, cls, last or random (default: last for decoders, mean otherwise)")
    add("--max-inputs", type=int, help="at most so many distinct texts (default 2400)")
    add("--max-length", type=int, help="tokens read of a text (default 128)")
    add("--seed", type=int, help="default 0")
    add("--output", help="folder for audit.json and the plots (default: nothing is written)")
    add("--quiet", action="store_true", help="no progress, only the table")
    add("--json", action="store_true", help="print the audit as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code (2 for anything the user can mend)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        verb = argv.pop(0) if argv and not argv[0].startswith("-") else "prune"
        if verb not in VERBS:
            raise BadRecipe(f"unknown verb '{verb}': {did_you_mean(verb, VERBS)}.")
        if verb == "prune" and "--version" in argv:
            from ibprune import __version__

            sys.stdout.write(f"ibprune {__version__}\n")
            return 0
        return {"prune": _prune, "plan": _plan, "audit": _audit}[verb](argv)
    except IBPruneError as error:
        if "--debug" in argv:
            raise
        sys.stderr.write(f"ibprune: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ibprune: stopped; nothing was written.\n")
        return 130


def _given(arguments: argparse.Namespace, *, without: tuple[str, ...]) -> dict:
    return {key: value for key, value in vars(arguments).items() if value is not None and key not in without}


def _prune(argv: list[str]) -> int:
    parser = _prune_parser()
    arguments = parser.parse_args(argv)
    if not argv:
        parser.print_help()
        return 2
    from ibprune.recipe import make_recipe

    recipe = make_recipe(_given(arguments, without=("recipe", "debug", "quiet", "json")), file=arguments.recipe)
    _hush()
    from ibprune.console import Quiet, Terminal
    from ibprune.export import check_output

    check_output(recipe.output)
    console = Quiet() if arguments.quiet else Terminal()
    console.say("starting")
    from ibprune.pipeline import run

    result = run(recipe, console)
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(result.report, indent=1) + "\n")
    else:
        _print_report(result.report, recipe.output)
    return 0


def _plan(argv: list[str]) -> int:
    arguments = _plan_parser().parse_args(argv)
    from ibprune.recipe import make_recipe

    values = _given(arguments, without=("debug", "json"))
    recipe = make_recipe({"budget": 1.0} | values)
    _hush()
    from ibprune.planning import plan

    found = plan(recipe.model, recipe.budget, cost=recipe.cost, scope=recipe.scope, kinds=recipe.kinds,
                 round_to=recipe.round_to)  # fmt: skip
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        _print_plan(found)
    return 0


def _audit(argv: list[str]) -> int:
    values = _given(_audit_parser().parse_args(argv), without=("debug", "quiet", "json"))
    for key in ("text_columns", "layers"):
        if key in values:
            values[key] = tuple(part for part in values[key].split(",") if part)
    _hush()
    from ibprune.comparing import audit
    from ibprune.console import Quiet, Terminal

    found = audit(**values, console=Quiet() if "--quiet" in argv else Terminal())
    if "--json" in argv:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        _print_audit(found)
    return 0


def _print_audit(found: dict) -> None:
    from ibprune.audit_output import HEADER, audit_rows

    _table(f"information in bits, {found['data']['n']:,} inputs of {found['data']['name']}", HEADER, audit_rows(found))
    failed = [check["id"] for check in found["checks"] if check["status"] == "fail"]
    if failed:
        sys.stdout.write(f"failed checks: {', '.join(failed)}\n")
    if found["headline"]:
        sys.stdout.write(found["headline"] + "\n")


def _hush() -> None:
    """Keeps the libraries' own bars and warnings off the screen; their errors come through ours."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torch")


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _print_report(report: dict, output: str) -> None:
    from ibprune.report import rows

    budget = report["budget"]
    _table(
        f"{report['model']} at {budget['keep']:g} of its {budget['cost']} ({budget['scope']}), score {report['score']}",
        ("", "dense", "pruned", "ratio"),
        rows(report),
    )
    kept = ", ".join(f"{kind} {share:.0%}" for kind, share in report["kept"].items())
    loads = WAYS[report["verify"]["tier"]]
    sys.stdout.write(
        f"budget {budget['achieved']:,} of at most {budget['limit']:,} {budget['cost']}; kept: {kept}\n"
        f"written to {output} in {sum(report['timings_s'].values()):.0f} s; loads with {loads} "
        f"(checked, max difference {report['verify']['max_abs_diff']:.1e})\n"
    )
    if report["pruned"]["latency_ms"]["median"] > 0.95 * report["dense"]["latency_ms"]["median"]:
        sys.stdout.write("note: no speed was gained on this device at this input size; the model is smaller only.\n")


def _print_plan(found: dict) -> None:
    _table(
        f"what can be cut in this {found['model_type']} model",
        ("kind", "sites", "units", "at least", f"{found['budget']['cost']} per unit", "cut"),
        [
            (
                kind,
                *(f"{g[k]:,}" for k in ("sites", "units", "min_units", "cost_per_unit")),
                "yes" if g["cut"] else "no",
            )
            for kind, g in found["groups"].items()
        ],
    )
    budget = found["budget"]
    lines = [
        f"dense      {found['dense']['params']:,} parameters, {found['dense']['macs'] / 1e6:,.1f} M MACs "
        f"({found['macs_length']} tokens)",
        f"predicted  {found['predicted']['params']:,} parameters, {found['predicted']['macs'] / 1e6:,.1f} M MACs",
        f"budget     {budget['achieved']:,} of at most {budget['limit']:,} {budget['cost']} ({budget['scope']})",
        f"reachable  {found['reachable_keep']:.4f} of the dense {budget['cost']} at the least",
        f"loading    {WAYS[found['tier']]} (with equal shares)",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
