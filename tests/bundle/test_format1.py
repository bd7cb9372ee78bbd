"""Bundles of format 1, as builds wrote them whose manifests had other names for a few fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polar_deploy.bundle.read import parse
from polar_deploy.errors import ContentError
from tests.support.bundle_commands import bundle
from tests.support.bundles import write_bundle

DELIVERED = Path(__file__).parent / "data/format-1.zip"  # by the build before the names changed, for ort-int8
SHA256 = "4d8ec6c87b54c94ee43b9bc7d38db096a824f1906b6fb035ff645f10adc22f7c"  # of its manifest, as that build printed it


def in_old_words(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle as format 1 had it."""
    document: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    document["schema"] = 1
    del document["task"]
    (source,), (result,) = document.pop("inputs"), document.pop("outputs")
    document["input"] = source | {"layout": "NCHW"}
    document["output"] = {"name": result["name"], "dtype": result["dtype"], "classes": result["shape"][0]}
    for key in ("inputs", "compressed", "full"):
        (document["golden"][key],) = document["golden"][key].values()
    document["build"]["edges"] = document["build"].pop("io_dtype", "fp32")
    for network in document["networks"].values():
        precision, profile = network["precision"], network["plan"]["profile"]
        precision["edges"], precision["kept"] = precision.pop("io_dtype"), precision.pop("high_precision_layers")
        for old, new in (("smallest", "min"), ("usual", "opt"), ("largest", "max")):
            profile[old] = profile.pop(new)
    return document


def test_a_bundle_of_an_earlier_build_is_verified() -> None:
    outcome = bundle("verify", DELIVERED, "--no-timing")
    assert outcome.code == 0
    assert SHA256 in outcome.out
    assert "verdict: PASS (golden, kernels)" in outcome.out


def test_a_manifest_of_format_1_is_read_as_one_of_format_2(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", "trt-fp16", build={"io_dtype": "native", "batches": [1, 4, 32]})
    new = parse((folder / "manifest.json").read_bytes(), "new")
    assert parse(json.dumps(in_old_words(folder)).encode(), "old") == new
    assert (new.build.io_dtype, new.build.batches) == ("native", (1, 4, 32))


PARTS = (
    "build",
    "input",
    "output",
    "golden",
    "golden.inputs",
    "networks",
    "networks.full",
    "networks.full.plan",
    "networks.full.precision",
)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [7, [1], {"io_dtype": "fp32"}])
def test_what_format_1_did_not_know_is_refused(part: str, value: object, tmp_path: Path) -> None:
    document = inside = in_old_words(write_bundle(tmp_path / "bundle", "trt-fp16"))
    *above, name = part.split(".")
    for each in above:
        inside = inside[each]
    inside[name] = value
    with pytest.raises(ContentError, match="is no manifest"):
        parse(json.dumps(document).encode(), "old")
