"""A hook of mkdocs: pages of the site that do not lie in docs/, and links as the site needs them.

    mkdocs build --strict

The README is the first page. What pages link to beside docs/ is part of the site. In the repository every link is
written as GitHub reads it, from the file that holds it; here it becomes the path between the two pages.
"""

import argparse
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ibprune import flags

ROOT = Path(__file__).parents[1]
BESIDE = (
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "benchmarks/**/*",
    "model_cards/**/*",
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


class Examples(griffe.Extension):
    """Docstrings here say "Example:", which griffe takes for prose: it knows "Examples:" as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return moved(markdown, page.file.src_uri)


def moved(markdown: str, page: str) -> str:
    """The text of a page, its links between files of the repository turned into those between pages of the site."""
    here = "README.md" if page == "index.md" else page if (ROOT / page).exists() else f"docs/{page}"

    def link(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        if not (ROOT / target).exists():
            return match[0]
        there = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return "](" + posixpath.relpath(there, posixpath.dirname(page) or ".")

    return LINK.sub(link, markdown)


def commands() -> str:
    """The page of all verbs and flags, from their parsers."""
    lines = [
        "# Commands",
        "",
        "What `ibprune VERB --help` says. Flags of `prune`, the default verb, are keys of a recipe too.",
        "",
    ]
    made = [make() for name, make in vars(flags).items() if name.endswith("_parser")]
    parsers = {parser.prog.removeprefix("ibprune").strip() or "prune": parser for parser in made}
    for verb, purpose in flags.VERBS.items():
        lines += [f"## `ibprune {verb}`", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
        lines += ["| flag or argument | |", "|---|---|"]
        for action in parsers[verb]._actions:
            if not isinstance(action, argparse._HelpAction):
                lines.append(f"| {called(action)} | {(action.help or '').replace('%%', '%')} |")
        lines.append("")
    return "\n".join(lines)


def called(action: argparse.Action) -> str:
    """How a flag or an argument is written on the command line."""
    if not action.option_strings:
        return f"`{action.dest.upper()}`"
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return f"`{action.option_strings[-1]}{value}`"
