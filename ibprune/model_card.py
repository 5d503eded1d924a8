"""The README.md of an exported folder, from the report alone."""

from ibprune.report import macs_input, rows

LOADING = {
    "vanilla": "It loads with plain transformers, no extra code:\n\n```python\nfrom transformers import {auto}\n\n"
    'model = {auto}.from_pretrained("{folder}")\n```',
    "remote_code": "Its layers differ in width, which transformers expresses through the small file "
    "`modeling_ibprune.py` in this folder (read it first):\n\n```python\nfrom transformers import {auto}\n\n"
    'model = {auto}.from_pretrained("{folder}", trust_remote_code=True)\n```\n\nWithout remote code, through '
    'ibprune:\n\n```python\nimport ibprune\n\nmodel = ibprune.load("{folder}")\n```',
}


def model_card(report: dict, *, auto_class: str, folder: str) -> str:
    """The card: what it is, how to load it, what was measured."""
    budget = report["budget"]
    table = ["| | dense | pruned | ratio |", "|---|---|---|---|"]
    table += [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows(report)]
    kept = ["| kind | kept |", "|---|---|"] + [f"| {kind} | {share:.1%} |" for kind, share in report["kept"].items()]
    where = "the whole model" if budget["scope"] == "model" else "the blocks"
    base = f"base_model: {report['model']}\nbase_model_relation: finetune\n" if _is_hub_id(report["model"]) else ""
    task = "pipeline_tag: image-classification\n" if report["pictures"] else ""
    return "\n".join(
        [
            "---",
            f"{base}library_name: transformers\n{task}tags:\n- ibprune\n- pruned",
            "---",
            "",
            f"# {report['model'].rstrip('/').split('/')[-1]}, pruned to {budget['keep']:.0%} of its {budget['cost']}",
            "",
            f"Made by ibprune from `{report['model']}` on the data `{report['data']}` (score `{report['score']}`, "
            f"seed {report['seed']}). The budget counts {where}: {budget['achieved']:,} of at most {budget['limit']:,} "
            f"{budget['cost']}.",
            "",
            LOADING[report["verify"]["tier"]].format(auto=auto_class, folder=folder),
            "",
            "## Measured",
            "",
            *table,
            "",
            f"Metrics are on held-out data; latency is the median of interleaved runs on {report['device']}, "
            "in float32. A MAC is one multiply-accumulate (two FLOPs).",
            "",
            "## What stayed",
            "",
            *kept,
            "",
            *_pictures(report, folder),
            "`plan.json` lists every unit that stayed, `recipe.yaml` repeats the run "
            "(`ibprune --recipe recipe.yaml`), `report.json` holds all figures.",
            "",
        ]
    )


def _pictures(report: dict, folder: str) -> list[str]:
    """What a model reads of pictures, and what could not be cut of it; nothing where it reads text."""
    if report["pictures"] is None:
        return []
    refused = len(report["refused"])
    note = f" The channels of {refused} layer(s) cannot be cut exactly; `report.json` says why." if refused else ""
    return [
        f"It reads pictures of {macs_input(report)} (channels, height, width), as "
        f'`AutoImageProcessor.from_pretrained("{folder}")` makes them; mean and deviation are those of '
        f"{report['pictures']['normalised_by']}.{note}",
        "",
    ]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
