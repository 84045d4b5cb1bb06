"""What a run needs is counted from its configuration and its weights' headers, and compared with what is there."""

import math
from typing import Any, NamedTuple

import pytest
import torch

from latentac.backbones import BACKBONES
from latentac.backbones.layout import Sizes
from latentac.config.learning import Policy
from latentac.critic import BODIES, Critic
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation import memory, sizing
from latentac.runs.preparation.model_sizes import Model
from latentac.runs.resolution import resolve_all
from latentac.sampling.encoding import KEPT_BYTES
from latentac.system.errors import ResourceError
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac import miniatures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
MODELS = {"unet": ("shapes-unet-smoke", "shapes-unet"), "dit": ("shapes-dit-smoke", "shapes-dit")}


def config(name="unet", **settings):
    overrides = [f"{path.replace('__', '.')}={value}" for path, value in settings.items()]
    return resolve_all(recipe_fields(MODELS[name][0], "", overrides)).config


def needed(name="unet", folder=None, **settings):
    return sizing.requirements(config(name, **settings), folder or builtin_pipeline(MODELS[name][1]), 100, "cpu")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_are_counted_from_headers_alone(name):
    """All of a part's tensors (a table of positions among them), and those of the adapters as they are attached."""
    folder = builtin_pipeline(MODELS[name][1])
    backbone = BACKBONES.build(name, folder, CPU)
    count = sum(each.numel() for each in backbone.module.parameters())
    full, lora = needed(name), needed(name, policy__adaptation="lora", policy__lora_rank=4)
    assert full.memory["training"] == pytest.approx(3 * 4 * count, rel=0.01)
    backbone.adapt(Policy(adaptation="lora", lora_rank=4))
    adapters = sum(each.numel() for each in backbone.module.parameters() if each.requires_grad)
    assert lora.memory["training"] == 3 * 4 * adapters
    assert lora.memory["weights"] == full.memory["weights"] + 4 * adapters


def test_moments_in_eight_bits_take_a_quarter(monkeypatch):
    """Two bytes per trained weight instead of eight, in memory and in each checkpoint."""
    monkeypatch.setattr("latentac.training.optimizers._PACKAGE", "torch")  # as if it were installed
    one, other = needed(), needed(policy__optimizer="adamw_8bit")
    trains = one.memory["training"] // 12
    assert one.memory["training"] - other.memory["training"] == 6 * trains
    copies = config().train.keep_checkpoints + 2
    assert one.disk["checkpoints"] - other.disk["checkpoints"] == copies * 6 * trains


def test_half_precision_on_disk_is_whole_in_memory(tmp_path):
    """Weights are cast to float32 when they are loaded; shards count as one."""
    full, half = tmp_path / "full", tmp_path / "half"
    one = needed(folder=miniatures.sd15(full))
    other = needed(folder=miniatures.sd15(half, variant="fp16", sharded=True))
    assert other.memory["weights"] == one.memory["weights"]
    assert other.disk["base"] < 0.7 * one.disk["base"]


def test_each_transformer_block_of_a_unet_counts(tmp_path):
    """As in Stable Diffusion XL, whose deepest level has ten per layer; and the weights of both text encoders."""
    few = miniatures.sdxl(tmp_path / "few")
    many = miniatures.sdxl(tmp_path / "many", unet={"transformer_layers_per_block": (1, 1, 10)})
    one, other = (needed(folder=folder, backbone__use="sdxl") for folder in (few, many))
    assert 1.2 < other.memory["activations"] / one.memory["activations"] < 8
    backbone = BACKBONES.build("sdxl", few, CPU)
    parts = [backbone.module, backbone._autoencoder, backbone._pipeline.text_encoder, backbone._pipeline.text_encoder_2]
    assert one.memory["weights"] == 4 * sum(each.numel() for part in parts for each in part.parameters())


@pytest.mark.parametrize(
    ("item", "kind", "settings"),
    [
        ("reference", "memory", {"algorithm__prediction_kl": 0.1}),
        ("critic's own backbone", "memory", {"critic__body__use": "copy"}),
        ("training", "memory", {"policy__ema_decay": 0.9}),
        ("images", "memory", {"train__images_per_iteration": 320}),
        ("activations", "memory", {"train__block_images": 64, "train__images_per_iteration": 128}),
        ("activations", "memory", {"steering__methods": "[{use: best_of_n, sweep_particles: [1024]}]"}),
        ("activations", "memory", {"steering__methods": "[{use: value_gradient, sweep_particles: [4]}]"}),
        ("activations", "memory", {"serving__batch_rows": 4096}),
        ("activations", "memory", {"pretrain__forward_noised": 0.5, "pretrain__minibatch_states": 4096}),
        ("activations", "memory", {"critic__body__use": "lora", "pretrain__minibatch_states": 512}),
        ("activations", "memory", {"pretrain__minibatch_states": 65536}),
        ("activations", "memory", {"critic__replay_images": 64, "critic__updates_per_pass": 1}),
        ("images", "memory", {"pretrain__num_held_out_images": 65536}),
        ("images", "memory", {"critic__body__use": "pixel"}),
        ("activations", "memory", {"critic__body__use": "pixel", "pretrain__forward_noised": 0.5}),
        ("text", "memory", {"pretrain__num_images": 65536}),
        ("other policies", "memory", {"evaluation__num_images": 100_000}),
        ("other policies", "memory", {"evaluation__images_per_prompt": 100_000}),
        ("scores", "disk", {"evaluation__num_images": 100_000}),
        ("checkpoints", "disk", {"train__keep_checkpoints": 5}),
        ("checkpoints", "disk", {"critic__replay_images": 4096}),
        ("scored", "disk", {"pretrain__num_images": 4096}),
    ],
)
def test_each_setting_that_costs_counts(item, kind, settings):
    """More of it, more of that item, and nothing less of any other."""
    before, after = getattr(needed(), kind), getattr(needed(**settings), kind)
    assert after[item] > before.get(item, 0)
    assert all(after[name] >= before[name] for name in before)


@pytest.mark.parametrize(("body", "num_queries"), [("frozen_taps", 0), *((body, 4) for body in BODIES)])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_a_critic_keeps_of_a_state_is_counted(name, body, num_queries):
    """Of every body exactly as many numbers as it keeps."""
    folder, own = builtin_pipeline(MODELS[name][1]), {"critic__body__use": body}
    own["critic__body__num_queries"] = num_queries
    settings = config(name, pretrain__num_images=0, train__num_workers=1, **own)
    backbone = BACKBONES.build(name, folder, CPU)
    critic = Critic(backbone, settings.reward_names, settings.critic)
    latents, sigma = torch.zeros(1, *backbone.latent_shape), torch.full((1,), 0.5)
    with torch.no_grad():
        prediction, taps = backbone.predict(latents, sigma, backbone.encode(["a red circle"]))
    kept = sum(feature.numel() for feature in critic.features(latents, prediction, taps).values())
    images, steps = settings.train.images_per_iteration, settings.kernel.num_steps
    text = math.prod(backbone.encode(["a red circle"]).tokens.shape)
    rollouts = images * ((2 * steps + 1) * latents.numel() + text)
    replay = settings.critic.replay_images * (latents.numel() + 8)
    counted = needed(name, folder, pretrain__num_images=0, train__num_workers=1, **own).memory["images"] // 4
    assert (counted - rollouts - replay) / (images * steps) == kept


def test_many_prompts_need_no_more_than_what_is_kept_of_them():
    """Beyond some MiB they are encoded as they are asked for: 20,000 of a large encoder are no reason to refuse."""
    folder = builtin_pipeline("shapes-unet")
    few, many = (sizing.requirements(config(), folder, count, "cpu").memory["text"] for count in (100, 10**7))
    assert few == 4 * 100 * 16 * 64
    assert many == KEPT_BYTES
    assert "text" not in sizing.requirements(config(), folder, 10**7, "cuda").memory


def test_sharded_weights_are_divided_by_the_workers():
    """With all that belongs to them; what does not stays as it is."""
    settings = {"algorithm__prediction_kl": 0.1, "critic__body__use": "copy", "train__num_workers": 2}
    whole, shared = (needed(**settings, train__sharding=kind).memory for kind in ("none", "full"))
    for item in ("reference", "critic's own backbone", "training"):
        assert shared[item] == pytest.approx(whole[item] / 2, abs=8)
    network = 2 * (whole["weights"] - shared["weights"])
    assert network == pytest.approx(whole["reference"], abs=8)
    assert all(shared[item] == whole[item] for item in ("images", "text", "activations"))
    assert needed(train__num_workers=1, train__sharding="full") == needed(train__num_workers=1)


def test_evaluation_has_three_policies():
    """By LoRA one worker trains few weights: then it is evaluation that needs most."""
    lora = {"policy__adaptation": "lora", "policy__lora_rank": 1, "train__num_workers": 1}
    found = needed(**lora, train__block_images=1, train__images_per_iteration=2, train__updates_per_iteration=4)
    weights = found.memory["weights"] - found.memory["training"] // 3
    assert sum(found.memory.values()) - found.memory["process"] >= 3 * weights
    assert "other policies" not in needed().memory


def test_without_the_base_the_export_is_smaller():
    """By the denoiser, in each copy."""
    with_base, without = needed(), needed(serving__include_base="false")
    count = with_base.memory["training"] // 12
    assert with_base.disk["exported"] - without.disk["exported"] == sizing.COPIES * 4 * count


def test_sizes_of_the_field_come_out_as_they_were_measured(tmp_path):
    """Stable Diffusion 1.5 at 512 pixels on one GPU, blocks of 8 in 10 steps: 32 GiB by LoRA and 46 GiB with all
    weights; with blocks of 32 a device of 79 GiB was too small. The formula is right within a third."""
    sizes = Sizes(
        latent=4 * 64 * 64,
        image=3 * 512 * 512,
        text=77 * 768,
        taps=16 * 16 * (320 + 1280),
        channels=320 + 1280,
        units=sum((4096 >> (2 * level)) * width for level, width in enumerate((320, 640, 1280, 1280))) * 5,
        decoder=512 * 512 * 256,
    )
    model = Model(
        files=4 * 10**9,
        network=859_520_964,
        frozen=83_653_863 + 123_060_480,
        adapters=6_000_000,
        sizes=sizes,
    )

    def gib(**settings):
        common: dict[str, Any] = {"train__num_workers": 1, "kernel__num_steps": 10}
        common |= {"train__updates_per_iteration": 4, "backbone__precision": "float32", "train__micro_images": 1000}
        run = config(**common, **settings)
        found = sizing.count(run, model, 0, "cuda")
        return sum(found.memory.values()) / 2**30

    lora = {"policy__adaptation": "lora"}
    assert gib(train__block_images=8, **lora) == pytest.approx(32, rel=1 / 3)
    assert gib(train__block_images=8) == pytest.approx(46, rel=1 / 3)
    assert gib(train__block_images=32, **lora) > 79


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def usage(free):
    return Usage(2 * free, free, free)


def test_a_disk_that_is_too_small_is_refused_with_the_sum(tmp_path, monkeypatch):
    """By item, in the folder of the run and in a store of files, which may not be there yet."""
    found = needed()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(found.disk_bytes - 1))
    with pytest.raises(ResourceError, match=r"has \d+ MiB free, and this run needs \d+ MiB \(base .*checkpoints"):
        sizing.check_room(found, tmp_path / "runs", f"file://{tmp_path}/store")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(found.disk_bytes))
    sizing.check_room(found, tmp_path / "runs" / "not" / "yet", f"file://{tmp_path}/store")


def test_memory_that_is_too_small_is_refused_with_the_sum(tmp_path, monkeypatch):
    """All workers together, where they share it."""
    found = needed()
    assert found.memory_bytes == found.workers * sum(found.memory.values())
    monkeypatch.setattr(sizing, "free_memory", lambda device: found.memory_bytes - 1)
    store = f"file://{tmp_path}/store"
    with pytest.raises(ResourceError, match=r"memory \(cpu\): has .*weights .*in each of 2 workers.*block_images"):
        sizing.check_room(found, tmp_path, store)
    monkeypatch.setattr(sizing, "free_memory", lambda device: found.memory_bytes)
    sizing.check_room(found, tmp_path, store)


def test_with_a_store_elsewhere_only_this_step_counts(tmp_path, monkeypatch):
    """The workers of a cluster have machines of their own."""
    found = needed()
    step = found.memory["weights"] + found.memory["process"]
    monkeypatch.setattr(sizing, "free_memory", lambda device: step)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(found.disk["base"]))
    sizing.check_room(found, tmp_path, "s3://bucket")
    monkeypatch.setattr(sizing, "free_memory", lambda device: step - 1)
    with pytest.raises(ResourceError, match="this step needs"):
        sizing.check_room(found, tmp_path, "s3://bucket")


def test_a_containers_own_limit_counts(tmp_path):
    """What its control group leaves, with what it only caches; without a limit the machine's memory does."""
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 200000\n")
    assert memory._control_group(tmp_path) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._control_group(tmp_path) is None
    assert (memory.free_memory("cpu") or 0) > 2**20


def test_it_is_described_for_a_person():
    """Two lines, by item."""
    disk, memory = sizing.describe(needed())
    assert disk.startswith("disk: ")
    assert "in each of 2 workers" in memory
    assert math.isfinite(needed().disk_bytes)


def test_an_exported_adapter_has_no_part_of_the_base():
    """The weights of the adapter, in each copy, whether or not the base is offered."""
    lora = {"policy__adaptation": "lora", "policy__lora_rank": 4}
    merged, alone = needed(**lora), needed(**lora, export__weights="adapter")
    assert alone.disk["exported"] == sizing.COPIES * merged.memory["training"] // 3
    without = needed(**lora, export__weights="adapter", serving__include_base="false")
    assert without.disk["exported"] == alone.disk["exported"]
