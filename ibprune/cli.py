"""The command line: parses flags, calls the verb, prints tables; errors are one line and exit code 2."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ibprune.console import Quiet, Terminal, printable
from ibprune.errors import BadRecipe, IBPruneError, Stopped, about_file, did_you_mean, first_line, is_out_of_memory
from ibprune.flags import (
    VERBS,
    audit_parser,
    bench_parser,
    compare_parser,
    completion_parser,
    doctor_parser,
    export_parser,
    legacy_parser,
    mi_parser,
    plan_parser,
    prune_parser,
    push_parser,
    recipes_parser,
    report_parser,
    train_parser,
)
from ibprune.tables import (
    estimate_line,
    print_audit,
    print_benchmark,
    print_contrast,
    print_conversion,
    print_estimate,
    print_export,
    print_machine,
    print_pareto,
    print_plan,
    print_report,
    print_sensitivity,
    print_speeds,
    print_training,
)

PATIENCE = 30.0  # seconds in which the main process says what it has to say too
# What `ibprune plan` reads from the config alone, and what more with --sensitivity; the rest is for --estimate.
PLANNED = {"model", "budget", "cost", "scope", "kinds", "round_to", "vanilla", "rotate", "image_size", "batch_size",
           "max_length", "load_in_4bit", "load_in_8bit"}  # fmt: skip
DATA = {"data", "text_columns", "label_column"}
SENSED = {*DATA, "task", "streaming", "shuffle_buffer", "max_train_samples",
          "max_eval_samples", "augment", "packing", "max_train_tokens", "score", "seed", "precision"}  # fmt: skip


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
            "prune": _prune, "plan": _plan, "train": _train, "compare": _compare, "report": _report, "push": _push,
            "audit": _audit, "bench": _bench, "export": _export, "convert-legacy": _convert_legacy,
            "recipes": _recipes, "doctor": _doctor, "completion": _completion,
            "mi-benchmark": _mi_benchmark,
        }[verb](argv)  # fmt: skip
    except IBPruneError as error:
        if "--debug" in argv:
            raise
        where = ""
        if _number():
            time.sleep(PATIENCE)  # then this one is ended
            where = f"process {_number()}: "
        sys.stderr.write(f"ibprune: error: {where}{printable(' '.join(str(error).split()))}\n")
        return 2
    except Stopped as stopped:
        if not _number():
            sys.stderr.write(f"ibprune: {printable(str(stopped))}\n")
        return 130
    except BrokenPipeError:  # whoever reads what is printed has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, OSError) and "--debug" not in argv and not is_out_of_memory(error):
            sys.stderr.write(f"ibprune: error: {printable(about_file(error))} --debug says where.\n")
            return 2
        if is_out_of_memory(error) and "--debug" not in argv:
            sys.stderr.write(f"ibprune: error: {printable(_ran_out(error, verb))}\n")
            return 2
        if not isinstance(error, RuntimeError) or not _is_lost_peer(error):
            raise
        sys.stderr.write(f"ibprune: error: process {_number()}: lost a process that trains with it.\n")
        return 1
    except KeyboardInterrupt:
        if _number():
            return 130
        more = " --resume goes on from the last state saved." if verb in ("prune", "train") else ""
        sys.stderr.write(f"ibprune: stopped; nothing half-written was left.{more}\n")
        return 130


def _number() -> int:
    """Of this process, where several train together: `ibprune.processes` knows too, but takes torch to import."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def _ran_out(error: Exception, verb: str) -> str:
    """What is said where memory ran out."""
    said = " ".join(first_line(error).split())
    again = "; --resume goes on from the last state saved" if verb in ("prune", "train") else ""
    return (
        f"memory ran out ({said.removesuffix('.')}), and nothing half-written was left: a smaller --batch-size or "
        f"--max-length takes less, and `ibprune plan --estimate` says what a run takes{again}."
    )


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether another process went away in the middle of a step; gloo, on CPUs, has no class for that."""
    return "WORLD_SIZE" in os.environ and (type(error).__name__.startswith("Dist") or "gloo" in str(error))


@contextmanager
def _listening(console: Quiet) -> Iterator[None]:
    """Lets SIGINT (Ctrl-C) or SIGTERM stop a run: while it trains after its step, else or the second time at once."""

    def stop(number: int, frame: object) -> None:
        if console.stopping or not console.stepping:
            raise KeyboardInterrupt
        console.stopping = True
        console.say("stopping after this step; the same signal again stops at once")

    if threading.current_thread() is not threading.main_thread():  # only there Python takes signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _several(arguments: argparse.Namespace) -> bool:
    """Whether the command is to be started in several processes, and is not one of them."""
    return arguments.num_processes not in (None, 1) and int(os.environ.get("WORLD_SIZE", 1)) == 1


def _given(arguments: argparse.Namespace, *, without: tuple[str, ...]) -> dict:
    return {key: value for key, value in vars(arguments).items() if value is not None and key not in without}


def _recipe_values(arguments: argparse.Namespace, *, without: tuple[str, ...]) -> dict:
    """The recipe's keys from flags and from --set."""
    from ibprune.recipe import parse_settings

    flags = _given(arguments, without=("set", *without))
    return flags | parse_settings(arguments.set or (), flags=flags)


def _prune(argv: list[str]) -> int:
    parser = prune_parser()
    arguments = parser.parse_args(argv)
    if not argv:
        parser.print_help()
        return 2
    from ibprune.recipe import make_recipe

    without = ("recipe", "num_processes", "debug", "quiet", "json")
    recipe = make_recipe(_recipe_values(arguments, without=without), file=arguments.recipe)
    _hush()
    from ibprune.folders import check_output

    check_output(recipe.output, model=recipe.model)
    if _several(arguments):
        from ibprune.launching import launch

        return launch(argv, arguments.num_processes)
    console = Quiet() if arguments.quiet or _number() else Terminal()
    console.say("starting")
    from ibprune.ladder import pareto
    from ibprune.processes import leave
    from ibprune.smallest import carry_out

    with _listening(console):
        result = carry_out(recipe, console)
    leave()
    if _number():
        return 0
    several = isinstance(result, tuple)
    found = pareto([each.report for each in result]) if several else result.report
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        (print_pareto if several else print_report)(found, recipe.output)
    return 0


def _plan(argv: list[str]) -> int:
    arguments = plan_parser().parse_args(argv)
    from ibprune.recipe import make_recipe

    rates = ("flops_per_second", "utilisation", "num_processes")
    asides = ("debug", "json", "recipe", "estimate", "sensitivity", "latency_table", *rates)
    values = _recipe_values(arguments, without=asides)
    asked = make_recipe(values, file=arguments.recipe) if arguments.recipe else make_recipe({"budget": 1.0} | values)
    given = {name: getattr(arguments, name) for name in rates if getattr(arguments, name) is not None}
    sensed = arguments.sensitivity is not None
    for name in (*given, *values):
        of_data = name in DATA
        if name not in PLANNED and not (sensed and name in SENSED) and (of_data or not arguments.estimate):
            needed = "--sensitivity" if of_data else "--estimate"
            raise BadRecipe(f"expected {needed} beside --{name.replace('_', '-')}.")
    sizes = {name: values.get(name) for name in ("batch_size", "max_length")}  # of a key-value cache
    if asked.cost == "memory":
        sizes = {name: getattr(asked, name) for name in sizes}
    elif arguments.estimate or arguments.recipe or sensed:
        sizes = {}
    _hush()
    from ibprune.planning import plan

    found = plan(asked.model, asked.budget, cost=asked.cost, scope=asked.scope, kinds=asked.kinds,
                 round_to=asked.round_to, vanilla=asked.vanilla, rotate=asked.rotate,
                 image_size=asked.image_size, load_in_4bit=asked.load_in_4bit, load_in_8bit=asked.load_in_8bit,
                 latency_table=arguments.latency_table or asked.latency_table, **sizes)  # fmt: skip
    if arguments.estimate:
        from ibprune.estimating import estimate

        found["estimate"] = estimate(**asked.model_dump(exclude_unset=True), **given)
    if sensed:
        from ibprune.sensing import sensitivity

        console = Quiet() if arguments.json else Terminal()
        found["sensitivity"] = sensitivity(
            **asked.model_dump(exclude_unset=True), share=arguments.sensitivity, console=console
        )
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_plan(found)
        if arguments.estimate:
            print_estimate(found["estimate"])
        if sensed:
            print_sensitivity(found["sensitivity"])
    return 0


def _train(argv: list[str]) -> int:
    arguments = train_parser().parse_args(argv)
    _hush()
    from ibprune.api import train
    from ibprune.processes import leave

    if _several(arguments):
        from ibprune.launching import launch

        return launch(["train", *argv], arguments.num_processes)
    values = _given(arguments, without=("num_processes", "debug", "quiet", "json"))
    console = Quiet() if arguments.quiet or _number() else Terminal()
    with _listening(console):
        report = train(**values, console=console)
    leave()
    if _number():
        return 0
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_training(report, values.get("output", "trained"))
    return 0


def _compare(argv: list[str]) -> int:
    arguments = compare_parser().parse_args(argv)
    from ibprune.contrast import contrast

    found = contrast(arguments.folders)
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_contrast(found)
    return 0


def _report(argv: list[str]) -> int:
    arguments = report_parser().parse_args(argv)
    from ibprune.report_page import write_page

    for path in write_page(arguments.folder):
        sys.stdout.write(f"written to {path}\n")
    return 0


def _push(argv: list[str]) -> int:
    values = _given(push_parser().parse_args(argv), without=("debug",))
    from ibprune.hub_folders import push

    sys.stdout.write(f"pushed: {push(**values)}\n")
    return 0


def _export(argv: list[str]) -> int:
    arguments = export_parser().parse_args(argv)
    _hush()
    from ibprune.exporting import export

    found = export(**_given(arguments, without=("debug", "json")), console=Quiet() if arguments.json else Terminal())
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_export(found)
    return 0


def _audit(argv: list[str]) -> int:
    values = _given(audit_parser().parse_args(argv), without=("debug", "quiet", "json"))
    for key in ("text_columns", "layers"):
        if key in values:
            values[key] = tuple(part for part in values[key].split(",") if part)
    _hush()
    from ibprune.comparing import audit

    found = audit(**values, console=Quiet() if "--quiet" in argv else Terminal())
    if "--json" in argv:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_audit(found)
    return 0


def _bench(argv: list[str]) -> int:
    values = _given(bench_parser().parse_args(argv), without=("debug", "quiet", "json"))
    _hush()
    from ibprune.benchmarking import bench

    found = bench(**values, console=Quiet() if "--quiet" in argv else Terminal())
    if "--json" in argv:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_speeds(found)
    return 0


def _convert_legacy(argv: list[str]) -> int:
    values = _given(legacy_parser().parse_args(argv), without=("debug", "quiet", "json"))
    _hush()
    from ibprune.legacy import convert_legacy

    report = convert_legacy(**values, console=Quiet() if "--quiet" in argv else Terminal())
    if "--json" in argv:
        import json

        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_conversion(report, values["output"])
    return 0


def _doctor(argv: list[str]) -> int:
    arguments = doctor_parser().parse_args(argv)
    _hush()
    from ibprune.doctor import examine

    found = examine()
    if arguments.json:
        import json

        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        print_machine(found)
    return 0


def _recipes(argv: list[str]) -> int:
    arguments = recipes_parser().parse_args(argv)
    from ibprune import recipe_files

    if arguments.action in ("show", "copy") and arguments.name is None:
        names = ", ".join(recipe_files.shipped())
        raise BadRecipe(f"expected the name of a recipe after {arguments.action}, found none. There are: {names}.")
    if arguments.action == "show":
        sys.stdout.write(recipe_files.find(arguments.name).read_text(encoding="utf-8"))
    elif arguments.action == "copy":
        path = recipe_files.copy_recipe(arguments.name, arguments.target)
        sys.stdout.write(f"written to {path}: ibprune --recipe {path}\n")
    elif arguments.action == "schema":
        import json

        from ibprune.recipe import Recipe

        sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=1) + "\n")
    else:
        for name, path in recipe_files.shipped().items():
            sys.stdout.write(f"{name:<20} {recipe_files.purpose(path)}\n")
    return 0


def _completion(argv: list[str]) -> int:
    arguments = completion_parser().parse_args(argv)
    _hush()
    from ibprune.completion import script

    sys.stdout.write(script(arguments.shell) + "\n")
    return 0


def _mi_benchmark(argv: list[str]) -> int:
    arguments = mi_parser().parse_args(argv)
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
        if min(seeds) < 0:
            raise ValueError("below 0")
    except ValueError:
        raise BadRecipe(f"--seeds: expected a comma list of whole numbers from 0, found '{arguments.seeds}'.") from None
    if arguments.n < 10:
        raise BadRecipe(f"--n: expected at least 10 samples, found {arguments.n}.")

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
    import logging
    import os
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)  # critical: its errors come through ours
    warnings.filterwarnings("ignore", module="torch")
