"""The model card: a run's page of Markdown, and the README.md of a folder that it exported, from the same facts.

What comes from outside (names, units, prompts, settings) is escaped: it can neither end a cell nor become HTML. Only
the texts of the configuration's section `card` are Markdown, and they are no HTML either.
"""

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentac.system.terminal import printable

_UNKNOWN = "Unknown. Set it in the configuration:"
_TAGS = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux",
    "ZImagePipeline": "z-image",
}
_USE = "## Use with diffusers"
_ADAPTER = "## Use only the adapter"
_FORMER = {_USE: "## Draw with diffusers", _ADAPTER: "## The adapter alone"}
"""Headings in the folders of earlier versions."""
_DEFAULT_USE = """\
Images from prompts like the training prompts, for research on reinforcement learning of diffusion models. For any other
use, evaluate the model on your own prompts first."""
_DEFAULT_LIMITS = """\
- Only the rewards above were measured. Other properties of the images may be worse than before training.
- Images are not checked by a safety filter: not in training, not in the endpoint, and not with this folder.
- The base model may reproduce its training data. This model may do the same."""

Facts = Mapping[str, Any]
"""Of summary.json: run, recipe, seed, commit, settings, evaluation, training, steering, gate, serving, and perhaps the
rewards' units. What is not there yet is None or empty."""


def model_card(facts: Facts) -> str:
    """card.md: what was trained on what, what it gained, what the gate said."""
    return _joined([f"# {_text(facts['run'])}", *_body(facts)])


def folder_card(facts: Facts, kind: str, use: str, adapter: str = "") -> str:
    """README.md of an exported folder, as the hub reads it. kind: the pipeline's class; use, adapter: sections made by
    `use_section` or `only_adapter`, or "". Without `use` the folder is an adapter alone."""
    return _joined(
        [
            _front_matter(facts, kind, adapter != "", alone=not use),
            f"# {_text(facts['run'])}",
            use,
            adapter,
            *_body(facts),
        ]
    )


def use_section(code: str, adapter: bool = False) -> str:
    """How to draw with this folder, from `latentac.sampling.snippet.usage`; adapter: with its adapters on the base."""
    if adapter:
        return (
            f"{_ADAPTER}\n\n`lora/` holds only the trained weights, for `load_lora_weights` of diffusers, which needs"
            f" peft. In this folder, this program makes the same image:\n\n```python\n{code.strip()}\n```"
            if code
            else ""
        )
    if not code:
        return (
            f"{_USE}\n\nThe folder loads in diffusers. But no scheduler of diffusers makes the steps that this model"
            " was trained with, so the images differ. `latentac generate` makes the correct ones."
        )
    return (
        f"{_USE}\n\nIn this folder, this program makes the same image as latentac's endpoint without steering, from the"
        f" same prompt and seed, within one grey level of 255:\n\n```python\n{code.strip()}\n```\n\nWith another number"
        " of steps, another scheduler, or another guidance scale, the images differ."
    )


def only_adapter(adapter: str) -> str:
    """How to draw with a folder that is an adapter alone. adapter: the section of the pipeline it comes from, or ""."""
    text = (
        f"{_USE}\n\nThis folder holds LoRA weights for the base model. `pipeline.load_lora_weights(folder)` of"
        " diffusers loads them, and needs peft. `latentac.json` has commit and sha256s of the base."
    )
    code = re.search(r"```python\n.*?\n```", adapter, re.S)
    if code is None:
        return f"{text} No scheduler of diffusers makes the steps that they were trained with, so the images differ."
    moved = code[0].replace('load_lora_weights("lora")', 'load_lora_weights(".")')
    return (
        f"{text} In this folder, this program makes the same image as latentac's endpoint without steering:\n\n{moved}"
    )


def sections(readme: str) -> tuple[str, str]:
    """(use, adapter): those sections of a folder's README.md, for the README.md of a copy; "" what it does not have."""

    def section(heading: str) -> str:
        start = readme.find(f"\n{heading}\n")
        if start < 0:
            return ""
        end = readme.find("\n## ", start + 1 + len(heading))
        return readme[start : end if end >= 0 else None].strip()

    use, adapter = (section(heading) or section(_FORMER[heading]) for heading in (_USE, _ADAPTER))
    return use, adapter


def base_model(settings: Mapping[str, Any]) -> str:
    """What the run began with, without a path of the machine: a hub id, `builtin:<name>`, or a folder's name."""
    source = str(settings["backbone"]["source"])
    named = str((settings.get("card") or {}).get("base_model") or "")
    if named or source.startswith("builtin:") or _is_hub_id(source):
        return named or source
    return Path(source).name


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", source) is not None


def _front_matter(facts: Facts, kind: str, adapter: bool, *, alone: bool) -> str:
    """YAML, of which JSON strings and lists are a part."""
    settings = facts["settings"]
    card = settings.get("card") or {}
    base = base_model(settings)
    fields: dict[str, Any] = {"license": card.get("licence") or "unknown"}
    if _is_hub_id(base):
        fields |= {"base_model": base, "base_model_relation": "adapter" if alone else "finetune"}
    if card.get("datasets"):
        fields["datasets"] = list(card["datasets"])
    tags = ["diffusers", "latentac", "reinforcement-learning", *([_TAGS[kind]] if kind in _TAGS else [])]
    fields |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*tags, *(["lora"] if adapter else [])],
    }
    # What is not printable is escaped, in JSON and in YAML alike.
    lines = (f"{name}: {printable(json.dumps(value, ensure_ascii=False))}" for name, value in fields.items())
    return "\n".join(["---", *lines, "---"])


def _body(facts: Facts) -> Iterator[str]:
    settings = facts["settings"]
    card = settings.get("card") or {}
    backbone, prompts, training = settings["backbone"], settings.get("prompts") or {}, facts["training"] or []
    yield "## The run"
    yield _table(
        ("", ""),
        [
            ("recipe", f"{_text(facts['recipe'])}, seed {_text(facts['seed'])}"),
            ("backbone", f"{_text(_name(backbone))} from {_text(_place(backbone['source']))}"),
            ("base model", _text(base_model(settings))),
            ("licence", _text(card.get("licence") or "unknown: `card.licence`")),
            ("prompts", _text(_place(prompts.get("source", "")))),
            ("code", _text(facts["commit"] or "unknown")),
            # The count is of all iterations so far, so that of the last one is the run's.
            ("images scored in training", max((row.get("images") or 0 for row in training), default=0) or "none"),
        ],
    )
    yield from _rewards(facts)
    yield from _training(settings, training)
    yield from _steering(facts["steering"] or [])
    gate, serving = facts["gate"], facts["serving"]
    if gate is None:
        yield "Not decided: the run has not reached the gate."
    else:
        reasons = [f"- {_text(reason)}" for reason in gate["reasons"] or ()]
        yield "\n".join([f"## Gate: {_text(gate['decision'])}", "", *reasons])
        for bound in gate.get("overrides") or ():
            new, old = _text(bound["new"]), _text(bound["old"])
            yield f"Decided with a bound other than the run's: {_code(bound['field'])} is {new}, not {old}."
    if serving:
        yield f"Served as version {_code(serving['version'])}."
        if serving.get("forced"):
            reasons = [f"- {_text(reason)}" for reason in serving["forced"]["reasons"]]
            yield "\n".join(["Forced into production against the gate's decision. The gate's reasons:", "", *reasons])
    elif gate is not None and gate["decision"] == "promote":
        yield "Promoted, but not deployed."
    yield f"## Data\n\n{_prose(card.get('data')) or _unknown('card.data')}"
    yield f"## Intended use\n\n{_prose(card.get('intended_use')) or _DEFAULT_USE}"
    yield f"## Limits\n\n{_prose(card.get('limits')) or _DEFAULT_LIMITS}"


def _rewards(facts: Facts) -> Iterator[str]:
    settings, evaluation = facts["settings"], facts["evaluation"]
    weights = {_name(reward): reward.get("weight", 1.0) for reward in settings.get("rewards") or []}
    if evaluation is None:
        yield "## Rewards\n\nNot evaluated."
        units = facts.get("units") or {}
        listed = [(_code(name), _text(units.get(name) or ""), f"{weight:g}") for name, weight in weights.items()]
        yield _table(("reward", "unit", "weight"), listed)
        return
    arms = ("base", "trained", "difference")
    rows = [
        (
            _code(name),
            _text(evaluation["units"].get(name) or ""),
            f"{weights[name]:g}" if name in weights else "",
            *(_interval(evaluation[arm].get(name)) for arm in arms),
        )
        for name in evaluation["base"]
    ]
    yield (
        "## Rewards on held-out prompts\n\nMeans before and after training, and the difference, with 95 % intervals."
        " A reward of weight 0 was measured, but not trained on."
    )
    yield _table(("reward", "unit", "weight", *arms), rows)


def _training(settings: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not training:
        return
    policy, kernel, last = settings.get("policy") or {}, settings.get("kernel") or {}, training[-1]
    lora = policy.get("adaptation") == "lora"
    rank, alpha = _text(policy.get("lora_rank")), _text(policy.get("lora_alpha"))
    what = f"LoRA of rank {rank}, alpha {alpha}" if lora else "all weights"
    rows = [
        ("trained", what),
        ("algorithm", _text(_name(settings.get("algorithm") or {}))),
        ("learning rate", _text(policy.get("learning_rate") or "")),
        ("sampler", ", ".join(f"{_text(name)} {_text(value)}" for name, value in kernel.items())),
        ("iterations", _text(last.get("iteration") or len(training))),
        ("seconds", f"{sum(row.get('seconds') or 0 for row in training):.0f}"),
        ("mean reward, first and last iteration", f"{_number(training[0], last, 'reward_mean')}"),
    ]
    yield "## Training"
    yield _table(("", ""), [row for row in rows if row[1] not in (None, "")])


def _number(first: Mapping[str, Any], last: Mapping[str, Any], name: str) -> str:
    ends = [row.get(name) for row in (first, last)]
    return ", ".join(f"{end:.3f}" if end is not None and math.isfinite(end) else "–" for end in ends)


def _steering(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield "## Steering the trained model"
    table = [
        (
            _code(row["method"]),
            "–" if row.get("strength") is None else f"{row['strength']:g}",
            _text(row.get("particles") or "–"),
            _text(row["nfe"]),
            _code(row["reward"]),
            _interval(row),
        )
        for row in rows
    ]
    yield _table(("method", "strength", "particles", "NFE", "reward", "mean"), table)


def _interval(row: Mapping[str, Any] | None) -> str:
    values = [(row or {}).get(name) for name in ("mean", "low", "high")]
    mean, low, high = (f"{value:.3f}" if value is not None and math.isfinite(value) else "–" for value in values)
    return "–" if mean == "–" else f"{mean} [{low}, {high}]"


def _name(row: Mapping[str, Any]) -> str:
    """Of an extension as the configuration names it."""
    return str(row.get("name") or row.get("use") or "")


def _place(source: object) -> str:
    """A source without the folders of the machine that it lies on."""
    text = str(source)
    return text if text.startswith("builtin:") or _is_hub_id(text) or not text else Path(text).name


def _unknown(field: str) -> str:
    return f"{_UNKNOWN} `{field}`."


def _prose(text: object) -> str:
    """Markdown of the configuration, without HTML, links that run code, and headings that would end its section."""
    prose = html.escape(printable(str(text or "").strip()), quote=False)
    prose = re.sub(r"(\]\(\s*|\]:\s*)(javascript|vbscript|data)\\*:", r"\1\2%3A", prose, flags=re.I)
    return re.sub(r"^( {0,3})(#+(?=\s|$)|=+\s*$|-+\s*$)", r"\1\\\2", prose, flags=re.M)


def _text(value: object) -> str:
    """One line of text: no HTML, and no Markdown but code; an address in it becomes no link."""
    line = html.escape(printable(" ".join(str(value).split())), quote=False)
    return re.sub(r"[\\*\[\]~@]|:(?=//)|(?<=www)\.|(?<!\w)_|_(?!\w)|^[#>+]|^-(?!\d)", r"\\\g<0>", line)


def _code(name: object) -> str:
    """A name as code."""
    return "`" + printable(" ".join(str(name).replace("`", "'").split())) + "`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    """A Markdown table; a bar in a cell would end it."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
