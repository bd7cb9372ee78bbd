"""Holding a document against the JSON Schema that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path

from jsonschema import Draft202012Validator

import polar_deploy

_FOLDER = Path(polar_deploy.__file__).parent / "schemas"


def schema(name: str) -> Draft202012Validator:
    """The validator of "build", "gates", "parity", … ."""
    content = json.loads((_FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


def valid(name: str, document: object) -> None:
    """Fail unless `document` is what the schema says, and JSON without NaN."""
    schema(name).validate(json.loads(json.dumps(document, allow_nan=False)))
