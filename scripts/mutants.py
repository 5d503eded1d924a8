"""Changes ibprune's code at random places, one change at a time, and counts which changes the tests notice.

    python scripts/mutants.py --output benchmarks/mutants.json

The places and changes are cosmic-ray's (`pip install cosmic-ray==8.7.0`), drawn with a seed: so many of each part,
inside functions, at most one in a line, none in an annotation. The tests are collected once. Each mutant is a process
forked from this one, whose functions get the changed code, and runs the quick tests of its part until one fails. One
that takes too much of a processor counts as noticed. `--show 17` prints one mutant, `--only 3 17` judges some.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import inspect
import json
import os
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import cosmic_ray.plugins
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
SURVIVED, KILLED = "survived", "killed"
FEW = ("albert-AlbertModel-1", "bert-BertForMaskedLM-1", "llama-tied-LlamaForCausalLM-2", "t5-T5Model-1")
FEW += ("mixtral-MixtralForCausalLM-1", "beit-BeitModel-2", "phi3-Phi3Model-1", "gpt2-GPT2LMHeadModel-1")
FEW += ("vit-ViTForImageClassification-1", "dinov2-Dinov2ForImageClassification-1", "clip-CLIP", "swin-SwinModel-1")
COSTS = tuple(f"test_contract.py::test_masked_equals_compacted_at_the_predicted_cost[{case}" for case in FEW)


@dataclass(frozen=True)
class Part:
    """Files that are changed, and the tests that must notice, by the beginnings of their names, in this order."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    mutants: int


PARTS = {
    "surgery": Part(
        ("surgery.py", "slicing.py"),
        (
            *COSTS,
            "test_contract.py::test_keeping_everything",
            "test_contract.py::test_generation_with_and_without_cache_agrees_after_losing_the_first",
            "test_contract.py::test_images_of_another_size",
            "test_folders.py::test_uneven_plans_of_every_family_reload_with_and_without",
            "test_folders.py::test_plans_that_plain",
            "test_channels.py::",
            "test_experts.py::test_as_many",
            "test_folders.py::test_a_plan_that",
        ),
        60,
    ),
    "costs": Part(
        ("costs.py",),
        (
            *COSTS,
            "test_budget.py::",
            "test_channels.py::test_masked_equals",
            "test_channels.py::test_the_cost",
            "test_memory.py::test_weights_and_cache",
            "test_contract.py::test_models_outside",
            "test_contract.py::test_plans_are_made",
        ),
        60,
    ),
    "plans": Part(
        ("plans.py", "planning.py"),
        (
            "test_hostile.py::",
            "test_contract.py::test_plans_are_made",
            "test_channels.py::test_a_plan",
            "test_cli.py::",
        ),
        30,
    ),
    "mi": Part(
        ("mi/channel.py", "mi/entropies.py", "mi/gaussian.py", "mi/neighbours.py", "mi/extrapolation.py"),
        ("test_mi_extrapolation.py::", "test_mi_neighbours.py::", "test_mi_channel.py::"),
        60,
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One change: the n-th place where an operator applies in a file."""

    part: str
    file: str
    operator: str
    occurrence: int
    line: int


def runs(source: str) -> set[tuple[int, int]]:
    """Lines and columns in the bodies of functions, without annotations."""
    bodies, silent = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            bodies |= {(line, column) for first in node.body for line, column in _cells(first)}
        for each in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            silent |= set(_cells(each)) if each is not None else set()
    return bodies - silent


def _cells(node: ast.AST) -> Iterator[tuple[int, int]]:
    for line in range(node.lineno, node.end_lineno + 1):
        first = node.col_offset if line == node.lineno else 0
        last = node.end_col_offset if line == node.end_lineno else 200
        yield from ((line, column) for column in range(first, last))


def places(part: str, file: str) -> list[Mutant]:
    """Every change of a file that a call can meet."""
    source = (ROOT / "ibprune" / file).read_text()
    tree, cells, found = get_ast(source), runs(source), []
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments() or name.endswith("no-op"):
            continue
        operator, occurrence = operator_class(), 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                if start in cells:
                    found.append(Mutant(part, file, name, occurrence, start[0]))
                occurrence += 1
    return found


def sample(seed: int) -> list[Mutant]:
    """So many mutants of each part, each on a line of its own."""
    found = []
    for name, part in PARTS.items():
        rng = random.Random(f"{seed} {name}")
        known = [mutant for file in part.files for mutant in places(name, file)]
        rng.shuffle(known)
        first = {}
        for mutant in known:
            first.setdefault((mutant.file, mutant.line), mutant)
        found += list(first.values())[: part.mutants]
    random.Random(seed).shuffle(found)  # so that a run that is cut short has some of every part
    return found


def mutated(mutant: Mutant) -> tuple[str, str]:
    """The source before and after."""
    source = (ROOT / "ibprune" / mutant.file).read_text()
    after = mutate_code(source, cosmic_ray.plugins.get_operator(mutant.operator)(), mutant.occurrence)
    if after is None:
        raise SystemExit(f"no such mutant: {mutant}")
    return source, after


def difference(mutant: Mutant) -> str:
    """What a mutant changes, line by line."""
    lines = difflib.unified_diff(*(text.splitlines() for text in mutated(mutant)), lineterm="", n=0)
    return "\n".join(line for line in lines if line[:2] not in ("--", "++", "@@"))


def functions(module: ModuleType) -> list[FunctionType]:
    """The functions and methods that a module defines, those behind decorators too."""
    classes = [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]
    found = []
    for each in (value for owner in (module, *classes) for value in vars(owner).values()):
        each = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
        each = inspect.unwrap(each) if callable(each) else each
        if isinstance(each, FunctionType) and each.__code__.co_filename == module.__file__:
            found.append(each)
    return found


def apply(mutant: Mutant) -> None:
    """Gives the functions of the module, as this process holds it, the changed code."""
    module = importlib.import_module("ibprune." + mutant.file.removesuffix(".py").replace("/", "."))
    codes = {}

    def collect(code: CodeType) -> None:
        for inner in (each for each in code.co_consts if isinstance(each, CodeType)):
            codes[inner.co_qualname] = inner
            collect(inner)

    collect(compile(mutated(mutant)[1], module.__file__, "exec", dont_inherit=True))
    for function in functions(module):
        function.__code__ = codes[function.__code__.co_qualname]


class Judge:
    """Runs, instead of the collected tests, every mutant against those of its part."""

    def __init__(self, drawn: list[tuple[int, Mutant | None]], output: Path | None, seed: int, limit_s: int):
        self.drawn, self.output, self.seed, self.limit_s = drawn, output, seed, limit_s
        self.found: list[dict] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {
            name: [item for start in part.tests for item in session.items if item.nodeid.startswith(f"tests/{start}")]
            for name, part in PARTS.items()
        }
        for number, mutant in self.drawn:
            started = time.monotonic()
            verdict = self.judge(session, items[mutant.part], mutant)
            print(number, verdict, f"{time.monotonic() - started:.0f} s", mutant, flush=True)
            self.found.append({"number": number, "verdict": verdict, **asdict(mutant), "change": difference(mutant)})
            if self.output:
                write(self.output, self.seed, self.found)
        for name in {mutant.part for _, mutant in self.drawn}:  # tests that a mutant passed need no other proof
            passed = any(each["part"] == name and each["verdict"] == SURVIVED for each in self.found)
            if not passed and self.judge(session, items[name], None) != SURVIVED:
                raise pytest.UsageError(f"the tests of {name} fail without a change")
        return True

    def judge(self, session: pytest.Session, items: list[pytest.Item], mutant: Mutant | None) -> str:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_CPU, (self.limit_s, self.limit_s))
                if mutant is not None:
                    apply(mutant)
                for item, following in zip(items, [*items[1:], None]):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if session.testsfailed:
                        break
                code = int(session.testsfailed > 0)
            os._exit(code)
        return SURVIVED if os.waitpid(child, 0)[1] == 0 else KILLED


def write(path: Path, seed: int, found: list[dict]) -> None:
    """Writes the counts and what survived."""
    counts = {
        name: {
            verdict: sum(each["part"] == name and each["verdict"] == verdict for each in found)
            for verdict in (KILLED, SURVIVED)
        }
        for name in PARTS
    }
    survivors = [each for each in found if each["verdict"] == SURVIVED]
    data = {"seed": seed, "mutants": len(found), "parts": counts, "survivors": survivors}
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=60, help="seconds of a processor that a mutant may take")
    parser.add_argument("--show", type=int, help="print this mutant and run nothing")
    parser.add_argument("--only", type=int, nargs="*", help="judge these mutants alone, and write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "mutants.json")
    args = parser.parse_args()
    drawn = list(enumerate(sample(args.seed)))
    if args.show is not None:
        print(drawn[args.show][1], difference(drawn[args.show][1]), sep="\n")
        return
    chosen = [each for each in drawn if args.only is None or each[0] in args.only]
    judge = Judge(chosen, None if args.only else args.output.absolute(), args.seed, args.limit)
    files = sorted({test.partition("::")[0] for part in PARTS.values() for test in part.tests})
    options = ["-n", "0", "-q", "-s", "-p", "no:cacheprovider"]
    os.chdir(ROOT)
    raise SystemExit(pytest.main([*options, *(f"tests/{file}" for file in files)], plugins=[judge]))


if __name__ == "__main__":
    main()
