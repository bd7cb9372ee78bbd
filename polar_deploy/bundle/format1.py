"""Manifests of format 1 in today's words: it differs in the names of a few fields, and knows classifiers alone."""

from __future__ import annotations

from typing import Any

_BUILD = {"edges": "io_dtype"}
_PRECISION = {"edges": "io_dtype", "kept": "high_precision_layers"}
_TASK = {"name": "classification", "metric": {"name": "accuracy", "unit": "%"}, "preprocessing": {}}
_PROFILE = {"smallest": "min", "usual": "opt", "largest": "max"}


def renamed(document: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the names of format 2. What is no manifest is none afterwards either."""
    networks = document.get("networks")
    if isinstance(networks, dict):
        networks = {name: _network(each) for name, each in networks.items()}
    new = {f"format 1 has no {key}": document[key] for key in ("inputs", "outputs", "task") if key in document}
    made = document | new | {"schema": 2, "build": _renamed(document.get("build"), _BUILD), "networks": networks}
    return made | _tensors(made)


def _tensors(document: dict[str, Any]) -> dict[str, Any]:
    """Format 1 had one input, images, and one output, logits; golden samples lay in one file each."""
    source, result, golden = (document.pop(key, None) for key in ("input", "output", "golden"))
    if not all(isinstance(part, dict) for part in (source, result, golden)):
        return {"inputs": source, "outputs": result, "golden": golden, "task": _TASK}
    taken, given = source.get("name"), result.get("name")
    files = {
        key: value if value is None or not isinstance(name, str) else {name: value}
        for key, name in (("inputs", taken), ("compressed", given), ("full", given))
        for value in (golden.get(key),)
    }
    plain = {key: value for key, value in source.items() if key != "layout" or value != "NCHW"}
    classes = {key: value for key, value in result.items() if key != "classes"} | {"shape": [result.get("classes")]}
    return {"inputs": [plain], "outputs": [classes], "golden": golden | files, "task": _TASK}


def _network(network: Any) -> Any:
    if not isinstance(network, dict):
        return network
    plan = network.get("plan")
    if isinstance(plan, dict):
        plan = plan | {"profile": _renamed(plan.get("profile"), _PROFILE)}
    return network | {"precision": _renamed(network.get("precision"), _PRECISION), "plan": plan}


def _renamed(part: Any, names: dict[str, str]) -> Any:
    """Format 1 has no field of a new name: one that is there keeps its place under a name that is refused."""
    new = set(names.values())
    if not isinstance(part, dict):
        return part
    return {f"format 1 has no {key}" if key in new else names.get(key, key): value for key, value in part.items()}
