"""Imports go one way: a file imports only from layers above it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ibprune"
LAYERS = (
    ("mi.samples",),
    ("mi.channel", "mi.entropies", "mi.gaussian", "mi.neighbours", "mi.probes", "mi.spectral", "mi.historic"),
    ("mi.codes", "mi.extrapolation"),
    ("mi.density_ratio", "mi.tasks", "mi.twins", "mi.weighted"),
    ("mi.critics",),
    ("mi.benchmark",),
    ("mi",),
    ("errors", "names", "statuses", "rebuild", "console", "verdict", "json_files", "limits"),
    ("task_heads", "hub"),
    (
        "groups",
        "metrics",
        "examples",
        "vocabulary",
        "annotations",
        "checksums",
        "thinning",
        "processes",
        "engine",
        "reading",
        "recipe_files",
        "claims",
        "markdown",
    ),
    ("families.parts",),
    ("families.encoders", "families.distilbert", "families.modernbert", "families.mpnet"),
    ("families.albert", "families.deberta", "families.bart", "families.t5"),
    ("families.decoders", "families.gpt", "families.vision"),
    ("families.moe",),
    ("families",),
    ("sites", "masks", "tracing", "locking", "optimizers"),
    ("plans", "inject", "costs", "losses", "numbering", "remote_code"),
    ("ties",),
    ("slicing", "budget", "stages", "timing", "lora"),
    ("embeddings", "latency", "memory", "rotation", "taps", "distillation", "decisions"),
    ("surgery",),
    ("recipe", "data", "report", "channels", "saves", "pruned_config"),
    ("collating", "prose", "images", "structure", "resuming", "streaming", "quantised", "contrast", "doctor"),
    ("denoising",),
    ("scores", "second_order", "activations", "refit", "shares", "models"),
    ("feeding", "pairs", "labels", "footprint", "overlaps", "gguf_vocab", "shards"),
    ("trainer", "evaluation", "folders", "loading", "features", "inputs"),
    ("onnx_files", "gguf_files", "walls"),
    ("vib", "choosing", "verify", "vanilla", "checks", "measures", "attention", "openvino_files"),
    ("dry_steps", "plots", "candidates"),
    ("auditing", "audit_output", "head_patterns", "rates"),
    ("cutting", "model_card", "skeletons", "drawing"),
    ("sizing", "curves"),
    ("report_page",),
    ("estimating",),
    ("subject", "hub_folders", "module_files"),
    ("training",),
    ("planning", "sensing", "pipeline", "module_pipeline", "comparing", "benchmarking", "legacy", "exporting"),
    ("ladder", "masked_folder"),
    ("masked_training",),
    ("callback",),
    ("smallest",),
    ("api",),
    ("tables", "flags", "launching"),
    ("completion",),
    ("", "cli"),
    ("__main__",),
)
PLACE = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".") or ""


def test_imports_go_one_way():
    files = list(PACKAGE.rglob("*.py"))
    assert {name_of(f) if f.name != "__main__.py" else "__main__" for f in files} == set(PLACE)
    for file in files:
        here = "__main__" if file.name == "__main__.py" else name_of(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ibprune"):
                continue
            module = node.module.removeprefix("ibprune").lstrip(".")
            targets = [module] if module else [a.name for a in node.names if a.name in PLACE]
            for target in targets:
                if here in ("", "cli"):
                    continue
                assert PLACE[target] < PLACE[here], f"{here} imports {target}, which does not lie above it"


def test_only_their_owners_do_it():
    """Optimisers step where they train or are tried, models are written in folders.py, nothing prints or pickles."""
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert (".step()" in text) <= (file.name in ("trainer.py", "optimizers.py") or file.parent.name == "mi"), file
        assert ("save_torch_state_dict" in text) <= (file.name == "folders.py"), file
        assert "pickle" not in text, file
        assert text.count("torch.load(") == (file.name == "legacy.py") == text.count(", weights_only=True)"), file


def test_every_test_asserts_something():
    """Itself, or through a function of its file that does."""

    def asserts(node: ast.AST, helpers: set[str]) -> bool:
        return any(
            isinstance(inner, ast.Assert)
            or (isinstance(inner, ast.Attribute) and inner.attr == "raises")
            or (isinstance(inner, ast.Name) and inner.id in helpers)
            for inner in ast.walk(node)
        )

    tests = Path(__file__).parent
    for file in tests.glob("test_*.py"):
        found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        helpers = {node.name for node in found if not node.name.startswith("test_") and asserts(node, set())}
        silent = [node.name for node in found if node.name.startswith("test_") and not asserts(node, helpers)]
        assert not silent, f"{file.name}: {silent}"


def test_files_are_small_and_say_what_they_are():
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 500, file
        assert ast.get_docstring(ast.parse(file.read_text())), file
