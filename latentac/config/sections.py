"""What sections of the configuration consist of: kinds of numbers, and sections that name an extension."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Seconds = Annotated[float, Field(gt=0, le=1e6)]


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Number = Annotated[float, Field(allow_inf_nan=False)]


# Of a server: an exported folder states them, too, and its author need not be the operator.
Images = Annotated[int, Field(gt=0, le=100_000)]


Particles = Annotated[int, Field(gt=0, le=1024)]


Characters = Annotated[int, Field(gt=0, le=1_000_000)]


Rows = Annotated[int, Field(gt=0, le=4096)]


Wait = Annotated[float, Field(ge=0, le=60)]


class Section(BaseModel):
    """Fields of one subject. The text below a field is its description: `latentac config fields` prints it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Extension(Section):
    """A row of a table, or your own class. All other fields are settings of this extension (`own`)."""

    model_config = ConfigDict(extra="allow")

    use: str
    """A row of the table, or `module:Class`."""

    @property
    def own(self) -> dict[str, Any]:
        """The extension's own settings, as they were given."""
        return dict(self.model_extra or {})

    def with_own(self, own: Mapping[str, Any]) -> Self:
        """The same extension with `own` as its settings."""
        framework = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**framework, **own})


class Named(Extension):
    """An extension of which there can be several."""

    name: str = ""
    """Its name in reports, metrics and requests. Default: the name of the row or of the class."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_use(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and not fields.get("name") and isinstance(fields.get("use"), str):
            return {**fields, "name": fields["use"].rpartition(":")[2].rpartition(".")[2]}
        return fields
