"""The policy on the shipped UNet: the ratio, the taps, and where gradients may go."""

import pytest
import torch

from latentac.backbones import BACKBONES, load_backbone
from latentac.config import Policy as PolicySettings
from latentac.critic import Critic
from latentac.diffusion import DDIM
from latentac.distributed import noise_for
from latentac.policy import Policy
from latentac.rollout import rollout
from latentac.shapes import builtin_pipeline
from latentac.types import flatten_steps

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square", "a cyan circle and a red square"]


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def backbone(request):
    torch.set_num_threads(1)
    return load_backbone(request.param, builtin_pipeline("shapes-unet"), CPU)


@pytest.fixture(scope="module")
def critic(backbone):
    torch.manual_seed(0)
    critic = Critic(backbone.tap_shapes, backbone.text_width, ("a", "b"), 32, 2, 2)
    torch.nn.init.normal_(critic.heads.weight)
    return critic.eval()


def roll(backbone, critic, kernel, num_steps=4, steering=None):
    noise = noise_for([(i,) for i in range(len(PROMPTS))], 0, num_steps, backbone.latent_shape)
    return rollout(Policy(backbone, kernel), critic, PROMPTS, backbone.encode(PROMPTS), noise, steering=steering)


@pytest.mark.parametrize("kernel", [DDIM(1.0), DDIM(0.5)], ids=repr)
def test_the_ratio_is_bitwise_1_before_the_first_update(backbone, critic, kernel):
    """log p of the update equals that of the rollout to the last bit, though the rows come shuffled over images and
    steps, in another batch size and with gradients on."""
    trajectory = roll(backbone, critic, kernel)
    images, steps = trajectory.log_probs.shape
    rows = torch.randperm(images * steps, generator=torch.Generator().manual_seed(1))[:7]
    batch = flatten_steps(trajectory, torch.zeros(images, steps), rows // steps, rows % steps)
    backbone.module.requires_grad_(True)
    transition = Policy(backbone, kernel).transition(batch.latents, batch.sigma, batch.sigma_next, batch.conditioning)
    log_probs = transition.log_prob(batch.next_latents)
    backbone.module.requires_grad_(False)
    assert log_probs.requires_grad
    assert torch.equal(log_probs.detach(), batch.old_log_probs)
    assert torch.equal(transition.mean.detach(), batch.old_means)


def test_a_rollout_keeps_its_axes(backbone, critic):
    """K + 1 latents, K values a head, K - 1 densities (the last DDIM step is deterministic), float32 throughout."""
    trajectory = roll(backbone, critic, DDIM(1.0))
    assert trajectory.latents.shape == (4, 5, *backbone.latent_shape)
    assert trajectory.values.shape == (4, 4, 2)
    assert trajectory.log_probs.shape == (4, 3)
    assert trajectory.means.shape == (4, 3, *backbone.latent_shape)
    for tensor in (trajectory.latents, trajectory.values, trajectory.log_probs, trajectory.sigmas):
        assert tensor.dtype == torch.float32
        assert bool(tensor.isfinite().all())
    pictures = backbone.decode(trajectory.clean)
    assert pictures.dtype == "uint8"
    assert pictures.shape == (4, 32, 32, 3)


def test_noise_depends_on_the_image_alone(backbone, critic):
    """An image's rollout is bitwise the same in blocks of 16 and of 32: blocks may be cut and dealt anywhere."""
    prompts = PROMPTS * 8
    noise = noise_for([(i,) for i in range(32)], 0, 4, backbone.latent_shape)
    policy = Policy(backbone, DDIM(1.0))
    whole = rollout(policy, critic, prompts, backbone.encode(prompts), noise)
    part = rollout(policy, critic, prompts[16:], backbone.encode(prompts[16:]), noise[16:])
    assert torch.equal(part.latents, whole.latents[16:])
    assert torch.equal(part.values, whole.values[16:])


def test_schedules_descend_to_0_and_keep_their_floats(backbone):
    """Trailing levels from the noisiest that the model was trained on; each is found again exactly."""
    schedule = backbone.schedule(10)
    assert schedule.shape == (11,)
    assert bool((schedule.diff() < 0).all())
    assert float(schedule[-1]) == 0
    assert torch.equal(backbone.schedule(10), schedule)
    assert float(schedule[0]) == float(backbone.schedule(20)[0])


def test_the_critic_follows_text_time_and_state(backbone, critic):
    """Each of prompt, noise level and latents changes the value: none is ignored."""
    policy, sigmas = Policy(backbone, DDIM(1.0)), backbone.schedule(4)
    latents = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))

    def value(latents, sigma, prompt):
        conditioning = backbone.encode([prompt])
        with torch.no_grad():
            output = policy.forward(latents, sigma[None], sigma[None] / 2, conditioning)
            return critic(output.taps, sigma[None], conditioning)

    plain = value(latents, sigmas[1], PROMPTS[0])
    assert not torch.equal(plain, value(latents, sigmas[1], PROMPTS[1]))
    assert not torch.equal(plain, value(latents, sigmas[2], PROMPTS[0]))
    assert not torch.equal(plain, value(latents + 0.1, sigmas[1], PROMPTS[0]))


def test_the_running_scale_keeps_predictions(critic):
    """Folding in rewards of another scale changes the heads' unit and not what they say (PopArt)."""
    fresh = Critic({"middle": (8, 4, 4)}, 16, ("a", "b"), 32, 2, 2)
    torch.nn.init.normal_(fresh.heads.weight)
    from latentac.types import Conditioning

    arguments = {"middle": torch.randn(5, 8, 4, 4)}, torch.rand(5), Conditioning(torch.randn(5, 3, 16))
    first = torch.tensor([[0.0, 10.0], [1.0, 30.0]])
    fresh.update_scale(first)
    torch.testing.assert_close(fresh.mean, torch.tensor([0.5, 20.0]))
    torch.testing.assert_close(fresh.std, torch.tensor([0.5, 10.0]))
    before = fresh(*arguments)
    fresh.update_scale(torch.tensor([[3.0, -50.0]] * 3))
    torch.testing.assert_close(fresh(*arguments), before, rtol=1e-4, atol=1e-3)
    everything = torch.cat([first, torch.tensor([[3.0, -50.0]] * 3)])
    torch.testing.assert_close(fresh.mean, everything.mean(0))
    torch.testing.assert_close(fresh.std, everything.std(0, correction=0))


def test_a_critic_is_saved_and_loaded_bitwise(critic, tmp_path):
    """model.safetensors and config.json are all of it."""
    critic.save(tmp_path / "critic")
    loaded = Critic.load(tmp_path / "critic", CPU)
    assert loaded.reward_names == critic.reward_names
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), critic.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_what_is_saved_samples_as_what_was_trained(adaptation, tmp_path):
    """The saved folder is plain diffusers, adapters merged, and gives the adapted model's predictions."""
    backbone = load_backbone("unet", builtin_pipeline("shapes-unet"), CPU)
    backbone.adapt(PolicySettings(adaptation=adaptation, lora_rank=4))
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.ones_like(parameter))
    backbone.save(tmp_path / "saved")
    loaded = load_backbone("unet", tmp_path / "saved", CPU)
    arguments = torch.randn(2, *backbone.latent_shape), backbone.schedule(4)[:1].expand(2), backbone.encode(PROMPTS[:2])
    with torch.no_grad():
        expected, found = backbone.predict(*arguments)[0], loaded.predict(*arguments)[0]
    torch.testing.assert_close(found.noise, expected.noise, rtol=1e-3, atol=1e-4)
    assert not list((tmp_path / "saved").rglob("*.bin"))
