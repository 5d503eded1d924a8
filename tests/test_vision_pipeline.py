"""Vision transformers by the command line: pictures in, an exact budget, folders that load, one line where not."""

import json

import pytest
import torch
import transformers
from cnn_models import pictures, save_pictures
from conftest import HEADS, TINY, build
from safetensors.torch import save_file

import ibprune
from ibprune import cli
from ibprune.costs import count_params
from ibprune.errors import BadRecipe

CLASSIFIERS = sorted((f, h) for f, heads in HEADS.items() for h in heads if "ForImageClassification" in h)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder / "train", *pictures(48), ("down", "up"))
    save_pictures(folder / "val", *pictures(24, seed=1), ("down", "up"))
    return str(folder)


@pytest.mark.parametrize("family,head", CLASSIFIERS)
def test_the_main_job_of_every_vision_transformer(family, head, data, tmp_path, capsys):
    dense, out = build(family, head, dtype=torch.float32), tmp_path / "out"
    dense.save_pretrained(tmp_path / "dense")
    flags = ["--model", str(tmp_path / "dense"), "--data", data, "--budget", "0.6", "--shares", "equal", "--quiet"]
    flags += ["--mask-steps", "3", "--recover-steps", "2", "--batch-size", "16", "--round-to", "1"]
    assert cli.main([*flags, "--output", str(out)]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert 0.9 * report["budget"]["limit"] < report["budget"]["achieved"] <= report["budget"]["limit"]
    assert report["verify"]["ways"] == ["ibprune", "transformers"] and report["verify"]["max_abs_diff"] <= 1e-5
    assert report["pictures"]["shape"] == [3, 8, 8] and report["audit"] is None
    model = ibprune.load(out)
    assert count_params(model) == report["pruned"]["params"] < report["dense"]["params"]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    auto = transformers.AutoModelForImageClassification.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(auto.eval()(x).logits, model(x).logits)


def test_a_size_without_positions_and_a_model_without_a_classifier_are_one_line(data, tmp_path, capsys):
    build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(tmp_path / "vit")
    build("clip_vision_model", "CLIPVisionModel", dtype=torch.float32).save_pretrained(tmp_path / "clip")
    flags = ["--data", data, "--budget", "0.5", "--quiet", "--output", str(tmp_path / "out")]
    for model, more, message in (
        ("vit", ["--image-size", "16"], "--image-size: expected 8, for which the model has positions, found 16"),
        ("clip", [], "transformers has no image classifier for model_type 'clip_vision_model'"),
    ):
        assert cli.main(["--model", str(tmp_path / model), *flags, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_is_no_new_head(data, tmp_path, capsys):
    """CLIP's classifier holds its tower without the prefix that tells a backbone from a head elsewhere."""
    model = build("clip", "CLIPForImageClassification", dtype=torch.float32)
    model.save_pretrained(tmp_path / "clip")
    state = {k: v.contiguous() for k, v in model.state_dict().items() if ".layers.0.mlp." not in k}
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    flags = ["--data", data, "--budget", "0.5", "--quiet", "--output", str(tmp_path / "out")]
    assert cli.main(["--model", str(tmp_path / "clip"), *flags]) == 2
    assert "4 are missing or of another shape" in capsys.readouterr().err


def test_a_plan_says_which_pictures_it_is_of():
    assert ibprune.plan(TINY["vit"](), 0.5)["pictures"] == {"shape": [3, 8, 8]}
    with pytest.raises(BadRecipe, match="--image-size: 'vit' reads what its config says"):
        ibprune.plan(TINY["vit"](), 0.5, image_size=16)
