"""The JSON Schema of manifest.json, as polar_deploy/schemas/bundle.schema.json has it."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    from polar_deploy.bundle.manifest import Manifest
    from polar_deploy.documents.part import schema

    print(json.dumps(schema(Manifest), indent=1))
    return 0
