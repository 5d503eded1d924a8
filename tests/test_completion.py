"""Completion of the command line, asked of the shells themselves where they are there."""

import shutil
import subprocess
from pathlib import Path

import pytest

import ibprune
from ibprune import cli
from ibprune.completion import PARSERS, script
from ibprune.flags import VERBS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(script(shell))
    return folder


ASK = """
source "$0"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p ibprune | sed -E 's/.*-F ([^ ]+).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("words,expected", [
    ([""], set(VERBS)),
    (["pl"], {"plan"}),
    (["--sc"], {"--scope", "--score", "--schedule"}),
    (["--score", "f"], {"fisher", "flap"}),
    (["--budget", "0.3", "--cost", "m"], {"macs", "memory"}),
    (["--task", "ss"], {"sst2"}),
    (["plan", "--est"], {"--estimate"}),
    (["plan", "--resume"], {""}),  # a run's, not a plan's
    (["export", "small", "--to", "o"], {"onnx", "openvino"}),
    (["recipes", ""], {"list", "show", "copy", "schema"}),
    (["recipes", "copy", "smo"], {"smoke"}),
    (["completion", ""], {"bash", "zsh", "fish"}),
    (["mi-benchmark", "--x"], {"--xy"}),
    (["report", "zs"], {"zsh"}),  # a file of this folder
])  # fmt: skip
def test_bash_completes(scripts, words, expected):
    found = subprocess.run(
        ["bash", "--norc", "-c", ASK, str(scripts / "bash"), "ibprune", *words], cwd=scripts, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert set(found.stdout.splitlines()) == expected and not found.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(scripts):
    for words, expected in (("--score f", {"fisher", "flap"}), ("plan --est", {"--estimate"}), ("", set(VERBS))):
        ask = f"source {scripts / 'fish'}; complete -C 'ibprune {words}'"
        found = subprocess.run(["fish", "--no-config", "-c", ask], text=True, capture_output=True, check=True).stdout
        assert {line.partition("\t")[0] for line in found.splitlines()} == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_can_read_its_script(scripts):
    assert subprocess.run(["zsh", "-n", scripts / "zsh"], capture_output=True, check=True).stderr == b""


def test_every_verb_and_shell_is_completed(scripts, capsys):
    assert list(PARSERS) == list(VERBS)
    for shell in ("bash", "zsh", "fish"):
        text = (scripts / shell).read_text()
        assert all(verb in text for verb in VERBS) and "at-least" in text and "fisher" in text
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == (scripts / "zsh").read_text() + "\n"
    assert cli.main(["completion", "csh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


def test_only_its_own_command_needs_shtab():
    files = Path(ibprune.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "shtab" in file.read_text()] == ["completion.py"]
    lines = [line for line in Path(cli.__file__).read_text().splitlines() if "ibprune.completion" in line]
    assert lines == ["    from ibprune.completion import script"]  # in its function
