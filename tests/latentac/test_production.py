"""What a store says is in production: read as it is written, and never as anything else."""

from pathlib import Path
from typing import Any

import pytest

from latentac.runs.release.incumbent import chosen_production, pointer, production, productions
from latentac.store import Store, open_store
from latentac.system.errors import ConfigError, IntegrityError

SOUND = {"version": "a-1", "run": "a", "previous": None, "deployed": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store")


@pytest.mark.parametrize(
    "content", [{}, [], "a-1", None, *({**SOUND, name: 3} for name in ("version", "run", "previous"))]
)
def test_a_pointer_that_names_no_model_is_refused(store: Store, content: Any) -> None:
    """A damaged registry is not an empty one."""
    store.write_json(pointer("mine"), content)
    with pytest.raises(IntegrityError, match="it names no version and run"):
        production(store, "mine")


@pytest.mark.parametrize(("forced", "expected"), [(["a", 3], ("a", "3")), ([], ()), (3, ()), ("abc", ()), (None, ())])
def test_the_reasons_against_a_forced_model_are_a_list_of_texts(store: Store, forced: Any, expected: tuple[str]):
    """Anything else is none."""
    store.write_json(pointer("mine"), {**SOUND, "forced": forced})
    found = production(store, "mine")
    assert found is not None
    assert found.forced == expected


def test_one_damaged_pointer_concerns_its_own_project(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """The others are listed, the last deployed first; what is not a project is none."""
    store.write_json(pointer("old"), SOUND)
    store.write_json(pointer("new"), {**SOUND, "deployed": "2026-02-01T00:00:00+00:00"})
    store.write_json(pointer("damaged"), {})
    store.write_json(pointer("-odd"), SOUND)
    store.write_json("registry/other.json", SOUND)
    assert [each.project for each in productions(store)] == ["new", "old"]
    assert "project damaged is left out" in caplog.text
    assert chosen_production(store, "")[0].project == "new"


def test_a_project_that_is_no_name_is_reported_before_the_store_is_asked(store: Store) -> None:
    for name in ("../other", "a/b", "-odd"):
        with pytest.raises(ConfigError, match="is not a project name"):
            chosen_production(store, name)
