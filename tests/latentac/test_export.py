"""The export: a folder that holds what was trained and nothing else, and draws in plain diffusers what is served."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from latentac.backbones import Denoiser, load_backbone
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.method.diffusion import CPS, DDIM, DanceSDE, FlowSDE, GaussianTransition
from latentac.method.randomness import generator_for, noise_for
from latentac.runs.release.deploy import Candidate, fetch_version
from latentac.runs.release.readme import write_trained
from latentac.runs.resolution import Resolved, resolve_all
from latentac.runs.steps import deploy, prepare
from latentac.runs.workspace import open_run
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.sampling.snippet import base_of, usage
from latentac.serving.deployment import Deployment
from latentac.serving.exported import add_base, export, image_size
from latentac.serving.generator import Generator
from latentac.system import folders
from latentac.system.errors import IntegrityError, ResourceError
from latentac.system.terminal import printable
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac import miniatures

CPU = torch.device("cpu")
PROMPT = "a red circle above two blue squares"
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
LORA = PolicySettings(adaptation="lora", lora_rank=4, lora_alpha=12)
PARTS = {
    "unet": {"unet", "vae", "text_encoder", "tokenizer", "scheduler"},
    "sdxl": {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"},
    "dit": {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def miniature(name: str, folder: Path, **settings: Any) -> Path:
    makers: dict[str, Any] = {"unet": miniatures.sd15, "sdxl": miniatures.sdxl, "dit": miniatures.sd3}
    made: Path = makers[name](folder, **settings)
    return made


def trained(name: str, base: Path, settings: PolicySettings | None = None) -> Denoiser:
    """The backbone of `base` with other weights than it had."""
    backbone = load_backbone(Extension(use=name), base, CPU)
    backbone.adapt(settings or PolicySettings())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def served(policy: Policy, num_steps: int, seed: int = 5, index: int = 0) -> np.ndarray:
    """What the endpoint draws without steering, as integers."""
    backbone = policy.backbone
    noise = noise_for([("serving", index, 0)], seed, num_steps, backbone.latent_shape)
    clean = rollout(policy, None, backbone.encode([PROMPT]), noise).clean
    return backbone.decode(clean)[0].astype(int)


def drawn(code: str, folder: Path) -> np.ndarray:
    """The image that the model card's Python writes, run as it stands in `folder`, in this process."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the text that is tested
        return np.asarray(Image.open("image.png")).astype(int)
    finally:
        os.chdir(before)
        (folder / "image.png").unlink(missing_ok=True)


def clutter(base: Path, name: str) -> None:
    """What lies in published folders beside the parts that are used."""
    network = "transformer" if name == "dit" else "unet"
    index = json.loads((base / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3", "safety_checker"):
        (base / part).mkdir()
        (base / part / "config.json").write_text("{}")
        (base / part / "model.safetensors").write_bytes(b"five gigabytes")
        index[part] = ["transformers", "T5EncoderModel"]
    index["requires_safety_checker"] = True
    (base / "model_index.json").write_text(json.dumps(index))
    for file in (".git/config", ".DS_Store", "v1-5-pruned.ckpt", f"{network}/.cache/x", f"{network}/readme.py"):
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text("x")
    for part in (network, "vae"):
        (base / part / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "LICENSE.md").write_text("whose they are")
    places: dict[str, dict[str, Any]] = {
        "vae/config.json": {"_name_or_path": "/scratch/somebody/vae"},
        "text_encoder/config.json": {"text_config_dict": {"_name_or_path": "/scratch/somebody/text"}},
        "tokenizer/tokenizer_config.json": {"special_tokens_map_file": "/scratch/somebody/map.json"},
        "model_index.json": {"_name_or_path": "/scratch/somebody/model"},
    }
    for file, fields in places.items():
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | fields))


@pytest.mark.parametrize("name", sorted(PARTS))
def test_an_export_holds_its_parts_and_nothing_else(name: str, tmp_path: Path) -> None:
    """No stale index, no variant of the untouched base, no pickle, no T5, no safety checker, nothing hidden, no path of
    the trainer; the licence goes with the weights. model_index.json names the parts that are there."""
    base = miniature(name, tmp_path / "base", sharded=True)
    miniature(name, base, variant="fp16")
    clutter(base, name)
    backbone, folder = trained(name, base), tmp_path / "export"
    backbone.save(folder)
    found, index = files(folder), json.loads((folder / "model_index.json").read_text())
    assert {part for part, entry in index.items() if isinstance(entry, list) and entry[0]} == PARTS[name]
    assert {path.split("/")[0] for path in found if "/" in path} == PARTS[name]
    assert {path for path in found if "/" not in path} == {"model_index.json", "LICENSE.md"}
    assert not [path for path in found if re.search(r"fp16|\.bin|\.ckpt|\.py$|/\.", path)]
    network = "transformer" if name == "dit" else "unet"
    assert {path for path in found if path.startswith(network)} == {
        f"{network}/config.json",
        f"{network}/diffusion_pytorch_model.safetensors",
    }
    for path in folder.rglob("*.json"):
        assert "name_or_path" not in path.read_text(), path
        assert "/scratch" not in path.read_text(), path
        assert str(tmp_path) not in path.read_text(), path
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **(WITHOUT_T5 if name == "dit" else {}))
    loaded = getattr(pipeline, network).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in backbone.module.named_parameters())


def test_an_export_needs_an_empty_folder(tmp_path: Path) -> None:
    """What is left of another export would be loaded with this one."""
    backbone = load_backbone(Extension(use="unet"), builtin_pipeline("shapes-unet"), CPU)
    (tmp_path / "export" / "unet").mkdir(parents=True)
    with pytest.raises(ResourceError, match="not empty"):
        backbone.save(tmp_path / "export")


@pytest.mark.parametrize("name", sorted(PARTS))
def test_sharded_weights_go_round(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on a sharded base, saved in shards, copied, loaded again by latentac and diffusers: bitwise the same."""
    monkeypatch.setattr(folders, "SHARD", "40KB")
    backbone = trained(name, miniature(name, tmp_path / "base", sharded=True))
    backbone.save(tmp_path / "export")
    folders.copy_pipeline(tmp_path / "export", tmp_path / "copy")
    network = "transformer" if name == "dit" else "unet"
    shards = list((tmp_path / "copy" / network).glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert files(tmp_path / "copy") == files(tmp_path / "export")
    again = load_backbone(Extension(use=name), tmp_path / "copy", CPU)
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "copy", **(WITHOUT_T5 if name == "dit" else {}))
    for module in (again.module, getattr(pipeline, network)):
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, backbone.module.state_dict()[key])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """Rather than a copy that cannot be loaded."""
    base = miniature("unet", tmp_path / "base", sharded=True)
    next((base / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(IntegrityError, match="00002-of"):
        folders.copy_part(base / "unet", tmp_path / "copy")


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_a_variant_are_copied_under_their_plain_names(sharded: bool, tmp_path: Path) -> None:
    """Where there is nothing else. `from_pretrained` takes them without an argument."""
    base = miniature("unet", tmp_path / "base", variant="fp16", sharded=sharded)
    folders.copy_pipeline(base, tmp_path / "copy")
    assert not [path for path in files(tmp_path / "copy") if "fp16" in path]
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "copy")
    origin: Any = DiffusionPipeline.from_pretrained(base, variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        for key, tensor in getattr(pipeline, part).state_dict().items():
            assert torch.equal(tensor, getattr(origin, part).state_dict()[key].float())
            assert tensor.dtype == torch.float32  # what latentac computes in, and diffusers' networks


@pytest.mark.parametrize("num_steps", [3, 10, 12, 30, 48, 61, 96])
def test_steps_are_those_of_diffusers_scheduler(num_steps: int) -> None:
    """Also where the timesteps fall between two numbers. For some numbers of steps diffusers takes one too many."""
    backbone = load_backbone(Extension(use="unet"), builtin_pipeline("shapes-unet"), CPU)
    scheduler: Any = DDIMScheduler.from_pretrained(builtin_pipeline("shapes-unet"), subfolder="scheduler")
    scheduler.set_timesteps(num_steps)
    sigmas = (1 - scheduler.alphas_cumprod[scheduler.timesteps[:num_steps]].double()).sqrt().float()
    assert torch.equal(backbone.schedule(num_steps)[:-1], sigmas)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 5), (1, 1, 1)])
def test_noise_is_drawn_as_a_pipeline_draws_it(shape: tuple[int, ...]) -> None:
    """One draw after the other from the key's generator, whatever the size; for whole blocks of 16 numbers that is one
    draw of all."""
    (noise,) = noise_for([("serving", 0, 0)], 3, 20, shape)
    generator = generator_for(3, "serving", 0, 0)
    for step in noise:
        assert torch.equal(step, torch.randn(1, *shape, generator=generator)[0])
    if shape == (4, 8, 8):
        assert torch.equal(noise, torch.randn(21, *shape, generator=generator_for(3, "serving", 0, 0)))


CALLS = [
    ("unet", DDIM(1.0), 10, {}),
    ("unet", DDIM(0.5), 12, {}),
    ("unet", DDIM(1.0), 61, {}),
    ("unet", DDIM(1.0), 10, {"prediction_type": "v_prediction", "scheduler": "DDIMScheduler", "clip_sample": True}),
    ("unet", DDIM(0.7), 10, {"scheduler": "EulerDiscreteScheduler"}),
    ("sdxl", DDIM(1.0), 10, {}),
    ("sdxl", DDIM(0.7), 12, {"prediction_type": "v_prediction", "variant": "fp16"}),
    ("dit", CPS(0.9), 10, {}),
    ("dit", CPS(1.0), 7, {"shift": 1.0}),
    ("dit", FlowSDE(0.7), 10, {"medium": True}),
    ("dit", DanceSDE(0.3), 10, {}),
    ("dit", CPS(0.9), 5, {"max_length": 77}),
    ("unet", DDIM(1.0), 5, {"variant": "fp16"}),
    ("dit", CPS(0.9), 5, {"variant": "fp16"}),
]


@pytest.mark.parametrize(("name", "kernel", "num_steps", "settings"), CALLS)
def test_the_card_call_draws_what_is_served(
    name: str, kernel: Any, num_steps: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The folder and its adapter on the untouched base, within one grey level: whatever the base's own scheduler and
    precision were, for every kernel, and for numbers of steps that do not divide the timesteps."""
    base = tmp_path / "base"
    folders.copy_pipeline(miniature(name, tmp_path / "published", sharded=True, **settings), base)
    backbone, folder = trained(name, base, LORA), tmp_path / "export"
    backbone.save(folder)
    policy = Policy(backbone, kernel)
    expected = served(policy, num_steps)
    assert expected.std() > 5
    code = usage(policy, folder, num_steps, PROMPT, 5)
    assert np.abs(drawn(code, folder) - expected).max() <= 1
    adapter = usage(policy, folder, num_steps, PROMPT, 5, base_of(str(base))).replace('"base"', repr(str(base)))
    assert np.abs(drawn(adapter, folder) - expected).max() <= 1
    untouched = Policy(load_backbone(Extension(use=name), base, CPU), kernel)
    assert np.abs(served(untouched, num_steps) - expected).max() > 2


def test_a_prompt_stands_in_the_card_call_as_it_is_meant(tmp_path: Path) -> None:
    """Whatever is in it: it ends no text of Python, and no character in it turns what stands around it."""
    base, folder = tmp_path / "base", tmp_path / "export"
    folders.copy_pipeline(miniature("unet", tmp_path / "published"), base)
    backbone = trained("unet", base, LORA)
    backbone.save(folder)
    prompt = "a \"red\\\" \u202e circle\u2066\u2028```\n''' é😀"
    code = usage(Policy(backbone, DDIM(1.0)), folder, 10, prompt, 5)
    assert prompt in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert printable(code) == code


def test_a_kernel_that_no_scheduler_makes_has_no_call(tmp_path: Path) -> None:
    """One that is not linear in what the network says, or a schedule of its own."""

    class Clipped(DDIM):
        def transition(self, *arguments: Any) -> GaussianTransition:
            transition = super().transition(*arguments)
            return GaussianTransition(transition.mean.clamp(-1, 1), transition.std)

    backbone = load_backbone(Extension(use="unet"), builtin_pipeline("shapes-unet"), CPU)
    backbone.save(tmp_path / "export")
    assert "eta=1.0" in usage(Policy(backbone, DDIM(1.0)), tmp_path / "export", 10, PROMPT, 0)
    assert usage(Policy(backbone, Clipped(1.0)), tmp_path / "export", 10, PROMPT, 0) == ""
    backbone.schedule = lambda num_steps: torch.linspace(1, 0, num_steps + 1)  # type: ignore[method-assign]
    assert usage(Policy(backbone, DDIM(1.0)), tmp_path / "export", 10, PROMPT, 0) == ""


def test_an_adapter_carries_its_scale(tmp_path: Path) -> None:
    """alpha / rank is in the file's weights, because a reader takes it as 1; its names are those of diffusers."""
    base = miniature("unet", tmp_path / "base")
    backbone = trained("unet", base, LORA)
    backbone.save(tmp_path / "export")
    weights = load_file(tmp_path / "export" / folders.ADAPTER)
    assert all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", name) for name in weights)
    before = dict(load_backbone(Extension(use="unet"), base, CPU).module.named_parameters())
    after = dict(load_backbone(Extension(use="unet"), tmp_path / "export", CPU).module.named_parameters())
    for name in {name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in weights}:
        change = weights[f"unet.{name}.lora_B.weight"] @ weights[f"unet.{name}.lora_A.weight"]
        torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_saving_makes_no_second_network_on_its_device(precision: str, tmp_path: Path) -> None:
    """A GPU that holds it once need not have room for it twice. Convolutions may be in the layout of a GPU."""
    extension = Extension.model_validate({"use": "unet", "precision": precision})
    backbone = load_backbone(extension, builtin_pipeline("shapes-unet"), CPU)
    module: Any = backbone.module
    module.to(memory_format=torch.channels_last)
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=2))

    def refuse(memo: object) -> None:
        raise AssertionError("the network was copied")

    module.__deepcopy__ = refuse
    backbone.save(tmp_path / "export")
    assert (tmp_path / "export" / folders.ADAPTER).is_file()


def test_full_training_has_no_adapter(tmp_path: Path) -> None:
    """There is nothing that could be put onto the base."""
    trained("unet", builtin_pipeline("shapes-unet")).save(tmp_path / "export")
    assert not (tmp_path / "export" / folders.ADAPTER).exists()


def test_the_scheduler_is_the_one_that_samples(tmp_path: Path) -> None:
    """The folder carries spacing, clipping and end of latentac's own steps, not those of the base."""
    load_backbone(Extension(use="unet"), miniature("unet", tmp_path / "sd15"), CPU).save(tmp_path / "unet")
    ddim: Any = DDIMScheduler.from_pretrained(tmp_path / "unet", subfolder="scheduler")
    assert (ddim.config.timestep_spacing, ddim.config.clip_sample, ddim.config.set_alpha_to_one) == (
        "trailing",
        False,
        True,
    )
    load_backbone(Extension(use="dit"), miniature("dit", tmp_path / "sd3"), CPU).save(tmp_path / "dit")
    flow: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "dit", subfolder="scheduler")
    assert flow.config.shift == 3.0


def resolved_of(name: str, base: Path) -> Resolved:
    return resolve_all(
        {
            "recipe": "test",
            "backbone": {"use": name, "source": str(base)},
            "kernel": {"use": "cps" if name == "dit" else "ddim", "noise": 0.9, "num_steps": 5},
            "prompts": {"source": "builtin:shapes"},
            "rewards": [{"use": "jpeg_compressibility"}],
            "gate": {"reward": "jpeg_compressibility"},
        }
    )


@pytest.mark.parametrize("form", ["sharded", "fp16"])
@pytest.mark.parametrize("name", sorted(PARTS))
def test_the_untouched_base_is_served_from_any_form(name: str, form: str, tmp_path: Path) -> None:
    """`include_base` of a sharded base, and of one that has the variant alone."""
    whole = miniature(name, tmp_path / "whole")
    network = "transformer" if name == "dit" else "unet"
    base = miniature(name, tmp_path / "base", **({"sharded": True} if form == "sharded" else {"variant": "fp16"}))
    backbone = trained(name, whole)
    folder, resolved = tmp_path / "export", resolved_of(name, whole)
    config = resolved.config
    backbone.save(folder)
    Critic(backbone, config.reward_names, config.critic).save(folder / "critic")
    add_base(folder, base)
    assert not [path for path in files(folder / "base") if "fp16" in path]
    export(folder, config, run="run", version="version", extensions=resolved.described())
    generator = Generator(folder, CPU)
    own = load_backbone(Extension(use=name), whole, CPU).module.state_dict()
    for key, tensor in generator.policy("base").backbone.module.state_dict().items():
        torch.testing.assert_close(tensor, own[key], rtol=2e-3, atol=2e-3)
    assert (folder / "base" / network / "config.json").is_file()
    assert image_size(folder) == (64, 64)


def released(run: str, output: Path, name: str, base: Path, adaptation: str) -> Path:
    """The folder of a model that was trained (a little), judged and deployed, as it is fetched from the store.
    adaptation: full, lora, or adapter: LoRA, of which the adapter alone is exported."""
    overrides = [
        f"backbone.source={base}",
        f"policy.adaptation={'full' if adaptation == 'full' else 'lora'}",
        f"export.weights={'adapter' if adaptation == 'adapter' else 'merged'}",
        "policy.lora_rank=4",
        "rewards=[{use: jpeg_compressibility}]",
        "gate.reward=jpeg_compressibility",
        f"backbone.use={name}",
    ]
    recipe = "shapes-dit-smoke" if name == "dit" else "shapes-unet-smoke"
    prepare(run, "", str(output), recipe, overrides=overrides)
    space = open_run(run, "", str(output))
    made = output / run / "made"
    policy = space.base_policy()
    policy = Policy(trained(name, policy.backbone.folder, space.config.policy), policy.kernel)  # type: ignore[attr-defined]
    policy.backbone.save(made / "policy")
    rows = [{"iteration": step, "images": 32 * step, "reward_mean": 0.1 * step, "seconds": 2.0} for step in (1, 2, 3)]
    write_trained(space, policy, made / "policy", rows)
    (made / "history.json").write_text(json.dumps(rows))
    Critic(policy.backbone, space.config.reward_names, space.config.critic).save(made / "critic")
    decision = {"decision": "promote", "reasons": ["it gained"], "checks": []}
    (made / "gate.json").write_text(json.dumps(decision))
    for step in ("train", "gate"):
        space.store.publish(f"{run}/{step}", made, run=run, step=step, config_hash=space.config.hash)

    def proved(candidate: Candidate) -> Deployment:
        return Deployment("http://127.0.0.1:4", candidate.version, candidate.request, b"PNG", "0" * 64, {}, 5, 1, 2, {})

    version = deploy(run, "", str(output), prove=proved).metrics["version"]
    fetch_version(version, space.store.url, output / "model")
    return output / "model"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("adaptation", ["full", "lora", "adapter"])
@pytest.mark.parametrize("name", sorted(PARTS))
def test_the_model_card_draws_the_served_image(name: str, adaptation: str, tmp_path: Path) -> None:
    """Each block of Python in the README.md of the deployed folder, as it stands, in a fresh process, with the base
    that it names; the image of the endpoint without steering, within one grey level."""
    output = tmp_path / "runs"
    base = miniature(name, tmp_path / "tiny-base", sharded=True)
    folder = released("run", output, name, base, adaptation)
    readme = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == (2 if adaptation == "lora" else 1)
    assert readme.index("```python") < 1500
    assert str(tmp_path) not in readme
    (prompt,) = re.findall(r'"(a [^"]*|two [^"]*|three [^"]*|four [^"]*)"', blocks[0])
    seed = int(re.findall(r"seed=(\d+)|generator\((\d+)\)", blocks[0])[0][0] or 0)
    expected = Generator(folder, CPU).generate(prompt, seed, method="none").images[0].astype(int)
    assert expected.std() > 5
    (folder / "tiny-base").symlink_to(base)
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=folder, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert np.abs(np.asarray(Image.open(folder / "image.png")).astype(int) - expected).max() <= 1
        (folder / "image.png").unlink()
