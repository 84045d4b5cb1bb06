"""The images' locks say what the checkout's lock says, so that what the tests prove is what the images run."""

import re
from pathlib import Path

import pytest

LOCKS = Path(__file__).parents[2] / "requirements"
IMAGES = sorted(path.name for path in (LOCKS / "images").glob("*.lock"))
PINNED = re.compile(r"^([a-z0-9-]+)==([^ ]+)(?: ; [^\\]+)? \\$", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    found = dict(PINNED.findall(path.read_text()))
    assert found, f"nothing is pinned in {path.name}"
    return found


@pytest.mark.parametrize("lock", IMAGES)
def test_a_version_is_the_checkouts(lock: str) -> None:
    """A package that both have is of one version: `make lock` resolves the images under the checkout's lock."""
    ours = pins(LOCKS / "dev.lock")
    other = {
        name: (version, ours[name])
        for name, version in pins(LOCKS / "images" / lock).items()
        if version != ours.get(name, version)
    }
    assert not other, "run `make lock`"


@pytest.mark.parametrize("lock", ["train", "serve"])
def test_an_image_on_torch_replaces_nothing_below(lock: str) -> None:
    """Every pin of the torch layer is in the lock of what stands on it, or torch would be in the image twice."""
    above, below = pins(LOCKS / "images" / f"{lock}.lock"), pins(LOCKS / "images" / "torch.lock")
    assert below.items() <= above.items()


@pytest.mark.parametrize("lock", IMAGES)
def test_every_pin_is_hashed_and_nothing_names_an_address(lock: str) -> None:
    """Each package has at least one sha256, and where it comes from is the business of the machine."""
    text = (LOCKS / "images" / lock).read_text()
    for paragraph in re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in paragraph, paragraph.splitlines()[0]
    assert "://" not in text


def test_the_pipeline_image_has_no_torch() -> None:
    """Steps that wait and decide start in a second and pull no 5 GB."""
    assert not {"torch", "diffusers", "transformers", "nvidia-cublas"} & pins(LOCKS / "images/pipeline.lock").keys()
