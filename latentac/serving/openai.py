"""The body of OpenAI's `images/generations`: our own fields, and what its clients send beside them."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, field_validator
from pydantic_core import CoreSchema, PydanticCustomError

from latentac.serving.request import WHOLE, Json, Request

_NO_PLAN = "Leave it out: this model plans nothing. num_steps and particles are what takes longer."
_NO_SVG = "Leave it out: the images are PNG files."
_NO_FILM = "Leave it out: an image is one frame."


def _fresh_seed() -> int:
    """Small enough to be exact in a program whose numbers are all floats, such as a browser's."""
    return secrets.randbelow(2**53)


def _boolean(value: object) -> object:
    """What is equal to false and no boolean is none."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


class ImagesRequest(Request):
    """The body of OpenAI's `images/generations`, and our own fields beside it. Of its fields that have no meaning here,
    those values are taken that change nothing about the image."""

    model: Annotated[str | None, Field(description="Use the served model's name, or leave it out.")] = None
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="Use a whole number from 0 to 2^63 - 1, or none for a fresh one."), WHOLE
    ] = Field(default_factory=_fresh_seed)
    count: Annotated[int, Field(ge=1, alias="n", description="Use a whole number of images, at least 1."), WHOLE] = 1
    response_format: Annotated[
        Literal["b64_json"], Field(description="Use b64_json: the server keeps no images to link to.")
    ] = "b64_json"
    quality: Annotated[
        Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"],
        Field(description="Leave it out: num_steps and particles are what takes longer for a better image."),
    ] = "auto"
    style: Annotated[
        Literal["vivid", "natural"], Field(description="Leave it out: this model has one style; say it in the prompt.")
    ] = "vivid"
    background: Annotated[
        Literal["auto", "opaque"], Field(description="Use opaque, or leave it out: the images have no transparency.")
    ] = "auto"
    moderation: Annotated[Literal["auto", "low"], Field(description="Leave it out: this server judges no prompts.")] = (
        "auto"
    )
    output_format: Annotated[
        Literal["png"], Field(description="Use png, or leave it out; convert the image afterwards.")
    ] = "png"
    output_compression: Annotated[
        int, Field(ge=100, le=100, description="Use 100, or leave it out: a PNG loses nothing."), WHOLE
    ] = 100
    partial_images: Annotated[
        int, Field(ge=0, le=0, description="Use 0, or leave it out; POST /v1/images/stream reports each step."), WHOLE
    ] = 0
    stream: Annotated[
        Literal[False],
        BeforeValidator(_boolean),
        Field(description="Use false, or leave it out; POST /v1/images/stream answers by events."),
    ] = False
    complexity: Annotated[None, Field(description=_NO_PLAN)] = None
    svg: Annotated[None, Field(description=_NO_SVG)] = None
    frame_count: Annotated[None, Field(description=_NO_FILM)] = None
    frame_duration_ms: Annotated[None, Field(description=_NO_FILM)] = None
    user: Annotated[str, Field(max_length=256, description="Use at most 256 characters.")] = ""
    safety_identifier: Annotated[str, Field(max_length=256, description="Use at most 256 characters.")] = ""

    @field_validator("size", mode="before")
    @classmethod
    def _own_size(cls, size: Any) -> Any:
        """Size `auto` is that of the model, as where it is left out."""
        return None if size == "auto" else size

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        schema = super().__get_pydantic_json_schema__(core, handler)
        size = schema["properties"]["size"]["anyOf"][0]
        size |= {"enum": [*size["enum"], "auto"]} if "enum" in size else {}
        return schema
