"""The recipes that come with ibprune: where they lie, what each is for, and a copy to start from."""

import shutil
from pathlib import Path

from ibprune.errors import BadRecipe, did_you_mean, first_line

_PLACES = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")  # installed; in a checkout


def shipped() -> dict[str, Path]:
    """The files by name.

    Example:
        >>> shipped()["smoke"].name
        'smoke.yaml'
    """
    place = next(place for place in _PLACES if place.is_dir())
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        BadRecipe: None has that name; the nearest is named.
    """
    files = shipped()
    if name not in files:
        raise BadRecipe(f"no recipe '{name}' comes with ibprune: {did_you_mean(name, files)}.")
    return files[name]


def purpose(path: Path) -> str:
    """The comment that a recipe begins with.

    Example:
        >>> purpose(find("smoke")).split(":")[0]
        'About a minute on two CPU cores'
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:first])


def copy_recipe(name: str, target: str | Path) -> Path:
    """A copy of a shipped recipe, in a folder under its own name or as the file that is named; returns its path.

    Raises:
        BadRecipe: No such recipe, or there is a file already, which stays as it is.
    """
    source, target = find(name), Path(target)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise BadRecipe(f"expected a new file, found '{target}': name another, or delete it.")
    if not target.parent.is_dir():
        raise BadRecipe(f"expected a folder '{target.parent}', found none: make it first.")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.rename(target)
    except OSError as error:
        raise BadRecipe(f"could not write '{target}': {first_line(error)}") from error
    return target
