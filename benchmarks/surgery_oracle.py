"""The coupled sets of a network, and what can be cut at best, from PyTorch alone: surgery's own answers are not asked.

Vertices are (tensor, channel). The output of every mixer (convolution, linear layer) is a leaf; a leaf's channel is
joined with each channel of a mixer's input to which it has a gradient that is not zero; sets are the connected
components. Depthwise convolutions are not mixers. In other grouped ones position j of all groups goes together, at the
input and at the output; so it does where a shuffle splits the channels into groups.

Gradients are taken at random points, in float64, with activations whose slope is never zero: a gradient is zero where
nothing leads from one channel to the other, and only there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
PROBES = 64  # images a backward pass, each of which asks for another channel
SIZE = 32  # pixels a side while gradients are taken
MINIMUM = {"inception_v3": 75}
LINEAR_UNITS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "silu", "silu_", "hardswish", "gelu"}
SIGMOIDS = {"sigmoid", "hardsigmoid"}
WALLS = {"layer_norm", "group_norm", "softmax"}  # each output channel depends on all of the inputs'

ROUNDING = 1e-12  # of the largest value: less than that is the same number
ENDS = {"wall", "walled", "output"}  # kinds of tensors that keep all of their channels


@dataclass(frozen=True)
class Mixer:
    """A convolution or a linear layer as the network runs it; `name` is that of its module, taps: kernel positions."""

    name: str
    inputs: int
    outputs: int
    groups: int
    taps: int
    padded: bool
    axis: int

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.inputs


class _Watch(TorchFunctionMode):
    """Sees every call of PyTorch while a network runs, and hands the mixers among them to `mix`."""

    def __init__(self, network: nn.Module, *, smooth: bool) -> None:
        super().__init__()
        self.smooth = smooth
        self.mixers: dict[str, Mixer] = {}
        mixers = {name: each for name, each in network.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}
        self._names = {id(module.weight): name for name, module in mixers.items()}
        self._running = ""  # the last mixer's module that was called: what it multiplies with may be computed
        for name, module in mixers.items():
            module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "_running", name))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("conv2d", "linear"):
            return self.mix(args[0], *self._mixer(name, func, args, kwargs))
        if name in LINEAR_UNITS | SIGMOIDS:
            return self.activate(args[0], name, lambda x: func(x, *args[1:], **kwargs))
        return self.other(name, func, args, kwargs)

    def mix(self, x: Tensor, mixer: Mixer, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """What a mixer answers for its input `x`; `apply` is what it would do by itself."""
        raise NotImplementedError

    def activate(self, x: Tensor, name: str, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """What an activation answers; if `smooth`, by one whose slope is never zero wherever images differ."""
        if not self.smooth:
            return apply(x)
        steep = torch.sigmoid(x) if name in SIGMOIDS else x + 0.5 * torch.tanh(x)
        fixed = (x.amax(0) - x.amin(0)).detach() <= ROUNDING * x.detach().abs().max()
        return torch.where(fixed, apply(x.clone()), steep)

    def other(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What any other function answers."""
        return func(*args, **kwargs)

    def _mixer(
        self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Mixer, Callable[[Tensor], Tensor]]:
        x, weight, bias, *rest = args
        name, outputs = self._names.get(id(weight), self._running), len(weight)
        if kind == "linear":
            self.mixers[name] = Mixer(name, x.shape[-1], outputs, 1, 1, padded=False, axis=x.ndim - 1)
            return self.mixers[name], lambda x: func(x, weight, bias)
        stride, padding, dilation, groups = rest
        assert dilation == (1, 1)
        apply = lambda x: func(x, weight, bias, *rest)  # noqa: E731 - it is handed on
        if groups == x.shape[1]:
            apply = lambda x: _depthwise(x, weight, bias, stride, padding)  # noqa: E731 - PyTorch's is slow in float64
        taps = weight[0, 0].numel()
        self.mixers[name] = Mixer(name, x.shape[1], outputs, groups, taps, any(padding), axis=1)
        return self.mixers[name], apply


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """A depthwise convolution as a sum over the kernel's taps."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).repeat_interleave(len(weight) // x.shape[1], 1)
    height, width = ((x.shape[2 + i] - weight.shape[2 + i]) // stride[i] * stride[i] + 1 for i in (0, 1))
    result: Tensor = sum(  # type: ignore[assignment]
        x[:, :, i : i + height : stride[0], j : j + width : stride[1]] * weight[:, 0, i, j, None, None]
        for i in range(weight.shape[2])
        for j in range(weight.shape[3])
    )
    return result if bias is None else result + bias[:, None, None]


class _Reader(NamedTuple):
    """A tensor whose channels something reads: a mixer's input, a wall's, a shuffle's, the graph's output."""

    key: tuple[str, str]
    tensor: Tensor
    axis: int


class _Probe(_Watch):
    """Cuts the network into pieces: every mixer answers with a new leaf of random numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, smooth=True)
        self.readers: list[_Reader] = []
        self.leaves: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self.shuffles: dict[tuple[str, str], int] = {}

    def mix(self, x: Tensor, mixer: Mixer, apply: Callable[[Tensor], Tensor]) -> Tensor:
        self.readers.append(_Reader(("in", mixer.name), x, mixer.axis))
        if mixer.depthwise:
            return apply(x)
        with torch.no_grad():
            shape = (len(x), *apply(x[:1]).shape[1:])
        return self._leaf(("out", mixer.name), shape, mixer.axis)

    def other(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in WALLS:
            key, axis = f"{name}-{len(self.readers)}", args[0].ndim - 1 if name == "layer_norm" else 1
            self.readers.append(_Reader(("wall", key), args[0], axis))
            return self._leaf(("walled", key), tuple(args[0].shape), axis)
        if name in ("view", "reshape") and args[0].ndim == 4 and len(args) == 6 and args[1] == len(args[0]):
            key = f"shuffle-{len(self.readers)}"
            self.readers.append(_Reader(("shuffle", key), args[0], 1))
            self.shuffles["shuffle", key] = args[2]
        return super().other(name, func, args, kwargs)

    def _leaf(self, key: tuple[str, str], shape: tuple[int, ...], axis: int) -> Tensor:
        leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        self.leaves[key] = (leaf, axis)
        return leaf * 1.0  # the network may write into it

    def pairs(self) -> Iterator[tuple[tuple[str, str], Ints, tuple[str, str], Ints]]:
        """For every reader and leaf: channels of the reader that depend on channels of the leaf."""
        leaves = [leaf for leaf, _ in self.leaves.values()]
        for key, tensor, axis in self.readers:
            if not tensor.requires_grad:
                continue  # the image
            rows = tensor.movedim(axis, 1).flatten(2) if tensor.ndim > 2 else tensor[:, :, None]
            for start in range(0, rows.shape[1], PROBES):
                channels = torch.arange(start, min(start + PROBES, rows.shape[1]))
                asked = rows[torch.arange(len(channels)), channels]
                gradients = torch.autograd.grad(
                    asked, leaves, torch.randn_like(asked), retain_graph=True, allow_unused=True
                )
                for (name, (_, leaf_axis)), gradient in zip(self.leaves.items(), gradients, strict=True):
                    if gradient is not None:
                        touched = (
                            gradient.movedim(leaf_axis, 1).flatten(2).ne(0).any(2)
                            if gradient.ndim > 2
                            else gradient.ne(0)
                        )
                        image, channel = touched.nonzero(as_tuple=True)
                        yield key, start + image.numpy(), name, channel.numpy()


@dataclass(frozen=True)
class Sets:
    """The coupled sets of a network.

    inputs, outputs: by mixer, the set of each channel (outputs: not those of depthwise convolutions)
    removable: by set, whether it reaches neither the network's output nor a wall
    """

    mixers: dict[str, Mixer]
    inputs: dict[str, Ints]
    outputs: dict[str, Ints]
    removable: Bools


@dataclass(frozen=True)
class Couplings:
    """Who depends on whom, as gradients tell."""

    mixers: dict[str, Mixer]
    sizes: dict[tuple[str, str], int]  # channels of every tensor that takes part
    shuffles: dict[tuple[str, str], int]  # groups
    pairs: list[tuple[tuple[str, str], Ints, tuple[str, str], Ints]] = field(repr=False)

    def sets(self, *, groups: bool = True) -> Sets:
        """The coupled sets; `groups`: position j of all groups of a grouped convolution goes together."""
        offsets = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()]).tolist(), strict=False))
        total = sum(self.sizes.values())
        edges = [(offsets[a] + i, offsets[b] + j) for a, i, b, j in self.pairs]
        edges += [(offsets[key] + i, offsets[key] + j) for key, i, j in self._ties(groups)]
        one, other = (np.concatenate(ends) for ends in zip(*edges, strict=True))
        graph = coo_matrix((np.ones(len(one), bool), (one, other)), (total, total))
        number, labels = connected_components(graph, directed=False)
        of = {key: labels[start : start + self.sizes[key]] for key, start in offsets.items()}
        removable = np.zeros(number, bool)  # what no mixer writes is the image
        removable[np.concatenate([found for (kind, _), found in of.items() if kind == "out"])] = True
        removable[np.concatenate([found for (kind, _), found in of.items() if kind in ENDS])] = False
        inputs, outputs = ({name: of[kind, name] for k, name in of if k == kind} for kind in ("in", "out"))
        return Sets(self.mixers, inputs, outputs, removable)

    def _ties(self, groups: bool) -> Iterator[tuple[tuple[str, str], Ints, Ints]]:
        found = dict(self.shuffles)
        for mixer in self.mixers.values():
            if groups and mixer.groups > 1 and not mixer.depthwise:
                found["in", mixer.name] = found["out", mixer.name] = mixer.groups
        for key, number in found.items():
            channels = np.arange(self.sizes[key])
            yield key, channels, channels % (self.sizes[key] // number)


def couplings(network: nn.Module, size: int = SIZE) -> Couplings:
    """Asks gradients which channels depend on which; seconds, and up to a minute for the widest networks.

    Args:
        network: from images [batch, 3, size, size] to [batch, classes]; it is left as it is.
    """
    wide = _in_double(network)
    torch.manual_seed(1)
    with _Probe(wide) as probe:
        result = wide(torch.randn(PROBES, 3, size, size, dtype=torch.float64))
    probe.readers.append(_Reader(("output", ""), result, 1))
    sizes = {key: tensor.shape[axis] for key, tensor, axis in probe.readers}
    sizes |= {key: leaf.shape[axis] for key, (leaf, axis) in probe.leaves.items()}
    return Couplings(probe.mixers, sizes, probe.shuffles, list(probe.pairs()))


class _Gated(_Watch):
    """Runs the network with gates: behind the BatchNorm and activation that follow a mixer, before anything else."""

    def __init__(self, network: nn.Module, masks: Mapping[str, Bools], *, smooth: bool) -> None:
        super().__init__(network, smooth=smooth)
        self.masks = masks
        self.constant: dict[str, Bools] = {}  # channels of a mixer's input that hold one number
        self.zero: dict[str, Bools] = {}

    def mix(self, x: Tensor, mixer: Mixer, apply: Callable[[Tensor], Tensor]) -> Tensor:
        x = self._closed(x)
        rows = x.movedim(mixer.axis, -1).reshape(-1, mixer.inputs)
        low, high = rows.min(0).values, rows.max(0).values
        self.constant[mixer.name] = (high - low <= ROUNDING * rows.abs().max()).numpy()
        self.zero[mixer.name] = ((low == 0) & (high == 0)).numpy()
        result = apply(x)
        if mixer.name in self.masks:
            result.writer = mixer  # type: ignore[attr-defined]
        return result

    def activate(self, x: Tensor, name: str, apply: Callable[[Tensor], Tensor]) -> Tensor:
        writer = getattr(x, "writer", None)
        result = super().activate(x, name, apply)
        return result if writer is None else self._close(result, writer)

    def other(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "batch_norm" and hasattr(args[0], "writer"):
            result = func(*args, **kwargs)
            result.writer = args[0].writer
            return result
        return func(*[self._closed(value) for value in args], **kwargs)

    def _closed(self, value: Any) -> Any:
        """Arguments of a function that a gate stands before."""
        if isinstance(value, list | tuple):
            return type(value)(map(self._closed, value))
        writer = getattr(value, "writer", None) if isinstance(value, Tensor) else None
        return value if writer is None else self._close(value, writer)

    def _close(self, x: Tensor, writer: Mixer) -> Tensor:
        mask = torch.from_numpy(self.masks[writer.name]).to(x.dtype)
        return x * mask.reshape([-1 if axis == writer.axis else 1 for axis in range(x.ndim)])


@torch.no_grad()
def logits(network: nn.Module, images: npt.NDArray[Any], masks: Mapping[str, Bools]) -> npt.NDArray[np.float64]:
    """What the gated network answers, in float64. masks: by mixer, which of its output channels are open."""
    wide = _in_double(network)
    with _Gated(wide, masks, smooth=False):
        result: npt.NDArray[np.float64] = wide(torch.from_numpy(images).double()).numpy()
    return result


class Widths(NamedTuple):
    """What is left of a mixer: groups, and channels of all groups together."""

    groups: int
    inputs: int
    outputs: int


def widths(sets: Sets, closed: Bools) -> dict[str, Widths]:
    """The mixers' widths where the sets `closed` have gone: position by position in every group."""
    found = {}
    for name, mixer in sets.mixers.items():
        inputs = int((~closed[sets.inputs[name]]).sum())
        if mixer.depthwise:
            found[name] = Widths(inputs, inputs, inputs * mixer.outputs // mixer.inputs)
        else:
            found[name] = Widths(mixer.groups, inputs, int((~closed[sets.outputs[name]]).sum()))
    return found


def optimum(network: nn.Module, couplings: Couplings, masks: Mapping[str, Bools], size: int) -> dict[str, Widths]:
    """The smallest widths that any cut can reach under independent masks.

    A set goes where no mixer needs what it reads of it: it holds a constant that a bias can take up (zero, or no zero
    padding), or its group has no output left. Dead groups are dropped; the others keep as many channels as the fullest.
    """
    sets = couplings.sets(groups=False)
    wide = _in_double(network)
    torch.manual_seed(2)
    with torch.no_grad(), _Gated(wide, masks, smooth=True) as run:
        wide(torch.randn(3, 3, size, size, dtype=torch.float64))
    mixers = [mixer for mixer in sets.mixers.values() if not mixer.depthwise]
    absorbed = {m.name: run.zero[m.name] | (run.constant[m.name] & (not m.padded)) for m in mixers}
    gone = np.zeros_like(sets.removable)
    while True:
        needed = ~sets.removable
        for mixer in mixers:
            alive = ~gone[sets.outputs[mixer.name]].reshape(mixer.groups, -1).all(axis=1)
            read = ~absorbed[mixer.name] & np.repeat(alive, mixer.inputs // mixer.groups)
            needed[sets.inputs[mixer.name][read]] = True
        if np.array_equal(gone, ~needed):
            break
        gone = ~needed
    for mixer in mixers:
        if mixer.groups > 1:
            _balance(sets, mixer, gone)
    return _widths_by_group(sets, gone)


def _balance(sets: Sets, mixer: Mixer, gone: Bools) -> None:
    """Takes sets back until all groups that live have as many channels as the fullest one."""
    blocks = [side[mixer.name].reshape(mixer.groups, -1) for side in (sets.inputs, sets.outputs)]
    alive = np.flatnonzero(np.any([~gone[block].all(axis=1) for block in blocks], axis=0))
    for block in blocks:
        most = int((~gone[block[alive]]).sum(axis=1).max(initial=0))
        for group in block[alive]:
            missing = most - int((~gone[group]).sum())
            gone[group[gone[group]][:missing]] = False


def _widths_by_group(sets: Sets, gone: Bools) -> dict[str, Widths]:
    found = widths(sets, gone)
    for name, mixer in sets.mixers.items():
        if mixer.groups > 1 and not mixer.depthwise:
            sides = [~gone[side[name]].reshape(mixer.groups, -1) for side in (sets.inputs, sets.outputs)]
            alive = np.any([side.any(axis=1) for side in sides], axis=0)
            found[name] = Widths(int(alive.sum()), *(int(side[alive].sum()) for side in sides))
    return found


def _in_double(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).double().eval().requires_grad_(False)
