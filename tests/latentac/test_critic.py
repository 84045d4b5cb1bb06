"""The critic's bodies on each shipped backbone: what they see, what they learn, and whom they leave alone."""

import pytest
import torch

from latentac.critic import BODIES, Critic
from latentac.method.randomness import noise_for
from latentac.method.records import Conditioning
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import Keep, rollout
from latentac.training.critic_learning import Learner, Replay
from latentac.training.distributed import Mesh
from latentac.training.sharding import Sharding
from latentac.training.value_pretraining import new_critic
from tests.latentac.trainers import BODY, BRIGHTNESS, CPU, PROMPTS, REDNESS, SHIPPED, make_config, shipped

EACH = [(name, body) for name in SHIPPED for body in BODIES]
OWN_BACKBONE = ("lora", "copy")
TWO = [BRIGHTNESS, REDNESS]


def make(name, body, opinion=0.0, **settings):
    """(config, policy, critic) with two heads; opinion: standard deviation of noise on all weights, heads included."""
    framework = {"shared_head", "replay_images", "num_passes", "learning_rate"}
    adapters = {"rank": 4, "alpha": 8} if body == "lora" else {}
    own = {"use": body, **BODY, "dropout": 0.0, **adapters}
    own |= {key: value for key, value in settings.items() if key not in framework}
    critic_settings = {"body": own, "learning_rate": 5e-3, "num_passes": 8, "updates_per_pass": 1}
    critic_settings |= {key: value for key, value in settings.items() if key in framework}
    train = {"images_per_iteration": 4, "block_images": 4, "updates_per_iteration": 1}
    config = make_config(name, critic=critic_settings, rewards=TWO, train=train)
    policy = Policy(shipped(name).clone(), KERNELS.make(config.kernel))
    critic = new_critic(config, policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(opinion * torch.randn(parameter.shape, generator=generator))
    return config, policy, critic


def ask(policy, critic, latents, sigma, conditioning):
    """[B, M]."""
    prediction, taps = policy.backbone.predict(latents, sigma, conditioning)
    return critic(critic.features(latents, prediction, taps), sigma, conditioning)


def some_state(backbone):
    latents = torch.randn(len(PROMPTS), *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, backbone.schedule(4)[1].expand(len(PROMPTS)), backbone.encode(PROMPTS)


def make_learner(config, policy, critic):
    return Learner(
        config.train,
        policy,
        critic,
        policy.backbone.encode(PROMPTS),
        Sharding(Mesh.single(CPU), wanted=False),
        num_steps=config.kernel.num_steps,
        weights=torch.tensor([reward.weight for reward in config.rewards]),
        seed=config.seed,
    )


def lesson(policy, critic):
    """Four rollouts with features, the prompt of each, and two rewards on different scales that the latents decide."""
    prompts = torch.arange(4)
    noise = noise_for([(i,) for i in range(4)], 0, 2, policy.backbone.latent_shape)
    trajectory = rollout(policy, critic, policy.backbone.encode(PROMPTS), noise, keep=Keep(features=True))
    mean = trajectory.clean.flatten(1).mean(1)
    return trajectory, prompts, torch.stack([mean, 1000 * mean + 5], 1)


@pytest.mark.parametrize(("name", "body"), EACH)
def test_a_new_critic_expects_nothing(name, body):
    """Zero for every state and head, float32 [B, M], whatever the body made of the state."""
    _, policy, critic = make(name, body)
    state = some_state(policy.backbone)
    with torch.no_grad():
        values = ask(policy, critic, *state)
        prediction, taps = policy.backbone.predict(*state)
        summary = critic.body(critic.features(state[0], prediction, taps), *state[1:])
    assert torch.equal(values, torch.zeros(len(PROMPTS), 2))
    assert summary.shape == (len(PROMPTS), critic.body.width)
    assert bool(summary.isfinite().all())
    assert float(summary.std(0).max()) > 0


@pytest.mark.parametrize(("name", "body"), EACH)
def test_a_value_has_a_gradient_by_the_latents(name, body):
    """Through the denoiser's own forward, or past it: what steering climbs is finite and nowhere flat."""
    _, policy, critic = make(name, body, opinion=0.05)
    latents, sigma, conditioning = some_state(policy.backbone)
    latents.requires_grad_(True)
    (gradient,) = torch.autograd.grad(ask(policy, critic, latents, sigma, conditioning).sum(), latents)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize(("name", "body"), EACH)
def test_learning_lowers_the_loss_and_leaves_the_actor_alone(name, body):
    """One `learn` on four rollouts, from what the rollout kept and from forward-noised states, comes closer to the
    rewards at every noise level; the actor, which could be trained, gets no gradient and does not move."""
    config, policy, critic = make(name, body, replay_images=4)
    policy.backbone.adapt(config.policy)
    actor = {key: parameter.detach().clone() for key, parameter in policy.backbone.module.named_parameters()}
    trajectory, prompts, rewards = lesson(policy, critic)
    assert all(not feature.requires_grad for feature in trajectory.features.values())
    learner = make_learner(config, policy, critic)
    learner.observe(trajectory.clean, rewards, prompts)

    def error():
        with torch.no_grad():
            values = [
                critic.standardised(
                    {n: f[:, k] for n, f in trajectory.features.items()}, level, trajectory.conditioning
                )
                for k, level in enumerate(trajectory.sigmas[:-1, None].expand(-1, 4))
            ]
        return (torch.stack(values, 1) - critic.standardise(rewards)[:, None]).square().mean((0, 2))

    before = error()
    torch.testing.assert_close(before, torch.ones(2))
    reported = learner.learn(0, [(0, trajectory, rewards[:, None].expand(-1, 2, -1))])
    assert bool((error() < before).all())
    assert 0 < reported < 0.5
    for key, parameter in policy.backbone.module.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, actor[key])


@pytest.mark.parametrize(("name", "body"), EACH)
def test_a_critic_is_saved_and_loaded_bitwise(name, body, tmp_path):
    """model.safetensors and config.json are all of it: same weights, scale, names, and values to the last bit."""
    _, policy, critic = make(name, body, opinion=0.05)
    critic.update_scale(torch.tensor([[0.1, 10.0], [0.3, 50.0]]))
    critic.save(tmp_path / "critic")
    assert {path.name for path in (tmp_path / "critic").iterdir()} == {"model.safetensors", "config.json"}
    loaded = Critic.load(tmp_path / "critic", policy.backbone)
    assert loaded.reward_names == critic.reward_names
    assert loaded.settings == critic.settings
    expected = critic.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = some_state(policy.backbone)
    with torch.no_grad():
        assert torch.equal(ask(policy, loaded, *state), ask(policy, critic, *state))


@pytest.mark.parametrize(("name", "body"), EACH)
def test_a_loaded_critic_goes_on_learning_with_all_that_it_has(name, body, tmp_path):
    """After value pretraining it was frozen and saved; joint training then moves the same weights as before: of a
    backbone of its own the adapters or all, at their own rate, and never what `lora` keeps frozen."""
    config, policy, critic = make(name, body, opinion=0.05, num_passes=1)
    critic.eval().requires_grad_(False).save(tmp_path / "critic")
    critic = Critic.load(tmp_path / "critic", policy.backbone)
    policy.backbone.adapt(config.policy)
    learner = make_learner(config, policy, critic)
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    assert rates == [5e-3, 1e-4][: 1 + (body in OWN_BACKBONE)]
    before = {key: parameter.detach().clone() for key, parameter in critic.named_parameters()}
    trajectory, prompts, rewards = lesson(policy, critic)
    learner.observe(trajectory.clean, rewards, prompts)
    learner.learn(0, [(0, trajectory, rewards[:, None].expand(-1, 2, -1))])
    moved = {key for key, parameter in critic.named_parameters() if not torch.equal(parameter, before[key])}
    own = {key for key in moved if key.startswith("body.backbone.")}
    assert moved - own
    assert bool(own) == (body in OWN_BACKBONE)
    if body == "lora":
        assert all("lora_" in key for key in own)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("body", sorted(set(BODIES) - set(OWN_BACKBONE)))
@pytest.mark.parametrize("queries", [0, 2])
def test_the_head_knows_time_and_text_only_if_it_gets_them(name, body, queries):
    """With what the body sees held fixed, noise level and prompt change the value where they are conditioned on, and
    not by a bit where they are not."""
    for time, text in ((True, True), (False, True), (True, False)):
        settings = {"time_conditioning": time, "text_conditioning": text, "num_queries": queries}
        _, policy, critic = make(name, body, opinion=0.05, **settings)
        latents, sigma, conditioning = some_state(policy.backbone)
        with torch.no_grad():
            prediction, taps = policy.backbone.predict(latents, sigma, conditioning)
            features = critic.features(latents, prediction, taps)
            value = critic(features, sigma, conditioning)
            later = critic(features, sigma / 2, conditioning)
            other = critic(features, sigma, policy.backbone.encode(PROMPTS[::-1]))
        assert torch.equal(value, later) == (not time)
        assert torch.equal(value, other) == (not text)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("queries", [0, 2])
def test_every_part_of_the_state_counts(name, queries):
    """Latents, noise level and prompt each change the value that the denoiser's own features give."""
    _, policy, critic = make(name, "frozen_taps", opinion=0.05, num_queries=queries)
    latents, sigma, conditioning = some_state(policy.backbone)
    with torch.no_grad():
        value = ask(policy, critic, latents, sigma, conditioning)
        for other in (
            (latents + 0.1, sigma, conditioning),
            (latents, sigma / 2, conditioning),
            (latents, sigma, policy.backbone.encode(PROMPTS[::-1])),
        ):
            assert bool((ask(policy, critic, *other) != value).all())


def test_a_shared_head_says_one_thing_in_every_unit():
    """Its standardised columns are equal; each is put in its reward's own unit. It learns the weighted rewards."""
    _, policy, critic = make(SHIPPED[0], "frozen_taps", opinion=0.05, shared_head=True)
    critic.update_scale(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    latents, sigma, conditioning = some_state(policy.backbone)
    with torch.no_grad():
        prediction, taps = policy.backbone.predict(latents, sigma, conditioning)
        features = critic.features(latents, prediction, taps)
        first, second = critic.standardised(features, sigma, conditioning).unbind(1)
        values = critic(features, sigma, conditioning)
    assert torch.equal(first, second)
    assert critic.heads.out_features == 1
    torch.testing.assert_close(values, torch.stack([1 + first, 20 + 10 * second], 1))


def test_the_running_scale_keeps_predictions():
    """Folding in rewards of another scale changes the heads' unit and not what they say (PopArt)."""
    _, policy, critic = make(SHIPPED[0], "latent_cnn", opinion=0.1)
    first = torch.tensor([[0.0, 10.0], [1.0, 30.0]])
    critic.update_scale(first)
    torch.testing.assert_close(critic.mean, torch.tensor([0.5, 20.0]))
    torch.testing.assert_close(critic.std, torch.tensor([0.5, 10.0]))
    state = some_state(policy.backbone)
    with torch.no_grad():
        before = ask(policy, critic, *state)
        more = torch.tensor([[3.0, -50.0]] * 3)
        critic.update_scale(more)
        torch.testing.assert_close(ask(policy, critic, *state), before, rtol=1e-4, atol=1e-3)
    everything = torch.cat([first, more])
    torch.testing.assert_close(critic.mean, everything.mean(0))
    torch.testing.assert_close(critic.std, everything.std(0, correction=0))


def numbered(first, last):
    """Scored images that carry their number in all parts."""
    number = torch.arange(first, last)
    return Replay(number[:, None].float(), number[:, None] * torch.ones(2), number)


def test_the_newest_images_are_remembered(tmp_path):
    """Oldest first, never more than asked for, all parts alike; a file gives them back bitwise, no file nothing."""
    replay = numbered(0, 3).extended(numbered(3, 8), 4)
    assert replay.prompts.tolist() == [4, 5, 6, 7]
    assert torch.equal(replay.clean[:, 0], replay.rewards[:, 1])
    assert numbered(0, 2).extended(numbered(2, 3), 4).prompts.tolist() == [0, 1, 2]
    assert Replay.load(tmp_path, CPU) is None
    replay.save(tmp_path)
    loaded = Replay.load(tmp_path, CPU)
    assert loaded is not None
    assert all(torch.equal(tensor, loaded.tensors()[key]) for key, tensor in replay.tensors().items())


def test_memory_begins_with_pretraining_and_survives_a_checkpoint():
    """A learner starts from the images that pretraining scored, adds each iteration's, and another one that loads its
    state has the same; one that is to remember nothing has nothing."""
    config, policy, critic = make(SHIPPED[0], "latent_cnn", replay_images=6)
    trajectory, prompts, rewards = lesson(policy, critic)
    before = Replay(trajectory.clean + 1, rewards, prompts)
    learner = make_learner(config, policy, critic)
    learner.begin_with(before)
    learner.observe(trajectory.clean, rewards, prompts)
    assert learner.replay is not None
    assert torch.equal(learner.replay.clean, torch.cat([before.clean[-2:], trajectory.clean]))
    state = {key: tensor.clone() for key, tensor in learner.state().items()}
    other = make_learner(*make(SHIPPED[0], "latent_cnn", replay_images=6))
    other.load_state(state)
    assert other.replay is not None
    assert all(torch.equal(t, other.replay.tensors()[key]) for key, t in learner.replay.tensors().items())

    forgetful = make_learner(*make(SHIPPED[0], "latent_cnn"))
    forgetful.begin_with(before)
    forgetful.observe(trajectory.clean, rewards, prompts)
    assert forgetful.replay is None


def test_without_queries_places_do_not_count():
    """Pooling reads channels, not where in the image they are strong; attention reads that too."""
    for queries, blind in ((0, True), (2, False)):
        _, policy, critic = make("dit", "frozen_taps", opinion=0.05, num_queries=queries)
        latents, sigma, conditioning = some_state(policy.backbone)
        with torch.no_grad():
            prediction, taps = policy.backbone.predict(latents, sigma, conditioning)
            turned = {name: tap.rot90(1, (2, 3)) for name, tap in taps.items()}
            value, other = (
                critic(critic.features(latents, prediction, seen), sigma, conditioning) for seen in (taps, turned)
            )
        assert torch.allclose(value, other, rtol=1e-5, atol=1e-6) == blind


def test_a_prompt_that_is_padded_is_read_to_its_end():
    """Text tokens beyond those that the head reads, as a denoiser appends for an encoder that it does without, change
    nothing."""
    _, policy, critic = make(SHIPPED[0], "latent_cnn", opinion=0.05)
    latents, sigma, _ = some_state(policy.backbone)
    words = torch.randn(len(PROMPTS), 77, policy.backbone.text_width, generator=torch.Generator().manual_seed(2))
    longer = torch.cat([words, torch.zeros_like(words)], 1)
    with torch.no_grad():
        assert torch.equal(
            critic({"latents": latents}, sigma, Conditioning(words)),
            critic({"latents": latents}, sigma, Conditioning(longer)),
        )
