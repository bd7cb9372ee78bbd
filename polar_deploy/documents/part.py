"""What all parts of a JSON file have in common, how a whole one is read and written, and its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from polar_deploy.errors import ContentError, first_problem
from polar_deploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from typing_extensions import Self

Of = TypeVar("Of")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(BaseModel):
    """Nothing is converted, nothing is ignored, no number is infinite. What may be left out of a file is None then."""

    model_config = STRICT | ConfigDict(frozen=True, populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """The part as plain JSON data, with the keys that the file has."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def entries(self) -> dict[str, Any]:
        """The fields that are there, to make another part of."""
        return {name: value for name, value in self if name in self.model_fields_set}


class Open(Part):
    """A part that may have further entries, which others know."""

    model_config = ConfigDict(extra="allow")


class Pair(Part, Generic[Of]):
    """The same of both networks."""

    full: Of
    compressed: Of

    def named(self) -> dict[str, Of]:
        """Both by name, the full network first."""
        return {"full": self.full, "compressed": self.compressed}


class Document(Part):
    """A whole file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            UsageError: there is no such file.
            ContentError: it is not JSON, or not what the type says; the message names the place.
        """
        content = read_json(path)
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            what = f"{path}: {first_problem(error, 'the document')}"
            raise ContentError(what, "let the stage that writes it run again") from error

    def write(self, path: Path) -> None:
        """Write it, atomically."""
        write_json(path, self.as_json())


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a file, from its type."""
    made = model.model_json_schema()
    generic = {name: value for name, value in made.get("$defs", {}).items() if "[" in value.get("title", "")}
    for name in generic:
        del made["$defs"][name]  # their names are long, and tell nothing
    plain = _plain(made, {f"#/$defs/{name}": value for name, value in generic.items()})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **plain}


def _plain(value: Any, inlined: Mapping[str, Any]) -> Any:
    """The same schema with some definitions in place; a map whose keys have to look like something takes no others."""
    if isinstance(value, list):
        return [_plain(each, inlined) for each in value]
    if not isinstance(value, dict):
        return value
    if (referred := inlined.get(value.get("$ref", ""))) is not None:
        return _plain(referred | {key: each for key, each in value.items() if key != "$ref"}, inlined)
    inner = {key: _plain(each, inlined) for key, each in value.items()}
    return inner | ({"additionalProperties": False} if "patternProperties" in inner else {})
