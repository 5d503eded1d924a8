"""The README.md of an exported folder, from its report and audit alone, with the metadata that the Hub reads."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ibprune.audit_output import audit_section
from ibprune.checksums import CARD, REPORT
from ibprune.console import printable
from ibprune.markdown import block, code, plain, quoted
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.report import SCHEMA, budget_line, kept_names, macs_input, rows, whole_line
from ibprune.statuses import layer_status

NAME = re.compile(r'\.from_pretrained\(("(?:[^"\\]|\\.)+")')  # what a card calls its folder
TASKS = {  # by objective, as the Hub calls them
    "classification": "text-classification",
    "regression": "text-classification",
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    WRITES: "text2text-generation",
    TAGS: "token-classification",
    ANSWERS: "question-answering",
    "encoder": "feature-extraction",
}
LOADING = {
    "vanilla": "It loads with plain transformers, no extra code:\n\n```python\nfrom transformers import {auto}\n\n"
    "model = {auto}.from_pretrained({name})\n```",
    "remote_code": "Its layers differ in width, which transformers expresses through the small file "
    "`modeling_ibprune.py` beside the weights (read it first, and name a commit with `revision=`):\n\n```python\n"
    "from transformers import {auto}\n\nmodel = {auto}.from_pretrained({name}, trust_remote_code=True)\n```\n\n"
    "Without remote code, and with every file compared to its checksum, through ibprune:\n\n```python\n"
    "import ibprune\n\nmodel = ibprune.load({name})\n```",
}

MEASURED = "Metrics are on held-out data; latency"
REPEATED = "`recipe.yaml` holds the same with every default (`ibprune --recipe recipe.yaml`), `report.json`"


def model_card(report: dict, audit: dict | None, *, name: str) -> str:
    """The card: what it is, how to load it, what was measured and removed, what each layer kept, and the limits.

    Args:
        report: The dict of `report.json`.
        audit: The dict of `audit.json`, where there is one.
        name: What the model is loaded by: its folder or its Hub repo.

    Raises:
        ValueError: Metadata that huggingface_hub does not take.
    """
    budget = report["budget"]
    where = "the whole model" if budget["scope"] == "model" else "the blocks"
    base = report["model"].rstrip("/").split("/")[-1]
    names = kept_names(report)
    data = report["data"]
    source = f"{code(report['model'])} on the data {code(data)}" if data else code(report["model"])
    lines = [
        f"# {plain(base)}, pruned to {100 * budget['keep']:g}% of its {budget['cost']}",
        "",
        f"Made by ibprune from {source} (score `{report['score']}`, "
        f"seed {report['seed']}). The budget counts {where}: {budget_line(budget)}.",
        *((whole,) if (whole := whole_line(report)) else ()),
        "",
        "## How to load it",
        "",
        LOADING[report["verify"]["tier"]].format(auto=report["verify"]["auto_class"], name=quoted(name)),
        "",
        *_pictures(report, name),
        "## What was measured",
        "",
        "| | dense | pruned | ratio |",
        "|---|---|---|---|",
        *(f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows(report)),
        "",
        f"{MEASURED if data else 'Latency'} is the median of interleaved runs on {plain(report['device'])}, "
        "in float32. A MAC is one multiply-accumulate (two FLOPs).",
        "",
        "## What was removed",
        "",
        "| kind | kept | removed |",
        "|---|---|---|",
        *(f"| {plain(names[kind])} | {share:.1%} | {1 - share:.1%} |" for kind, share in report["kept"].items()),
        "",
        "`plan.json` lists the units that stayed; what it lists inside a removed sub-layer went with it."
        + (
            " Its `hidden` units are directions, which the dense model does not have."
            if report.get("directions")
            else ""
        ),
        "",
        *_audit(report, audit),
        "## Limits",
        "",
        *(f"- {line}" for line in limits(report, audit)),
        "",
        "## How it was made",
        "",
        block(report["command"], "bash" if data else "python"),
        "",
        f"{REPEATED if data else '`report.json` holds'} all figures, "
        f"versions and checksums (ibprune {report['versions']['ibprune']}, torch {report['versions']['torch']}, "
        f"transformers {report['versions']['transformers']}).",
        "",
    ]
    return str(ModelCard(f"---\n{_metadata(report, name).to_yaml()}\n---\n\n" + "\n".join(lines)))


def renamed_card(folder: Path, name: str) -> str | None:
    """The folder's card under another name, or None where it is not, or no longer, the generated one."""
    try:
        card = (folder / CARD).read_text()
        report = json.loads((folder / REPORT).read_text())
        found = NAME.search(card)
        if found is None or report["schema"] != SCHEMA:
            return None
        audit = json.loads((folder / "audit.json").read_text()) if report["audit"] else None
        return (
            model_card(report, audit, name=name)
            if card == model_card(report, audit, name=json.loads(found[1]))
            else None
        )
    except Exception:  # noqa: BLE001 - no card, or a report or audit of another version, which may lack anything
        return None


def _metadata(report: dict, name: str) -> ModelCardData:
    """The YAML block: ids of the Hub only where the run took them from there."""
    base, data = report["hub"]["model"], report["hub"]["data"]
    task = "image-classification" if report["pictures"] else TASKS[report["objective"]]
    repo, _, config = (data or "").partition(":")
    results = [
        EvalResult(
            task_type=task, dataset_type=repo or printable(report["data"]), dataset_name=printable(report["data"]),
            dataset_config=config or None, metric_type=metric, metric_value=value,
        )
        for metric, value in report["pruned"]["metrics"].items()
        if math.isfinite(value)
    ]  # fmt: skip
    relation = {"base_model": base, "base_model_relation": "finetune"} if base else {}  # the Hub has no word for pruned
    return ModelCardData(
        **relation,
        datasets=[repo] if repo else None,
        eval_results=results or None,
        library_name="transformers",
        metrics=list(report["pruned"]["metrics"]) or None,
        model_name=printable(name).rstrip("/").split("/")[-1],
        pipeline_tag=task,
        tags=["ibprune", "pruned"],
    )


def _pictures(report: dict, name: str) -> list[str]:
    """What a model reads of pictures; nothing where it reads text."""
    if report["pictures"] is None:
        return []
    return [
        f"It reads pictures of {macs_input(report)} (channels, height, width), as "
        f"{code(f'AutoImageProcessor.from_pretrained({quoted(name)})')} makes them; mean and deviation are those of "
        f"{report['pictures']['normalised_by']}.",
        "",
    ]


def _audit(report: dict, audit: dict | None) -> list[str]:
    """The audit's table and its plots, or why there is none."""
    if audit is None:
        return ["## What each layer kept", "", f"Not audited: {plain(report['audit_note'])}", ""]
    plots = [file for file in sorted(report["sha256"]) if file.startswith("audit/") and file.endswith(".png")]
    return [audit_section(audit), *(f"![{_title(file)}]({file})" for file in plots), ""]


def _title(file: str) -> str:
    return Path(file).stem.replace("_", " ")


def limits(report: dict, audit: dict | None) -> Iterable[str]:
    """What must not be read into the figures of a transformer's run, in Markdown."""
    if report.get("unknown"):  # reports of an older version have none
        yield from map(plain, report["unknown"])  # a folder may come from anywhere
    else:
        yield (
            f"One run with seed {report['seed']}: another seed gives other figures. Nothing was tested but the metrics "
            f"above, on held-out rows of {code(report['data'])}; what was lost on other data is not known, and what is "
            "wrong with the dense model is not mended."
        )
    if report.get("chosen"):  # reports of an older version have none
        yield plain(report["chosen"]["note"])
    if report.get("overlap"):
        yield f"{report['overlap']:,} held-out rows occur in the training data too, which flatters the metrics."
    dense, pruned = (report[side]["latency_ms"]["median"] for side in ("dense", "pruned"))
    slower = pruned > 0.95 * dense and not report.get("quantised")
    gain = "No speed was gained there: the model is smaller only. " if slower else ""
    device = plain(report["device"])
    yield f"Latency holds for {device} at the size of input in the table. {gain}Other hardware was not tried."
    if report.get("quantised"):
        yield (
            f"The dense model was held in {report['quantised']} bits: its metrics and its latency are of that "
            "form, and so is what was learned from it. The weights are those of the full-precision checkpoint."
        )
    if report["refused"]:
        yield f"The channels of {len(report['refused'])} layer(s) cannot be cut exactly; `report.json` says why."
    if report["vocabulary"]:
        yield "Its tokenizer is not the dense model's: words whose tokens went are split further."
    if audit is not None:
        doubtful = [layer["name"] for layer in audit["layers"] if layer_status(layer) != "ok"]
        if doubtful:
            yield f"The audit does not vouch for the figures of {', '.join(map(plain, doubtful))}: see their status."
    if report["hub"]["model"]:
        yield f"The licence is that of {code(report['hub']['model'])}."
