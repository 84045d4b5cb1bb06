"""ImageReward's network as a folder: BLIP's image encoder, a text encoder that reads it, and a head (Xu et al. 2023).

`latentac convert-weights --kind image_reward` writes it: config.json, model.safetensors, the tokenizer of BERT, and how
images are prepared. The encoders are transformers' own, of BLIP.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel, PreTrainedModel

from latentac.backbones.inspection import inspect_alone
from latentac.backbones.layout import Part
from latentac.backbones.loading import load
from latentac.rewards import folders
from latentac.rewards.conversion import KINDS, command
from latentac.rewards.image_settings import PROCESSORS, check_size, image_processor, prepared
from latentac.rewards.network import ModelNetwork
from latentac.system.errors import ConfigError, describe
from latentac.system.modelfiles import Damaged, faults, read_bytes, read_json

MAX_TOKENS = 35
"""Of a prompt, as published: a longer one loses its end."""
TOKENIZER = ("vocab.txt", "tokenizer_config.json")
HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Place -> outputs. Between them lie layers of dropout, which scoring leaves out, and no activations."""
_HEAD_WIDTH = 64  # numbers of each head of attention, in both encoders as published
_MODEL = Part(".", "model", ("ImageRewardModel",))
_REMEDY = f"Use a folder that `{command('image_reward', 'FILE')}` has written"
_LIKE = KINDS["image_reward"][1]
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class ImageRewardModel(PreTrainedModel):
    """Images and tokens to a number each, not yet normalised."""

    config_class = BlipConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = nn.ModuleDict()
        inputs = config.text_config.hidden_size
        for place, outputs in HEAD.items():
            self.head[str(place)] = nn.Linear(inputs, outputs)
            inputs = outputs
        self.post_init()

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """float32 [B] of `pixels` [B, 3, size, size], `tokens` and `mask` int64 [B, MAX_TOKENS]: the head on what the
        text encoder makes of the first token, with the image's patches as what it attends to."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen)
        found = read.last_hidden_state[:, 0].float()
        for layer in self.head.values():
            found = layer(found)
        return found[:, 0]


def empty(described: Mapping[str, Any]) -> ImageRewardModel:
    """The network that a config.json describes."""
    return ImageRewardModel(BlipConfig(**described))


def description(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of the network with tensors of these shapes. Raises Damaged."""
    try:
        width, _, patch, _ = shapes["vision.embeddings.patch_embedding.weight"]
        patches = shapes["vision.embeddings.position_embedding"][1] - 1
        words, own = shapes["text.embeddings.word_embeddings.weight"]
        vision = {
            "hidden_size": width,
            "num_attention_heads": width // _HEAD_WIDTH,
            "layer_norm_eps": 1e-6,
            "intermediate_size": shapes["vision.encoder.layers.0.mlp.fc1.weight"][0],
            "hidden_act": "gelu",
            "num_hidden_layers": _layers(shapes, "vision.encoder.layers."),
            "patch_size": patch,
            "image_size": round(patches**0.5) * patch,
        }
        text = {
            "hidden_size": own,
            "num_attention_heads": own // _HEAD_WIDTH,
            "layer_norm_eps": 1e-12,
            "intermediate_size": shapes["text.encoder.layer.0.intermediate.dense.weight"][0],
            "hidden_act": "gelu",
            "num_hidden_layers": _layers(shapes, "text.encoder.layer."),
            "vocab_size": words,
            "encoder_hidden_size": width,
            "is_decoder": True,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id")),
            "max_position_embeddings": shapes["text.embeddings.position_embeddings.weight"][0],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise Damaged(f"lacks tensors of ImageReward, or has them in another shape ({describe(error)})") from None
    if min(vision["num_attention_heads"], text["num_attention_heads"]) < 1:
        raise Damaged(f"has an encoder of less than {_HEAD_WIDTH} numbers")
    return {
        "architectures": ["ImageRewardModel"],
        "model_type": "blip",
        "vision_config": vision,
        "text_config": text,
    }


def _layers(shapes: Mapping[str, tuple[int, ...]], begin: str) -> int:
    return len({name.removeprefix(begin).partition(".")[0] for name in shapes if name.startswith(begin)})


def image_settings(described: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json, as published: CLIP's for images of the network's size."""
    return {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), True),
        **dict.fromkeys(("size", "crop_size"), described["vision_config"]["image_size"]),
        "resample": 3,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def locate(source: str, revision: str = "") -> Path:
    """The folder on this machine that `source` names, fetched if need be, and inspected. Raises ConfigError."""
    form = folders.Format(files, problems, _REMEDY, conversion="image_reward")
    return folders.locate(source, revision, form)


def files(names: Collection[str]) -> set[str]:
    """Those of a folder's file names that are used."""
    return {*_MODEL.files(names), *(name for name in (*TOKENIZER, *PROCESSORS) if name in names)}


def problems(folder: Path, *, weights: bool = True) -> Iterator[tuple[str, str]]:
    """What is wrong with a folder, and the remedy."""
    found = [(f"{name}: {problem}", to) for name, problem, to in inspect_alone(folder, (_MODEL,), weights=weights)]
    found += [(f"{name}: {problem}", to) for name, problem, to in faults(folder, (*TOKENIZER, *PROCESSORS))]
    yield from found
    if found:
        return
    try:
        described = read_json(folder / "config.json")
        _check_vocabulary(folder, described.get("text_config", {}).get("vocab_size", 0))
        check_size(folder, described.get("vision_config", {}).get("image_size", 0))
    except (Damaged, OSError) as error:
        yield str(error), _REMEDY
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        yield f"has values of the wrong type ({error})", _REMEDY


def _check_vocabulary(folder: Path, size: int) -> None:
    """Raises Damaged where vocab.txt is not that of BERT. It has one token a line; BLIP adds two."""
    if not (folder / TOKENIZER[0]).is_file():
        raise Damaged(f"tokenizer: has no {TOKENIZER[0]}, which is that of {_LIKE}")
    try:
        tokens = read_bytes(folder / TOKENIZER[0]).decode().splitlines()
    except UnicodeDecodeError:
        raise Damaged(f"{TOKENIZER[0]} is no text") from None
    if missing := [mark for mark in _MARKS if mark not in tokens]:
        raise Damaged(f"{TOKENIZER[0]} has no token {missing[0]}")
    if len(tokens) > size:
        raise Damaged(f"{TOKENIZER[0]} has {len(tokens):,} tokens, and text_config.vocab_size is {size:,}")


class Scorer(ModelNetwork):
    """The network with its tokenizer. Calls of `score` may come from several threads; those of `move` may not come
    beside them."""

    def __init__(self, source: str, folder: Path, dtype: torch.dtype) -> None:
        """On the CPU. Raises ConfigError where the files do not belong to each other."""
        cpu = torch.device("cpu")
        try:
            self.model = load(ImageRewardModel, folder, _MODEL, cpu, dtype)
        except ConfigError as error:
            raise folders.as_source(source, error) from error
        with folders.view(folder, TOKENIZER) as view:
            try:
                self._tokenizer = BertTokenizer.from_pretrained(view, local_files_only=True)
            except Exception as error:
                raise folders.bad(source, f"tokenizer: cannot be loaded ({describe(error)})", _REMEDY) from error
        self._processor = image_processor(folder)
        self.move(cpu, dtype)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """The head stays in float32, as published."""
        super().move(device, dtype)
        self.model.head.float()

    def prepare(self, images: np.ndarray) -> Tensor:
        """float32 [B, 3, size, size] of `images` uint8 [B, H, W, 3]."""
        return prepared(self._processor, images)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Numbers and mask int64 [B, MAX_TOKENS]. Threads must take turns: the tokenizer keeps how it cuts."""
        asked = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        found = self._tokenizer(list(prompts), **asked)
        return found["input_ids"], found["attention_mask"]

    def score(self, pixels: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """float32 [B] of what `prepare` and `tokenize` gave."""
        numbers, mask = (each.to(self.device) for each in tokens)
        found: Tensor = self.model(pixels.to(self.device, self.dtype), numbers, mask)
        return found
