"""The recipe: everything that decides a run, as one strict record read from YAML and flags."""

import math
import os
import shlex
from collections.abc import Container, Sequence
from pathlib import Path
from reprlib import repr  # of a value that refers to itself a hundred times, as YAML's may, the whole fills the memory
from types import NoneType, UnionType
from typing import Literal, NamedTuple, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ibprune.errors import BadRecipe, did_you_mean, first_line
from ibprune.losses import LAYERED
from ibprune.names import KINDS
from ibprune.recipe_files import find

CNN_KINDS = ("channels",)
AUGMENTATIONS = ("flip", "crop")
BUFFER = 4096  # windows of 256 tokens take 40 MB
# Where a result goes and how it is got there, not what it is.
HUB = {"push_to_hub", "private", "revision", "commit_message"}
WHERE = HUB | {"output", "log_with", "resume", "save_every", "keep_last"}
Score = Literal["vib", "gradual", "fisher", "kwon", "obs", "taylor", "flap", "activation", "magnitude", "random"]
Start = Literal["fisher", "obs", "taylor", "flap", "activation", "magnitude", "random"]
UNSTARTED = "start is the ranking from which the masks of score vib start to learn: leave it out"
PATHS = ("model", "data", "latency_table", "output")
UNFIT = "reconstruct refits weights that stayed as they were: vib and gradual train the weights around their cuts"
UNTAUGHT = "divergence says how outputs are distilled, and distill none that they are not"


class Goal(NamedTuple):
    """What `at_least` asks of a metric: a value, or a share of the dense model's."""

    metric: str
    value: float
    relative: bool


def parse_goal(text: str) -> Goal:
    """Reads METRIC=VALUE, the value a number or a percentage.

    Raises:
        ValueError: Anything else.

    Example:
        >>> parse_goal("accuracy=99%")
        Goal(metric='accuracy', value=0.99, relative=True)
    """
    metric, _, value = (part.strip() for part in text.partition("="))
    relative = value.endswith("%")
    try:
        number = float(value.removesuffix("%")) / (100 if relative else 1)
    except ValueError:
        number = math.nan
    if not metric or not math.isfinite(number) or (relative and number <= 0):
        raise ValueError(f"expected METRIC=VALUE, such as accuracy=0.88 or accuracy=99%, found '{text}'")
    return Goal(metric, number, relative)


def parse_shares(value: object) -> tuple[float, ...]:
    """Reads one share in (0, 1] or several: a number, a list, or text such as 0.5,0.3 or 0.1..0.9 (steps of 0.1).

    Returns:
        They, the largest first, each once.

    Raises:
        ValueError: Anything else, or shares that look the same in six digits: folders and phases bear them as names.

    Example:
        >>> parse_shares("0.5,0.3"), parse_shares("0.2..0.4,0.9")
        ((0.5, 0.3), (0.9, 0.4, 0.3, 0.2))
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        if any(isinstance(part, bool) for part in parts):
            raise TypeError
        shares = tuple(sorted({share for part in parts for share in _steps(part)}, reverse=True))
    except (TypeError, ValueError, OverflowError):
        expected = "a share in (0, 1], such as 0.3, or several, such as 0.5,0.3 or 0.1..0.9"
        raise ValueError(f"expected {expected}, found {repr(value)}") from None
    for share in shares or (0.0,):
        if not 0 < share <= 1:
            raise ValueError(f"expected a share in (0, 1], found {share:g}")
    if len({f"{share:g}" for share in shares}) < len(shares):
        raise ValueError(f"expected shares that differ in their first six digits, found {repr(value)}")
    return shares


def _steps(part: object) -> list[float]:
    """A number, or those from one end of FIRST..LAST to the other, both ends among them."""
    low, dots, high = part.partition("..") if isinstance(part, str) else (part, "", part)
    if not dots:
        return [float(low)]
    low, high = sorted((float(low), float(high)))
    if not (0 < low and high <= 1):
        return [low, high]  # the one that lies outside is named
    steps = round((high - low) / 0.1)
    if abs(low + 0.1 * steps - high) > 1e-9:
        raise ValueError
    return [round(low + 0.1 * step, 9) for step in range(steps + 1)]


class Recipe(BaseModel):
    """One field per idea; the YAML key, the flag and the argument of `ibprune.prune` are the same word.

    Fields whose default is None are decided by the model's objective (see `feeding.DEFAULTS`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(description="Hub id, folder or alias of the dense model")
    budget: float | tuple[float, ...] | None = Field(
        None, description="share of the dense cost to keep, in (0, 1], or several, the largest first"
    )
    at_least: str | None = Field(None, description="the smallest model that keeps a metric: accuracy=0.88 or =99%")
    cost: Literal["params", "macs", "memory", "latency"] = Field("params", description="what the budget counts")
    scope: Literal["model", "blocks"] = Field("model", description="blocks leaves embeddings and heads out")
    latency_table: str | None = Field(None, description="a latency.json measured before (cost latency)")
    task: str | None = Field(None, description="a GLUE task by name")
    data: str | None = Field(None, description="file, folder or Hub data set; default: prose on this machine")
    text_columns: tuple[str, ...] = Field((), description="columns with the text, if not the usual names")
    label_column: str = Field("", description="column with the label, if not the usual name")
    streaming: bool = Field(False, description="training rows are read as they are needed, and never held all at once")
    shuffle_buffer: int = Field(BUFFER, ge=1, description="rows of a stream from which the next is drawn")
    max_train_samples: int | None = Field(None, ge=1, description="rows to train on at most; of a stream the first")
    max_train_tokens: int | None = Field(None, ge=1, description="tokens to train on at most (packing)")
    max_eval_samples: int | None = Field(None, ge=1, description="rows to hold out and judge on at most")
    mode: Literal["full", "fast", "faster"] = Field(
        "full", description="fast trains on 3 % of the data; faster learns masks alone, on these"
    )
    score: Score = Field("vib", description="what ranks the units")
    start: Start | None = Field(None, description="the ranking that learned masks start from (score vib)")
    reconstruct: bool = Field(False, description="refit by least squares what reads the cut units")
    shares: Literal["probe", "cost", "equal"] = Field("probe", description="how the cut is shared between kinds")
    augment: tuple[str, ...] = Field(AUGMENTATIONS, description="what is done to training pictures: flip, crop or none")
    image_size: int | None = Field(None, ge=1, description="pixels of a side of the pictures that the model reads")
    kinds: tuple[str, ...] = Field((), description="kinds of units to cut; default: all the model has but vocab")
    rotate: bool = Field(False, description="cut directions of the residual stream instead of its features")
    round_to: int = Field(8, ge=1, description="wide axes become multiples of this")
    vanilla: bool = Field(False, description="cut only what plain transformers loads without code")
    output: str = Field("pruned", description="folder to write")
    seed: int = Field(0, ge=0, le=2**31 - 1)
    finetune_steps: int | None = Field(None, ge=0, description="steps to train the dense model's task head first")
    mask_steps: int | None = Field(None, ge=0, description="steps of scores vib and gradual")
    recover_steps: int | None = Field(None, ge=0, description="steps of recovery after the cut")
    probe_steps: int | None = Field(
        None, ge=0, description="steps of recovery before candidate cuts are compared (shares probe)"
    )
    recovery: Literal["full", "lora"] = Field(
        "full", description="what trains in the recovery: all weights, or adapters that they take up"
    )
    lora_rank: int | None = Field(None, ge=1, description="of the adapters; default: 16")
    lora_alpha: float | None = Field(None, gt=0, description="over the rank, their scale; default: twice the rank")
    eval_every: int | None = Field(
        None, ge=1, description="steps of recovery between two looks at training rows held back; the best weights stay"
    )
    patience: int | None = Field(None, ge=1, description="looks without a lower loss after which the recovery ends")
    batch_size: int = Field(32, ge=1, description="sequences per batch, divided among the processes")
    grad_accum: int = Field(1, ge=1, description="batches per step")
    gradient_checkpointing: bool = Field(False, description="blocks run again in the backward pass, for less memory")
    lr: float | None = Field(None, gt=0, description="peak learning rate of the weights; adapters take ten times that")
    schedule: Literal["linear", "cosine", "uba"] = Field("linear", description="how it falls; uba: budget-aware")
    optimizer: Literal["adamw", "adamw-8bit"] = Field("adamw", description="8bit: moments in a byte each")
    max_length: int | None = Field(None, ge=4, description="tokens per sequence")
    packing: bool = Field(False, description="texts are joined and cut into full windows (causal language models)")
    distill: Literal["logits", "hidden", "relations", "none"] = Field(
        "logits",
        description="what is learned from the dense model; hidden, relations: of its blocks, beside the logits",
    )
    divergence: Literal["forward", "reverse", "balanced"] = Field(
        "forward", description="how its distributions are compared: KL from it, to it, or both"
    )
    push_to_hub: str | None = Field(None, description="Hub repo that gets the folder, such as user/model")
    private: bool = Field(False, description="make that repo a private one")
    revision: str | None = Field(None, description="branch of that repo; default: main")
    commit_message: str | None = Field(None, description="of the commit there")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto")
    load_in_4bit: bool = Field(False, description="the dense model is held in 4 bits; full-precision weights are cut")
    load_in_8bit: bool = Field(False, description="the same in 8 bits")
    log_with: str | None = Field(None, description="tracker of Accelerate that draws the run, such as tensorboard")
    audit: bool = Field(True, description="audit the retained information")
    resume: bool = Field(False, description="go on with a run that was cut short")
    save_every: float = Field(10, gt=0, description="minutes between two saves of a run's state")
    keep_last: int = Field(2, ge=1, description="saves of a phase of training that are kept")

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value, info):
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if info.field_name in PATHS and isinstance(value, str):
            return os.path.expanduser(value)  # a shell leaves --output=~/out as it is, and YAML has no shell
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"expected a number or text, found {value}")
        return value

    @field_validator("distill", mode="before")  # runs before `_plain`
    @classmethod
    def _distill(cls, value):
        return {True: "logits", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value):
        if value is None:
            return None
        shares = parse_shares(value)
        return shares if len(shares) > 1 else shares[0]

    @field_validator("at_least")
    @classmethod
    def _at_least(cls, value: str | None) -> str | None:
        if value is not None:
            parse_goal(value)
        return value

    @field_validator("kinds", "text_columns", "augment", mode="before")
    @classmethod
    def _list(cls, value):
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("kinds")
    @classmethod
    def _kinds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            if kind not in KINDS + CNN_KINDS:
                raise ValueError(f"unknown kind '{kind}': {did_you_mean(kind, KINDS + CNN_KINDS)}")
        return value

    @field_validator("augment")
    @classmethod
    def _augment(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in (*AUGMENTATIONS, "none"):
                raise ValueError(f"found '{name}': {did_you_mean(name, (*AUGMENTATIONS, 'none'))}")
        return tuple(name for name in value if name != "none")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.budget is None and self.at_least is None:
            raise ValueError("expected --budget (recipe key 'budget'), found none")
        if isinstance(self.budget, tuple) and not self.at_least and self.push_to_hub:
            raise ValueError("--push-to-hub: a repo holds one model: push a folder of the several budgets afterwards")
        if self.rotate and self.kinds and "hidden" not in self.kinds:
            raise ValueError("--rotate turns the axes in which 'hidden' is cut: add it to --kinds, or leave it out")
        if "vocab" in self.kinds and (isinstance(self.budget, tuple) or self.at_least):
            raise ValueError("'vocab' is cut for one budget, tokenizer and all: give one --budget, or other --kinds")
        if "vocab" in self.kinds and self.distill in LAYERED:
            raise ValueError(f"--distill {self.distill} pairs tokens, which 'vocab' changes: use --distill logits")
        for name in ("private", "revision", "commit_message"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"expected --push-to-hub REPO beside --{name.replace('_', '-')}")
        return self

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.streaming and self.mode != "full":
            raise ValueError(
                f"--mode {self.mode} learns from a share of all rows, and nobody has counted a stream's: use "
                "--max-train-samples"
            )
        if self.streaming and self.eval_every:
            raise ValueError("--eval-every holds training rows back, and a stream's are not all known: leave it out")
        if self.shuffle_buffer != BUFFER and not self.streaming:
            raise ValueError("--shuffle-buffer is of a stream: other rows are shuffled all together: leave it out")
        if self.max_train_tokens and not self.packing:
            raise ValueError("expected --packing beside --max-train-tokens: other windows are of any length")
        return self

    @model_validator(mode="after")
    def _timed(self) -> Self:
        if self.latency_table and self.cost != "latency":
            raise ValueError(f"expected --cost latency beside --latency-table, found {self.cost}")
        if self.cost == "latency" and self.scope != "model":
            raise ValueError("--scope: a latency is that of the whole model: leave it out")
        return self

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if self.reconstruct and self.score in ("vib", "gradual") and self.mask_steps != 0 and self.mode != "faster":
            raise ValueError(UNFIT + " (vib leaves them in --mode faster)")
        if self.start and self.score != "vib":
            raise ValueError(UNSTARTED)
        if self.mode == "faster" and self.score == "gradual":
            raise ValueError("--mode: gradual trains the weights alone, which stay as they are in faster: use fast")
        if self.divergence != "forward" and self.distill == "none":
            raise ValueError(UNTAUGHT)
        if self.patience and not self.eval_every:
            raise ValueError("expected --eval-every STEPS beside --patience")
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) and self.recovery != "lora":
                raise ValueError(f"expected --recovery lora beside --{name.replace('_', '-')}, found {self.recovery}")
        for name in ("recovery", "eval_every"):
            if self.recover_steps == 0 and getattr(self, name) not in ("full", None):
                raise ValueError(f"--{name.replace('_', '-')} is of the recovery, which has no steps: leave it out")
        return self

    def save(self, path: Path) -> None:
        """Writes the recipe without what only the one run needed: its output folder is taken when it is repeated."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json", exclude=WHERE), sort_keys=False))

    def command(self) -> str:
        """The command line of the run, but for where its result goes."""
        words = ["ibprune"]
        for name, value in self.model_dump(exclude=WHERE, exclude_defaults=True).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", ",".join(map(str, value)) or "none" if isinstance(value, tuple) else f"{value}"]
        return shlex.join(words)


def parse_settings(lines: Sequence[str], *, flags: Container[str] = ()) -> dict:
    """Reads lines KEY=VALUE: keys of a recipe, and values as its YAML has them; a key that takes text takes any.

    Args:
        flags: Keys that are given otherwise.

    Raises:
        BadRecipe: Not that, an unknown key (with the nearest valid one), or one that is given twice.

    Example:
        >>> parse_settings(["kinds=[heads, ffn]", "batch-size=8", "lr=null", "at_least=accuracy=99%"])
        {'kinds': ['heads', 'ffn'], 'batch_size': 8, 'lr': None, 'at_least': 'accuracy=99%'}
    """
    found: dict = {}
    for line in lines:
        key, equals, text = (part.strip() for part in line.partition("="))
        key = key.replace("-", "_")
        if not key or not equals:
            raise BadRecipe(f"--set: expected KEY=VALUE, such as seed=1, found '{line}'.")
        if key not in Recipe.model_fields:
            raise BadRecipe(f"--set: unknown recipe key '{key}': {did_you_mean(key, Recipe.model_fields)}.")
        if key in found or key in flags:
            raise BadRecipe(f"--set: '{key}' is given twice: leave one of them out.")
        annotation = Recipe.model_fields[key].annotation
        types = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        try:
            value = yaml.safe_load(text)
        except Exception as error:  # as in `make_recipe`
            value = text
            if str not in types:
                raise BadRecipe(f"--set: could not read the value of '{key}', '{text}': {first_line(error)}") from error
        none = value is None and NoneType in types
        found[key] = text if str in types and not isinstance(value, str) and not none else value
    return found


def make_recipe(values: dict, *, file: str | Path | None = None) -> Recipe:
    """A recipe from a YAML file, `values` (flags) overriding it.

    Args:
        file: A path, or the name of a recipe that comes with ibprune (`ibprune.recipe_files`).

    Raises:
        BadRecipe: Unreadable, an unknown key (with the nearest valid one), or a value out of range.

    Example:
        >>> make_recipe({"model": "minilm", "budget": 0.3}).score
        'vib'
    """
    found: dict = {}
    if file is not None:
        if Path(file).name == str(file) and Path(file).suffix not in (".yaml", ".yml") and not Path(file).exists():
            file = find(str(file))
        try:
            loaded = yaml.safe_load(Path(file).read_text())
        except Exception as error:  # YAML's dates, numbers and depths fail in classes of their own
            raise BadRecipe(f"could not read the recipe '{file}': {first_line(error)}") from error
        if not isinstance(loaded, dict):
            raise BadRecipe(f"expected keys and values in the recipe '{file}', found {type(loaded).__name__}.")
        found = loaded
    try:
        return Recipe(**{str(key): value for key, value in (found | values).items()})
    except ValidationError as error:
        raise BadRecipe(_one_line(error)) from error
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise BadRecipe(f"expected text in UTF-8, found {repr(ascii(error.object))}: name it otherwise.") from error


def _one_line(error: ValidationError) -> str:
    # a misspelt key first: it is why its right name is missing
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"unknown recipe key '{key}': {did_you_mean(key, Recipe.model_fields)}."
    if first["type"] == "missing":
        return f"expected --{key.replace('_', '-')} (recipe key '{key}'), found none."
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{reason}."
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        found = first["input"] if isinstance(first["input"], str) else repr(first["input"])
        reason = f"found '{found}': {did_you_mean(found, expected)}"
    elif reason == first["msg"]:
        reason = f"{reason}, found {repr(first['input'])}"
    return f"--{key.replace('_', '-')}: {reason}."
