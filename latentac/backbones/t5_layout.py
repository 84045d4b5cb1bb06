"""T5 as a part of a pipeline: a text encoder and its tokenizer, and what their configurations may say."""

from collections.abc import Callable, Iterator

from latentac.backbones.layout import Part, Rule
from latentac.backbones.stable_diffusion import Configurations, Finding

LONGEST = 512
"""Tokens per prompt, at most, as in diffusers."""


def t5_parts(encoder: str, tokenizer: str) -> tuple[Part, ...]:
    """The parts of these names."""
    return (
        Part(encoder, "text_encoder", ("T5EncoderModel",)),
        Part(tokenizer, "tokenizer", ("T5TokenizerFast", "T5Tokenizer")),
    )


def t5_rules(encoder: str, tokenizer: str) -> tuple[tuple[tuple[str, ...], Rule], ...]:
    """What the parts of these names must be for each other and for a transformer."""
    return ((("transformer", encoder), _width(encoder)), ((encoder, tokenizer), _tokens(encoder, tokenizer)))


def _width(encoder: str) -> Callable[[Configurations], Iterator[Finding]]:
    def rule(found: Configurations) -> Iterator[Finding]:
        width, reads = found[encoder].get("d_model", 512), found["transformer"].get("joint_attention_dim", 4096)
        if width != reads:
            problem = f"joint_attention_dim is {reads!r}, and {encoder} has a d_model of {width!r}"
            yield "transformer", problem, "Use the text encoders that it was trained with"

    return rule


def _tokens(encoder: str, name: str) -> Callable[[Configurations], Iterator[Finding]]:
    def rule(found: Configurations) -> Iterator[Finding]:
        tokenizer, known = found[name], found[encoder].get("vocab_size", 32128)
        length = tokenizer.get("model_max_length", LONGEST)
        if not isinstance(length, int) or length < 2:
            problem, remedy = f"model_max_length is {length!r}", f"Set it to {LONGEST} in {name}/tokenizer_config.json"
            yield name, problem, remedy
        if tokenizer["highest_id"] >= known:
            problem = f"has the token {tokenizer['highest_id']}, and {encoder} knows {known} tokens"
            yield name, problem, "Use the tokenizer that the text encoder was trained with"

    return rule
