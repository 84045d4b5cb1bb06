"""When training stops, what it publishes, and how it comes back from a divergence."""

import json
from pathlib import Path

import pytest
import torch

from latentac.config.learning import DivergenceCheck, EarlyStopping
from latentac.system.errors import Diverged
from latentac.training.stability import best_iteration, diverged, stop_early, window_means
from tests.latentac.extensions import Stumbling
from tests.latentac.trainers import BRIGHTNESS, REDNESS, credited, make_trainer, rolled_out, same, snapshot
from tests.latentac.workers import prepared, train_here

STUMBLING = "algorithm.use=tests.latentac.extensions:Stumbling"
WATCHED = [
    BRIGHTNESS,
    {**REDNESS, "weight": 0.0},
]


def history(*rewards):
    return [{"rewards": {"held": reward, "trained": 1.0}} for reward in rewards]


def test_the_best_iteration_is_the_end_of_the_best_window():
    """By hand: window 2 over 1 3 5 2 4 has means 2 4 3.5 3, so the third iteration is the best, and an equal later
    window does not replace it; before the first full window it is the last there is."""
    stopping = EarlyStopping(reward="held", window=2, patience=2)
    assert window_means(stopping, history(1, 3, 5, 2, 4)) == [2.0, 4.0, 3.5, 3.0]
    assert best_iteration(stopping, history(1, 3, 5, 2, 4)) == 3
    assert best_iteration(stopping, history(1, 3, 5, 2, 4, 4)) == 3
    assert best_iteration(stopping, history(1, 3, 5, 2, 4, 5)) == 6
    assert best_iteration(stopping, history(9)) == 1
    assert best_iteration(EarlyStopping(reward="held", window=3), history(1, 9)) == 2


def test_a_rise_below_min_delta_is_none():
    """The best stays where it was until it is beaten by more than that."""
    stopping = EarlyStopping(reward="held", window=1, patience=2, min_delta=0.5)
    assert best_iteration(stopping, history(1.0, 1.4, 1.5)) == 1
    assert best_iteration(stopping, history(1.0, 1.4, 1.6)) == 3
    assert stop_early(stopping, history(1.0, 1.4, 1.5))
    assert not stop_early(stopping, history(1.0, 1.4, 1.6))


def test_training_stops_when_patience_is_at_its_end():
    """Two iterations after the best, and not one before; never where no rule is given or while it rises."""
    stopping = EarlyStopping(reward="held", window=2, patience=2)
    assert [stop_early(stopping, history(1, 3, 5, 2, 4)[:n]) for n in range(1, 6)] == [False] * 4 + [True]
    assert not stop_early(None, history(5, 4, 3, 2, 1))
    assert not stop_early(stopping, history(*range(50)))


@pytest.mark.parametrize(
    ("kl", "clip_share", "words"),
    [
        (0.5, 0.2, ""),
        (1.0, 0.9, ""),
        (1.5, 0.2, "kl is 1.5, beyond train.divergence.max_kl = 1"),
        (0.5, 0.95, "clip_share is 0.95, beyond train.divergence.max_clip_share = 0.9"),
        (float("nan"), 0.2, "kl is nan"),
        (0.1, float("inf"), "clip_share is inf"),
    ],
)
def test_an_iteration_beyond_a_bound_is_reported(kl, clip_share, words):
    """The bound itself is allowed; what is not a number is beyond every bound."""
    found = diverged(DivergenceCheck(), {"kl": kl, "clip_share": clip_share})
    assert found.startswith(words)
    assert bool(found) == bool(words)


def test_the_average_of_the_weights_is_its_closed_form(monkeypatch):
    """After n updates: d^n of the first weights and (1 - d) d^(n - i) of those after update i."""
    decay = 0.7
    trainer = make_trainer(policy={"ema_decay": decay, "learning_rate": 1e-3}, train={"divergence": {"max_kl": 1e3}})
    name = max(trainer.policy_learner.parameters, key=lambda key: trainer.policy_learner.parameters[key].numel())
    weights = [trainer.policy_learner.parameters[name].detach().clone()]
    step = trainer.policy_learner.optimizer.step

    def remember():
        step()
        weights.append(trainer.policy_learner.parameters[name].detach().clone())

    monkeypatch.setattr(trainer.policy_learner.optimizer, "step", remember)
    for _ in range(2):
        trainer.iterate()
    count = len(weights) - 1
    assert count == 4
    expected = decay**count * weights[0]
    for index, weight in enumerate(weights[1:], start=1):
        expected = expected + (1 - decay) * decay ** (count - index) * weight
    torch.testing.assert_close(trainer.policy_learner.ema[name], expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(trainer.policy_learner.ema[name], weights[-1])


def test_what_is_published_is_the_last_the_average_or_the_best():
    """Without a rule the last weights, with an average that, and with early stopping those of the best iteration: the
    average's, where there is one."""

    def run(decay, stopping):
        trainer = make_trainer(
            rewards=WATCHED,
            policy={"ema_decay": decay, "learning_rate": 1e-3},
            train={"early_stopping": stopping, "divergence": {"max_kl": 1e3, "max_clip_share": 1.0}},
        )
        trainer.iterate()
        after = snapshot(trainer)
        trainer.history[0]["rewards"]["redness"] = 1e9  # so that the first iteration is the best for good
        trainer.iterate()
        last = snapshot(trainer)
        trainer.publish_weights()
        return after, last, snapshot(trainer)

    def below(prefix, tensors):
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    _, last, published = run(0.0, None)
    assert same(below("actor.", last), below("actor.", published))
    _, last, published = run(0.5, None)
    assert same(below("ema.", last), below("actor.", published))
    assert not same(below("actor.", last), below("actor.", published))
    stopping = {"reward": "redness", "window": 1, "patience": 1}
    after, last, published = run(0.0, stopping)
    assert same(below("actor.", after), below("actor.", published))
    assert not same(below("actor.", last), below("actor.", published))
    after, last, published = run(0.5, stopping)
    assert same(below("ema.", after), below("actor.", published))
    assert not same(below("ema.", last), below("actor.", published))


def test_a_run_is_finished_when_early_stopping_says_so():
    """Before its iterations are done: the watched reward has not risen for as long as it may."""
    trainer = make_trainer(rewards=WATCHED, train={"early_stopping": {"reward": "redness", "window": 1, "patience": 2}})
    entry = trainer.iterate()
    before = trainer.finished
    trainer.history += [{**entry, "rewards": {"brightness": 1e9, "redness": 0.0}}] * 2
    assert (before, trainer.finished) == (False, True)
    assert trainer.iteration < trainer.config.train.num_iterations


def test_an_update_that_is_not_a_number_is_reported_with_its_place():
    """And one whose KL is beyond its bound, with the bound; neither becomes an entry of the history."""
    trainer = make_trainer(policy={"learning_rate": 1e-3, "warmup_updates": 0}, train={"divergence": {"max_kl": 1e-9}})
    with pytest.raises(Diverged, match=r"iteration 1: kl is .*, beyond train\.divergence\.max_kl = 1e-09"):
        trainer.iterate()
    assert trainer.iteration == 0
    trainer = make_trainer()
    with torch.no_grad():
        next(iter(trainer.policy_learner.parameters.values())).fill_(float("inf"))
    blocks = [credited(rolled_out(make_trainer(), index), 1.0) for index in range(2)]
    with pytest.raises(Diverged, match="iteration 1, update 1: the update is not finite"):
        trainer.policy_learner.update(blocks, trainer.iteration, 0, 1e-4)


def test_after_a_recovery_the_rate_is_lower():
    """By the factor of `train.divergence`, warm-up included, for the rest of the run."""
    trainer = make_trainer(
        policy={"warmup_updates": 2, "learning_rate": 1e-3}, train={"divergence": {"rate_factor": 0.1}}
    )
    rates = []
    for count in (0, 1):
        trainer.recoveries = [{}] * count
        for update in (0, 1):
            rates.append(trainer._rate(update))
    assert rates == pytest.approx([5e-4, 1e-3, 5e-5, 1e-4])


def stumble(monkeypatch, *calls):
    monkeypatch.setattr(Stumbling, "stumbles", calls)
    monkeypatch.setattr(Stumbling, "calls", 0)


def weights(space):
    manifest = space.finished("train")
    return manifest.metrics, {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}


def test_a_run_comes_back_from_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real worker whose second update is not a number, before there is any checkpoint, begins anew, the adapters of
    actor and critic included: with a rate factor of 1 it ends with the weights of a run that nothing happened to, and
    says so."""
    ends = []
    for name, calls in (("whole", ()), ("hurt", (3,))):
        stumble(monkeypatch, *calls)
        (tmp_path / name).mkdir()
        adapted = ["policy.adaptation=lora", "critic.body.use=lora", "critic.body.rank=4"]
        space = prepared(tmp_path / name, STUMBLING, *adapted, "train.divergence.rate_factor=1.0")
        assert train_here(tmp_path / name, monkeypatch) == (0, "")
        ends.append(weights(space))
    (metrics, expected), (recovered, found) = ends
    assert found == expected
    assert metrics["recoveries"] == []
    (recovery,) = recovered["recoveries"]
    assert recovery["from_iteration"] == 0
    assert recovery["where"] == "iteration 1, update 2"
    assert "not finite" in recovery["problem"]


def test_the_second_divergence_ends_a_run_and_the_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first one takes it back from iteration 4 to the checkpoint of the second; another one in iteration 4 is told
    to the launcher as Diverged, exit code 7. Resumed, it goes on from that checkpoint to the end."""
    stumble(monkeypatch, 14, 19)
    settings = ["train.num_iterations=4", "train.checkpoint_every=2"]
    space = prepared(tmp_path, STUMBLING, *settings)
    code, found = train_here(tmp_path, monkeypatch)
    assert code == 7
    assert json.loads(found)["kind"] == "Diverged"
    assert json.loads(found)["where"] == "iteration 4, update 1"
    assert space.store.read_json(f"checkpoints/{space.run}/LATEST")["key"].endswith("000002")
    assert Stumbling.calls == 20
    stumble(monkeypatch)
    assert train_here(tmp_path, monkeypatch) == (0, "")
    assert Stumbling.calls == 8
    metrics, _ = weights(space)
    assert metrics["iterations"] == 4
