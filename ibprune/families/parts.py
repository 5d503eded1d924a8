"""Groups that rows have in common, made from the paths in which they differ."""

from ibprune.groups import Cut, Group, MaskAt

# What reads a decoder's residual stream at its end.
DECODER_HEADS = (
    Cut("/lm_head", "in", optional=True),
    Cut("/score", "in", optional=True),
    Cut("/qa_outputs", "in", optional=True),
    Cut("/classifier", "in", optional=True),
)


def sublayer(name: str, cuts: tuple[Cut, ...], mask_at: MaskAt) -> Group:
    """A whole attention or FFN as one unit, which may go."""
    return Group(name, kind="layers", cuts=cuts, mask_at=mask_at, min_units=0)


def ffn(cuts: tuple[Cut, ...], mask_at: MaskAt) -> Group:
    """The inner units of a block's FFN."""
    return Group("ffn", kind="ffn", cuts=cuts, mask_at=mask_at)


def width(name: str, cuts: tuple[Cut, ...], mask_at: MaskAt) -> Group:
    """A feature width of the whole model: the residual stream ("hidden"), or one inside a task head."""
    return Group(name, kind="hidden", cuts=cuts, mask_at=mask_at, per_block=False)


def embedding_rank(embedding: str, output: str) -> Group:
    """The directions of a factorised embedding and of the output tied to it."""
    cuts = (Cut(embedding, "rank"), Cut(output, "rank", optional=True))
    return Group("embedding_rank", kind="embedding_rank", cuts=cuts, mask_at=MaskAt("rank", embedding), per_block=False)


def vocab(embedding: str, output: str, *, bias: str = "") -> Group:
    """The rows of the token embedding and of the output layer, tied or not; `bias` holds a bias of its own."""
    cuts = [Cut(embedding, "rows"), Cut(output, "out", optional=True)]
    if bias:
        cuts.append(Cut(bias, "own", optional=True))
    return Group("vocab", kind="vocab", cuts=tuple(cuts), mask_at=MaskAt("none"), per_block=False)
