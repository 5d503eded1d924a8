"""The report of a run: what was asked, what was reached, what it cost, as JSON and as a table."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ibprune.checksums import REPORT, check_own
from ibprune.errors import BadRecipe, PlanMismatch, first_line
from ibprune.json_files import read_json
from ibprune.markdown import code

SCHEMA = "ibprune.report/1"
MODULE_SCHEMA = "ibprune.module_report/1"
PARETO, PARETO_SCHEMA = "pareto.json", "ibprune.pareto/1"
PACKAGES = ("ibprune", "torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass
class Side:
    """One model, dense or pruned.

    Attributes:
        params: Parameters, tied tensors once.
        macs: Multiply-accumulates of one sequence of `macs_length` tokens, or of one picture (a MAC is two FLOPs).
        file_bytes: Size of the safetensors; of the dense model, the bytes of its parameters in the same type.
        metrics: By name, on the held-out data.
        latency_ms: {"median", "iqr", "layers"} of a forward pass, by `ibprune.timing.time_forward`.
        params_blocks, macs_blocks: The same without embeddings and heads.
        memory_bytes: What a budget on memory counts, of the whole model; None where there is no such budget.
    """

    params: int
    macs: int
    file_bytes: int
    metrics: dict[str, float]
    latency_ms: dict[str, float]
    params_blocks: int = 0
    macs_blocks: int = 0
    memory_bytes: int | None = None


@dataclass
class Report:
    """Everything a run found; `report.json` in the output folder.

    Attributes:
        macs_length: Tokens of the sequence whose MACs count; for pictures the most rows that a layer sees, or 0.
        vocabulary: What a cut vocabulary means for held-out texts, dense and pruned: its rows, the tokens of a
            text, and the share of unknown ones; None where it was not cut.
        directions: Of a residual stream that was turned before `hidden` was cut: how many stayed, of how many; None
            where features are cut.
        pictures: Where pictures are read, the shape that MACs and latency are of, and how they were normalised and
            augmented.
        refused: Channels of a CNN that cannot be cut, with the reason.
        command: The command line that made it.
        first: Where the model that the run began with had been pruned itself, the dense one of the first run: its
            "model", "params", "macs" and what these are of ("macs_input"); empty where its folder does not say.
        hub: What the run took from the Hub: the id of the "model", and of the "data" as "repo" or "repo:config"; None
            where it was local.
        quantised: Bits in which the dense model was held, whose metrics and latency are of that form; None: as it is.
        recovery: What trained in the recovery, how many parameters and steps; where rows were held back, how many, the
            loss on them after which steps, and which of these was best: its weights stayed.
        resumed: Whether the run was cut short and taken up again: its timings are then of its last part.
        budgets: Of the mask run that this model is one stop of; empty where it had one budget.
        chosen: Where `at_least` chose the budget, the metric, its "threshold", what was "tried", and a "note".
        data: None where nobody told what it was trained on.
        unknown: In words, what the report cannot say; empty for a run of the command.
        overlap: Held-out rows that also occur in the training data; None where these are too many to look.
        sha256: Checksums of the folder's other files, by `ibprune.checksums`.
        own_sha256: Of all that the report itself says.
        audit: The file of the audit; None, with the reason in `audit_note`, where there is none.
    """

    dense: Side
    pruned: Side
    budget: dict
    score: str
    seed: int
    model: str
    data: str | None
    objective: str
    macs_length: int
    latency_input: dict[str, int]
    kept: dict[str, float]
    world_size: int
    device: str
    precision: str
    shares: str
    command: str
    hub: dict[str, str | None]
    first: dict | None = None
    vocabulary: dict[str, list[float]] | None = None
    directions: list[int] | None = None
    quantised: int | None = None
    pictures: dict | None = None
    refused: dict[str, str] = field(default_factory=dict)
    audit: str | None = None
    audit_note: str = ""
    recovery: dict = field(default_factory=dict)
    resumed: bool = False
    budgets: list[float] = field(default_factory=list)
    chosen: dict | None = None
    overlap: int | None = None
    unknown: list[str] = field(default_factory=list)
    verify: dict = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    own_sha256: str = ""
    schema: str = SCHEMA

    def to_dict(self) -> dict:
        return asdict(self)


class Timer:
    """Seconds by stage, added up where a stage comes again.

    Example:
        >>> timer = Timer()
        >>> with timer("load"):
        ...     pass
        >>> list(timer.seconds)
        ['load']
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 2)


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_object(path: Path) -> dict:
    """A JSON file of an output folder.

    Raises:
        PlanMismatch: It cannot be read, or holds something else than keys and values.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise PlanMismatch(f"could not read {path}: {first_line(error)}. Get the folder again.") from error
    if not isinstance(found, dict):
        raise PlanMismatch(f"expected keys and values in {path}, found {type(found).__name__}. Get the folder again.")
    return found


def run_folders(folder: Path) -> list[Path]:
    """The folders of several budgets that a run wrote into one, the largest first; of any other, the folder itself."""
    if not (folder / PARETO).is_file():
        return [folder]
    return [path.parent for path in sorted(folder.glob(f"*/{REPORT}"), reverse=True)]


def read_report(folder: Path) -> dict:
    """The dict of the report of a pruned model, a transformer or a module.

    Raises:
        BadRecipe: No report in the folder, or one of something else, such as a trained dense model.
        PlanMismatch: It cannot be read, or its figures are not those that were written.
    """
    path = folder / REPORT
    if not path.is_file():
        raise BadRecipe(f"expected a folder that a run wrote, with a {REPORT}, found none in '{folder}'.")
    found = read_object(path)
    check_own(found, path)
    if found.get("schema") not in (SCHEMA, MODULE_SCHEMA):
        raise BadRecipe(
            f"expected the report of a pruned model in '{folder}', {SCHEMA} or {MODULE_SCHEMA}, found "
            f"'{found.get('schema')}': name what a pruning run of this version wrote."
        )
    return found


def macs_input(found: dict) -> str:
    """What the MACs of a report or a plan are of."""
    if found["pictures"] is None:
        return f"{found['macs_length']} tokens"
    return " x ".join(str(size) for size in found["pictures"]["shape"])


def pruned_before(folder: Path) -> dict | None:
    """What the report beside a model says of the dense one that its first run began with, as `Report.first`.

    Returns:
        None where there is no report, or one that knows of no pruning.

    Raises:
        PlanMismatch: It cannot be read, or its figures are not those that were written.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    found = read_object(path)
    check_own(found, path)
    if found.get("first") is not None or found.get("schema") != SCHEMA:
        return found.get("first")
    try:
        sizes = {key: found["dense"][key] for key in ("params", "macs")}
        return {"model": found["model"], **sizes, "macs_input": macs_input(found)}
    except (KeyError, TypeError) as error:
        raise PlanMismatch(f"expected the report of a run in {path}, found one without {error}.") from error


def whole_line(report: dict) -> str:
    """Of a model that was pruned before, in Markdown: by how much in all; "" where it was not."""
    first = report.get("first")  # reports of an older version have none
    if first is None:
        return ""
    before = f"{code(report['model'])} had been pruned before"
    if not all(isinstance(first.get(key), int) and first[key] > 0 for key in ("params", "macs")):
        return f"{before}; how much, its folder does not say."
    pruned = report["pruned"]
    left = f"{pruned['params'] / first['params']:.1%} of the {first['params']:,} parameters"
    if first.get("macs_input") == macs_input(report):
        left += f" and {pruned['macs'] / first['macs']:.1%} of the MACs"
    return f"{before}: in all, {left} of {code(str(first.get('model')))} are left."


def kept_names(report: dict) -> dict[str, str]:
    """What the tables call the kinds of `kept`."""
    found = {kind: kind for kind in report["kept"]}
    if report.get("directions"):  # reports of an older version have none
        kept, total = report["directions"]
        found["hidden"] = f"hidden ({kept} of {total} directions of the turned stream)"
    return found


def budget_line(budget: dict) -> str:
    """The cost that was reached and the one allowed, from a report's or a plan's budget."""
    if budget["cost"] == "latency":
        return (
            f"{budget['achieved']:,.2f} of at most {budget['limit']:,.2f} ms, by a measured table that is "
            f"{budget['error']:.1%} off on other widths"
        )
    spent = f"{budget['achieved']:,} of at most {budget['limit']:,}"
    return f"{spent} bytes: {budget['counts']}" if budget["cost"] == "memory" else f"{spent} {budget['cost']}"


def recovery_line(recovery: dict) -> str:
    """How a model recovered, where it was otherwise than by all weights to the last step; "" else."""
    parts = []
    if recovery.get("recovery") == "lora":
        adapters = f"adapters of rank {recovery['lora_rank']} ({recovery['trained_params']:,} parameters)"
        parts.append(f"{adapters} trained and were merged")
    if "best_step" in recovery:
        parts.append(
            f"the best of {recovery['steps']} steps was {recovery['best_step']}, by the loss on "
            f"{recovery['held_back']:,} training rows held back ({recovery['best_loss']:.4f})"
        )
    return f"recovery: {'; '.join(parts)}" if parts else ""


def rows(report: dict) -> list[tuple[str, str, str, str]]:
    """The closing table from a report's dict: (what, dense, pruned, pruned/dense)."""
    dense, pruned = report["dense"], report["pruned"]
    table = []

    def add(name: str, a: float, b: float, form: str) -> None:
        table.append((name, form.format(a), form.format(b), f"{b / a:.3f}" if a else "-"))

    def scaled(name: str, a: float, b: float, unit: str = "") -> None:
        size, prefix = (1e6, "M") if a >= 1e6 else (1e3, "k")  # a network of some thousand shows no 0.0 M
        add(name, a / size, b / size, f"{{:,.1f}} {prefix}{unit}")

    add("parameters", dense["params"], pruned["params"], "{:,}")
    blocks = dense["params_blocks"] > 0  # a traced model has none
    if blocks:
        add("  in blocks", dense["params_blocks"], pruned["params_blocks"], "{:,}")
    scaled(f"MACs ({macs_input(report)})", dense["macs"], pruned["macs"])
    if blocks:
        scaled("  in blocks", dense["macs_blocks"], pruned["macs_blocks"])
    if dense.get("file_bytes"):  # a module's report has none
        scaled("file", dense["file_bytes"], pruned["file_bytes"], "B")
    if dense.get("memory_bytes"):  # reports of an older version have none
        scaled("memory (weights and cache)", dense["memory_bytes"], pruned["memory_bytes"], "B")
    forms = {"rows": ("vocabulary", "{:,}"), "tokens_per_text": ("tokens per held-out text", "{:.2f}")}
    forms["unknown"] = ("unknown tokens", "{:.3%}")
    for key, (name, form) in forms.items() if report["vocabulary"] else ():
        add(name, *report["vocabulary"][key], form)
    shape = report["latency_input"]
    latency = [
        f"{side['latency_ms']['median']:.1f} ± {side['latency_ms']['iqr'] / 2:.1f} ms" for side in (dense, pruned)
    ]
    ratio = pruned["latency_ms"]["median"] / dense["latency_ms"]["median"]
    table.append((f"latency ({' x '.join(str(size) for size in shape.values())})", *latency, f"{ratio:.3f}"))
    inside = [side["latency_ms"]["layers"] for side in (dense, pruned)]
    add("  in linear layers and convolutions", *inside, "{:.1f} ms")
    add("  elsewhere", *(s["latency_ms"]["median"] - i for s, i in zip((dense, pruned), inside)), "{:.1f} ms")
    for name in dense["metrics"]:
        add(name, dense["metrics"][name], pruned["metrics"][name], "{:.4f}")
    return table
