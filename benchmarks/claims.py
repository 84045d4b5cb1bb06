"""What is claimed, the comparison that decides each claim, and its verdict.

A verdict needs an interval over at least three seeds. A claim holds if the whole interval is on its side of the bound.
It does not hold if the whole interval is on the other side. Otherwise it is undecided. Each interval is a 95 % interval
on its own: among many claims, a few verdicts are wrong by chance.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Results = Mapping[str, Mapping[str, Any]]
"""<experiment>-<recipe> -> its aggregated file."""

Word = Literal["holds", "does not hold", "undecided"]
MIN_SEEDS = 3
EXPLAINED_VARIANCE_MARGIN = 0.05
COST_BOUND = 1.10
JUDGE_GAIN = 0.15
OVERLAP_BOUND = 1.15
SPEEDUP_BOUND = 1.7
PARTICLE_BOUND, GRADIENT_BOUND = 1.10, 2.5
BATCHING_BOUND, PROBE_SECONDS, MIN_PROBES = 1.5, 0.1, 100
MULTIPLES = (1, 2, 4, 8, 16)
"""Of K: numbers of network evaluations per image at which steering methods are compared."""
BODY_MARGIN = 0.03
"""By how much (as a share of images) a costlier critic body may be better before the cheap one counts as worse."""


@dataclass(frozen=True)
class Verdict:
    """word; reason: the numbers and why they decide, one line."""

    word: Word
    reason: str


@dataclass(frozen=True)
class Claim:
    """sentence: what is claimed; experiment: whose results decide it; decide: how."""

    sentence: str
    experiment: str
    decide: Callable[[Mapping[str, Any]], Verdict]

    def verdict(self, results: Results, recipe: str) -> Verdict:
        found = results.get(f"{self.experiment}-{recipe}")
        return self.decide(found) if found else Verdict("undecided", "not run yet")


def judge(
    interval: Mapping[str, Any] | None, bound: float, *, above: bool = True, unit: str = "seeds", sign: str = "+"
) -> Verdict:
    """Is the number above (or below) the bound? Decided by the interval {mean, low, high, n}."""
    if interval is None:
        return Verdict("undecided", "not run yet")
    if interval["low"] is None or (unit == "seeds" and interval["n"] < MIN_SEEDS):
        return Verdict("undecided", f"{interval['mean']:{sign}.3f}, only {_count(interval['n'], unit)}")
    numbers = f"{_written(interval, sign)}, {_count(interval['n'], unit)}"
    low, high = (
        (interval["low"] - bound, interval["high"] - bound)
        if above
        else (bound - interval["high"], bound - interval["low"])
    )
    if low > 0:
        return Verdict("holds", numbers)
    if high < 0:
        return Verdict("does not hold", numbers)
    return Verdict("undecided", f"{numbers}: the interval contains {bound:g}")


def better(
    arm: str, metric: str = "final.shapes_verifier", bound: float = 0.0, *, above: bool = True
) -> Callable[..., Verdict]:
    """The reference is above (or below) `arm` by more than `bound`."""
    return lambda found: judge(found["differences"].get(arm, {}).get(metric), bound, above=above)


def above(arm: str, metric: str, bound: float = 0.0) -> Callable[..., Verdict]:
    """A number of one arm is above `bound`; `metric.last` is the last denoising step."""

    def decide(found: Mapping[str, Any]) -> Verdict:
        numbers = found["arms"].get(arm, {})
        steps = series(numbers, metric)
        return judge(steps[-1] if steps else numbers.get(metric), bound)

    return decide


def within(margin: float) -> Callable[..., Verdict]:
    """At each step, a critic from ten times the rollouts explains at most `margin` more than the pretrained one."""

    def decide(found: Mapping[str, Any]) -> Verdict:
        gaps = found.get("gaps", [])
        verdicts = [judge(gap, margin, above=False) for gap in gaps]
        if not verdicts:
            return Verdict("undecided", "not run yet")
        word: Word = "holds"
        for worse in ("undecided", "does not hold"):
            word = worse if any(verdict.word == worse for verdict in verdicts) else word
        worst = max(range(len(gaps)), key=lambda step: gaps[step]["mean"])
        return Verdict(word, f"largest gap at step {worst + 1} of {len(gaps)}: {verdicts[worst].reason}")

    return decide


def cheap(found: Mapping[str, Any]) -> Verdict:
    """Time of one iteration with the critic, divided by that of one DDPO iteration."""
    ratio = found["ratio"]
    interval = {**ratio, "mean": ratio["median"]}
    return judge(interval, COST_BOUND, above=False, unit="pairs of iterations", sign="")


def overlapped(found: Mapping[str, Any]) -> Verdict:
    """Time of rollouts and scoring of an iteration, divided by that of the longer of the two."""
    ratio = found["waits"]["ratio"]
    return judge({**ratio, "mean": ratio["median"]}, OVERLAP_BOUND, above=False, unit="iterations", sign="")


def scales(found: Mapping[str, Any]) -> Verdict:
    """Images per second of two workers on two cores, divided by those of one worker on one core."""
    speedup = found["speedup"]
    return judge({**speedup, "mean": speedup["median"]}, SPEEDUP_BOUND, above=True, unit="pairs of iterations", sign="")


def near(found: Mapping[str, Any], weights: str, multiple: int) -> list[Mapping[str, Any]]:
    """The points of these weights for which `multiple` K is the nearest number of evaluations; at most 5 % above it."""
    target = multiple * found["steps"]
    return [
        point
        for point in found["points"]
        if point["weights"] == weights
        and min(MULTIPLES, key=lambda each: abs(math.log(each * found["steps"] / point["nfe"]))) == multiple
        and point["nfe"] <= 1.05 * target
    ]


def steered_best(weights: str) -> Callable[..., Verdict]:
    """From 2 K evaluations on, the best method that uses the critic against best-of-N by the true reward."""

    def decide(found: Mapping[str, Any]) -> Verdict:
        verdicts = []
        for multiple in MULTIPLES[1:]:
            points = [point for point in near(found, weights, multiple) if point["critic"]]
            if points:
                best = max(points, key=lambda point: point["minus_control"]["mean"])
                verdict = judge(best["minus_control"], 0.0, unit="prompts")
                verdicts.append((verdict.word, f"{multiple} K: {best['label']} {_written(best['minus_control'], '+')}"))
        words = [word for word, _ in verdicts]
        word: Word = "holds"
        for worse in ("undecided", "does not hold"):
            word = worse if worse in words or not words else word
        return Verdict(word, "; ".join(reason for _, reason in verdicts) or "not run yet")

    return decide


def over_plain(weights: str, way: str, particles: int, choice: str) -> Callable[..., Verdict]:
    """One steering method against plain sampling."""

    def decide(found: Mapping[str, Any]) -> Verdict:
        points = [
            point
            for point in found["points"]
            if (point["weights"], point["way"], point["particles"], point["choice"])
            == (weights, way, particles, choice)
        ]
        return judge(points[0]["minus_plain"] if points else None, 0.0, unit="prompts")

    return decide


def step_cost(kind: str, bound: float) -> Callable[..., Verdict]:
    """Time of a steered rollout, divided by that of a plain one with the same number of rows."""

    def decide(found: Mapping[str, Any]) -> Verdict:
        ratio = found["cost"]["base"][kind]
        return judge({**ratio, "mean": ratio["median"]}, bound, above=False, unit="pairs of rollouts", sign="")

    return decide


def batched(method: str) -> Callable[..., Verdict]:
    """Images per second of a server that batches, divided by those of a server that does not."""

    def decide(found: Mapping[str, Any]) -> Verdict:
        ratio = found["throughput"][method]
        return judge({**ratio, "mean": ratio["median"]}, BATCHING_BOUND, unit="rounds", sign="")

    return decide


def probed(found: Mapping[str, Any]) -> Verdict:
    """The slowest of all probes; undecided if there are too few."""
    probes = found["probes"]
    word: Word = "holds" if probes["max"] <= PROBE_SECONDS else "does not hold"
    if probes["n"] < MIN_PROBES:
        word = "undecided"
    times = ", ".join(f"{name} {probes[name] * 1000:.0f} ms" for name in ("median", "p99", "max"))
    return Verdict(word, f"{times} of {probes['n']:,} probes")


def series(numbers: Mapping[str, Any], metric: str) -> list[Mapping[str, Any]]:
    """The intervals `<metric>.0`, `<metric>.1` ... of an arm, one per denoising step."""
    found: list[Mapping[str, Any]] = []
    while f"{metric}.{len(found)}" in numbers:
        found.append(numbers[f"{metric}.{len(found)}"])
    return found


CLAIMS: Sequence[Claim] = (
    *(
        Claim(
            f"With equal numbers of images and updates, ours is correct on more held-out prompts than {name}",
            "main",
            better(arm),
        )
        for arm, name in (
            ("ddpo", "DDPO"),
            ("grpo", "GRPO with groups of 4"),
            ("pixel", "the pixel critic"),
            ("latent_cnn", "the stand-alone latent critic"),
        )
    ),
    Claim(
        "The critic ranks the images of one prompt better than chance (rank correlation above 0 at the last step)",
        "main",
        above("ours", "rank_correlation"),
    ),
    Claim("The value gradient helps in training", "ablations", better("unguided")),
    Claim("Time conditioning of the critic helps", "ablations", better("no_time")),
    Claim("Value pretraining helps, with its images counted", "ablations", better("no_pretraining")),
    *(
        Claim(f"Lambda {number} is better than lambda 0.9", "ablations", better(arm, above=False))
        for arm, number in (("lambda_1", "1"), ("lambda_095", "0.95"))
    ),
    Claim("Replay of scored images for the critic helps", "ablations", better("replay", above=False)),
    Claim("Lambda 1 and replay together, as in ours, help", "ablations", better("ours", above=False)),
    *(
        Claim(
            f"Frozen taps are at most {BODY_MARGIN:g} worse than a {name} of the backbone",
            "ablations",
            better(arm, bound=-BODY_MARGIN),
        )
        for arm, name in (("lora", "LoRA copy"), ("copy", "full copy"))
    ),
    Claim(
        "With three rewards, one head per reward gains more than a shared head (mean gain in standard deviations)",
        "ablations",
        better("shared_head", "score"),
    ),
    Claim(
        "The verifier is higher after training on three rewards, one of them the verifier, than on `shapes_clip` alone",
        "hacking",
        better("clip_alone"),
    ),
    Claim(
        "Three rewards keep more diversity than `shapes_clip` alone (neither arm is trained on diversity)",
        "hacking",
        better("clip_alone", "diversity_kept"),
    ),
    Claim(
        "Three rewards change colourfulness less than `shapes_clip` alone (neither arm is trained on colourfulness)",
        "hacking",
        better("clip_alone", "drift.colourfulness", above=False),
    ),
    Claim(
        "A floor for `jpeg_compressibility` keeps it nearer to the base's mean than `shapes_clip` alone",
        "combination",
        better("clip_alone", "drift.jpeg_compressibility", above=False),
    ),
    Claim(
        "With that floor, `shapes_clip` ends higher than with the weighted sum of both",
        "combination",
        better("weighted_sum", "final.shapes_clip"),
    ),
    Claim(
        f"Training on tesseract raises rapidocr on held-out words by at least {JUDGE_GAIN:g}",
        "words",
        above("ours", "gain.rapidocr", JUDGE_GAIN),
    ),
    *(
        Claim(
            f"With equal numbers of images and updates, rapidocr reads ours better than {name}",
            "words",
            better(arm, "final.rapidocr"),
        )
        for arm, name in (("ddpo", "DDPO"), ("grpo", "GRPO with groups of 4"))
    ),
    Claim(
        "Training on `clip_score` as well narrows the gap between tesseract's gain and rapidocr's",
        "words",
        better("joint", "gap"),
    ),
    Claim(
        "Training on `clip_score` as well keeps more diversity",
        "words",
        better("joint", "diversity_kept", above=False),
    ),
    Claim(
        f"At each step, a critic from ten times the rollouts explains at most {EXPLAINED_VARIANCE_MARGIN:g} more of "
        "the variance",
        "critic",
        within(EXPLAINED_VARIANCE_MARGIN),
    ),
    Claim(
        f"With `frozen_taps`, an iteration takes at most {COST_BOUND:.2f} times as long as a DDPO iteration",
        "cost",
        cheap,
    ),
    Claim(
        "With a reward that waits 50 ms per image in a pool of processes, rollouts and scoring of an iteration take at "
        f"most {OVERLAP_BOUND:.2f} times as long as the longer of the two",
        "scoring",
        overlapped,
    ),
    Claim(
        f"Two workers on two cores do at least {SPEEDUP_BOUND:.1f} times the images per second of one on one core",
        "scaling",
        scales,
    ),
    *(
        Claim(
            f"On {weights} weights, the best critic-based method is correct more often than best-of-N by the true "
            "reward, at each number of evaluations from 2 K on",
            "steering",
            steered_best(weights),
        )
        for weights in ("base", "trained")
    ),
    *(
        Claim(
            f"On {weights} weights, the value gradient with one particle is correct more often than plain sampling",
            "steering",
            over_plain(weights, "value_gradient", 1, "none"),
        )
        for weights in ("base", "trained")
    ),
    *(
        Claim(
            f"On {weights} weights, resampling with 4 particles and the critic's choice is correct more often than "
            "plain sampling, without any call of the reward",
            "steering",
            over_plain(weights, "resampling", 4, "critic"),
        )
        for weights in ("base", "trained")
    ),
    Claim(
        f"A particle takes at most {PARTICLE_BOUND:.2f} times as long as a plain sample in a batch of the same size",
        "steering",
        step_cost("resampling", PARTICLE_BOUND),
    ),
    Claim(
        f"A rollout with a gradient at every step takes at most {GRADIENT_BOUND:g} times as long as a plain one",
        "steering",
        step_cost("value_gradient", GRADIENT_BOUND),
    ),
    *(
        Claim(
            f"With eight clients, batching gives at least {BATCHING_BOUND:g} times as many images per second, {name}",
            "serving",
            batched(method),
        )
        for method, name in (("none", "without steering"), ("value_gradient", "with the value gradient"))
    ),
    Claim(f"Under that load, every health probe is answered within {PROBE_SECONDS * 1000:.0f} ms", "serving", probed),
)


def verdicts(experiment: str, found: Mapping[str, Any]) -> Iterator[str]:
    """One line per claim that an experiment's file decides."""
    for claim in CLAIMS:
        if claim.experiment == experiment:
            verdict = claim.decide(found)
            yield f"{verdict.word}: {claim.sentence} ({verdict.reason})"


def _written(interval: Mapping[str, Any], sign: str) -> str:
    return f"{interval['mean']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number != 1 else f"1 {unit.removesuffix('s')}"
