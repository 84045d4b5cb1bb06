"""The navigation and the reference are complete. `make docs` builds the site, and a broken link fails it."""

import re
from collections import Counter

import yaml

import latentac
from docs.site.hooks import ROOT, documents, public, reference


def listed(entries: list) -> list[str]:
    """The pages of a part of the navigation, in order."""
    inner = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries]
    return [page for each in inner for page in (listed(each) if isinstance(each, list) else [each])]


def test_every_document_is_in_the_navigation() -> None:
    """Each document of the repository has one place in mkdocs.yml, and nothing else has one."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2])
    assert Counter(listed(navigation)) == Counter(name for name in documents() if name.endswith(".md"))


def test_every_public_name_has_its_place_in_the_reference() -> None:
    """A name that `latentac` exports is described once, on a page of public names that the first page links to."""
    pages = reference()
    described = Counter(
        path for page, text in pages.items() if "/modules/" not in page for path in re.findall("^::: (.+)$", text, re.M)
    )
    names = public()
    assert set(names) == set(latentac.__all__)
    assert described == Counter(f"{module}.{name}" for name, module in names.items())
    assert not [name for name, module in names.items() if f"[{module}.{name}]" not in pages["reference/index.md"]]


def test_every_module_has_its_place_in_the_reference() -> None:
    """Each module of the library is described once, `components` and `pipelines` with it."""
    text = "\n".join(text for page, text in reference().items() if "/modules/" in page)
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "latentac").rglob("*.py")]
    for linked in ("components", "pipelines"):
        files += ["latentac" / path.relative_to(ROOT).with_suffix("") for path in (ROOT / linked).rglob("*.py")]
    dotted = {".".join(part for part in path.parts if part != "__init__") for path in files if path.name != "__main__"}
    assert Counter(re.findall("^::: (.+)$", text, re.M)) == Counter(dotted - {"latentac"})
