"""The configuration explains itself: every field has a text, the page is current, what is shown can be given back."""

from pathlib import Path

import pytest
import yaml

from latentac.config.recipes import RECIPES
from latentac.config.schema import Config
from latentac.config.validation import section_of
from latentac.runs.cli import main
from latentac.runs.configuration import recipe_fields
from latentac.runs.reference import _sections, commented_yaml, fields_markdown, fields_text
from latentac.runs.resolution import resolve_all

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_every_field_is_explained() -> None:
    """Of every section and of every row of every table."""
    silent = [f"{title}: {name}" for title, _, rows in _sections() for name, *_, text in rows if not text]
    assert silent == []


def test_every_section_is_in_the_reference() -> None:
    """As deep as they go."""
    titles = {title for title, *_ in _sections()}
    pending = [(Config, "")]
    while pending:
        section, path = pending.pop()
        for name in section.model_fields:
            below, place = section_of(section, name), f"{path}.{name}".lstrip(".")
            if below is not None:
                assert place in titles
                pending.append((below, place))


def test_the_page_is_current() -> None:
    """`make reference` changes nothing."""
    assert PAGE.read_text() == fields_markdown()


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_what_is_shown_can_be_given_back(recipe: str, tmp_path: Path) -> None:
    """As a file over any recipe it is the same configuration, comments and all."""
    config = resolve_all(recipe_fields(recipe)).config
    file = tmp_path / "shown.yaml"
    file.write_text(commented_yaml(config))
    assert yaml.safe_load(file.read_text()) == config.model_dump()
    assert resolve_all(recipe_fields("shapes-unet", str(file))).config.hash == config.hash


def test_what_is_shown_explains_itself() -> None:
    """Each field has its description above it, those of a class's own settings too; what several entries of a list have
    in common is said once."""
    overrides = ["rewards=[{use: colourfulness, name: a}, {use: colourfulness, name: b}]", "gate.reward=a"]
    text = commented_yaml(resolve_all(recipe_fields("shapes-unet", "", overrides)).config)
    for shown in (
        "  # Denoising steps per image, K.\n  num_steps: 10\n",
        "  # eta of DDIM, or the noise level of the flow kernels. 0 is deterministic.\n  noise: 1.0\n",
        "    # A row of the rewards' table, or `module:Class`.\n  - use: colourfulness\n",
        "\n  - use: colourfulness\n    name: b\n    weight: 1.0\n",
        "      # Factor on the steering weights, in standard deviations of each reward.\n      strength: 20.0\n",
    ):
        assert shown in text
    assert text.count("# Time limit of one call, in seconds.") == 1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("train", ["num_iterations: integer > 0; default 30", "Images per iteration", "train.divergence"]),
        ("rewards.weight", ["number >= 0; default 1.0"]),
        ("algorithm.grpo", ["group_size: integer >= 2; default 4", "Shao et al. 2024"]),
        ("algorithm.grpo.group_size", ["Rollouts per prompt"]),
        ("gate.reward", ["required"]),
    ],
)
def test_a_section_a_field_and_a_row_can_be_looked_up(path: str, words: list[str]) -> None:
    """With type, bounds, default and meaning."""
    text = fields_text(path)
    assert all(word in text for word in words), text


def test_a_wrong_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With what there is."""
    assert main(["config", "fields", "trian"]) == 2
    assert 'Did you mean "train"?' in capsys.readouterr().err


def test_show_reports_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    """It resolves as `prepare` does."""
    assert main(["config", "show", "--set", "algorithm.clipp=1", "--set", "kernel.noise=0"]) == 2
    output = capsys.readouterr().err
    assert "algorithm.clipp" in output
    assert "kernel.noise" in output
