"""The export of an adapter: LoRA weights that plain diffusers loads, and one base that the endpoint shares."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentac.backbones import Denoiser, layout_of, load_backbone
from latentac.backbones.layout import Layout, copy, used
from latentac.backbones.weights import header
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.runs.release.deploy import UNFINISHED, fetch_version, model_to_use
from latentac.runs.release.incumbent import in_production, load_incumbent, trouble
from latentac.runs.resolution import resolve_all
from latentac.runs.workspace import Workspace, open_run
from latentac.serving import exported
from latentac.serving.exported import ADAPTER, BASE, FILE, Base, add_base, export
from latentac.serving.generator import Generator
from latentac.store import Store, copy_folder
from latentac.store.pool import hash_of
from latentac.system import folders
from latentac.system.errors import ConfigError, IntegrityError, ResourceError, ServingError
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac import miniatures
from tests.latentac.flux_miniature import flux
from tests.latentac.test_export import released
from tests.latentac.zimage_miniature import zimage

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares"]
LORA = PolicySettings(adaptation="lora", lora_rank=4, lora_alpha=12)
WITHOUT: dict[str, Any] = {"dit": {"text_encoder_3": None, "tokenizer_3": None}}
"""What diffusers' pipeline of the family must be told is missing."""
SIZELESS = ("flux", "zimage")
"""Families whose configuration names no size."""


def backbone_of(name: str) -> Extension:
    own = {"image_size": [32, 32]} if name in SIZELESS else {}
    return Extension.model_validate({"use": name.removeprefix("shapes-"), **own})


def layout(name: str) -> Layout:
    found = layout_of(backbone_of(name))
    assert found is not None
    return found


def base_of(name: str, folder: Path) -> Path:
    """A copy of the family's miniature, or of an embedded model, as `prepare` makes it."""
    makers: dict[str, Any] = {"unet": miniatures.sd15, "sdxl": miniatures.sdxl, "dit": miniatures.sd3}
    makers |= {"flux": flux, "zimage": zimage}
    if name.startswith("shapes-"):
        source = builtin_pipeline(name)
    else:
        source = makers[name](folder / "source", **({} if name in SIZELESS else {"size": 32}))
    copy(source, folder / "base", layout(name))
    return folder / "base"


def trained(name: str, base: Path) -> Any:
    """The backbone of `base` with an adapter that changes what it predicts."""
    backbone = load_backbone(backbone_of(name), base, CPU)
    backbone.adapt(LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone


def predicted(backbone: Denoiser) -> Tensor:
    """What it predicts at two noise levels, in float32."""
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        prediction, _ = backbone.predict(latents, torch.tensor([0.3, 0.8]), backbone.encode(PROMPTS))
    return torch.stack([prediction.clean, prediction.noise])


def exports(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """A merged export, the export of its adapter with its base beside it, and the base."""
    base = base_of(name, folder)
    backbone, settings = trained(name, base), backbone_of(name)
    flow = "cps" if name.endswith(("dit", "flux", "zimage")) else "ddim"
    fields = {
        "recipe": "test",
        "backbone": {"source": str(base), "use": settings.use, **settings.own},
        "kernel": {"use": flow, "num_steps": 3},
        "policy": {"adaptation": "lora"},
        "prompts": {"source": "builtin:shapes"},
        "rewards": [{"use": "jpeg_compressibility"}],
        "steering": {"methods": [{"use": "best_of_n"}]},
        "gate": {"reward": "jpeg_compressibility"},
    }
    backbone.save(folder / "pipeline")
    reference = Base(
        name="miniature",
        artifact="run/prepare",
        files={file: hash_of(base / file) for file in used(base, backbone.layout)},
    )
    for weights in ("merged", "adapter"):
        resolved, made = resolve_all({**fields, "export": {"weights": weights}}), folder / weights
        details: dict[str, Any] = {"run": "run", "version": weights, "extensions": resolved.described()}
        if weights == "merged":
            folders.copy_pipeline(folder / "pipeline", made)
            add_base(made, base)
        else:
            folders.copy_adapter(folder / "pipeline", made)
            details |= {"base": reference, "pipeline": base}
        torch.manual_seed(0)
        critic = Critic(backbone, resolved.config.reward_names, resolved.config.critic)
        torch.nn.init.normal_(critic.heads.weight, std=0.5)
        critic.save(made / "critic")
        export(made, resolved.config, **details)
    shutil.copytree(base, folder / "adapter" / BASE)
    return folder / "merged", folder / "adapter", base


FAMILIES = ["unet", "sdxl", "dit", "flux", "zimage", "shapes-unet", "shapes-dit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_both_exports_are_the_same_model(name: str, tmp_path: Path) -> None:
    """Predictions agree up to rounding, those of the base bitwise with it. Plain diffusers makes the same network of
    each export."""
    merged, adapter, base = exports(name, tmp_path)
    whole, shared = Generator(merged, CPU), Generator(adapter, CPU)
    untouched = predicted(load_backbone(backbone_of(name), base, CPU))
    found = predicted(shared.policy("trained").backbone)
    expected = predicted(whole.policy("trained").backbone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - untouched).abs().max() > 0.01
    assert torch.equal(predicted(shared.policy("base").backbone), untouched)
    network = layout(name).network
    own: Any = DiffusionPipeline.from_pretrained(merged, **WITHOUT.get(name.removeprefix("shapes-"), {}))
    loaded: Any = DiffusionPipeline.from_pretrained(base, **WITHOUT.get(name.removeprefix("shapes-"), {}))
    loaded.load_lora_weights(adapter)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    fused = dict(getattr(loaded, network).named_parameters())
    for key, tensor in getattr(own, network).named_parameters():
        torch.testing.assert_close(fused[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `exports` of a UNet, and in `source` the pipeline that its base was copied from."""
    folder = tmp_path_factory.mktemp("made")
    exports("unet", folder)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """An export with its base, to be spoilt."""
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


def test_one_base_in_memory_serves_both(made: Path) -> None:
    """Each weight of the base is the same memory in both networks; the trained one has the adapter's beside them."""
    generator = Generator(made / "adapter", CPU)
    places: dict[str, set[int]] = {}
    for name in ("base", "trained"):
        module: Any = generator.policy(name).backbone.module
        places[name] = {tensor.data_ptr() for tensor in module.state_dict().values()}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.training
    assert places["base"] < places["trained"]
    added = [key for key in generator.policy("trained").backbone.module.state_dict() if ".lora_" in key]
    assert len(places["trained"] - places["base"]) == len(added)


def test_requests_to_both_do_not_disturb_each_other(made: Path) -> None:
    """At the same time, in several threads: each image is bitwise the one that it is alone, and that of the base is
    bitwise that of a merged export's base."""
    generator = Generator(made / "adapter", CPU)

    def image(policy: str) -> bytes:
        return generator.generate("a red circle", seed=5, method="none", policy=policy).images.tobytes()

    alone = {policy: image(policy) for policy in ("base", "trained")}
    assert alone["base"] != alone["trained"]
    asked = ["base", "trained"] * 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(image, asked)) == [alone[policy] for policy in asked]
    merged = Generator(made / "merged", CPU).generate("a red circle", seed=5, method="none", policy="base")
    assert merged.images.tobytes() == alone["base"]


def test_the_network_is_the_one_that_was_trained_in_half_precision_too(made: Path, tmp_path: Path) -> None:
    """The base is kept in bfloat16 as in training; merged weights would be rounded once more."""
    folder, extension = tmp_path / "half", Extension.model_validate({"use": "unet", "precision": "bfloat16"})
    shutil.copytree(made / "adapter", folder)
    rewritten(folder, lambda described: described["backbone"].update(precision="bfloat16"))
    untouched = predicted(load_backbone(extension, made / "base", CPU))
    found = Generator(folder, CPU)
    assert torch.equal(predicted(found.policy("base").backbone), untouched)
    expected = predicted(Generator(made / "adapter", CPU).policy("trained").backbone)
    served = predicted(found.policy("trained").backbone)
    assert (served - expected).abs().mean() < 0.3 * (untouched - expected).abs().mean()


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Other content in the latentac.json of `folder`."""
    described = json.loads((folder / FILE).read_text())
    change(described)
    (folder / FILE).write_text(json.dumps(described))


WEIGHTS, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _shards(base: Path) -> None:
    """Shards beside the file, which diffusers would prefer to it."""
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    shutil.copyfile(base / WEIGHTS, base / "unet" / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(header(base / WEIGHTS), shard)}
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _emptied(base: Path) -> None:
    shutil.rmtree(base)
    base.mkdir()


def _elsewhere(place: Path) -> None:
    """A link where a file or folder was."""
    place.rename(place.parent.parent / "elsewhere")
    place.symlink_to(place.parent.parent / "elsewhere")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight": (
        lambda base: flip(base / WEIGHTS),
        rf"base/{WEIGHTS}: has sha256 \w+, and that of the base miniature is",
    ),
    "the text encoder": (
        lambda base: flip(base / "text_encoder" / "model.safetensors"),
        r"model\.safetensors: has sha256",
    ),
    "the noise levels": (
        lambda base: (base / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.1}'),
        r"scheduler_config\.json: has sha256",
    ),
    "a missing file": (lambda base: (base / WEIGHTS).unlink(), rf"{WEIGHTS}: is missing"),
    "shards": (_shards, r"is (missing|not a file)"),
    "no base": (shutil.rmtree, r"is not there, and the adapter needs its base.*latentac fetch-model.*--base"),
    "a link": (_elsewhere, r"leads out of the folder"),
    "an empty folder": (_emptied, r"has no model_index\.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_base_is_refused(name: str, adapter: Path) -> None:
    """Before it is served, with the file and the remedy."""
    change, expected = WRONG[name]
    change(adapter / BASE)
    with pytest.raises(ServingError, match=f"(?s){expected}"):
        Generator(adapter, CPU)


def test_the_operator_names_the_base(made: Path, adapter: Path, tmp_path: Path) -> None:
    """As it was fetched from elsewhere, with what `prepare` leaves out; one of other weights is refused. A merged
    export takes none."""
    shutil.rmtree(adapter / BASE)
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    (source / WEIGHTS).rename(source / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    (source / "notes.txt").write_text("not used")
    expected = Generator(made / "adapter", CPU).generate("a red circle", seed=5).images
    assert (Generator(adapter, CPU, source).generate("a red circle", seed=5).images == expected).all()
    other = miniatures.sd15(tmp_path / "other", size=32, seed=1)
    with pytest.raises(ServingError, match="has sha256"):
        Generator(adapter, CPU, other)
    with pytest.raises(ServingError, match="takes no base"):
        Generator(made / "merged", CPU, source)
    command = [sys.executable, "-m", "latentac.serving", "--model", str(adapter), "--port", "0", "--base", str(other)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 8
    assert "has sha256" in done.stderr
    assert "Traceback" not in done.stderr


def _changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return write


def _another_rank(weights: dict[str, Tensor]) -> None:
    name = next(name for name in weights if ".lora_A." in name)
    weights[name] = weights[name][:2].clone()


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (lambda file: file.write_bytes(b"cos\nsystem\n"), "is not a safetensors file"),
    "nothing": (lambda file: file.unlink(), "has no pytorch_lora_weights.safetensors"),
    "a link": (_elsewhere, "leads out of the folder"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "cut off"),
    "ranks that differ": (_changed(_another_rank), "has adapters of 2 ranks"),
    "a layer less": (_changed(lambda weights: weights.pop(min(weights))), "is nothing, and this base needs of shape"),
    "a layer more": (
        _changed(lambda weights: weights.update({"vae.decoder.lora_A.weight": torch.zeros(4, 4)})),
        r"vae\.decoder\.lora_A\.weight is of shape \[4, 4\], and this base needs nothing",
    ),
    "no layers": (_changed(lambda weights: weights.clear()), "has adapters of 0 ranks"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_adapter_that_is_not_of_the_base_is_refused(name: str, adapter: Path) -> None:
    """Before anything is allocated for it, with what it has and what it should have."""
    change, expected = DAMAGED[name]
    change(adapter / ADAPTER)
    with pytest.raises(ServingError, match=expected):
        Generator(adapter, CPU)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"artifact": "../../outside"}, r"base\.artifact: String should match"),
        ({"artifact": "run/train"}, r"base\.artifact: String should match"),
        ({"files": {}}, r"base\.files: Dictionary should have at least 1 item"),
        ({"files": {f"f{n}": "0" * 64 for n in range(2000)}}, "at most 1000 items"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "is missing|is not a file of the base"),
        ({"files": {"unet/config.json": "0"}}, "String should match"),
        ({"revision": "main"}, "Extra inputs"),
    ],
)
def test_what_an_adapter_says_of_its_base_has_bounds(change: dict[str, Any], expected: str, adapter: Path) -> None:
    rewritten(adapter, lambda described: described["base"].update(change))
    with pytest.raises(ServingError, match=expected):
        Generator(adapter, CPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_the_base_policy_the_adapter_is_merged(precision: str, made: Path, adapter: Path) -> None:
    """`serving.include_base: false`: the network is that of a merged export, as fast, and the base is not offered."""
    rewritten(adapter, lambda described: described.update(policies=["trained"]))
    whole = Path(shutil.copytree(made / "merged", adapter.parent / "merged"))
    for folder in (adapter, whole):
        rewritten(folder, lambda described: described["backbone"].update(precision=precision))
    found, expected = (Generator(folder, CPU).policy("trained").backbone.module for folder in (adapter, whole))
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for key, tensor in found.state_dict().items():
        # In bfloat16 the base is rounded before the adapter is added, and merged weights after.
        relative, absolute = (1e-5, 1e-5) if precision == "float32" else (0.02, 0.001)
        torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=relative, atol=absolute)
    with pytest.raises(ConfigError, match="this model has no such policy"):
        Generator(adapter, CPU).generate("a red circle", policy="base")


FIELDS: dict[str, Any] = {
    "recipe": "test",
    "backbone": {"source": "builtin:shapes-unet"},
    "prompts": {"source": "builtin:shapes"},
    "rewards": [{"use": "jpeg_compressibility"}],
    "gate": {"reward": "jpeg_compressibility"},
    "export": {"weights": "adapter"},
}


class Bare:
    """A backbone that saves whole pipelines and knows nothing of adapters."""

    path = "variance_preserving"
    schedule = encode = predict = images = decode = clone = adapt = save = None


def test_an_adapter_needs_lora_and_a_backbone_that_loads_it() -> None:
    """Both are told before the run begins."""
    with pytest.raises(
        ConfigError, match=r"export\.weights = 'adapter': needs an adapter, and policy\.adaptation=full"
    ):
        resolve_all(FIELDS)
    assert resolve_all(FIELDS | {"policy": {"adaptation": "lora"}}).config.export.weights == "adapter"
    own = {"source": "builtin:shapes-unet", "use": "tests.latentac.test_export_adapter:Bare"}
    with pytest.raises(ConfigError, match=r"export\.weights = 'adapter': needs a backbone that loads adapters"):
        resolve_all(FIELDS | {"policy": {"adaptation": "lora"}, "backbone": own})


RUN = "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a run whose adapter is in production, and in `model` that model, as it was fetched."""
    output = tmp_path_factory.mktemp("runs")
    released(RUN, output, "unet", miniatures.sd15(tmp_path_factory.mktemp("base") / "tiny", size=32), "adapter")
    return output


@pytest.fixture
def spoilt(runs: Path, tmp_path: Path) -> Workspace:
    """The same store, to be spoilt."""
    shutil.copytree(runs / "store", tmp_path / "runs" / "store")
    return open_run(RUN, "", str(tmp_path / "runs"))


def published(space: Workspace) -> str:
    found = in_production(replace(space, run="another"))
    assert found is not None
    return found


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_artifact_has_the_adapter_and_a_reference(runs: Path) -> None:
    """No file of the base. Those are named with the hashes of what training loaded, and their artifact is a parent."""
    space = open_run(RUN, "", str(runs))
    manifest = space.store.manifest(f"models/{published(space)}")
    described = exported.read(runs / "model")
    assert {file.path for file in manifest.files} == {
        *("README.md", FILE, ADAPTER, "scheduler/scheduler_config.json"),
        *("critic/config.json", "critic/model.safetensors"),
    }
    assert [parent.key for parent in manifest.parents] == ["run/train", "run/prepare"]
    assert described.base is not None
    assert (described.base.name, described.base.artifact) == ("tiny", "run/prepare")
    backbone = space.artifact("prepare") / "backbone"
    assert described.base.files == {name: hash_of(backbone / name) for name in names(backbone)}
    assert described.policies == ["trained", "base"]
    assert str(runs) not in (runs / "model" / FILE).read_text()
    assert "base_model_relation" not in (runs / "model" / "README.md").read_text()  # a folder is no id of the hub


def test_whoever_fetches_the_model_gets_its_base(runs: Path, tmp_path: Path) -> None:
    """Into `base/`, verified; again changes nothing. On the machine of the store the base is no second copy."""
    space = open_run(RUN, "", str(runs))
    for _ in range(2):
        fetch_version(published(space), space.store.url, runs / "model")
        assert names(runs / "model" / BASE) == names(space.artifact("prepare") / "backbone")
        with model_to_use(RUN, "", "", str(runs)) as (folder, line):
            assert "in production" in line
            assert (folder / BASE / WEIGHTS).samefile(space.artifact("prepare") / "backbone" / WEIGHTS)
            drawn = Generator(folder, CPU).generate("a red circle", seed=5).images
    assert (Generator(runs / "model", CPU).generate("a red circle", seed=5).images == drawn).all()


@pytest.mark.parametrize("part", [BASE, "critic", ADAPTER])
def test_a_folder_that_a_killed_call_left_is_completed(part: str, runs: Path, tmp_path: Path) -> None:
    space, target = open_run(RUN, "", str(runs)), tmp_path / "to"
    fetch_version(published(space), space.store.url, target)
    before = names(target)
    (target / UNFINISHED).mkdir()
    (target / part).rename(target / UNFINISHED / part)
    fetch_version(published(space), space.store.url, target)
    assert names(target) == before


def test_other_files_in_the_base_are_refused(runs: Path, tmp_path: Path) -> None:
    """As anywhere in a fetched folder."""
    space, target = open_run(RUN, "", str(runs)), tmp_path / "to"
    fetch_version(published(space), space.store.url, target)
    (target / BASE / "mine").write_text("mine")
    with pytest.raises(ResourceError, match="is not the artifact run/prepare"):
        fetch_version(published(space), space.store.url, target)


def _gone(space: Workspace) -> None:
    space.store.delete("run/prepare")


def _other(space: Workspace) -> None:
    folder = space.folder / "other"
    copy_folder(space.artifact("prepare"), folder)
    flip(folder / "backbone" / WEIGHTS)
    space.store.publish("run/prepare", folder, run=RUN, step="prepare", config_hash=space.config.hash)


def _rotten(space: Workspace) -> None:
    file = Path(space.store.url.removeprefix("file://"), space.prepared.folder, "backbone", WEIGHTS)
    content = bytearray(file.read_bytes())
    file.unlink()
    file.write_bytes(content[:-1] + b"?")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_gone, r"run/prepare: is not in the store, and the adapter needs it: it has the base tiny"),
        (_other, rf"is not the base of the adapter: backbone/{WEIGHTS}: expected sha256 \w+, found sha256"),
        (_rotten, rf"backbone/{WEIGHTS}: expected size"),
    ],
)
def test_a_store_without_the_base_is_reported(
    change: Callable[[Workspace], None], expected: str, spoilt: Workspace, tmp_path: Path
) -> None:
    """By whoever fetches the model, by the evaluation that compares with it, and by the gate."""
    version, store = published(spoilt), spoilt.store
    space = replace(spoilt, run="another", folder=tmp_path / "another")
    digest, base = store.manifest(f"models/{version}").digest, spoilt.base_policy()
    assert trouble(space, version, digest) == ""
    found = load_incumbent(space, base)
    assert found.problem == ""
    assert found.policy is not None
    served = predicted(Generator(fetched(store, version, tmp_path / "sound"), CPU).policy("trained").backbone)
    torch.testing.assert_close(predicted(found.policy.backbone), served, rtol=1e-5, atol=1e-5)
    assert not [name for name in found.policy.backbone.module.state_dict() if "lora" in name], "timed as it is merged"
    change(spoilt)
    with pytest.raises(IntegrityError, match=expected):
        fetch_version(version, store.url, tmp_path / "to")
    assert not (tmp_path / "to" / FILE).exists()
    assert re.search(expected, trouble(space, version, digest))
    again = load_incumbent(replace(space, folder=tmp_path / "third"), base)
    assert again.policy is None
    assert re.search(expected, again.problem)


def fetched(store: Store, version: str, folder: Path) -> Path:
    fetch_version(version, store.url, folder)
    return folder
