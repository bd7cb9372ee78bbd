"""The JSON Schema of manifest.json, as polar_deploy/schemas/bundle.schema.json has it."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(document(), indent=1))
    return 0


def document() -> dict[str, Any]:
    """The schema, made from the types of `manifest`."""
    from polar_deploy.bundle.manifest import Manifest

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_closed(Manifest.model_json_schema())}


def _closed(value: Any) -> Any:
    """The same schema, in which a map whose keys have to look like something takes no others."""
    if isinstance(value, list):
        return [_closed(each) for each in value]
    if not isinstance(value, dict):
        return value
    inner = {key: _closed(each) for key, each in value.items()}
    return inner | ({"additionalProperties": False} if "patternProperties" in inner else {})
