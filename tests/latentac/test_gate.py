"""The promotion rule, check by check, and that whatever it does not know holds the model back."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest

from latentac.config.recipes import RECIPES
from latentac.config.schema import Gate
from latentac.config.validation import resolve
from latentac.runs.release.gate import decide, markdown
from latentac.system.errors import ConfigError

REWARDS = ("verifier", "jpeg")
VERSION = "other-0a1b2c3d"
NOTHING = {"version": None, "trouble": ""}
PRESENT = {"version": VERSION, "trouble": ""}
ALONE: dict[str, Any] = {
    "base": {"verifier": {"mean": 0.4, "low": 0.37}, "jpeg": {"mean": -1.1, "low": -1.2}},
    "trained": {"verifier": {"mean": 0.6, "low": 0.57}, "jpeg": {"mean": -1.2, "low": -1.3}},
    "difference": {"verifier": {"mean": 0.2, "low": 0.16}},
    "production": {"version": None, "sha256": None, "problem": ""},
    "diversity": {"kept": {"base": {"low": 0.9}}},
    "latency": {"ratio": {"base": {"high": 1.1}}},
}
BESIDE: dict[str, Any] = {
    **ALONE,
    "production": {"version": VERSION, "sha256": "0" * 64, "problem": ""},
    "incumbent_difference": {"verifier": {"low": -0.01}},
    "diversity": {"kept": {"base": {"low": 0.9}, "incumbent": {"low": 0.85}}},
    "latency": {"ratio": {"base": {"high": 1.1}, "incumbent": {"high": 1.05}}},
}
FLOORS = {"verifier": 0.5, "jpeg": -2.0}
USED = {
    "verifier: gain": "difference.verifier.mean",
    "verifier: lower bound of the gain": "difference.verifier.low",
    "jpeg: mean": "trained.jpeg.mean",
    "verifier: lower bound against its floor": "trained.verifier.low",
    "jpeg: lower bound against its floor": "trained.jpeg.low",
    "verifier: lower bound of the gain over the incumbent": "incumbent_difference.verifier.low",
    "diversity: lower bound of the ratio to base": "diversity.kept.base.low",
    "diversity: lower bound of the ratio to incumbent": "diversity.kept.incumbent.low",
    "latency: upper bound of the ratio to base": "latency.ratio.base.high",
    "latency: upper bound of the ratio to incumbent": "latency.ratio.incumbent.high",
}
"""Check -> the number of evaluation.json that it is of."""


def settings(**fields: Any) -> Gate:
    return Gate(**{"reward": "verifier", "floors": FLOORS, **fields})


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the entry at `path` replaced; removed where value is DROPPED."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    below = content
    for name in parents:
        below = below[name]
    if value is DROPPED:
        del below[last]
    else:
        below[last] = value
    return content


DROPPED = "dropped"


def failed(decision: dict[str, Any]) -> list[str]:
    assert decision["decision"] == ("hold" if any(not check["passed"] for check in decision["checks"]) else "promote")
    return [check["name"] for check in decision["checks"] if not check["passed"]]


@pytest.mark.parametrize(("evaluation", "production"), [(ALONE, NOTHING), (BESIDE, PRESENT)], ids=["alone", "beside"])
def test_all_is_well(evaluation: dict[str, Any], production: dict[str, Any]) -> None:
    """Promoted, with every check among the reasons; the checks against an incumbent only where there is one."""
    decision = decide(settings(), REWARDS, evaluation, production)
    assert decision["decision"] == "promote"
    assert len(decision["reasons"]) == len(decision["checks"]) == (8 if production is NOTHING else 12)


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("verifier: gain", 0.05, True),
        ("verifier: gain", 0.049, False),
        ("verifier: lower bound of the gain", 0.0, True),
        ("verifier: lower bound of the gain", -0.001, False),
        ("jpeg: mean", -1.64, True),
        ("jpeg: mean", -1.66, False),
        ("verifier: lower bound against its floor", 0.5, True),
        ("verifier: lower bound against its floor", 0.499, False),
        ("jpeg: lower bound against its floor", -2.01, False),
        ("verifier: lower bound of the gain over the incumbent", -0.05, True),
        ("verifier: lower bound of the gain over the incumbent", -0.051, False),
        ("diversity: lower bound of the ratio to base", 0.7, True),
        ("diversity: lower bound of the ratio to base", 0.699, False),
        ("diversity: lower bound of the ratio to incumbent", 0.699, False),
        ("latency: upper bound of the ratio to base", 1.25, True),
        ("latency: upper bound of the ratio to base", 1.251, False),
        ("latency: upper bound of the ratio to incumbent", 1.251, False),
    ],
)
def test_each_check_by_itself(name: str, value: float, passes: bool) -> None:
    """At its bound it passes, beyond it this check alone holds, and the reason names it with value and bound."""
    decision = decide(settings(), REWARDS, changed(BESIDE, USED[name], value), PRESENT)
    assert failed(decision) == ([] if passes else [name])
    if not passes:
        (reason,) = decision["reasons"]
        assert reason.startswith(f"{name}: {value:.3f} is not at ")


@pytest.mark.parametrize("value", [DROPPED, math.nan, math.inf, -math.inf, None, "0.9", True, [0.9]], ids=repr)
@pytest.mark.parametrize("name", USED)
def test_a_number_that_is_none_holds(name: str, value: Any) -> None:
    """Missing, NaN, infinite, null or no number at all: every number that the decision rests on must be there."""
    decision = decide(settings(), REWARDS, changed(BESIDE, USED[name], value), PRESENT)
    assert failed(decision) == [name]
    assert decision["reasons"] == [f"{name} is missing or not a finite number"]
    check = next(check for check in decision["checks"] if not check["passed"])
    assert check["value"] is None


def paths(content: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in content.items():
        yield f"{above}{name}"
        if isinstance(value, dict):
            yield from paths(value, f"{above}{name}.")


UNUSED = {"base.verifier", "base.verifier.mean", "base.verifier.low", "base.jpeg.low", "trained.verifier.mean"}
SILENT = {
    "production.sha256",
    "production.problem",
}  # the first is checked where the store is, "" and nothing are alike


@pytest.mark.parametrize("path", sorted({*paths(BESIDE)} - UNUSED - SILENT))
@pytest.mark.parametrize("value", [DROPPED, None, math.nan], ids=["dropped", "null", "nan"])
def test_whatever_part_is_lost_the_gate_holds(path: str, value: Any) -> None:
    """Any entry of evaluation.json that the decision rests on, a number or a whole part of it."""
    assert failed(decide(settings(), REWARDS, changed(BESIDE, path, value), PRESENT)), path


@pytest.mark.parametrize("evaluation", [{}, {"base": None}, {"difference": []}], ids=repr)
def test_an_empty_evaluation_holds(evaluation: dict[str, Any]) -> None:
    """Nothing is known, nothing passes but bounds that could not be failed."""
    assert decide(settings(), REWARDS, evaluation, NOTHING)["decision"] == "hold"


@pytest.mark.parametrize(
    ("evaluation", "production"),
    [(BESIDE, NOTHING), (ALONE, PRESENT), (BESIDE, {"version": "third-1", "trouble": ""}), (BESIDE, {})],
    ids=["gone", "new", "another", "unknown"],
)
def test_another_model_in_production_than_the_evaluated_one_holds(
    evaluation: dict[str, Any], production: dict[str, Any]
) -> None:
    """A comparison with a model that no longer serves, or with none where one serves now, decides nothing."""
    assert "model in production, still the one that was compared" in failed(
        decide(settings(), REWARDS, evaluation, production)
    )


@pytest.mark.parametrize("production", [{"version": VERSION, "trouble": "sha256 differs"}, {"version": VERSION}])
def test_an_incumbent_that_is_not_whole_holds(production: dict[str, Any]) -> None:
    """Its files must be those that were published; not having looked is not proof."""
    assert failed(decide(settings(), REWARDS, BESIDE, production)) == ["files of the incumbent"]


def test_an_incumbent_must_be_beaten_where_that_is_asked() -> None:
    """Strictly: the lower bound of the gain over it above 0, not at 0."""
    name = "verifier: lower bound of the gain over the incumbent"
    for low, missed in ((0.001, []), (0.0, [name]), (-0.01, [name])):
        evaluation = changed(BESIDE, USED[name], low)
        assert failed(decide(settings(must_beat_incumbent=True), REWARDS, evaluation, PRESENT)) == missed


def test_an_incumbent_that_does_not_fit_holds_by_default() -> None:
    """A person decides to replace what cannot be compared; the reason is in the check either way."""
    production = {"version": VERSION, "sha256": "0" * 64, "problem": "its backbone is dit"}
    evaluation = {**ALONE, "production": production}
    held = decide(settings(), REWARDS, evaluation, PRESENT)
    assert failed(held) == ["comparison with the incumbent (its backbone is dit)"]
    assert decide(settings(unfit_incumbent="replace"), REWARDS, evaluation, PRESENT)["decision"] == "promote"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_gain", 0.3),
        ("min_lower_bound", 0.3),
        ("max_loss_fraction", 0.0),
        ("floors", {"verifier": 0.9}),
        ("max_incumbent_loss", 0.0),
        ("must_beat_incumbent", True),
        ("min_diversity_kept", 0.95),
        ("max_latency_ratio", 1.0),
    ],
)
def test_every_bound_of_the_configuration_counts(field: str, value: Any) -> None:
    """What passes with the defaults is held with a sharper bound."""
    assert decide(settings(), REWARDS, BESIDE, PRESENT)["decision"] == "promote"
    assert decide(settings(**{field: value}), REWARDS, BESIDE, PRESENT)["decision"] == "hold"


def test_markdown_is_a_table_with_the_failures_first() -> None:
    """One row a check, four cells each, whatever stands in a name; a missing value says so."""
    evaluation = {**BESIDE, "production": {**BESIDE["production"], "problem": "a|b\n*c* <d>"}}
    decision = decide(settings(), REWARDS, changed(evaluation, "difference.verifier.low", math.nan), PRESENT)
    lines = markdown(decision, "run_1").splitlines()
    assert lines[0] == "# Held back: run run\\_1"
    assert lines[2] == f"2 of {len(decision['checks'])} checks failed."
    rows = lines[6:]
    assert len(rows) == len(decision["checks"])
    assert [row.startswith("| **failed** |") for row in rows] == [True, True] + [False] * (len(rows) - 2)
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert any("| missing | at least 0.000 |" in row for row in rows)
    assert "(a\\|b \\*c\\* &lt;d>)" in rows[1]
    promoted = markdown(decide(settings(), REWARDS, ALONE, NOTHING), "r")
    assert promoted.startswith("# Promoted: run r\n\nAll 8 checks passed.\n\n| result |")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"floors": {"beauty": 0.5}}, r"gate\.floors\.beauty = 0\.5: beauty is not a reward of this run"),
        ({"floors": {"shapes_verifier": math.nan}}, r"gate\.floors\.shapes_verifier = nan"),
        ({"max_incumbent_loss": -0.1}, r"gate\.max_incumbent_loss = -0\.1"),
        ({"unfit_incumbent": "promote"}, r"gate\.unfit_incumbent = 'promote'"),
        ({"max_latency_ratio": math.inf}, r"gate\.max_latency_ratio = inf"),
        ({"max_latency": 1.0}, r"gate\.max_latency = 1\.0: unknown field\. Did you mean \"max_latency_ratio\"\?"),
    ],
)
def test_a_bound_that_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    """By its path, before anything runs."""
    with pytest.raises(ConfigError, match=words):
        resolve(RECIPES["shapes-unet"] | {"gate": {"reward": "shapes_verifier", **fields}})
