"""Folders of pruned models on the Hub: sent there whole, fetched from there, checked against their sums."""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ibprune.checksums import CARD, REPORT, check_files, inside, sha256
from ibprune.errors import BadRecipe, IBPruneError
from ibprune.hub import at, hub_reachable, reason, repo_folder
from ibprune.model_card import renamed_card
from ibprune.models import FETCHED

NEEDED = (*FETCHED, "modeling_ibprune.py")  # the last is compared with its sum, and never run
OF_THE_HUB = ".gitattributes"


def fetch(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder itself, or what loading needs of a Hub repo, from the cache where the Hub is out of reach.

    Args:
        name: A folder, or a repo such as "user/model"; a folder of that name comes first.
        revision: Branch, tag or commit of the repo.

    Raises:
        BadRecipe: Neither a folder nor a repo that can be read.
    """
    if not isinstance(name, str | os.PathLike):
        raise BadRecipe(f"expected a folder or a Hub repo such as 'user/model', found a {type(name).__name__}.")
    folder = Path(name)
    if isinstance(name, os.PathLike) or os.path.exists(name) or not _is_repo_id(name):
        if revision is not None:
            raise BadRecipe(f"expected a Hub repo such as 'user/model' beside revision=, found the folder '{name}'.")
        return folder
    return repo_folder(name, NEEDED, revision=revision)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    overwrite: bool = False,
) -> str:
    """Sends an exported folder to a Hub repo, which is created if it is not there; returns the commit's URL.

    The folder is compared with its checksums first. The files appear in one commit (of very many files, in several);
    what had arrived when an upload was interrupted is not sent again. Hidden files stay here. A generated card names
    the repo there; one that was edited goes as it is.

    Args:
        repo: "user/model".
        private: Create a private repo; one that exists must be private.
        revision: A branch, created empty if it is not there; default: main.
        overwrite: Replace what the repo holds; without it, one that holds other files is refused.

    Raises:
        PlanMismatch: The folder differs from its checksums.
        BadRecipe: No such folder, a link that leads out of it, no token, no network, a repo that cannot be written or
            holds other files.
        IBPruneError: The upload was interrupted.

    Example:
        >>> push("pruned", "me/bert-small", private=True)  # doctest: +SKIP
    """
    folder = Path(folder)
    if not os.path.isfile(folder / REPORT):
        raise BadRecipe(f"expected an exported folder with a {REPORT}, found none in '{folder}'.{inside(folder)}")
    check_files(folder, needed=("*",))
    _check_links(folder)
    check_target(repo, private=private, revision=revision)
    api = HfApi()
    with _staged(folder, repo) as staged:
        with _one_line(f"could not open the repo '{repo}'"):
            api.create_repo(repo, private=private or None, exist_ok=True)
            _branch(api, repo, revision)
            there = _files(api, repo, revision)
        if not overwrite:
            _check_same(there, staged, repo, revision)
        here = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
        again = f"ibprune push {folder} {repo}" + (f" --revision {revision}" if revision else "")
        with _one_line(
            f"the upload to '{repo}' was interrupted, and what arrived stays there; the same command goes on "
            f"from it (`{again}{' --overwrite' if overwrite else ''}`)"
        ):
            commit = api.upload_folder(
                repo_id=repo, folder_path=staged, revision=revision,
                commit_message=commit_message or "Pruned with ibprune",
                delete_patterns=[glob.escape(name) for name in set(there) - here] or None,
            )  # fmt: skip
    return commit.commit_url


def check_target(repo: str, *, private: bool, revision: str | None, empty: bool = False) -> None:
    """What can be known of a push before anything is sent.

    Args:
        empty: Whether the branch must hold no files yet.

    Raises:
        BadRecipe: Not a repo id, no token or a wrong one, no network, or a repo that is public or not empty
            against what was asked.
    """
    if not _is_repo_id(repo):
        raise BadRecipe(f"expected a Hub repo such as 'user/model', found '{repo}'.")
    if constants.HF_HUB_OFFLINE:
        raise BadRecipe(f"expected to reach the Hub for '{repo}', found HF_HUB_OFFLINE set: unset it.")
    if get_token() is None:
        raise BadRecipe("expected a token of the Hub, found none: run `hf auth login` or set HF_TOKEN.")
    if not hub_reachable():
        raise BadRecipe(f"expected to reach the Hub at {constants.ENDPOINT} for '{repo}': check the network.")
    api = HfApi()
    with _one_line(f"could not ask the Hub about '{repo}'"):
        api.whoami()
        try:
            public = not api.model_info(repo).private
            there = _files(api, repo, revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return
    if private and public:
        raise BadRecipe(f"expected a private repo '{repo}', found a public one: change it on the Hub or name another.")
    if empty and there:
        raise BadRecipe(
            f"expected a new or empty repo '{repo}'{at(revision)}, found {_some(there)}: name another or a "
            "--revision, or replace it later with `ibprune push OUTPUT REPO --overwrite`."
        )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _branch(api: HfApi, repo: str, revision: str | None) -> None:
    """Makes the branch if it is not there, from the first commit, which holds nothing of main."""
    if revision in (None, constants.DEFAULT_REVISION):
        return
    try:
        api.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        first = api.list_repo_commits(repo)[-1].commit_id
        api.create_branch(repo, branch=revision, revision=first, exist_ok=True)


def _files(api: HfApi, repo: str, revision: str | None) -> dict[str, RepoFile]:
    """The files of a branch by path, but for the Hub's own."""
    found = [f for f in api.list_repo_tree(repo, recursive=True, revision=revision) if isinstance(f, RepoFile)]
    return {file.path: file for file in found if file.path != OF_THE_HUB}


def _check_same(there: dict[str, RepoFile], staged: Path, repo: str, revision: str | None) -> None:
    """Raises `BadRecipe` if the repo holds a file that is not the staged folder's: it is somebody's work."""
    other = []
    for name, file in there.items():
        path = staged / name
        same = path.is_file() and (
            sha256(path) == file.lfs.sha256 if file.lfs else git_hash(path.read_bytes()) == file.blob_id
        )
        other += [] if same else [name]
    if other:
        raise BadRecipe(
            f"expected a new or empty repo '{repo}'{at(revision)} or parts of this folder there, found "
            f"{_some(other)}: name another repo or a --revision, or replace what is there with --overwrite."
        )


def _check_links(folder: Path) -> None:
    """Raises `BadRecipe` for a link to what lies elsewhere: it would be sent, whoever put it there."""
    for path in folder.rglob("*"):
        if path.is_symlink() and folder.resolve() not in path.resolve().parents:
            raise BadRecipe(
                f"expected files of its own in '{folder}', found the link '{path.relative_to(folder)}', which leads "
                "out of it: put the file itself there."
            )


@contextmanager
def _staged(folder: Path, repo: str) -> Iterator[Path]:
    """A temporary folder of links to what is sent, with a card that names the repo."""
    card = renamed_card(folder, repo)
    with tempfile.TemporaryDirectory() as temporary:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if name.as_posix() == CARD and card is not None:
                (Path(temporary) / name).write_text(card)
            elif path.is_file() and not any(part.startswith(".") for part in name.parts):
                link = Path(temporary) / name
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(path.absolute(), link)
        yield Path(temporary)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns the client's errors into one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the client's error classes differ between releases of huggingface_hub
        raise IBPruneError(f"{what}: {reason(error)}") from error


def _some(names: object) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
