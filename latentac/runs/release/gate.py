"""The promotion rule: `promote` or `hold`, closed on every number that is missing or not finite.

`latentac.evaluation.measures` defines the numbers, `latentac.config.schema.Gate` the bounds.
The gate can decide again with other bounds, from the same numbers. The decision then says which bounds were changed, by
whom, and what the decisions before it were.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentac.config.fields import merge, read_overrides
from latentac.config.schema import Config, Gate
from latentac.config.validation import resolve
from latentac.system.errors import ConfigError, Problem
from latentac.system.terminal import printable

Check = dict[str, Any]
_RELATIONS = {
    "at least": lambda value, bound: value >= bound,
    "at most": lambda value, bound: value <= bound,
    "above": lambda value, bound: value > bound,
}
_NOTHING = "none"


def decide(
    settings: Gate, rewards: Sequence[str], evaluation: Mapping[str, Any], production: Mapping[str, Any]
) -> dict[str, Any]:
    """{"decision", "reasons", "checks": [{name, value, relation, bound, passed}]}.

    rewards: the names of all that the run measures; evaluation: content of evaluation.json; production: as it is now,
    {"version": None where nothing is, "trouble": what is wrong with the files of that version, or ""}.
    A check's value and bound are numbers in the unit of what its name says, None where missing; texts with "is".
    """
    checks = [
        *_gain(settings, rewards, evaluation),
        *_against_incumbent(settings, evaluation, production),
        *_not_inferior(settings, "base", evaluation),
    ]
    failed = [check for check in checks if not check["passed"]]
    reasons = [_reason(check) for check in failed or checks]
    return {"decision": "hold" if failed else "promote", "reasons": reasons, "checks": checks}


def override(config: Config, assignments: Sequence[str]) -> tuple[Gate, list[dict[str, Any]]]:
    """The run's bounds with `gate.field=value` strings over them, and what they change: [{field, old, new}].

    Raises ConfigError with every problem at once; nothing but the gate's own fields can be changed after a run began.
    """
    problems, changed = list[Problem](), dict[str, Any]()
    for assignment in assignments:
        try:
            fields = read_overrides([assignment])
        except ConfigError as error:
            problems += error.problems
            continue
        if list(fields) != ["gate"]:
            remedy = "Only fields of gate can be overridden. For another configuration, start a new run."
            problems.append(Problem("--set", assignment, "was fixed when the run began", remedy))
        elif not isinstance(fields["gate"], Mapping):
            problems.append(Problem("--set", assignment, "names no field", "Write for example gate.min_gain=0.02."))
        else:
            changed = merge(changed, fields["gate"])
    before = config.model_dump()
    try:
        settings = resolve(merge(before, {"gate": changed})).gate
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    after = settings.model_dump()
    named = ((f"gate.{name}", before["gate"][name], after[name]) for name in after)
    return settings, [{"field": field, "old": old, "new": new} for field, old, new in named if old != new]


def former(decision: Mapping[str, Any], decided: str) -> list[dict[str, Any]]:
    """The decisions up to this one, in short, the oldest first, for the one that takes its place.

    decided: when it was published.
    """
    kept = {name: decision[name] for name in ("decision", "reasons")} | {"decided": decided}
    bounds = {"overrides": decision.get("overrides") or [], "by": decision.get("by")}
    return [*(decision.get("former") or []), {**kept, **bounds}]


def against(decision: Mapping[str, Any]) -> list[str]:
    """The reasons of a decision that holds; none for one that promotes."""
    return [] if decision["decision"] == "promote" else list(decision["reasons"])


def overridden(decision: Mapping[str, Any]) -> list[str]:
    """Which bounds a decision has changed, in words."""
    return [f"{each['field']} is {each['new']}, not {each['old']}" for each in decision.get("overrides") or ()]


def markdown(decision: Mapping[str, Any], run: str) -> str:
    """The decision and its checks as a Markdown document, the failed checks first."""
    checks = sorted(decision["checks"], key=lambda check: bool(check["passed"]))
    rows = [
        f"| {'passed' if check['passed'] else '**failed**'} | {_cell(check['name'])} | {_cell(_text(check['value']))} "
        f"| {check['relation']} {_cell(_text(check['bound']))} |"
        for check in checks
    ]
    heading = "Promoted" if decision["decision"] == "promote" else "Held back"
    failed = sum(not check["passed"] for check in checks)
    summary = f"{failed} of {len(checks)} checks failed." if failed else f"All {len(checks)} checks passed."
    table = ["| result | check | value | must be |", "|---|---|---|---|", *rows]
    lines = [f"# {heading}: run {_cell(run)}", "", summary, "", *table]
    if decision.get("former") or decision.get("overrides"):
        lines += ["", "## Decisions, the oldest first", "", *_story(decision)]
    return "\n".join(lines) + "\n"


def _story(decision: Mapping[str, Any]) -> Iterator[str]:
    """Each decision about the run up to this one, and the bounds that it was made with."""
    for each in [*(decision.get("former") or ()), decision]:
        bounds = "; ".join(overridden(each)) or "the bounds of the run's configuration"
        person = f" by {each['by']}" if each.get("by") else ""
        yield "- " + _cell(f"{each['decision']}, {each.get('decided', 'now')}{person}: {bounds}")


def _gain(settings: Gate, rewards: Sequence[str], evaluation: Mapping[str, Any]) -> Iterator[Check]:
    """The reward over base, the other rewards against base, and the absolute floors."""
    main, gain = settings.reward, ("difference", settings.reward)
    yield _check(f"{main}: gain", _find(evaluation, *gain, "mean"), "at least", settings.min_gain)
    low = _find(evaluation, *gain, "low")
    yield _check(f"{main}: lower bound of the gain", low, "at least", settings.min_lower_bound)
    for name in sorted(set(rewards) - {main}):
        base = _find(evaluation, "base", name, "mean")
        bound = None if base is None else base - settings.max_loss_fraction * abs(base)
        yield _check(f"{name}: mean", _find(evaluation, "trained", name, "mean"), "at least", bound)
    for name, floor in sorted(settings.floors.items()):
        yield _check(
            f"{name}: lower bound against its floor", _find(evaluation, "trained", name, "low"), "at least", floor
        )


def _against_incumbent(settings: Gate, evaluation: Mapping[str, Any], production: Mapping[str, Any]) -> Iterator[Check]:
    """Nothing to check where nothing is in production; otherwise all that has to be known of it."""
    evaluated = _at(evaluation, "production") or {}
    version = _version(production)
    yield _same("model in production, still the one that was compared", version, _version(evaluated))
    if version == _NOTHING:
        return
    problem = _at(evaluated, "problem")
    if isinstance(problem, str) and problem:
        replace = settings.unfit_incumbent == "replace"
        bound = "possible, or gate.unfit_incumbent=replace" if replace else "possible"
        check = _same(f"comparison with the incumbent ({problem})", "not possible", bound)
        yield {**check, "passed": replace}
        return
    trouble = production.get("trouble")
    yield _same("files of the incumbent", "as published" if trouble == "" else str(trouble), "as published")
    difference = _find(evaluation, "incumbent_difference", settings.reward, "low")
    name = f"{settings.reward}: lower bound of the gain over the incumbent"
    if settings.must_beat_incumbent:
        yield _check(name, difference, "above", 0.0)
    else:
        yield _check(name, difference, "at least", -settings.max_incumbent_loss)
    yield from _not_inferior(settings, "incumbent", evaluation)


def _not_inferior(settings: Gate, arm: str, evaluation: Mapping[str, Any]) -> Iterator[Check]:
    """Diversity and latency against base or the incumbent, by the unfavourable end of each interval."""
    kept = _find(evaluation, "diversity", "kept", arm, "low")
    slower = _find(evaluation, "latency", "ratio", arm, "high")
    yield _check(f"diversity: lower bound of the ratio to {arm}", kept, "at least", settings.min_diversity_kept)
    yield _check(f"latency: upper bound of the ratio to {arm}", slower, "at most", settings.max_latency_ratio)


def _at(content: Any, *path: str) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _find(content: Mapping[str, Any], *path: str) -> float | None:
    value = _at(content, *path)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _version(state: Any) -> str | None:
    """The version that `state` names, "none" where it says that there is none, None where it does not say."""
    if not isinstance(state, Mapping) or "version" not in state:
        return None
    version = state["version"]
    return _NOTHING if version is None else version if isinstance(version, str) and version != _NOTHING else None


def _check(name: str, value: float | None, relation: str, bound: float | None) -> Check:
    passed = value is not None and bound is not None and _RELATIONS[relation](value, bound)
    return {"name": name, "value": value, "relation": relation, "bound": bound, "passed": passed}


def _same(name: str, value: str | None, bound: str | None) -> Check:
    passed = value is not None and value == bound
    return {"name": name, "value": value, "relation": "is", "bound": bound, "passed": passed}


def _reason(check: Check) -> str:
    if check["value"] is None or check["bound"] is None:
        return f"{check['name']} is missing or not a finite number"
    if check["relation"] == "is":
        return f"{check['name']}: {check['value']}" + ("" if check["passed"] else f", not {check['bound']}")
    relation = check["relation"] if check["passed"] else f"not {check['relation']}"
    return f"{check['name']}: {_text(check['value'])} is {relation} {_text(check['bound'])}"


def _text(value: float | str | None) -> str:
    return "missing" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table and is not markup."""
    plain = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    plain = re.sub(r"@|:(?=//)|(?<=www)\.", r"\\\g<0>", plain)  # an address becomes no link
    return plain.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("`", "\\`").replace("[", "\\[")
