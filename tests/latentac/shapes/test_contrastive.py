"""The script that made the tiny CLIP: its loss, its hard negatives, and a run from start to end."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from latentac.rewards.shapes_clip import WEIGHTS
from latentac.worlds.pretraining.clip import ContrastiveTraining, contrastive_loss
from latentac.worlds.shapes.captions import parse_caption
from latentac.worlds.shapes.contrastive import false_negatives, hard_negatives, main, pretrain

TRAINING = ContrastiveTraining(steps=2, batch=8)


def captions_beside(caption):
    return {
        respect: {each.caption for each in specs} for respect, specs in hard_negatives(parse_caption(caption)).items()
    }


def test_hard_negatives_differ_in_one_respect():
    """And ask for another image: no wording of the same one is among them."""
    beside = captions_beside("a red circle left of a blue square")
    assert beside["exchange"] == {"a red square left of a blue circle"}
    assert beside["relation"] == {f"a red circle {word} a blue square" for word in ("right of", "above", "below")}
    assert "a red triangle left of a blue square" in beside["shape"]
    assert len(beside["colour"]) == 8  # each of the two in four colours that neither has
    assert captions_beside("two red circles")["count"] == {"a red circle", "three red circles", "four red circles"}
    assert captions_beside("a red circle and a blue circle").keys() == {"colour", "shape"}


def test_another_wording_is_no_negative():
    """Rows of two wordings of one image share the target: logits that prefer neither lose nothing by it."""
    specs = [parse_caption(f"a red circle {rest}") for rest in ("left of a blue square", "above a blue square")]
    specs.append(parse_caption("a blue square right of a red circle"))
    logits = torch.tensor([[50.0, 0.0, 50.0], [0.0, 50.0, 0.0], [50.0, 0.0, 50.0]])
    assert contrastive_loss(logits, *false_negatives(specs)).item() == pytest.approx(
        2 / 3 * torch.tensor(2.0).log().item(), abs=1e-6
    )


def test_what_a_caption_implies_counts_neither_way():
    """`A and B` is true of an image of `A left of B`: their logit has no gradient."""
    specs = [parse_caption(f"a red circle {rest} a blue square") for rest in ("left of", "and", "above")]
    logits = torch.zeros(3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(contrastive_loss(logits, *false_negatives(specs)), logits)
    assert gradient.eq(0).tolist() == [[False, True, False], [True, True, True], [False, True, False]]


@pytest.mark.slow
def test_two_steps_make_a_loadable_clip_and_a_second_run_the_same_weights(tmp_path: Path):
    """The same settings give the same bytes."""
    weights = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        pretrain(folder, 1, 16, TRAINING, "a test")
        CLIPModel.from_pretrained(folder)
        CLIPTokenizer.from_pretrained(folder)
        weights.append(load_file(folder / "model.safetensors"))
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_the_shipped_weights_are_those_that_are_described():
    """Every file but the description has the sha256 that it names."""
    described = json.loads((WEIGHTS / "provenance.json").read_text())["files"]
    found = {path.name for path in WEIGHTS.iterdir()} - {"provenance.json"}
    assert found == described.keys()
    for name, entry in described.items():
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == entry["sha256"]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]):
    """`python -m latentac.worlds.shapes.contrastive --help`."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "example: python -m latentac.worlds.shapes.contrastive --output" in capsys.readouterr().out
