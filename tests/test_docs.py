"""README and docs: the site builds, links lead somewhere, commands parse, Python blocks run, nothing is missing."""

import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import TINY
from test_layers import PACKAGE

import ibprune
from ibprune import cli, feeding, flags, module_files, recipe_files
from ibprune.recipe import make_recipe

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "SECURITY"))]
RECORDS = {"results.md", "reliability.md", "walkthrough.md"}  # they name flags of scripts, too
PARSERS = {
    parser.prog.removeprefix("ibprune").strip() or "prune": parser
    for parser in (make() for name, make in vars(flags).items() if name.endswith("_parser"))
}
AUDITED = ROOT / "model_cards" / "minilm-0.3"
UNREAD = ("recipe", "num_processes", "estimate", "sensitivity", "latency_table", "flops_per_second", "utilisation",
          "debug", "quiet", "json")  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The words of each `ibprune …` in the blocks of a page, without the name."""
    found = []
    for line in "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if part.split()[:1] in (["ibprune"], ["torchrun"]):
                words = shlex.split(re.split(" [|>] ", part)[0], comments=True)
                found.append(words[words.index("ibprune") + 1 :])
    return found


def read(words: list[str]) -> None:
    """Parses a command as `cli.main` would, up to the recipe that it makes."""
    given = [word for word in words if word != "…"]
    verb = given.pop(0) if not given[0].startswith("-") else "prune"
    arguments = PARSERS[verb].parse_args(given)
    if verb not in ("prune", "plan") or "…" in words:
        return
    file = arguments.recipe
    known = file in recipe_files.shipped()
    others = {"model": "a", "budget": 0.5} if (file and not known) or verb == "plan" else {}
    make_recipe(others | cli._recipe_values(arguments, without=UNREAD), file=file if known else None)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_parses(path):
    for words in commands(path):
        try:
            read(words)
        except ValueError as error:
            pytest.fail(f"ibprune {shlex.join(words)}: {error}")
    told = [] if path.name in RECORDS else re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text())
    mentioned = {flag for code in told for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code)}
    assert mentioned <= {option for parser in PARSERS.values() for option in parser._option_string_actions}


def test_commands_are_found_and_wrong_ones_refused():
    assert sum(len(commands(path)) for path in PAGES) >= 60 and ["doctor"] in commands(ROOT / "README.md")
    for words in ("--model a --budget 2", "plan --modle a", "prune it", "--recipe smoke --score fischer"):
        with pytest.raises(ValueError):
            read(shlex.split(words))


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_every_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_what_is_public_is_on_the_page_of_the_api_and_every_page_in_the_navigation():
    named = re.findall(r"^::: ibprune\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(name for name in named if name in ibprune.__all__) == sorted(ibprune.__all__)
    pages = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2], re.MULTILINE)
    assert {path.relative_to(ROOT / "docs").as_posix() for path in DOCS} <= set(pages)


def test_every_paper_that_is_cited_is_one_that_the_code_names():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert found["version"] == ibprune.__version__ and len(found["references"]) > 20
    for paper in found["references"]:
        named = paper["url"].removeprefix("https://arxiv.org/abs/"), f"{paper['authors'][0]['family-names']} et al."
        assert paper["title"] and paper["year"] and any(name in code for name in named), paper["title"]


def test_the_tree_has_every_module():
    tree = (ROOT / "ARCHITECTURE.md").read_text().partition("## The tree")[2].partition("\n## ")[0]
    here = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"\w+\.py", tree)) == here


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))  # raises at a warning
    api, verbs = ((tmp_path / page / "index.html").read_text() for page in ("api", "commands"))
    assert all(f'id="ibprune.{name}"' in api for name in ibprune.__all__) and "&gt;&gt;&gt;" in api
    assert all(f'id="ibprune-{verb}"' in verbs for verb in flags.VERBS)
    assert 'href="units/"' in (tmp_path / "index.html").read_text()  # the README's link to docs/units.md
    assert 'href="../benchmarks/mi_40_tasks.json"' in (tmp_path / "results" / "index.html").read_text()
    assert (tmp_path / "benchmarks" / "mi_40_tasks.json").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny model where the pages have MiniLM, and what README's Python makes of it in a few steps."""
    root = tmp_path_factory.mktemp("docs")
    transformers.BertModel(TINY["bert"]()).save_pretrained(root / "minilm")
    tokenizer.save_pretrained(root / "minilm")
    short = replace(feeding.DEFAULTS["encoder"], mask_steps=2, recover_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setitem(feeding.DEFAULTS, "encoder", short)
        patch.setattr(feeding, "load_prose", partial(feeding.load_prose, limit=600))
        run(ROOT / "README.md")
    return root


def run(path: Path) -> dict:
    """Runs the Python blocks of a page one after the other, as a reader would."""
    names: dict = {"__name__": "__main__"}
    for block in blocks(path, "python"):
        exec(compile(block, f"{name_of(path)}: {block.splitlines()[0]}", "exec"), names)
    return names


def test_the_blocks_of_the_readme_have_run(folder):
    assert ibprune.load(folder / "small").config.model_type == "bert"
    assert {"report.json", "report.html", "recipe.yaml"} <= {path.name for path in (folder / "small").iterdir()}


@pytest.mark.parametrize("path", [path for path in DOCS if blocks(path, "python")], ids=name_of)
def test_the_blocks_of_the_pages_run(path, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").symlink_to(folder / "minilm")
    (tmp_path / "me").mkdir()
    for name in ("me/minilm-small", *(() if path.name == "cnn.md" else ("small",))):
        (tmp_path / name).symlink_to(AUDITED if path.name == "audit.md" else folder / "small")
    # its exporter takes longer than all the rest, and has tests of its own
    monkeypatch.setattr(module_files, "write_onnx", lambda *given, **named: None)
    names = run(path)
    assert len(names) > 2
    if path.name == "cnn.md":
        assert (tmp_path / "small" / "model.safetensors").exists()
        assert names["found"]["layers"] and names["result"].report["budget"]["achieved"] > 0
