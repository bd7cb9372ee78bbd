"""What a network of the user's can lose: exported once, looked at by surgery, brought back to its modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from types import NoneType

import numpy as np
import torch
from torch import Tensor, nn

from polar_deploy import export
from polar_deploy.errors import ContentError, PolarDeployError, UsageError, first_line
from polar_deploy.export import Example
from polar_deploy.exportable import no_autocast
from polar_deploy.gating import places
from polar_deploy.gating.places import Place, Places
from polar_deploy.surgery import choices
from polar_deploy.surgery.choices import Choices
from polar_deploy.surgery.detached import DetachedModel
from polar_deploy.surgery.ungated import WHOLE


@dataclass(frozen=True)
class Analysis:
    """The gates of a network, and the modules that carry their masks.

    Attributes:
        example: arguments of the network's forward.
        structure: its graph, without masks; the values of its weights are made up.
        choices: gates, sites, blocks, costs.
        places: for each mask of `choices`, its module.
        unmasked: layers that cannot be masked, and why: they are counted, and keep what they read.
    """

    example: Example
    structure: DetachedModel
    choices: Choices
    places: tuple[Place, ...]
    unmasked: dict[str, str]

    @property
    def ungated(self) -> dict[str, str]:
        """Layers whose channels have no gate, and those that cannot be masked, with the reason; their cost counts."""
        known = self.choices.reasons
        whole = {name for name, reason in known.items() if reason.endswith(WHOLE)}
        return known | {name: f"{reason}{WHOLE if name in whole else ''}" for name, reason in self.unmasked.items()}

    @cached_property
    def _gate_of(self) -> list[Tensor]:
        return [torch.from_numpy(gates.astype(np.int64)) for gates in self.choices.gate_of]

    def gate_of(self, device: torch.device | None = None) -> list[Tensor]:
        """For each mask, int64 [width], the gate of each channel, or -1."""
        return [gates.to(device) for gates in self._gate_of]


def analyse(
    network: nn.Module, example: Example, *, ignore: Sequence[str] = (), blocks: bool = True, heads: bool = False
) -> Analysis:
    """Find the gates of a network; it is run and exported in evaluation mode, and left as it was.

    Args:
        ignore: patterns (`head*`) of the paths of modules whose input and output get no mask, nor what is inside.
        blocks: whether residual branches get gates.
        heads: whether heads of attention get gates.

    Raises:
        ContentError: the network cannot be called with the example, or gives back what is no tensor; PyTorch cannot
            export it, or loses a part of it, such as the projection of an LSTM.
        UsageError: there is no gate in it, or nothing in it to ignore, it has no parameters in float32, or some of them
            have no values or no shapes yet.
    """
    require_values(network)
    require_float32(network)
    for path, module in network.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:  # PyTorch 2.15 exports it as if it had none
            raise ContentError(
                f"PyTorch cannot export {path or 'an LSTM'} with proj_size={module.proj_size}: it drops the projection",
                "use an LSTM without proj_size and a linear layer, or attach to a part of the network that has none",
            )
    example = example.to(export.device_of(network))
    ignore = (ignore,) if isinstance(ignore, str) else ignore
    for pattern in require_patterns(ignore):
        if not any(fnmatchcase(path, pattern) for path, _ in network.named_modules()):
            raise UsageError(
                f"ignore={pattern!r} fits no module of {type(network).__name__}",
                "give paths as in named_modules(), or patterns of them such as 'head*'",
            )
    _require_callable(network, example.given or example)
    structure, example = export.captured(network, example)
    blank = choices.without_values(replace(structure, heads=heads), set(export.own_tensors(network)))
    found = Places(blank, places.watch(network, example), places.aliases(network), ignore, blocks=blocks)
    made = choices.find(blank, found.masks, found.name_of, places.layers(network, blank))
    if not made.gates:
        reasons = [f"{name}: {reason}" for name, reason in (*found.unmasked.items(), *made.reasons.items())]
        raise UsageError(
            f"{type(network).__name__} has no place for a gate" + (f" ({'; '.join(reasons[:3])})" if reasons else ""),
            "use a network in which a layer reads channels that another layer writes, or ignore less of it",
        )
    made, used = made.with_gates_alone()
    return Analysis(example, blank, made, tuple(found.places[index] for index in used), found.unmasked)


@torch.no_grad()
def _require_callable(network: nn.Module, example: Example) -> None:
    """Raise ContentError where a network cannot be called with an example, or gives back what is no tensor."""
    name, given = type(network).__name__, ", ".join(map(_described, torch.utils._pytree.tree_leaves(example.args)))
    given = ", ".join(filter(None, [given, *(f"{key}={_described(each)}" for key, each in example.kwargs.items())]))
    try:
        with export.evaluating(network), no_autocast():
            output = network(*example.args, **example.kwargs)
    except (MemoryError, torch.OutOfMemoryError, PolarDeployError):
        raise
    except Exception as error:
        raise ContentError(
            f"{name} cannot be called with the example ({given}): {type(error).__name__}: {first_line(error)}",
            "give an example as its forward takes it: tensors with the batch as their first axis; or mend the forward",
        ) from error
    leaves = torch.utils._pytree.tree_leaves(output)
    wrong = [each for each in leaves if not isinstance(each, (Tensor, int, float, NoneType))]
    if wrong or not any(isinstance(each, Tensor) for each in leaves):
        what = f"a {type(wrong[0]).__name__}" if wrong else "no tensor"
        raise ContentError(
            f"{name} gives back {what}{' among its outputs' if wrong and output is not wrong[0] else ''}",
            "let its forward return tensors: one, a tuple of them, or a dictionary",
        )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def require_patterns(patterns: Sequence[str]) -> Sequence[str]:
    """What is to be ignored; UsageError where it is no sequence of texts."""
    wrong = [patterns] if not isinstance(patterns, Collection) else [each for each in patterns if type(each) is not str]
    if wrong:
        raise UsageError(
            f"ignore holds a {type(wrong[0]).__name__}, and takes the paths of modules",
            "give them as named_modules() does, such as ignore=['head'], or leave it out",
        )
    return patterns


def require_float32(network: nn.Module, *, or_wider: bool = False) -> None:
    """Raise UsageError where no parameter is in float32, the type of graphs and of what they are compared with.

    or_wider: whether float64 will do, too.
    """
    kinds = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
    if kinds and torch.float32 not in kinds and not (or_wider and torch.float64 in kinds):
        raise UsageError(
            f"the parameters of {type(network).__name__} are {min(map(str, kinds))}",
            "give it in float32, by its `float()`: autocast can compute in less",
        )


def require_values(network: nn.Module) -> None:
    """Raise UsageError where a parameter or buffer has no values, or no shape yet: nobody can run such a network."""
    if not isinstance(network, nn.Module):
        raise UsageError(f"a {type(network).__name__} was given as the network", "give a torch.nn.Module")
    for name, tensor in export.own_tensors(network).items():
        if nn.parameter.is_lazy(tensor):
            raise UsageError(
                f"{name} of {type(network).__name__} has no shape yet: its module is a lazy one",
                "run the network once on an example, then put gates on it",
            )
        if tensor.is_meta:
            raise UsageError(
                f"{name} of {type(network).__name__} is on the meta device, where tensors have no values",
                "load its weights onto a device first, by to_empty and load_state_dict for example",
            )
