"""Miniatures of the rewards that are published as pickles, with the names of the published files, and what the
published code computes with them, written here from its papers in the terms of torch alone.

    open_clip(...)      a CLIP as open_clip names it, the layout of HPS_v2.1_compressed.pt
    image_reward(...)   BLIP's encoders and the head, the layout of ImageReward.pt
    bert(folder)        a tokenizer of BERT's true format with a small vocabulary
    pickled(...)        tensors as the pickle that torch writes, by a process of its own
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

State = dict[str, Tensor]
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a the red blue green circle square squares three two tri ##angle above "
    "paint ##ing of z ##ur ##ich"
).split()


def pickled(state: dict[str, Any], file: Path, wrap: str = "state") -> Path:
    """The tensors `state` as a pickle. wrap: the Python expression that is saved, of `state`."""
    plain = file.with_suffix(".tensors")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, plain)
    script = (
        "import torch; from safetensors.torch import load_file; "
        f"state = load_file({str(plain)!r}); torch.save({wrap}, {str(file)!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    plain.unlink()
    return file


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Weights of these shapes; those of a norm are around 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * (0.2 if len(shape) < 2 else shape[-1] ** -0.5)
        is_norm = name.endswith("weight") and len(shape) == 1
        found[name] = values + 1 if is_norm else values
    return found


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# open_clip


def open_clip(*, width: int = 32, shared: int = 24, words: int = 579, length: int = 16, seed: int = 0) -> State:
    """Two layers a half, images of 32 pixels in patches of 8."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (length, width),
        "token_embedding.weight": (words, width),
        "text_projection": (width, shared),
        "visual.proj": (width, shared),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (17, width),
        "visual.conv1.weight": (width, 3, 8, 8),
        **_norm("visual.ln_pre", width),
        **_norm("visual.ln_post", width),
        **_norm("ln_final", width),
    }
    for half in ("visual.", ""):
        for layer in range(2):
            begin = f"{half}transformer.resblocks.{layer}."
            shapes |= _norm(begin + "ln_1", width) | _norm(begin + "ln_2", width)
            shapes |= {begin + "attn.in_proj_weight": (3 * width, width), begin + "attn.in_proj_bias": (3 * width,)}
            shapes |= _linear(begin + "attn.out_proj", width, width)
            shapes |= _linear(begin + "mlp.c_fc", 2 * width, width) | _linear(begin + "mlp.c_proj", width, 2 * width)
    return drawn(shapes, seed)


def open_clip_cosines(state: State, pixels: Tensor, tokens: Tensor, end: int, heads: int = 4) -> Tensor:
    """float32 [B] as HPSv2's code has them: the diagonal of the product of the unit vectors. end: the last token."""

    def normed(name: str, values: Tensor) -> Tensor:
        return functional.layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def layers(half: str, values: Tensor, mask: Tensor | None) -> Tensor:
        for layer in range(2):
            begin = f"{half}transformer.resblocks.{layer}."
            attention = nn.MultiheadAttention(values.shape[-1], heads, batch_first=True)
            own = {name.removeprefix(begin + "attn."): one for name, one in state.items() if name.startswith(begin)}
            attention.load_state_dict({name: one for name, one in own.items() if not name.startswith(begin)})
            inputs = normed(begin + "ln_1", values)
            values = values + attention(inputs, inputs, inputs, attn_mask=mask, need_weights=False)[0]
            inner = _apply(state, begin + "mlp.c_fc", normed(begin + "ln_2", values))
            values = values + _apply(state, begin + "mlp.c_proj", functional.gelu(inner))
        return values

    patches = functional.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    seen = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    seen = layers("visual.", normed("visual.ln_pre", seen), None)
    image = normed("visual.ln_post", seen[:, 0]) @ state["visual.proj"]

    length = tokens.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)
    read = layers("", state["token_embedding.weight"][tokens] + state["positional_embedding"][:length], causal)
    places = (tokens == end).int().argmax(dim=1)
    text = normed("ln_final", read)[torch.arange(len(tokens)), places] @ state["text_projection"]
    return (functional.normalize(image, dim=-1) * functional.normalize(text, dim=-1)).sum(dim=-1)


def _apply(state: State, name: str, values: Tensor) -> Tensor:
    return functional.linear(values, state[f"{name}.weight"], state[f"{name}.bias"])


# ImageReward

HEADS = 2
"""Of the image encoder, of 64 numbers each; the text encoder has one."""


def image_reward(*, seed: int = 0, words: int = len(WORDS) + 2) -> State:
    """Two layers an encoder, images of 32 pixels in patches of 8, and the published head."""
    width, own = 64 * HEADS, 64
    see, read = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        see + "cls_token": (1, 1, width),
        see + "pos_embed": (1, 17, width),
        see + "patch_embed.proj.weight": (width, 3, 8, 8),
        see + "patch_embed.proj.bias": (width,),
        **_norm(see + "norm", width),
        read + "embeddings.word_embeddings.weight": (words, own),
        read + "embeddings.position_embeddings.weight": (40, own),
        **_norm(read + "embeddings.LayerNorm", own),
        **_linear("blip.vision_proj", 256, width),
        **_linear("blip.text_proj", 256, own),
    }
    for layer in range(2):
        begin = f"{see}blocks.{layer}."
        shapes |= _norm(begin + "norm1", width) | _norm(begin + "norm2", width)
        shapes |= _linear(begin + "attn.qkv", 3 * width, width) | _linear(begin + "attn.proj", width, width)
        shapes |= _linear(begin + "mlp.fc1", 4 * width, width) | _linear(begin + "mlp.fc2", width, 4 * width)
        begin = f"{read}encoder.layer.{layer}."
        for kind, of in (("attention", own), ("crossattention", width)):
            shapes |= _linear(f"{begin}{kind}.self.query", own, own) | _linear(f"{begin}{kind}.self.key", own, of)
            shapes |= _linear(f"{begin}{kind}.self.value", own, of) | _linear(f"{begin}{kind}.output.dense", own, own)
            shapes |= _norm(f"{begin}{kind}.output.LayerNorm", own)
        shapes |= _linear(begin + "intermediate.dense", 96, own) | _linear(begin + "output.dense", own, 96)
        shapes |= _norm(begin + "output.LayerNorm", own)
    inputs = own
    for place, outputs in {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}.items():
        shapes |= _linear(f"mlp.layers.{place}", outputs, inputs)
        inputs = outputs
    found = drawn(shapes, seed)
    found[read + "embeddings.position_ids"] = torch.arange(40)[None]
    return found


def image_rewards(state: State, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """float32 [B] as published: normalised by mean and deviation of the training set."""
    see, read = "blip.visual_encoder.", "blip.text_encoder."

    def normed(name: str, values: Tensor, epsilon: float) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(values, values.shape[-1:], weight, bias, epsilon)

    def attended(query: Tensor, key: Tensor, value: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
        apart = [each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key, value)]
        scores = apart[0] @ apart[1].transpose(2, 3) / apart[0].shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None, None, :], float("-inf"))
        return (scores.softmax(dim=-1) @ apart[2]).transpose(1, 2).flatten(2)

    kernel, offset = state[see + "patch_embed.proj.weight"], state[see + "patch_embed.proj.bias"]
    patches = functional.conv2d(pixels, kernel, offset, stride=8).flatten(2).transpose(1, 2)
    seen = torch.cat([state[see + "cls_token"].expand(len(pixels), 1, -1), patches], dim=1) + state[see + "pos_embed"]
    for layer in range(2):
        begin = f"{see}blocks.{layer}."
        query, key, value = _apply(state, begin + "attn.qkv", normed(begin + "norm1", seen, 1e-6)).chunk(3, dim=-1)
        seen = seen + _apply(state, begin + "attn.proj", attended(query, key, value, HEADS))
        inner = functional.gelu(_apply(state, begin + "mlp.fc1", normed(begin + "norm2", seen, 1e-6)))
        seen = seen + _apply(state, begin + "mlp.fc2", inner)
    seen = normed(see + "norm", seen, 1e-6)

    words, places = (state[f"{read}embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    text = normed(read + "embeddings.LayerNorm", words[tokens] + places[: tokens.shape[1]], 1e-12)
    for layer in range(2):
        begin = f"{read}encoder.layer.{layer}."
        for kind, of, allowed in (("attention", None, mask.bool()), ("crossattention", seen, None)):
            name = f"{begin}{kind}."
            inputs = text if of is None else of
            parts = [
                _apply(state, f"{name}self.{part}", values)
                for part, values in (("query", text), ("key", inputs), ("value", inputs))
            ]
            found = _apply(state, name + "output.dense", attended(parts[0], parts[1], parts[2], 1, allowed))
            text = normed(name + "output.LayerNorm", found + text, 1e-12)
        inner = functional.gelu(_apply(state, begin + "intermediate.dense", text))
        text = normed(begin + "output.LayerNorm", _apply(state, begin + "output.dense", inner) + text, 1e-12)
    found = text[:, 0]
    for place in (0, 2, 4, 6, 7):
        found = _apply(state, f"mlp.layers.{place}", found)
    return (found[:, 0] - 0.16717362830052426) / 1.0333394966054072


def bert(folder: Path) -> Path:
    """What the published folder of bert-base-uncased has of its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    return folder
