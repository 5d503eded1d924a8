"""A dense model held in 4 or 8 bits: what is written is cut from the full-precision checkpoint; what cannot be."""

import pytest
import torch
from conftest import outputs

import ibprune
from ibprune.models import find_source, load_dense
from ibprune.plans import PruningPlan
from ibprune.surgery import compact_

pytest.importorskip("bitsandbytes")
SHORT = dict(batch_size=16, max_length=16, audit=False, seed=3, round_to=1)


def same_as_sliced(folder, model) -> None:
    """The folder's tensors are those of the source, sliced by its plan, bit for bit."""
    sliced = compact_(load_dense(find_source(model)).model, PruningPlan.load(folder / "plan.json"))
    state = ibprune.load(folder).state_dict()
    assert state.keys() == sliced.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in sliced.state_dict().items())


@pytest.mark.parametrize("score,head,held", [
    ("fisher", "BertForSequenceClassification", "load_in_4bit"),
    ("activation", "LlamaForCausalLM", "load_in_8bit"),
])  # fmt: skip
def test_the_weights_written_are_those_of_the_checkpoint(score, head, held, folders, reviews, stories, tmp_path):
    data = reviews if head.endswith("Classification") else stories
    result = ibprune.prune(
        folders[head], 0.5, data=data, output=tmp_path / "out", score=score, recover_steps=0, **SHORT, **{held: True}
    )
    same_as_sliced(tmp_path / "out", folders[head])
    print(result.report["kept"], result.report["dense"], result.report["pruned"])
