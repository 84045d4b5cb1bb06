"""Where trajectories, features and replay are kept: on the device, in the host's memory, or nowhere. Results stay."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from latentac.config.learning import Memory
from latentac.method.records import Conditioning, Trajectory, ValueGradients, flatten_steps
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation import sizing
from latentac.runs.resolution import resolve_all
from latentac.sampling.policy import configured_policy
from latentac.training.critic_learning import Replay
from latentac.training.distributed import Mesh
from latentac.training.value_pretraining import States, new_critic, pretrain
from latentac.worlds.builtin import builtin_pipeline
from latentac.worlds.prompts import load_prompts
from tests.latentac.trainers import Brightness, configured, make_config, make_trainer, same, shipped, snapshot

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("settings", "size", "device", "place"),
    [
        ({}, 2**33, "cuda", "device"),
        ({}, 2**33 + 1, "cuda", "host"),
        ({}, 2**60, "cpu", "host"),
        ({"host_states_gib": 2.0}, 2**31 + 1, "cpu", "again"),
        ({"host_states_gib": 2.0}, 2**31 + 1, "cuda", "device"),
        ({"states_gib": 1.0, "host_states_gib": 2.0}, 2**31, "cuda", "host"),
        ({"states_gib": 0.0, "host_states_gib": 0.0}, 1, "cuda", "again"),
    ],
)
def test_features_are_kept_where_they_fit(settings: dict[str, float], size: int, device: str, place: str) -> None:
    assert Memory.model_validate(settings).place_of_features(size, device) == place


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("num_queries", [0, 2])
def test_features_that_are_computed_again_are_the_same(
    name: str, num_queries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Bitwise: each pass of value pretraining, its measures on held-out prompts, and the critic at the end."""

    def fitted(**memory: Any) -> tuple[Any, dict[str, Tensor]]:
        config = make_config(
            name,
            critic={"body": {"use": "frozen_taps", "num_queries": num_queries}},
            pretrain={"num_images": 32, "num_held_out_images": 16, "num_passes": 2, "minibatch_states": 32},
            train={"block_images": 16, "images_per_iteration": 16, "memory": memory},
        )
        policy = configured_policy(config, shipped(name))
        critic = new_critic(config, policy)
        rewards, prompts = [configured(Brightness())], load_prompts("builtin:shapes")
        history, scored = pretrain(config, policy, critic, rewards, prompts)
        assert scored is not None
        return history, critic.state_dict() | scored.tensors()

    caplog.set_level("INFO", "latentac")
    kept = fitted()
    assert "each pass computes" not in caplog.text
    again = fitted(host_states_gib=0.0)
    assert caplog.text.count("each pass computes") == 2
    assert kept[0] == again[0]
    assert same(kept[1], again[1])


def test_training_from_the_host_s_memory_is_the_same() -> None:
    """Bitwise on a CPU, where it is the same memory."""
    sections: dict[str, Any] = {"critic": {"replay_images": 8}, "algorithm": {"value_gradient": 1.0}}
    host = {"trajectories": "host", "states_gib": 0.0}
    one, other = make_trainer(**sections), make_trainer(**sections, train={"memory": host})
    for trainer in (one, other):
        for _ in range(2):
            trainer.iterate()
    assert same(snapshot(one), snapshot(other))
    assert (one.last_images() == other.last_images()).all()


def trajectory() -> Trajectory:
    """Of 4 images and 3 steps, two of them stochastic, all of it on a GPU. Within a FakeTensorMode."""
    with GPU:
        return Trajectory(
            Conditioning(torch.zeros(4, 5, 6), torch.zeros(4, 7)),
            torch.zeros(4, 4, 2, 8, 8),
            torch.zeros(4),
            torch.zeros(4, 2, 2, 8, 8),
            torch.zeros(4, 2),
            torch.zeros(4, 3, 1),
            {"middle": torch.zeros(4, 3, 9)},
            ValueGradients(torch.zeros(4, 2, 2, 8, 8), torch.zeros(4, 2, dtype=torch.bool)),
        )


def devices(record: Any) -> set[str]:
    """Of all tensors within a record."""
    if isinstance(record, Tensor):
        return {record.device.type}
    if isinstance(record, dict):
        return set().union(*map(devices, record.values()))
    return set().union(*map(devices, vars(record).values())) if hasattr(record, "__dataclass_fields__") else set()


@pytest.mark.parametrize("place", [CPU, GPU], ids=str)
def test_a_minibatch_is_on_the_gpu_wherever_the_trajectory_is(place: torch.device) -> None:
    """Torch's fake tensors have the devices of a machine with a GPU, and refuse an operation across them."""
    with FakeTensorMode():
        kept = trajectory().kept_on(place)
        assert {feature.device.type for feature in kept.features.values()} == devices(kept.conditioning) == {place.type}
        assert devices(kept.latents) == devices(kept.means) == devices(kept.value_gradients) == {place.type}
        rows = torch.zeros(3, dtype=torch.int64, device=place)
        minibatch = flatten_steps(kept, torch.zeros(4, 2, device=GPU), rows, rows)
        assert devices(minibatch) == {"cuda"}
        assert minibatch.latents.shape == (3, 2, 8, 8)


@pytest.mark.parametrize("again", [False, True])
def test_the_critic_s_inputs_are_on_the_gpu_wherever_they_are_kept(again: bool) -> None:
    """Features of the host's memory, or those of latents there."""
    with FakeTensorMode():
        made = trajectory()
        host = made.kept_on(CPU)

        def observed(latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
            assert devices(latents) == devices(sigma) == devices(conditioning) == {"cuda"}
            return {"middle": latents.flatten(1)}

        given: dict[str, Any] = {"latents": host.latents[:, :-1], "observe": observed} if again else {}
        kept = {} if again else dict(host.features)
        prompts = torch.zeros(4, dtype=torch.int64, device=GPU)
        states = States(kept, made.clean, made.sigmas[:-1], host.conditioning, made.values[:, 0], prompts, **given)
        features, sigma, conditioning = states.inputs(torch.arange(6, device=GPU))
        assert devices(features) == devices(sigma) == devices(conditioning) == {"cuda"}
        assert features["middle"].shape[0] == 6


def test_a_replay_that_grows_beyond_its_room_moves_to_the_host() -> None:
    """Its latents alone; new images go where it is."""
    trainer = make_trainer(critic={"replay_images": 100}, train={"memory": {"states_gib": 6 * 128 * 4 / 2**30}})
    learner = trainer.learner
    assert learner is not None
    learner.mesh = Mesh.single(GPU)
    with FakeTensorMode(), GPU:
        new = Replay(torch.zeros(4, 2, 8, 8), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
        small = learner._placed(new)
        assert devices(small) == {"cuda"}
        large = learner._placed(small.extended(new, 100))
        more = large.extended(new, 100)
        for replay in (large, more):
            assert devices(replay.clean) == {"cpu"}
            assert devices(replay.rewards) == devices(replay.prompts) == {"cuda"}
        assert len(more.clean) == 12


def needed(device: str, **memory: Any) -> sizing.Requirements:
    overrides = ["critic.replay_images=100000", "train.num_workers=1", "critic.body.num_queries=4"]
    overrides += [f"train.memory.{name}={value}" for name, value in memory.items()]
    config = resolve_all(recipe_fields("shapes-unet-smoke", "", overrides)).config
    return sizing.requirements(config, builtin_pipeline("shapes-unet"), 100, device)


def test_what_is_not_on_the_gpu_is_not_counted_there() -> None:
    """And the dry run says where it is."""
    plain = needed("cuda")
    for memory, item, words in (
        ({"trajectories": "host"}, "trajectories", "in the host's memory"),
        ({"states_gib": 0.0}, "features of value pretraining", "in the host's memory"),
        ({"states_gib": 0.0, "host_states_gib": 0.0}, "features of value pretraining", "computes them again"),
        ({"states_gib": 0.0}, "replay", "in the host's memory"),
    ):
        less = needed("cuda", **memory)
        assert "on the GPU" in plain.kept[item]
        assert words in less.kept[item]
        assert less.memory["images"] < plain.memory["images"]
        assert sizing.describe(less)[-1].startswith("kept: ")
    assert needed("cpu").kept == {}
    assert needed("cpu").memory == needed("cpu", trajectories="host", states_gib=0.0).memory
    again = needed("cpu", host_states_gib=0.0)
    assert list(again.kept) == ["features of value pretraining"]
    assert again.memory["images"] < needed("cpu").memory["images"]
