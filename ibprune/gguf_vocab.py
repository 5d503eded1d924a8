"""A BPE tokenizer as the keys of a GGUF file, by which llama.cpp splits texts alike."""

import json
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ibprune.errors import PlanMismatch, UnsupportedModel

# Token types of the format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
NEVER = -1e9  # the score of what no merge makes
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How a tokenizer of bytes splits a text before it merges: llama.cpp's name for it.
SPLITS = {"": "gpt-2", "digits": "smollm", _LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
CHECKED = (
    "Once upon a time there was a girl named Lily, who liked to sing.",
    "don't  do\nthat: 3.14, €5, naïve 北京 🙂",
)


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp is told of a tokenizer.

    Attributes:
        model: "llama" merges characters by the scores of what they make, "gpt2" bytes by `merges`.
        pre: llama.cpp's name for how texts are split first.
        tokens: By id, one for every row of the embedding.
        scores: By id; none for "gpt2".
        types: By id, such as `NORMAL`.
        merges: Pairs joined by a space; none for "llama".
        special: Ids by role ("bos").
        adds: What it adds to a text ("bos_token", "eos_token", "space_prefix").
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    adds: dict[str, bool]


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """A fast BPE tokenizer as llama.cpp's.

    Args:
        rows: Of the embedding; ids beyond the tokenizer's are marked unused.

    Raises:
        UnsupportedModel: Another kind of tokenizer, or a split of texts that is not among `SPLITS`.
        PlanMismatch: Merging as llama.cpp does gives other tokens, or the tokenizer has more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    if state["model"]["type"] != "BPE":
        raise UnsupportedModel(f"expected a BPE tokenizer for GGUF, found {state['model']['type']}.")
    if len(tokenizer) > rows:
        raise PlanMismatch(f"expected at most {rows} tokens, the rows of the embedding, found {len(tokenizer)}.")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"]]
    added = {token["id"]: token for token in state["added_tokens"]}
    ids = tokenizer.get_vocab()
    by_id = {number: token for token, number in ids.items()}
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(rows))
    types = tuple(_type(i, by_id, added, tokenizer.unk_token_id) for i in range(rows))
    adds = {f"{role}_token": _adds(tokenizer, role) for role in ("bos", "eos")}
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    special = {role: number for role, number in roles.items() if number is not None}
    parts = _parts(state)
    if any(part["type"] == "ByteLevel" for part in parts):
        joined = tuple(" ".join(pair) for pair in merges)
        return Vocabulary("gpt2", _split(parts), tokens, (), types, joined, special, adds)
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    scores = tuple(float(-rank[token]) if token in rank else NEVER for token in tokens)
    adds["space_prefix"] = _prefixes(parts)
    found = Vocabulary("llama", "default", tokens, scores, types, (), special, adds)
    for text in CHECKED:
        if merged(found, text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise PlanMismatch(f"expected llama.cpp's merging to give the tokenizer's tokens, found others: '{text}'.")
    return found


def merged(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids that llama.cpp makes of a text without special tokens, by a vocabulary of the model "llama".

    The neighbours whose union has the highest score are merged, the first of equals; what is no token falls to bytes.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    pieces = list(((" " if vocabulary.adds["space_prefix"] else "") + text).replace(" ", SPACE))
    while True:
        unions = [left + right for left, right in zip(pieces, pieces[1:])]
        known = [(vocabulary.scores[ids[union]], -i) for i, union in enumerate(unions) if union in ids]
        if not known:
            break
        at = -max(known)[1]
        pieces[at : at + 2] = [unions[at]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids.get(f"<0x{byte:02X}>", -1) for byte in piece.encode()]
    return found


def _type(number: int, by_id: dict[int, str], added: dict[int, dict], unknown: int | None) -> int:
    if number not in by_id:
        return UNUSED
    if number == unknown:
        return UNKNOWN
    if _BYTE.fullmatch(by_id[number]):
        return BYTE
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return NORMAL


def _adds(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Whether the tokenizer begins ("bos") or ends ("eos") every text with that token."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0 if role == "bos" else -1] == getattr(tokenizer, f"{role}_token_id")


def _parts(state: dict) -> list[dict]:
    """The normalizers and pre-tokenizers in order, sequences opened."""
    found: list[dict] = []
    for step in (state["normalizer"], state["pre_tokenizer"]):
        found += (step.get("normalizers") or step.get("pretokenizers") or [step]) if step else []
    return found


def _prefixes(parts: list[dict]) -> bool:
    """Whether a space goes before every text."""
    return any(
        (part["type"] == "Prepend" and part["prepend"] == SPACE)
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _split(parts: list[dict]) -> str:
    """llama.cpp's name for how texts are split before their bytes merge."""
    kinds = [part["type"] for part in parts if part["type"] not in ("NFC", "NFKC")]
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    spaced = any(part.get("add_prefix_space") for part in parts)
    key = {("ByteLevel",): "", ("Digits", "ByteLevel"): "digits", ("Split", "ByteLevel"): (patterns or [""])[0] or None}
    found = SPLITS.get(key.get(tuple(kinds)))
    if found is None or spaced:
        raise UnsupportedModel(
            f"expected texts to be split as one of {', '.join(SPLITS.values())} do, which llama.cpp knows, found "
            f"{', '.join(kinds)} {' '.join(patterns)}{' with a space before' if spaced else ''}."
        )
    return found
