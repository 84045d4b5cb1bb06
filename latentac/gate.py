"""The promotion rule: `promote` or `hold`, closed on every number that is missing or not finite."""

import math
from collections.abc import Mapping
from typing import Any

from latentac.config import Gate


def decide(settings: Gate, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """{"decision", "reasons", "checks": [{name, value, bound, passed}]} from the content of evaluation.json."""
    gain = f"difference.{settings.reward}"
    checks = [
        _check(f"{settings.reward}: gain", _find(evaluation, f"{gain}.mean"), settings.min_gain),
        _check(
            f"{settings.reward}: lower 95 % bound of the gain",
            _find(evaluation, f"{gain}.low"),
            settings.min_lower_bound,
        ),
    ]
    others = sorted(set(evaluation.get("base", {})) - {settings.reward})
    for name in others:
        base = _find(evaluation, f"base.{name}.mean")
        bound = None if base is None else base - settings.max_loss_fraction * abs(base)
        checks.append(_check(f"{name}: not worse than bound", _find(evaluation, f"trained.{name}.mean"), bound))
    failed = [check for check in checks if not check["passed"]]
    reasons = [_reason(check) for check in failed or checks]
    return {"decision": "hold" if failed else "promote", "reasons": reasons, "checks": checks}


def _find(content: Mapping[str, Any], path: str) -> float | None:
    value: Any = content
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _check(name: str, value: float | None, bound: float | None) -> dict[str, Any]:
    passed = value is not None and bound is not None and value >= bound
    return {"name": name, "value": value, "bound": bound, "passed": passed}


def _reason(check: Mapping[str, Any]) -> str:
    if check["value"] is None or check["bound"] is None:
        return f"{check['name']} is missing or not a finite number"
    relation = "reaches" if check["passed"] else "is below"
    return f"{check['name']} {check['value']:.3f} {relation} {check['bound']:.3f}"
