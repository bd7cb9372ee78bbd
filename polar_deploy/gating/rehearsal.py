"""The rehearsal: promise and result are held against each other before anything is trained.

Random states are closed in the exported graph; surgery cuts it, and what is left is counted. And the masks in the model
and the Muls in its graph have to do the same to its outputs: else graph and modules were brought together wrongly.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polar_deploy.errors import ContentError
from polar_deploy.export import Example, device_of, evaluating, with_weights
from polar_deploy.exportable import no_autocast
from polar_deploy.gating import masking
from polar_deploy.gating.analysis import Analysis
from polar_deploy.ort_session import open_session, translated
from polar_deploy.surgery import detached
from polar_deploy.surgery.choices import Choices
from polar_deploy.surgery.facts import Bools

TOLERANCE = 1e-3  # of the outputs' scale: a mask in the wrong place changes far more, rounding in deep networks less


def rehearse(model: nn.Module, analysis: Analysis, trials: int = 2) -> None:
    """Try `trials` random states on a model that carries the masks, all open, and that `analysis` is of.

    Raises:
        ContentError: promise and result differ, or the graph does not do what the model does.
    """
    for seed in range(trials):
        _require_promise(analysis.choices, random_state(analysis.choices, seed))
    if find_spec("onnxruntime") is not None and trials:
        require_faithful(model, analysis, random_state(analysis.choices, 0))


def random_state(choices: Choices, seed: int) -> Bools:
    """A state bool [gates] in which every site has an open gate, and one block in five is closed."""
    draw = np.random.default_rng(seed)
    opened: Bools = draw.random(choices.gates) < draw.choice([0.3, 0.5, 0.8])
    for site in choices.sites:
        opened[draw.choice(site.gates)] = True
    for block in choices.blocks:
        opened[block.gate] = draw.random() < 0.8
    for either in choices.alive:
        opened[choices.blocks[min(either)].gate] |= not any(opened[choices.blocks[index].gate] for index in either)
    return opened


def _require_promise(choices: Choices, opened: Bools) -> None:
    measured = choices.measure(opened)
    for name, count in measured.items():
        promised = round(choices.costs[name].absolute(choices.state(opened)))
        if promised != count:
            found = f"{promised} promised, {count} left after surgery{_culprit(choices)}"
            raise ContentError(
                f"{name} of a rehearsed sub-network: {found}",
                "leave that layer out with ignore, and report this network",
            )


def _culprit(choices: Choices) -> str:
    """The first site or block that alone makes promise and result differ."""
    for gates, name, kind in choices.owners():
        opened = np.ones(choices.gates, bool)
        opened[gates.start + (kind != "block") : gates.stop] = False
        state = choices.state(opened)
        if any(round(choices.costs[k].absolute(state)) != v for k, v in choices.measure(opened).items()):
            return f", because of {name}"
    return ""


def require_faithful(model: nn.Module, analysis: Analysis, opened: Bools) -> None:
    """Raise ContentError where masks in the model and Muls in its graph differ in what comes out."""
    if _difference(model, analysis, opened) <= TOLERANCE:
        return
    whole = np.ones(analysis.choices.gates, bool)
    if _difference(model, analysis, whole) > TOLERANCE:
        raise ContentError(
            f"the exported graph of {type(model).__name__} does not compute what the model does",
            "its forward may depend on values or on chance in evaluation mode: make it free of both",
        )
    low, high = 0, len(opened)  # closing gates up to `high` shows a difference, up to `low` none
    while high - low > 1:
        middle = (low + high) // 2
        part = np.where(np.arange(len(opened)) < middle, opened, True)
        low, high = (low, middle) if _difference(model, analysis, part) > TOLERANCE else (middle, high)
    name = next(name for gates, name, _ in analysis.choices.owners() if low in gates)
    raise ContentError(
        f"closing a gate of {name} in the model does not do what it does in its exported graph",
        "leave that layer out with ignore, and report this network",
    )


def require_same(model: nn.Module, analysis: Analysis, path: Path) -> None:
    """Raise ContentError where an exported graph does not do what the model does, as its masks stand."""
    if find_spec("onnxruntime") is not None and (off := _off(model, noise(_there(model, analysis)), path)) > TOLERANCE:
        raise ContentError(
            f"the exported graph is {off:.2g} of the outputs' scale apart from {type(model).__name__} (allowed: "
            f"{TOLERANCE})",
            "put gates on the network as it is to be exported; if it has not changed since, report it",
        )


def _there(model: nn.Module, analysis: Analysis) -> Example:
    """The example, where the model is."""
    return analysis.example.to(device_of(model))


def _difference(model: nn.Module, analysis: Analysis, opened: Bools) -> float:
    """Largest difference between model and masked graph in a state, as a share of each output's scale."""
    graph = analysis.choices.with_masks(with_weights(analysis.choices.detached, model), opened)
    masking.write(model, analysis, torch.from_numpy(opened).float())
    try:
        with TemporaryDirectory(prefix="polar_deploy-") as folder:
            path = Path(folder, "masked.onnx")
            detached.write_files(graph, path)
            return _off(model, noise(_there(model, analysis)), path)
    finally:
        masking.write(model, analysis, torch.ones(len(opened)))


def _off(model: nn.Module, example: Example, path: Path) -> float:
    """Largest difference between a model and a graph, as a share of each output's scale."""
    with torch.no_grad(), evaluating(model), no_autocast():
        expected = _arrays(model(*example.args, **example.kwargs))
    with translated("ONNX Runtime cannot run the graph with its masks"):
        session = open_session(path)
        names = [each.name for each in session.get_inputs()]
        given = session.run(None, dict(zip(names, _arrays((example.args, dict(example.kwargs))), strict=False)))
    return max((_share_off(a, b) for a, b in zip(given, expected, strict=True)), default=0.0)


def noise(example: Example, dtype: torch.dtype | None = None) -> Example:
    """The example with noise where it holds nothing but zeros, and its floating-point tensors as `dtype`."""
    draw = torch.Generator("cpu").manual_seed(0)  # told, since a program may make all else on another device

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        leaf = leaf if bool(leaf.any()) else torch.randn(leaf.shape, generator=draw, device="cpu").to(leaf)
        return leaf.to(dtype or leaf.dtype)

    return example.mapped(filled)


def _arrays(values: Any) -> list[np.ndarray]:
    """All tensors in nested containers."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, Tensor)]


def _share_off(given: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the scale; where the model itself is not finite nothing is compared."""
    if given.size == 0 or given.dtype.kind != "f" or not np.isfinite(expected).all():
        return 0.0
    scale = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(given.astype(np.float64) - expected).max()) / scale
