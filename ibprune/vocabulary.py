"""Which rows of a vocabulary the data need, and the same tokenizer with fewer of them."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ibprune.errors import BadData, PlanMismatch, UnsupportedModel, first_line

MODELS = ("WordPiece", "BPE", "Unigram")
SPACE = "▁"  # what SentencePiece writes for a space
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class RankedRows:
    """The rows of a token embedding in the order in which they stay.

    Attributes:
        scores: The largest stays longest, all distinct, float64, (n_rows,).
        n_needed: So many, those with the largest scores, stay in any case.
    """

    scores: torch.Tensor
    n_needed: int


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UnsupportedModel` unless the tokenizer can be rewritten."""
    _read(tokenizer)


def rank_rows(tokenizer: PreTrainedTokenizerBase, counts: torch.Tensor, *, named: Iterable[int] = ()) -> RankedRows:
    """Ranks the rows by how often the data use their tokens, what every text needs in front.

    A BPE token counts for its parts as well, because it is made by merging them: so any number of rows from
    the top is closed under merges, and each of its tokens can be reached. Rows without a token come last.

    Always needed: added (special) tokens, the unknown token, the rows that `named` lists, and what keeps unseen
    words apart from unknown ones: the 256 byte tokens where the tokenizer falls back to them, else every single
    character (with ## too, for WordPiece), and every piece with a character that has no row of its own.

    Args:
        counts: How often each token id occurs in the data, (n_rows,).
        named: Ids that the model's config names.

    Raises:
        UnsupportedModel: A tokenizer that cannot be rewritten.
        BadData: The tokenizer, or the config, has a token beyond the last row.

    Example:
        >>> rank_rows(tokenizer, torch.ones(30522)).n_needed  # doctest: +SKIP
        1999
    """
    state = _read(tokenizer)
    pieces = _pieces(state)
    needed = {token["id"] for token in state["added_tokens"]} | set(named) | _alphabet(state["model"], pieces)
    beyond = sorted(row for row in {*needed, *pieces.values()} if row >= len(counts))
    if beyond:
        raise BadData(
            f"expected a row of the embedding for every token, found {len(counts):,} rows and the token {beyond[0]}, "
            "which the tokenizer makes or the config names: they do not belong together."
        )
    used = {p: torch.inf if row in needed else float(counts[row]) for p, row in pieces.items()}
    if state["model"]["type"] == "BPE":
        parts = _merge_parts(state["model"])
        for piece in sorted(parts, key=len, reverse=True):  # a part is shorter than what it makes
            for part in parts[piece]:
                used[part] += used[piece]
    usage = torch.full((len(counts),), -1.0, dtype=torch.float64)
    lengths = torch.zeros(len(counts), dtype=torch.long)
    for piece, count in used.items():
        usage[pieces[piece]] = count
        lengths[pieces[piece]] = len(piece)
    usage[list(needed)] = torch.inf
    order = sorted(range(len(counts)), key=lambda row: (-usage[row].item(), lengths[row].item(), row))
    scores = torch.empty(len(counts), dtype=torch.float64)
    scores[order] = torch.arange(len(counts), 0, -1, dtype=torch.float64)
    return RankedRows(scores, int(usage.isinf().sum()))


def keep_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens of `rows` only; row i of the cut embedding is `rows[i]` of the whole one.

    Text whose tokens all stay is cut into the same tokens, under their new ids. Other words split further: WordPiece
    takes the longest piece that is left, BPE the merges whose parts and result are left, Unigram the best pieces left.

    Args:
        rows: Sorted ids, closed under merges, as the first of a `RankedRows` are.

    Raises:
        UnsupportedModel: A tokenizer that cannot be rewritten.
        PlanMismatch: An added token or the unknown token is not among the rows.
    """
    state = _read(tokenizer)
    new_id = {row: i for i, row in enumerate(rows)}
    model = state["model"]
    gone = [token["content"] for token in state["added_tokens"] if token["id"] not in new_id]
    unknown = _unknown(model)
    if unknown is not None and _pieces(state).get(unknown) not in new_id:
        gone.append(unknown)
    if gone:
        raise PlanMismatch(f"expected the row of the token '{gone[0]}' to stay, found it cut: it is always needed.")
    stay = {piece: new_id[row] for piece, row in _pieces(state).items() if row in new_id}
    if model["type"] == "Unigram":
        scores = dict(map(tuple, model["vocab"]))
        model["vocab"] = [[piece, scores[piece]] for piece in sorted(stay, key=stay.__getitem__)]
        model["unk_id"] = None if unknown is None else stay[unknown]
    else:
        model["vocab"] = stay
    if model["type"] == "BPE":
        model["merges"] = [(a, b) for a, b in _merges(model) if a in stay and b in stay and a + b in stay]
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber_(state["post_processor"], new_id)
    if state["padding"] is not None:
        state["padding"]["pad_id"] = new_id[state["padding"]["pad_id"]]
    found = _reloaded(tokenizer, state)
    expected = {token: new_id[row] for token, row in tokenizer.get_vocab().items() if row in new_id}
    if found.get_vocab() != expected:
        raise UnsupportedModel(
            f"expected {len(expected):,} tokens under new ids in the rewritten {type(tokenizer).__name__}, found "
            "others: leave 'vocab' out of the kinds."
        )
    return found


def compare_tokenizers(
    dense: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, list[float]]:
    """What fewer rows mean for texts: "rows", "tokens_per_text" and "unknown", each [dense, pruned].

    `unknown` is the share of tokens that say only that something was there. Tokens that mark where texts begin and
    end are left out.
    """
    found: dict[str, list[float]] = {"rows": [], "tokens_per_text": [], "unknown": []}
    for tokenizer in (dense, pruned):
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        total = sum(map(len, rows))
        found["rows"].append(len(tokenizer))
        unknown = sum(row.count(tokenizer.unk_token_id) for row in rows)
        found["tokens_per_text"].append(round(total / max(len(texts), 1), 3))
        found["unknown"].append(round(unknown / max(total, 1), 6))
    return found


def _read(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The whole tokenizer as the `tokenizers` library writes it; only what can be rewritten passes."""
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"expected a fast tokenizer (a tokenizer.json) to cut the vocabulary, found the slow {name}: convert it, "
            "or leave 'vocab' out of the kinds."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] not in MODELS:
        raise UnsupportedModel(
            f"expected a {', '.join(MODELS[:-1])} or {MODELS[-1]} tokenizer to cut the vocabulary, found "
            f"{model['type']}, whose words cannot be split further: leave 'vocab' out of the kinds."
        )
    if model["type"] == "BPE" and (model["continuing_subword_prefix"] or model["end_of_word_suffix"]):
        raise UnsupportedModel(
            f"expected a BPE tokenizer without prefixes and suffixes inside words, found a {name} with them: "
            "leave 'vocab' out of the kinds."
        )
    return state


def _pieces(state: dict) -> dict[str, int]:
    """The ids of the pieces that words are made of; tokens that were only added have none."""
    vocab = state["model"]["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def _unknown(model: dict) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model["unk_token"]


def _alphabet(model: dict, pieces: dict[str, int]) -> set[int]:
    """Rows without which some word that is known could become unknown."""
    needed = {pieces[piece] for piece in (SPACE, _unknown(model)) if piece in pieces}
    if model.get("byte_fallback") and BYTES <= set(pieces):
        return needed | {pieces[piece] for piece in BYTES}
    inside = model["continuing_subword_prefix"] if model["type"] == "WordPiece" else ""
    for piece, row in pieces.items():
        start = len(inside) if inside and piece.startswith(inside) and piece != inside else 0
        word = piece[start:]
        own = [character if i + start == 0 else inside + character for i, character in enumerate(word)]
        bare = any(character not in pieces for character in own)
        if len(word) == 1 or (bare and model["type"] != "BPE"):  # BPE starts from characters in any case
            needed.add(row)
    return needed


def _merges(model: dict) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


def _merge_parts(model: dict) -> dict[str, tuple[str, str]]:
    """The two parts that each token is made of: the last merge when its own text is tokenised.

    Inside any text a token is made by the same merges, because none of them crosses its borders.
    """
    rank = {pair: i for i, pair in enumerate(_merges(model))}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for pair in rank:
        pairs.setdefault(pair[0] + pair[1], []).append(pair)
    never = len(rank)
    parts = {}
    for token, ways in pairs.items():
        if len(ways) == 1:
            parts[token] = ways[0]
            continue
        symbols = list(token)
        while len(symbols) > 2:
            best = min(range(len(symbols) - 1), key=lambda i: (rank.get((symbols[i], symbols[i + 1]), never), i))
            if (symbols[best], symbols[best + 1]) not in rank:
                break
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        if tuple(symbols) in rank:
            parts[token] = tuple(symbols)
    return parts


def _renumber_(processor: dict | None, new_id: dict[int, int]) -> None:
    """Gives the special tokens that a post-processor adds their new ids."""
    match processor:
        case {"type": "Sequence", "processors": steps}:
            for step in steps:
                _renumber_(step, new_id)
        case {"type": "TemplateProcessing", "special_tokens": tokens}:
            for token in tokens.values():
                token["ids"] = [new_id[row] for row in token["ids"]]
        case {"type": "BertProcessing" | "RobertaProcessing"}:
            for key in ("cls", "sep"):
                token, row = processor[key]
                processor[key] = [token, new_id[row]]


def _reloaded(tokenizer: PreTrainedTokenizerBase, state: dict) -> PreTrainedTokenizerBase:
    """The tokenizer with another state, by way of a folder: what a reader of the export will get."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        try:
            return type(tokenizer).from_pretrained(folder)
        except Exception as error:  # the library raises bare exceptions for a state it refuses
            raise UnsupportedModel(
                f"the rewritten {type(tokenizer).__name__} does not load ({first_line(error)}): leave 'vocab' out of "
                "the kinds."
            ) from error
