"""The command line: parses flags, calls the verb, prints tables; errors are one line and exit code 2."""

import argparse
import sys

from ibprune.errors import BadRecipe, IBPruneError, did_you_mean
from ibprune.tables import (
    estimate_line,
    print_audit,
    print_benchmark,
    print_conversion,
    print_export,
    print_pareto,
    print_plan,
    print_report,
    print_speeds,
    print_training,
)

VERBS = {
    "prune": "make a trained model smaller and write a folder that loads (the default verb)",
    "plan": "say what can be cut and what a budget reaches, from the config alone",
    "train": "train a dense model, also from a config alone, and write a folder that loads",
    "push": "send a folder that ibprune wrote to the Hub",
    "export": "write a pruned transformer for ONNX Runtime, OpenVINO or llama.cpp",
    "audit": "say what each layer of a dense and of a pruned model knows of its input and labels",
    "bench": "measure speed, memory and size of a dense and a pruned model side by side, and say why it is not more",
    "convert-legacy": "turn a checkpoint that an older tool pruned into a folder that loads",
    "mi-benchmark": "compare information estimators on known distributions, or estimate a pair of arrays",
}


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and names the nearest flag."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: "):
            found = message.removeprefix("unrecognized arguments: ").split()[0]
            flags = [option for action in self._actions for option in action.option_strings]
            message = f"unknown flag or argument '{found}': {did_you_mean(found, flags)}"
        raise BadRecipe(message)


def _common(parser: _Parser) -> None:
    _model(parser)
    parser.add_argument("--budget", help="share of the dense cost to keep, in (0, 1]; several: 0.5,0.3,0.2")
    parser.add_argument("--cost", help="what the budget counts: params (default), macs or latency")
    parser.add_argument("--scope", help="model (default) or blocks, which leaves embeddings and heads out")
    kinds = "heads, kv_groups, experts, ffn, layers, hidden, embedding_rank, vocab; channels"
    parser.add_argument("--kinds", help=f"comma list: {kinds}")
    parser.add_argument("--round-to", type=int, help="wide axes become multiples of this (default 8; 256 for k-quants)")
    text = "cut only what plain transformers loads without code: the same widths in every layer"
    parser.add_argument("--vanilla", action="store_true", default=None, help=text)
    text = "cut the residual width in its principal directions (RMSNorm models with a head)"
    parser.add_argument("--rotate", action="store_true", default=None, help=text)


def _model(parser: _Parser) -> None:
    parser.add_argument("--model", help="Hub id, local folder, or an alias such as bert-base or minilm")
    parser.add_argument("--image-size", type=int, help="pixels of a side of pictures (default: as the model was made)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _training(parser: _Parser) -> None:
    add = parser.add_argument
    add("--augment", help="comma list of what is done to training pictures: flip,crop (default) or none")
    add("--seed", type=int, help="default 0")
    add("--batch-size", type=int, help="texts or pictures per step and process (default 32)")
    add("--grad-accum", type=int, help="batches per step (default 1)")
    add("--lr", type=float, help="peak learning rate (default: by objective)")
    add("--schedule", help="how it falls to 0: linear (default), cosine or uba (budget-aware)")
    add("--max-length", type=int, help="tokens per sequence (default: by objective)")
    add("--precision", help="auto (default), fp32 or bf16")


def _data(parser: _Parser) -> None:
    parser.add_argument("--task", help="a GLUE task by name, such as sst2")
    parser.add_argument(
        "--data",
        help="csv, tsv, jsonl, parquet or txt file, a folder of them, a Hub data set, or 'prose'; "
        "for pictures a folder with a sub-folder per class, an npz file or a Hub data set",
    )
    parser.add_argument("--text-columns", help="comma list of the columns with the text")
    parser.add_argument("--label-column", help="the column with the label")


def _saving(parser: _Parser) -> None:
    add = parser.add_argument
    add("--resume", action="store_true", default=None, help="go on with a run that was cut short, from OUTPUT.partial")
    add("--save-every", type=float, help="minutes between two saves of the run's state (default 10)")


def _pushing(parser: _Parser) -> None:
    add = parser.add_argument
    add("--private", action="store_true", default=None, help="make the Hub repo a private one")
    add("--revision", help="branch of the Hub repo (default: main)")
    add("--commit-message", help="of the commit on the Hub")


def _prune_parser() -> _Parser:
    parser = _Parser(prog="ibprune", description="Prune a trained model to a budget.", allow_abbrev=False)
    _common(parser)
    add = parser.add_argument
    add("--recipe", help="YAML file with these flags as keys; flags override it")
    _data(parser)
    add("--at-least", metavar="METRIC=VALUE", help="the smallest model that keeps accuracy=0.88, or accuracy=99%% of "
        "the dense model's (perplexity: at most); --budget is then the least to try (default 0.1)")  # fmt: skip
    add("--latency-table", metavar="FILE", help="a latency.json measured on this device before (--cost latency)")
    add("--mode", help="full (default); fast: on 3 %% of the data; faster: that, and weights stay as they are")
    scores = "vib (default), gradual, fisher, kwon, obs, taylor, flap, activation, magnitude or random"
    add("--score", help=f"what ranks the units: {scores}")
    add("--reconstruct", action="store_true", default=None, help="refit by least squares what reads the cut units")
    add("--shares", help="how the cut is shared between kinds: probe (default), cost or equal")
    add("--output", help="folder to write (default: pruned)")
    _training(parser)
    add("--finetune-steps", type=int, help="steps to train the dense model first (default: if its head is new)")
    add("--mask-steps", type=int, help="steps of scores vib and gradual (default: by objective)")
    add("--recover-steps", type=int, help="steps of recovery (default: by objective)")
    add("--probe-steps", type=int, help="steps before candidate cuts are compared (default: recovery / 8)")
    add("--distill", help="what is learned from the dense model: logits (default), hidden or relations (these and its "
        "blocks' states, or how they relate tokens), or none")  # fmt: skip
    add("--no-distill", dest="distill", action="store_const", const="none", help="the same as --distill none")
    add("--divergence", help="how logits are compared: forward KL (default), reverse or balanced")
    _saving(parser)
    add("--push-to-hub", metavar="REPO", help="send the folder to this Hub repo, such as user/model, at the end")
    _pushing(parser)
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


def _train_parser() -> _Parser:
    parser = _Parser(prog="ibprune train", description=VERBS["train"].capitalize() + ".", allow_abbrev=False)
    _model(parser)
    _data(parser)
    _training(parser)
    parser.add_argument("--output", help="folder to write (default: trained)")
    parser.add_argument("--finetune-steps", type=int, help="steps to train (default: one epoch, at most 2000)")
    _saving(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the closing line")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the line")
    return parser


def _push_parser() -> _Parser:
    parser = _Parser(prog="ibprune push", description=VERBS["push"].capitalize() + ".", allow_abbrev=False)
    parser.add_argument("folder", help="what ibprune wrote")
    parser.add_argument("repo", help="user/model")
    _pushing(parser)
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what the repo holds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _export_parser() -> _Parser:
    parser = _Parser(prog="ibprune export", description=VERBS["export"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("folder", help="what ibprune wrote for a transformer or a CNN of transformers")
    add("--to", required=True, help="onnx, openvino or gguf (causal language models of LLaMA's kind)")
    add("--output", help="what to write (default: the folder's name with -onnx, -openvino or .gguf)")
    add("--dtype", help="of a GGUF's matrices: f32 or f16 (default: as the folder's)")
    add("--json", action="store_true", help="print the result as JSON instead of lines")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _audit_parser() -> _Parser:
    parser = _Parser(prog="ibprune audit", description=VERBS["audit"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("dense", help="Hub id, folder or alias of the dense model")
    add("pruned", help="the pruned folder, or any checkpoint of the same family")
    _data(parser)
    add("--image-size", type=int, help="pixels of a side, for a CNN that brings no image processor")
    add("--layers", help="comma list of blocks or modules (default: every block; of a CNN about a dozen stages)")
    add("--pooling", help="mean, cls, last or random (default: last for decoders, mean otherwise)")
    add("--probe", choices=("logistic", "mlp"), help="predictors of the V-information (default logistic)")
    add("--tokens", type=int, help="ask for the N most frequent tokens too, current and next (default: not)")
    add("--pair", action="store_true", default=None, help="also estimate I(dense layer; pruned layer)")
    add("--max-inputs", type=int, help="at most so many distinct texts or pictures (default 2400)")
    add("--max-length", type=int, help="tokens read of a text (default 128)")
    add("--seed", type=int, help="default 0")
    add("--output", help="folder for audit.json and the plots (default: nothing is written)")
    add("--quiet", action="store_true", help="no progress, only the table")
    add("--json", action="store_true", help="print the audit as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _bench_parser() -> _Parser:
    parser = _Parser(prog="ibprune bench", description=VERBS["bench"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("dense", help="Hub id, folder or alias of the dense model")
    add("pruned", help="the pruned folder, or any checkpoint of the same family")
    add("--batches", type=_numbers, help="comma list of inputs at a time (default 1,8,32)")
    add("--lengths", type=_numbers, help="comma list of tokens of an input (default 32,128)")
    add("--runtimes", type=_names, help="comma list of eager (default) and compile")
    add("--precision", help="fp32 (default) or bf16")
    add("--rounds", type=int, help="timed runs of each model (default 15)")
    add("--image-size", type=int, help="pixels of a side, for a CNN that brings no image processor")
    add("--output", help="a JSON file for the result (default: none is written)")
    add("--quiet", action="store_true", help="no progress, only the table")
    add("--json", action="store_true", help="print the result as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _legacy_parser() -> _Parser:
    parser = _Parser(prog="ibprune convert-legacy", description=VERBS["convert-legacy"].capitalize() + ".",
                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("source", help="a folder with a config.json and a state dict")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the closing line")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a comma list of whole numbers, found '{text}'") from None


def _mi_parser() -> _Parser:
    parser = _Parser(prog="ibprune mi-benchmark", description=VERBS["mi-benchmark"].capitalize() + ".",
                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--tasks", help="comma list of tasks, or of parts of their names (default: all 40)")
    add("--estimators", help="comma list (default: pairwise,ksg,ksg-copula,gaussian,gaussian-copula,infonce)")
    add("--n", type=int, default=10_000, help="samples (default 10000)")
    add("--seeds", default="0", help="comma list (default 0)")
    add("--xy", help="an npz file with the arrays x and y; integer y means labels")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code (2 for anything the user can mend)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv.pop(0) if argv and not argv[0].startswith("-") else "prune"
    try:
        if verb not in VERBS:
            raise BadRecipe(f"unknown verb '{verb}': {did_you_mean(verb, VERBS)}.")
        if verb == "prune" and "--version" in argv:
            from ibprune import __version__

            sys.stdout.write(f"ibprune {__version__}\n")
            return 0
        return {
            "prune": _prune, "plan": _plan, "train": _train, "push": _push, "audit": _audit,
            "bench": _bench, "export": _export, "convert-legacy": _convert_legacy,
            "mi-benchmark": _mi_benchmark,
        }[verb](argv)  # fmt: skip
    except IBPruneError as error:
        if "--debug" in argv:
            raise
        sys.stderr.write(f"ibprune: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        more = " --resume goes on from the last state saved." if verb in ("prune", "train") else ""
        sys.stderr.write(f"ibprune: stopped; nothing half-written was left.{more}\n")
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
    from ibprune.folders import check_output

    check_output(recipe.output, model=recipe.model)
    console = Quiet() if arguments.quiet else Terminal()
    console.say("starting")
    from ibprune.ladder import pareto
    from ibprune.smallest import carry_out

    result = carry_out(recipe, console)
    several = isinstance(result, tuple)
    found = pareto([each.report for each in result]) if several else result.report
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        (print_pareto if several else print_report)(found, recipe.output)
    return 0


def _plan(argv: list[str]) -> int:
    arguments = _plan_parser().parse_args(argv)
    from ibprune.recipe import make_recipe

    values = _given(arguments, without=("debug", "json"))
    recipe = make_recipe({"budget": 1.0} | values)
    _hush()
    from ibprune.planning import plan

    found = plan(recipe.model, recipe.budget, cost=recipe.cost, scope=recipe.scope, kinds=recipe.kinds,
                 round_to=recipe.round_to, vanilla=recipe.vanilla, rotate=recipe.rotate,
                 image_size=recipe.image_size)  # fmt: skip
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_plan(found)
    return 0


def _train(argv: list[str]) -> int:
    arguments = _train_parser().parse_args(argv)
    _hush()
    from ibprune.api import train
    from ibprune.console import Quiet, Terminal

    values = _given(arguments, without=("debug", "quiet", "json"))
    report = train(**values, console=Quiet() if arguments.quiet else Terminal())
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_training(report, values.get("output", "trained"))
    return 0


def _push(argv: list[str]) -> int:
    values = _given(_push_parser().parse_args(argv), without=("debug",))
    from ibprune.hub_folders import push

    sys.stdout.write(f"pushed: {push(**values)}\n")
    return 0


def _export(argv: list[str]) -> int:
    arguments = _export_parser().parse_args(argv)
    _hush()
    from ibprune.console import Quiet, Terminal
    from ibprune.exporting import export

    found = export(**_given(arguments, without=("debug", "json")), console=Quiet() if arguments.json else Terminal())
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_export(found)
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
        print_audit(found)
    return 0


def _bench(argv: list[str]) -> int:
    values = _given(_bench_parser().parse_args(argv), without=("debug", "quiet", "json"))
    _hush()
    from ibprune.benchmarking import bench
    from ibprune.console import Quiet, Terminal

    found = bench(**values, console=Quiet() if "--quiet" in argv else Terminal())
    if "--json" in argv:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_speeds(found)
    return 0


def _convert_legacy(argv: list[str]) -> int:
    values = _given(_legacy_parser().parse_args(argv), without=("debug", "quiet", "json"))
    _hush()
    from ibprune.console import Quiet, Terminal
    from ibprune.legacy import convert_legacy

    report = convert_legacy(**values, console=Quiet() if "--quiet" in argv else Terminal())
    if "--json" in argv:
        import json

        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_conversion(report, values["output"])
    return 0


def _mi_benchmark(argv: list[str]) -> int:
    arguments = _mi_parser().parse_args(argv)
    import json

    from ibprune.errors import BadData
    from ibprune.mi.samples import BadSamples

    try:
        if arguments.xy:
            from ibprune.mi.benchmark import estimate_file

            names = tuple(name for name in (arguments.estimators or "").split(",") if name)
            found = estimate_file(arguments.xy, estimators=names)
            sys.stdout.write(json.dumps(found, indent=1) + "\n" if arguments.json else estimate_line(found))
            return 0
        results = _mi_results(arguments)
    except BadSamples as error:
        raise BadData(str(error)) from error
    if arguments.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


def _mi_results(arguments: argparse.Namespace) -> list[dict]:
    """Runs the benchmark, printing the table of errors by task unless JSON is asked for."""
    from ibprune.mi.benchmark import run_benchmark
    from ibprune.mi.tasks import TASKS

    parts = [part for part in (arguments.tasks or "").split(",") if part]
    tasks = tuple(task for task in TASKS if not parts or any(part in task.name for part in parts))
    if not tasks:
        raise BadRecipe(f"no task bears '{arguments.tasks}': {did_you_mean(parts[0], [t.name for t in TASKS])}.")
    estimators = tuple((arguments.estimators or "pairwise,ksg,ksg-copula,gaussian,gaussian-copula,infonce").split(","))
    try:
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    except ValueError:
        raise BadRecipe(f"--seeds: expected a comma list of whole numbers, found '{arguments.seeds}'.") from None
    if arguments.n < 10:
        raise BadRecipe(f"--n: expected at least 10 samples, found {arguments.n}.")
    from ibprune.console import Terminal

    total = len(tasks) * len(seeds) * len(estimators)
    results = list(Terminal().track(run_benchmark(tasks, estimators, n=arguments.n, seeds=seeds), "estimating", total))
    if not arguments.json:
        print_benchmark(results, estimators, arguments.n, len(seeds))
    return [
        {"task": r.task, "seed": r.seed, "truth": r.truth, "seconds": r.seconds}
        | r.estimate.to_dict()
        | {"estimator": r.estimator}
        for r in results
    ]


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
    datasets.logging.set_verbosity(50)  # critical: its errors come through ours
    warnings.filterwarnings("ignore", module="torch")
