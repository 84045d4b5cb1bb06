"""Hostile model folders: each a sound miniature with one thing done to it, tried in a process of its own.

    python -m tests.latentac.hostile prepare <root>       or `serve`

writes <root>/found.json: case -> what happened. `test_hostile_models.py` starts it and judges; it
also has a listener that every proxy and the address of the hub lead to.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CANARY = "canary-5f0c9a"
"""Stands in every file outside of the folders: nothing may hold it afterwards."""
MARKER = "code-has-run"
"""File that the hostile code makes."""
CODE = f"open({MARKER!r}, 'w').close()\nclass Evil:\n    def __init__(self, *a, **k): open({MARKER!r}, 'w').close()\n"
PICKLE = f"cbuiltins\nexec\n(Vopen({MARKER!r}, 'w').close()\ntR.".encode()
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SECONDS = 30  # a case that takes longer is given up
ROOM = 6 * 2**30  # beyond what the process has when it begins: less than the machine, and enough to see a bomb

Change = Callable[[Path, Path], None]
"""Does something to a folder; the other is the folder outside, which must not be read."""


def fields(file: str, **settings: Any) -> Change:
    """Other values in a JSON file; a dot is written as two underscores."""

    def change(folder: Path, outside: Path) -> None:
        content = json.loads((folder / file).read_text())
        for path, value in settings.items():
            *within, name = path.split("__") if not path.startswith("_") else [path]
            place = content
            for step in within:
                place = place[step]
            place[name] = value
        (folder / file).write_text(json.dumps(content).replace("{outside}", str(outside)))

    return change


def text(file: str, pattern: str, new: str) -> Change:
    """What a JSON library would not write."""

    def change(folder: Path, outside: Path) -> None:
        found, count = re.subn(pattern, new, (folder / file).read_text(), count=1)
        assert count == 1, f"{file} has no {pattern}"
        (folder / file).write_text(found)

    return change


def content(file: str, new: str | bytes) -> Change:
    def change(folder: Path, outside: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(new if isinstance(new, bytes) else new.encode())

    return change


def link(file: str, target: str) -> Change:
    """target: `{outside}` is the folder outside."""

    def change(folder: Path, outside: Path) -> None:
        if (folder / file).is_dir():
            shutil.rmtree(folder / file)
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target.format(outside=outside, folder=folder))

    return change


def fifo(file: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


def sparse(file: str, size: int) -> Change:
    """A JSON file that is long and takes no disk: blanks are zeros here, which no parser gets to see."""

    def change(folder: Path, outside: Path) -> None:
        with (folder / file).open("r+b") as stream:
            stream.truncate(size)

    return change


def header(file: str, described: Any, body: int = 0, length: int | None = None) -> Change:
    """A safetensors file with this header and so many bytes behind it, none of them on the disk."""

    def change(folder: Path, outside: Path) -> None:
        start = json.dumps(described).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(start) if length is None else length) + start)
            stream.truncate(8 + len(start) + body)

    return change


def shards(target: str) -> Change:
    """An index that names a file elsewhere as the one that holds the weights."""

    def change(folder: Path, outside: Path) -> None:
        whole = folder / WEIGHTS
        names = _names(whole)
        place = target.format(outside=outside)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        whole.rename(whole.parent / "diffusion_pytorch_model-00001-of-00001.safetensors")
        (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path, outside: Path) -> None:
        for each in changes:
            each(folder, outside)

    return change


def _names(file: Path) -> list[str]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return [name for name in json.loads(stream.read(length)) if name != "__metadata__"]


def _pickles(folder: Path, outside: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        (file.parent / file.name.replace("safetensors", "bin")).write_bytes(PICKLE)
        file.unlink()


def _beside(folder: Path, outside: Path) -> None:
    """Code, pickles and hidden files beside good ones, each with the canary."""
    for place in (folder, folder / "unet", folder / "text_encoder", folder / "tokenizer", folder / "critic"):
        if not place.is_dir():
            continue
        for name in ("hubconf.py", "pipeline.py", "modeling_evil.py", "unet.py", "__init__.py"):
            (place / name).write_text(f"{CODE}# {CANARY}\n")
        for name in ("pytorch_model.bin", "model.ckpt", "x.pt", "training_args.pkl"):
            (place / name).write_bytes(PICKLE + CANARY.encode())
        for name in (".env", ".git-credentials", "notes.txt", "chat_template.jinja", "evil.json"):
            (place / name).write_text(CANARY)
    (folder / ".secret").mkdir()
    (folder / ".secret" / "config.json").write_text(CANARY)


def _snapshot(folder: Path, outside: Path) -> None:
    """The layout of a hub's cache, in which `blobs` is a link out of it."""
    inner = folder / "snapshots" / "main"
    shutil.copytree(folder, folder.parent / "inner")
    shutil.rmtree(folder)
    inner.parent.mkdir(parents=True)
    (folder.parent / "inner").rename(inner)
    (folder / "blobs").symlink_to(outside)
    (inner / UNET).unlink()
    (inner / UNET).symlink_to("../../../blobs/config.json")


BOMB = {f"token{n}": n for n in range(20_000)}
ADDED = [
    {"id": n, "content": f"<{n}>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
     "special": True} for n in range(30_000)
]  # fmt: skip
LARGE = {"a": {"dtype": "F32", "shape": [25 * 2**30], "data_offsets": [0, 100 * 2**30]}}
MANY = {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(30_000)}
SHARED = {f"t{n}": {"dtype": "F32", "shape": [2**24], "data_offsets": [0, 2**26]} for n in range(1000)}
PLACES = {
    "vocab_file": "{outside}/config.json",
    "tokenizer_file": "../../outside/config.json",
    "vocab": "/etc/passwd",
    "merges_file": "/etc/passwd",
    "fast_tokenizer_files": ["tokenizer.4.0.0.json", "../../outside/config.json"],
    "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    "trust_remote_code": True,
    "name_or_path": f"/home/{CANARY}",
    "chat_template": "{{ cycler.__init__.__globals__.os.system('touch code-has-run') }}",
}
REMOTE = {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "trust_remote_code": True}
ELSEWHERE = {"peft_type": "LORA", "base_model_name_or_path": "", "r": 2, "target_modules": ["q_proj"]}


def _adapter(part: str, base: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        described = {**ELSEWHERE, "base_model_name_or_path": base.format(outside=outside)}
        (folder / part / "adapter_config.json").write_text(json.dumps(described))

    return change


CODE_IN_NAMES: dict[str, tuple[Change, str]] = {
    "a class of another module in model_index": (fields("model_index.json", unet=["os", "system"]), "is a system"),
    "a module of the folder in model_index": (
        fields("model_index.json", unet=["evil", "UNet2DConditionModel"]), "is of 'evil'"),
    "a tokenizer of another module": (fields("model_index.json", tokenizer=["evil", "CLIPTokenizer"]), "is of 'evil'"),
    "a scheduler of another module": (fields("model_index.json", scheduler=["os", "PNDMScheduler"]), "is of 'os'"),
    "a pipeline class from a file": (fields("model_index.json", _class_name=["evil", "Evil"]), "is not supported"),
    "a pipeline class of another kind": (fields("model_index.json", _class_name="os.system"), "is not supported"),
    "a part's class of another kind": (fields(UNET, _class_name="evil.Evil"), "only UNet2DConditionModel"),
    "a scheduler's class of another kind": (
        fields("scheduler/scheduler_config.json", _class_name="os:system"), "is not known"),
    "a quantizer": (fields(UNET, quantization_config={"quant_method": "evil"}), "quantization_config"),
    "pickles alone": (_pickles, "pickles can run code"),
    "a pickle called safetensors": (content(WEIGHTS, PICKLE), "is not a safetensors file"),
    "an adapter whose base is outside": (_adapter("text_encoder", "{outside}"), "is an adapter of peft"),
    "an adapter whose base is on the hub": (_adapter("unet", "someone/a-model"), "is an adapter of peft"),
    "an adapter of the autoencoder": (_adapter("vae", "../../outside"), "is an adapter of peft"),
}  # fmt: skip

OUTSIDE: dict[str, tuple[Change, str]] = {
    "shards in a parent folder": (shards("../../../outside/weights.safetensors"), "not there"),
    "shards at an absolute path": (shards("{outside}/weights.safetensors"), "not there"),
    "weights are a link": (link(WEIGHTS, "{outside}/weights.safetensors"), "leads out of the folder"),
    "a configuration is a link": (link(UNET, "{outside}/config.json"), "leads out of the folder"),
    "the index is a link": (link("model_index.json", "{outside}/model_index.json"), "leads out of the folder"),
    "a vocabulary is a link": (link("tokenizer/vocab.json", "{outside}/config.json"), "leads out of the folder"),
    "a part is a link": (link("unet", "{outside}/unet"), "leads out of the folder"),
    "a chain of links": (both(link("unet/x", "../y"), link("y", "{outside}/config.json"), link(UNET, "x")),
                         "leads out of the folder"),
    "links in a circle": (both(link("unet/x", "config.json"), link(UNET, "x")), "links in a circle"),
    "a link to a device": (link(WEIGHTS, "/dev/zero"), "leads out of the folder"),
    "a link to the environment": (link("tokenizer/merges.txt", "/proc/self/environ"), "leads out of the folder"),
    "a configuration is a pipe": (fifo(UNET), "is not a regular file"),
    "weights are a pipe": (fifo(WEIGHTS), "is not a regular file"),
    "the index is a pipe": (fifo("model_index.json"), "is not a regular file"),
    "merges are a pipe": (fifo("tokenizer/merges.txt"), "is not a regular file"),
}  # fmt: skip

NUMBERS: dict[str, tuple[Change, str]] = {
    "huge channels": (fields(UNET, block_out_channels=[10**9, 10**9]), "block_out_channels is 1000000000"),
    "channels beyond the weights": (fields(UNET, block_out_channels=[8192, 65536]), "no tensor of its weights"),
    "more blocks than weights": (fields(UNET, layers_per_block=16), "asks for"),
    "many layers per block": (fields(UNET, layers_per_block=10**9), "layers_per_block is"),
    "many blocks": (fields(UNET, down_block_types=["DownBlock2D"] * 10**4), "down_block_types has 10,000"),
    "a huge image": (fields(UNET, sample_size=10**6), "sample_size is 1000000"),
    "an image of 4,096 pixels": (fields(UNET, sample_size=512), "sample_size is 512"),
    "no image": (fields(UNET, sample_size=0), "sample_size is 0"),
    "a huge number of any other field": (fields(UNET, norm_eps=1e30), "norm_eps is 1e+30"),
    "a text of 5,000 characters": (fields(UNET, act_fn="x" * 5000), "act_fn is a text of 5,000 characters"),
    "negative channels": (fields(UNET, in_channels=-4), "in_channels is -4"),
    "a huge width of the text": (fields(UNET, cross_attention_dim=2**70), "cross_attention_dim is"),
    "a text for a number": (fields(UNET, layers_per_block="1; import os"), "layers_per_block is"),
    "true for a number": (fields(UNET, attention_head_dim=True), "attention_head_dim is True"),
    "NaN": (text(UNET, r'"norm_eps": [^,]+', '"norm_eps": NaN'), "norm_eps is nan"),
    "infinity by its exponent": (text(UNET, r'"norm_eps": [^,]+', '"norm_eps": 1e400'), "norm_eps is inf"),
    "a number of 5,000 digits": (text(UNET, r'"layers_per_block": 1', f'"layers_per_block": {"9" * 5000}'), "not JSON"),
    "a fraction of channels": (fields(VAE, latent_channels=4.5), "latent_channels is 4.5"),
    "huge channels of the autoencoder": (fields(VAE, block_out_channels=[8, 8, 16, 2**40]), "block_out_channels is"),
    "autoencoder beyond its weights": (fields(VAE, block_out_channels=[8, 8, 16, 65536]), "no tensor of its weights"),
    "a huge vocabulary": (fields(TEXT, vocab_size=10**9), "vocab_size is"),
    "a vocabulary beyond the weights": (fields(TEXT, vocab_size=2**20, hidden_size=32), "no tensor of its weights"),
    "many positions": (
        both(fields(TEXT, max_position_embeddings=10**8),
             fields("tokenizer/tokenizer_config.json", model_max_length=10**8)), "max_position_embeddings is"),
    "a prompt of 100,000,000 tokens": (
        fields("tokenizer/tokenizer_config.json", model_max_length=10**8), "model_max_length is 100000000"),
    "many layers of the text encoder": (fields(TEXT, num_hidden_layers=10**9), "num_hidden_layers is"),
    "a wide text encoder": (fields(TEXT, intermediate_size=65536), "no tensor of its weights"),
    "many timesteps": (fields("scheduler/scheduler_config.json", num_train_timesteps=10**9), "num_train_timesteps is"),
    "many betas": (fields("scheduler/scheduler_config.json", trained_betas=[0.1] * 20_000), "trained_betas has 20,000"),
    "NaN for a beta": (text("scheduler/scheduler_config.json", r'"beta_end": [^,]+', '"beta_end": NaN'),
                       "beta_end is nan"),
    "a text for a beta": (fields("scheduler/scheduler_config.json", beta_end="high"), "cannot be built"),
    "tokens with huge numbers": (fields("tokenizer/vocab.json", a=2**62), "whose number is"),
    "a token with a text for a number": (fields("tokenizer/vocab.json", a="1"), "whose number is"),
}  # fmt: skip

FILES: dict[str, tuple[Change, str]] = {
    "a header of 100 GB": (header(WEIGHTS, {}, length=100 * 2**30), "is not a safetensors file"),
    "a tensor of 100 GB": (header(WEIGHTS, LARGE), "it was cut off"),
    "tensors that share bytes": (header(WEIGHTS, SHARED, 2**26), "one after another"),
    "tensors of negative size": (
        header(WEIGHTS, {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, 8), "damaged header"),
    "a tensor of another size than its shape": (
        header(WEIGHTS, {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}, 8), "damaged header"),
    "30,000 tensors": (header(WEIGHTS, MANY), "30,000 tensors"),
    "a header nested deep": (content(WEIGHTS, struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000),
                             "damaged header"),
    "a header of 9 MB": (content(WEIGHTS, struct.pack("<Q", 9 * 2**20) + b"{}".ljust(9 * 2**20)),
                         "is not a safetensors file"),
    "weights of no bytes": (content(WEIGHTS, b""), "is not a safetensors file"),
    "a configuration of no bytes": (content(UNET, b""), "is not JSON"),
    "a configuration that is a list": (content(UNET, "[]"), "is not a JSON object"),
    "a configuration in no encoding": (content(UNET, b"\xff\xfe\x00\x81"), "is not JSON"),
    "nested 100,000 deep": (content(UNET, '{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deep"),
    "nested 500 deep": (content(UNET, '{"a":' * 500 + "1" + "}" * 500), "nested too deep"),
    "lists nested 100,000 deep": (content("model_index.json", "[" * 100_000 + "]" * 100_000), "nested too deep"),
    "a configuration of 1 GB": (sparse(UNET, 2**30), "at most 1,048,576 are read"),
    "an index of 1 GB": (sparse("model_index.json", 2**30), "at most 1,048,576 are read"),
    "a vocabulary of 1 GB": (sparse("tokenizer/vocab.json", 2**30), "at most 8,388,608 are read"),
    "merges of 1 GB": (sparse("tokenizer/merges.txt", 2**30), "at most 8,388,608 are read"),
    "a key twice": (text(UNET, r"\{", '{"in_channels": 4,'), "key 'in_channels' twice"),
    "a part twice": (text("model_index.json", r"\{", '{"unet": ["diffusers", "UNet2DConditionModel"],'), "twice"),
    "30,000 added tokens": (
        content("tokenizer/tokenizer.json",
                json.dumps({"version": "1.0", "added_tokens": ADDED, "model": {"vocab": {"a": 0}, "merges": []}})),
        "tokens to its vocabulary"),
    "800,000 merges": (
        content("tokenizer/tokenizer.json",
                '{"version": "1.0", "added_tokens": [], "model": {"vocab": {"a": 0}, "merges": ['
                + ",".join(['["a","a"]'] * 800_000) + "]}}"),
        "more than 500,000 values"),
    "20,000 more tokens": (content("tokenizer/added_tokens.json", json.dumps(BOMB)), "tokens to its vocabulary"),
    "30,000 special tokens": (
        fields("tokenizer/special_tokens_map.json", additional_special_tokens=[f"<{n}>" for n in range(30_000)]),
        "tokens to its vocabulary"),
    "a token of a million characters": (fields("tokenizer/vocab.json", **{"a" * 10**6: 5}), "has a token of"),
}  # fmt: skip

HARMLESS: dict[str, Change] = {
    "an encoder that returns tuples": fields(TEXT, return_dict=False),
    "a kernel on the hub": fields(TEXT, attn_implementation="evil/kernel", _experts_implementation="evil/kernel"),
    "code, pickles and hidden files beside": _beside,
    "auto_map and trust_remote_code": both(
        fields(TEXT, **REMOTE),
        fields(UNET, auto_map={"AutoModel": "evil.Evil"}),
        fields("model_index.json", custom_pipelines={"evil": "evil.Evil"}, custom_pipeline="evil.Evil"),
    ),
    "names of places": both(
        fields(TEXT, _name_or_path=f"/home/{CANARY}/text_encoder"),
        fields(UNET, _name_or_path=f"../../{CANARY}"),
        fields(VAE, _name_or_path=f"{CANARY}/a-model"),
        fields("model_index.json", _name_or_path=f"/home/{CANARY}"),
    ),
    "a tokenizer's files elsewhere": fields("tokenizer/tokenizer_config.json", **PLACES),
}
"""Loaded as if it were not there."""

PREPARE: dict[str, tuple[Change, str | None]] = {
    **CODE_IN_NAMES,
    **OUTSIDE,
    "blobs of a snapshot are a link": (_snapshot, "leads out of the folder"),
    **NUMBERS,
    **FILES,
    **{name: (change, None) for name, change in HARMLESS.items()},
}

OURS, CRITIC = "latentac.json", "critic/config.json"
LORA = "pytorch_lora_weights.safetensors"


def _as_adapter(change: Change | None = None, *, hashed: bool = True) -> Change:
    """The export as that of an adapter with its base, and then `change`. hashed: whether latentac.json says the hashes
    of what is in `base/` after that, so that only what the base is can be wrong."""

    def make(folder: Path, outside: Path) -> None:
        for path in [path for path in folder.iterdir() if path.name not in {OURS, "critic"}]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(folder.parent.parent / "prepared", folder / "base")
        shutil.copyfile(folder.parent.parent / LORA, folder / LORA)
        _rehash(folder)
        if change is not None:
            change(folder, outside)
        if hashed:
            _rehash(folder)

    return make


def _without_base(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder / "base")


def _rehash(folder: Path) -> None:
    files = {}
    for path in (path for path in (folder / "base").rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.suffix == ".json":  # as `prepare` writes it
            raw = f"{json.dumps(json.loads(raw), indent=2, ensure_ascii=False)}\n".encode()
        files[path.relative_to(folder / "base").as_posix()] = hashlib.sha256(raw).hexdigest()
    described = json.loads((folder / OURS).read_text())
    described["base"] = {"name": "a base", "artifact": "r/prepare", "files": files}
    (folder / OURS).write_text(json.dumps(described))


RANK = {"unet.x.lora_A.weight": {"dtype": "F32", "shape": [2**24, 1], "data_offsets": [0, 2**26]}}
METHOD = {
    "extension": {"use": "best_of_n", "name": "best_of_n"}, "summary": "", "needs_gradient": False, "strength": 1.0,
    "particles": 2,
}  # fmt: skip
WIDE = {"settings__body": {"use": "frozen_taps", "width": 4096, "num_queries": 256}}
SERVE: dict[str, tuple[Change, str | None]] = {
    "a backbone that loads a folder's code": (
        both(fields(OURS, backbone__use="torch.hub:_load_local"), content("hubconf.py", CODE)), "not built in"),
    "a class of the folder as the backbone": (fields(OURS, backbone__use="evil:Evil"), "not built in"),
    "os.system as the kernel": (fields(OURS, kernel__use="os:system"), "not built in"),
    "eval as a method": (
        fields(OURS, methods__best_of_n__extension={"use": "builtins:eval", "name": "best_of_n"}), "not built in"),
    "a class of the folder as the critic's body": (fields(CRITIC, settings__body={"use": "evil:Evil"}), "not built in"),
    "a setting that the backbone has not": (fields(OURS, backbone__custom_pipeline="evil"), "no such setting"),
    "a setting that a method has not": (fields(OURS, methods__best_of_n__extension__code="evil"), "no such setting"),
    "a batch of 1,000,000,000 rows": (fields(OURS, batching__batch_rows=10**9), "batch_rows"),
    "1,000,000,000 particles": (fields(OURS, limits__max_particles=10**9), "max_particles"),
    "a method of many particles": (fields(OURS, methods__best_of_n__particles=10**9), "particles"),
    "1,000,000,000 steps": (fields(OURS, kernel__num_steps=10**9), "num_steps"),
    "1,000,000,000 images": (fields(OURS, limits__max_images=10**9), "max_images"),
    "1,000,000,000 images that wait": (fields(OURS, batching__max_queued_images=10**9), "max_queued_images"),
    "1,000,000,000 steps of a request": (fields(OURS, limits__max_steps=10**9), "max_steps"),
    "1,000,000,000 characters": (fields(OURS, limits__max_prompt_characters=10**9), "max_prompt_characters"),
    "a request of 30 years": (fields(OURS, batching__request_seconds=10**9), "request_seconds"),
    "a wait of a day": (fields(OURS, batching__batch_wait_seconds=86400.0), "batch_wait_seconds"),
    "100 rewards": (fields(OURS, rewards=[{"name": f"r{n}", "weight": 1.0, "unit": ""} for n in range(100)]),
                    "at most 64 items"),
    "100 examples": (fields(OURS, examples=["a red circle"] * 100), "at most 64 items"),
    "100 methods": (fields(OURS, methods={f"m{n}": METHOD for n in range(100)}), "at most 64 items"),
    "no trained policy": (fields(OURS, policies=["base"]), "policies lacks `trained`"),
    "a huge size": (fields(OURS, size=[10**9, 10**9]), "size"),
    "a negative batch": (fields(OURS, batching__batch_rows=-1), "batch_rows"),
    "a text for a batch": (fields(OURS, batching__batch_rows="4"), "batch_rows"),
    "a wait without an end": (text(OURS, r'"batch_wait_seconds":\s*[^,]+', '"batch_wait_seconds": 1e400'),
                              "batch_wait_seconds is inf"),
    "NaN for a strength": (text(OURS, r'"strength":\s*[^,]+', '"strength": NaN'), "strength is nan"),
    "a policy in another folder": (fields(OURS, policies=["trained", "../../outside"]), "policies"),
    "a default method that is none": (fields(OURS, default_method="os.system"), "default_method"),
    "a description with a key twice": (text(OURS, r"\{", '{"run": "x",'), "twice"),
    "a description nested deep": (content(OURS, '{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deep"),
    "a description of 1 GB": (sparse(OURS, 2**30), "at most 1,048,576 are read"),
    "a description that is a link": (link(OURS, "{outside}/config.json"), "leads out of the folder"),
    "a description that is a pipe": (fifo(OURS), "is not a regular file"),
    "a critic that is a pipe": (fifo(CRITIC), "is not a regular file"),
    "a critic of 1 GB": (sparse(CRITIC, 2**30), "at most 1,048,576 are read"),
    "a critic without settings": (content(CRITIC, "{}"), "has no settings"),
    "a critic of huge width": (fields(CRITIC, settings__body={"use": "frozen_taps", "width": 10**9}), "width"),
    "a critic wider than its weights": (fields(CRITIC, **WIDE), "asks for"),
    "a critic of many hidden units": (fields(CRITIC, settings__hidden=8192), "asks for"),
    "a critic of one cell of a map": (fields(CRITIC, settings__body={"use": "frozen_taps", "grid": 1}), "asks for"),
    "a critic of many rewards": (fields(CRITIC, reward_names=["x"] * 30_000), "asks for"),
    "a critic's weights are a link": (link("critic/model.safetensors", "{outside}/weights.safetensors"), "leads out"),
    "a critic's tensors share bytes": (header("critic/model.safetensors", SHARED, 2**26), "one after another"),
    "a critic is a pickle": (content("critic/model.safetensors", PICKLE), "is not a safetensors file"),
    "the base's weights are a link": (
        link(f"base/{WEIGHTS}", "{outside}/weights.safetensors"), "leads out of the folder"),
    "the base is a link": (link("base/unet", "{outside}/unet"), "leads out of the folder"),
    "the base is beyond its weights": (fields(f"base/{UNET}", block_out_channels=[8192, 65536]), "asks for"),
    "the base of many layers": (fields(f"base/{UNET}", layers_per_block=10**9), "layers_per_block is"),
    "the base is a pickle": (content(f"base/{WEIGHTS}", PICKLE), "is not a safetensors file"),
    "the base has an adapter": (_adapter("base/unet", "{outside}"), "is an adapter of peft"),
    "an adapter with its base": (_as_adapter(), None),
    "an adapter whose base is another": (
        _as_adapter(fields(f"base/{UNET}", norm_eps=1e-3), hashed=False), f"{UNET}: has sha256"),
    "an adapter whose base is in a parent folder": (
        _as_adapter(fields(OURS, base__artifact="../../outside/prepare"), hashed=False), "base.artifact"),
    "an adapter whose base is at an address": (
        _as_adapter(fields(OURS, base__artifact="https://example.org/prepare"), hashed=False), "base.artifact"),
    "an adapter whose base has files outside": (
        _as_adapter(fields(OURS, base__files={"../../outside/config.json": "0" * 64}), hashed=False), "base"),
    "an adapter whose base is a name of the hub": (
        _as_adapter(both(fields(OURS, base__name="someone/a-model"), _without_base), hashed=False), "is not there"),
    "an adapter whose base is a link": (
        _as_adapter(both(_without_base, link("base", "{outside}")), hashed=False), "leads out of the folder"),
    "an adapter whose base has a link": (
        _as_adapter(link(f"base/{WEIGHTS}", "{outside}/weights.safetensors"), hashed=False), "leads out of the folder"),
    "an adapter whose base is a pipe": (_as_adapter(fifo(f"base/{WEIGHTS}"), hashed=False), "is not a regular file"),
    "an adapter whose base is a pickle": (_as_adapter(content(f"base/{WEIGHTS}", PICKLE)), "is not a safetensors file"),
    "an adapter whose base asks for more": (
        _as_adapter(fields(f"base/{UNET}", block_out_channels=[8192, 65536])), "no tensor of its weights"),
    "an adapter that is a pickle": (_as_adapter(content(LORA, PICKLE)), "is not a safetensors file"),
    "an adapter that is a link": (_as_adapter(link(LORA, "{outside}/weights.safetensors")), "leads out of the folder"),
    "an adapter that is a pipe": (_as_adapter(fifo(LORA)), "is not a regular file"),
    "an adapter of a tensor of 100 GB": (_as_adapter(header(LORA, LARGE)), "it was cut off"),
    "an adapter of a huge rank": (_as_adapter(header(LORA, RANK, 4 * 2**24)), "this base needs"),
    "an adapter whose tensors share bytes": (_as_adapter(header(LORA, SHARED, 2**26)), "one after another"),
    "an adapter of peft in the base of an adapter": (
        _as_adapter(_adapter("base/unet", "{outside}"), hashed=False), "is an adapter of peft"),
    **{name: case for cases in (CODE_IN_NAMES, OUTSIDE) for name, case in cases.items()},
    **{name: NUMBERS[name] for name in ("a huge image", "channels beyond the weights", "many timesteps",
                                        "a prompt of 100,000,000 tokens", "many positions", "a wide text encoder")},
    **{name: FILES[name] for name in ("tensors that share bytes", "a configuration of 1 GB", "30,000 added tokens")},
    **{name: (change, None) for name, change in HARMLESS.items()},
}  # fmt: skip


def base_folder(folder: Path) -> Path:
    """The sound model that the cases of `prepare` begin with."""
    from tests.latentac import miniatures

    return miniatures.sd15(folder)


def exported_folder(folder: Path, base: Path) -> Path:
    """The sound export that the cases of `serve` begin with."""
    import torch

    from latentac.backbones import layout_of, load_backbone
    from latentac.backbones.layout import copy
    from latentac.config.learning import Policy as PolicySettings
    from latentac.critic import Critic
    from latentac.runs.resolution import resolve_all
    from latentac.serving.exported import add_base, export

    resolved = resolve_all(
        {
            "recipe": "test",
            "backbone": {"source": str(base)},
            "prompts": {"source": "builtin:shapes"},
            "rewards": [{"use": "jpeg_compressibility"}],
            "steering": {"methods": [{"use": "best_of_n"}]},
            "gate": {"reward": "jpeg_compressibility"},
        }
    )
    shutil.copytree(base, folder)
    backbone = load_backbone(resolved.config.backbone, folder, torch.device("cpu"))
    Critic(backbone, resolved.config.reward_names, resolved.config.critic).save(folder / "critic")
    add_base(folder, base)
    export(folder, resolved.config, run="r", version="v", extensions=resolved.described())
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=4, lora_alpha=4))
    backbone.save(folder.parent / "trained")
    (folder.parent / "trained" / "lora" / LORA).rename(folder.parent / LORA)
    copy(base, folder.parent / "prepared", layout_of(resolved.config.backbone))
    return folder


def outside_folder(folder: Path, base: Path) -> None:
    """Files that would do, were they not elsewhere: each holds the canary."""
    shutil.copytree(base / "unet", folder / "unet")
    described = json.loads((base / UNET).read_text()) | {"canary": CANARY}
    for file in (folder / "config.json", folder / "unet" / "config.json"):
        file.write_text(json.dumps(described))
    index = json.loads((base / "model_index.json").read_text()) | {"canary": CANARY}
    (folder / "model_index.json").write_text(json.dumps(index))
    raw = (base / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    answer = {"__metadata__": {"canary": CANARY}, **json.loads(raw[8 : 8 + length])}
    answer["__metadata__"]["format"] = "pt"
    start = json.dumps(answer).encode()
    for file in (folder / "weights.safetensors", folder / "unet" / "diffusion_pytorch_model.safetensors"):
        file.write_bytes(struct.pack("<Q", len(start)) + start + raw[8 + length :])


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _prepare(folder: Path, output: Path) -> int:
    from latentac.runs.cli import main

    source = folder / "snapshots" / "main"
    source = source if source.is_dir() else folder
    words = ["prepare", "--run", "r", "--recipe", "shapes-unet-smoke", "--output", str(output)]
    words += ["--set", f"backbone.source={source}", "--set", "rewards=[{use: jpeg_compressibility}]"]
    return int(main([*words, "--set", "gate.reward=jpeg_compressibility"]))


def _serve(folder: Path, output: Path) -> int:
    import torch

    from latentac.serving.generator import Generator
    from latentac.system.errors import LatentacError

    try:
        Generator(folder, torch.device("cpu")).generate("a red circle", num_steps=2)
    except LatentacError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def main(role: str, root: Path, cases: dict[str, tuple[Change, str | None]]) -> None:
    outside = root / "outside"
    base = base_folder(root / "sound")
    outside_folder(outside, base)
    act = {"prepare": _prepare, "serve": _serve}[role]
    if role == "serve":
        base = exported_folder(root / "exported", base)
    opened: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            if str(outside) in os.path.realpath(arguments[0]):
                opened.append(os.fspath(arguments[0]))
        elif event in {"os.system", "socket.connect", "os.exec", "os.posix_spawn"} or (
            event == "subprocess.Popen" and arguments[0] != "git"  # asked for the commit of latentac
        ):
            opened.append(f"{event} {arguments[:2]!r}")

    sys.addaudithook(watch)
    assert act(base, root / "first") == 0, "the sound folder is refused"  # and what is loaded once is no case's affair
    signal.signal(signal.SIGALRM, _too_long)
    limit = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found: dict[str, dict[str, Any]] = {}
    for number, (name, (change, _)) in enumerate(cases.items()):
        folder, output = root / f"case-{number}" / "model", root / f"case-{number}" / "output"
        shutil.copytree(base, folder)
        change(folder, outside)
        opened.clear()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, started, reported = _status("VmRSS"), time.monotonic(), io.StringIO()
        watching = True
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(reported), contextlib.redirect_stdout(reported):
                code = act(folder, output)
        except BaseException as error:  # noqa: BLE001 - anything is a finding
            code, _ = -1, reported.write("".join(traceback.format_exception(error)[-3:]))
        signal.alarm(0)
        watching = False
        said = reported.getvalue()
        found[name] = {
            "code": code,
            "seconds": time.monotonic() - started,
            "bytes": _status("VmHWM") - before,
            "said": said[-3000:],
            "leaked": [str(path) for path in output.rglob("*") if path.is_file() and _leaks(path)]
            + (["the message"] if CANARY in said and CANARY not in name else []),
            "opened": list(opened),
            "ran": Path(MARKER).exists(),
        }
        Path(MARKER).unlink(missing_ok=True)
        (root / "found.json").write_text(json.dumps(found))
        shutil.rmtree(folder.parent)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {SECONDS} s")


def _leaks(path: Path) -> bool:
    """Whether a file holds what stands outside, or names code: whoever loads a published copy may trust it."""
    content = path.read_bytes()
    return CANARY.encode() in content or b"evil.Evil" in content


if __name__ == "__main__":
    chosen = {"prepare": PREPARE, "serve": SERVE}[sys.argv[1]]
    main(sys.argv[1], Path(sys.argv[2]), chosen)
