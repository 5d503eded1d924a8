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


def heads(
    inputs: tuple[str, ...],
    output: str,
    unit: str,
    *,
    name: str = "heads",
    more: tuple[Cut, ...] = (),
    sizes: tuple[str, ...] = (),
    stack: str = "",
) -> Group:
    """The heads of a block whose queries, keys and values (`inputs`) and `output` are layers of their own."""
    cuts = (*(Cut(path, "out") for path in inputs), *more, Cut(output, "in"))
    return Group(name, kind="heads", unit=unit, cuts=cuts, mask_at=MaskAt("in", output), sizes=sizes, stack=stack)


def reads_and_writes(block: str, inputs: tuple[str, ...], output: str, *, stays: bool = False) -> tuple[Cut, ...]:
    """The residual features that a sub-layer reads and writes; its output layer may be absent, unless it `stays`."""
    reads = (Cut(f"{block}.{path}", "in", optional=True) for path in inputs)
    return (*reads, Cut(f"{block}.{output}", "out", optional=not stays))


def ffn(cuts: tuple[Cut, ...], mask_at: MaskAt) -> Group:
    """The inner units of a block's FFN."""
    return Group("ffn", kind="ffn", cuts=cuts, mask_at=mask_at)


def width(name: str, cuts: tuple[Cut, ...], mask_at: MaskAt) -> Group:
    """A feature width of the whole model: the residual stream ("hidden"), or one inside a task head."""
    return Group(name, kind="hidden", cuts=cuts, mask_at=mask_at, per_block=False)


def tanh_head(path: str) -> Group:
    """The inner width of a classifier of two layers, `dense` and `out_proj`."""
    dense = f"{path}.dense"
    cuts = (Cut(dense, "out", optional=True), Cut(f"{path}.out_proj", "in", optional=True))
    return width("head", cuts=cuts, mask_at=MaskAt("out", dense))  # before the tanh, and tanh(0) = 0


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
