"""A physically smaller copy of a network: parameters sliced as surgery says, closed branches replaced by zeros.

And back: what the copy has learned is put into its places in the whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.padding import _ConstantPadNd

from polar_deploy.errors import ContentError, UsageError, first_line
from polar_deploy.export import device_of, evaluating, own_tensors
from polar_deploy.gating import masking
from polar_deploy.gating.analysis import Analysis, require_float32
from polar_deploy.gating.places import Calls, argument_of, is_within, result_of, watch, with_result
from polar_deploy.gating.recount import recount
from polar_deploy.gating.rehearsal import noise
from polar_deploy.module_names import module_of
from polar_deploy.surgery.choices import Block
from polar_deploy.surgery.detached import DetachedModel
from polar_deploy.surgery.facts import Bools
from polar_deploy.surgery.slices import paddings, slices

TOLERANCE = 1e-6  # of the outputs' scale, in float64
_DEPLOY = "deploy the ONNX graph (Gates.export, then surgery), or leave that layer out with ignore"


def cut(model: nn.Module, analysis: Analysis, opened: Bools) -> nn.Module:
    """A copy of `model` without what is closed in bool [gates], in the same mode, without gates; see `Gates.cut`."""
    require_float32(model, or_wider=True)
    small = masking.stripped(model)
    example = analysis.example.to(device_of(model))
    if all(parameter.dtype is torch.float64 for parameter in model.parameters()):
        example = example.mapped(
            lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf
        )
    calls = watch(small, example)
    closed = _closed(analysis, opened)
    left = slices(closed, set(own_tensors(small)))
    _drop(small, analysis, opened, calls)
    _slice(small, left)
    _pad(small, closed)
    check = partial(_require_equal, model, small, analysis, opened)
    try:
        check()
    except ContentError:
        recount(small, analysis.choices, analysis.choices.state(opened), check)
    return small


@torch.no_grad()
def merge(model: nn.Module, small: nn.Module, analysis: Analysis, opened: Bools) -> None:
    """Write parameters and buffers of `small` into their places in `model`; see `Gates.merge`."""
    tensors, learned = own_tensors(model), own_tensors(small)
    if strange := sorted(learned.keys() - tensors.keys()):
        raise UsageError(
            f"{type(small).__name__} has {strange[0]}, which {type(model).__name__} has not",
            "merge what `cut` made of this model itself, not what compiles, averages or distributes it",
        )
    known = _by_tensor(model, slices(_closed(analysis, opened), set(tensors)))
    for name, tensor in tensors.items():
        value = learned.get(name)
        if value is None:
            continue
        kept = known.get(id(tensor), [np.arange(size) for size in tensor.shape])
        if tuple(map(len, kept)) != tuple(value.shape):
            raise UsageError(
                f"{name} has the shape {tuple(value.shape)}, and {tuple(map(len, kept))} are open",
                "merge what `cut` made of this model with these gates",
            )
        tensor[np.ix_(*kept)] = value.to(tensor)


def _closed(analysis: Analysis, opened: Bools) -> DetachedModel:
    """The graph with the gates closed that are not in bool [gates]."""
    return analysis.choices.with_masks(analysis.choices.detached, opened)


def _by_tensor(network: nn.Module, left: Mapping[str, Sequence[np.ndarray]]) -> dict[int, Sequence[np.ndarray]]:
    """What is left of each parameter and buffer, by its id: one that is shared has one of its names in the graph."""
    return {id(tensor): left[name] for name, tensor in own_tensors(network).items() if name in left}


def _slice(network: nn.Module, left: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Slice every parameter and buffer, each tensor once, and tell the modules their new sizes."""
    done: dict[int, Tensor] = {}
    sizes: dict[nn.Module, dict[str, torch.Size]] = {}
    known = _by_tensor(network, left)
    for name, tensor in own_tensors(network).items():
        kept = known.get(id(tensor))
        path, _, own = name.rpartition(".")
        module = network.get_submodule(path)
        if id(tensor) not in done and kept is not None:
            done[id(tensor)] = _sliced(tensor, kept)
        if id(tensor) in done:
            sizes.setdefault(module, {})[own] = tensor.shape
            value = done[id(tensor)]
            if isinstance(value, nn.Parameter):
                module._parameters[own] = value
            else:
                module._buffers[own] = value
    for module, before in sizes.items():
        _resize(module, before)


def _pad(network: nn.Module, closed: DetachedModel) -> None:
    """Write what modules that pad with constants, channels as well, add from now on."""
    padding = {path: each for path, each in network.named_modules() if isinstance(each, _ConstantPadNd)}
    if not padding:
        return
    for position, (before, after) in paddings(closed).items():
        module = padding.get(module_of(closed.model.graph.node[position]) or "")
        if module is not None:  # PyTorch tells pads from the last axis on
            pairs = list(zip(before.tolist(), after.tolist(), strict=True))[::-1][: len(module.padding) // 2]
            module.padding = tuple(each for pair in pairs for each in pair)


def _sliced(tensor: Tensor, kept: Sequence[np.ndarray]) -> Tensor:
    values = tensor.detach()
    for axis, indices in enumerate(kept):
        if len(indices) < values.shape[axis]:
            values = values.index_select(axis, torch.from_numpy(indices).to(values.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values.clone(), requires_grad=tensor.requires_grad)
    return values.clone()


def _resize(module: nn.Module, before: dict[str, torch.Size]) -> None:
    """Write the sizes that PyTorch's modules keep beside their parameters."""
    weight, old = getattr(module, "weight", None), before.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None and old is not None:
        _resize_convolution(module, weight, old)
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(next(t for t in (weight, module.running_mean) if isinstance(t, Tensor)))
    elif isinstance(module, nn.GroupNorm) and weight is not None and old is not None:
        module.num_groups = module.num_groups * len(weight) // old[0]
        module.num_channels = len(weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding) and weight is not None:
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _resize_convolution(module: nn.modules.conv._ConvNd, weight: Tensor, old: torch.Size) -> None:
    """Groups go whole, so that their number shrinks like the axis that runs through all of them."""
    module.groups = module.groups * weight.shape[0] // old[0] if module.groups > 1 else 1
    outside, inside = weight.shape[0], weight.shape[1] * module.groups
    module.in_channels, module.out_channels = (outside, inside) if module.transposed else (inside, outside)


class Absent(nn.Module):
    """Stands for a module that was removed with its branch: zeros of the shape that the module would have given.

    Where each axis of that is as long as the same one of what comes in, or of one length, exporters and compilers can
    follow it for any batch and size. Else the module is asked. Of several things that it gave back the others are None.
    Settings of the module, which others may look at, are there still; its parameters are None.

    Args:
        module: what was removed; asked for shapes alone, on the meta device.
        calls: how it was called in the whole network; its first argument is the tensor whose shape tells that of zeros.
        made: axis and number of the channels that it gives back from now on; None, inside of a branch: as before.
        result: the position of the zeros in what it gives back; None: they are all.
    """

    def __init__(self, module: nn.Module, calls: Calls, made: tuple[int, int] | None, result: int | None) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple)) and name not in vars(self):
                setattr(self, name, value)
        for name in module._parameters:
            self.register_parameter(name, None)
        self.register_forward_hook(_called)
        self._empty, self._result = calls.empty, result
        self._argument, shape = _first(calls)
        axis = _channel_axis(module, len(shape))
        self._asked = [(copy.deepcopy(module).to("meta").eval(), calls)]  # in a list: it is no part of this network
        self._given, self._made = (axis, shape[axis]), made
        self._known: dict[torch.Size, list[int]] = {}
        self._lengths = self._learned(shape)
        if self._lengths is not None:
            self._asked = []

    @torch.no_grad()
    def forward(self, *args: Any, **named: Any) -> Any:
        """Zeros [B, ...] like the argument."""
        return with_result(self._empty, self._result, self._zeros(*args, **named))

    def _zeros(self, *args: Any, **named: Any) -> Tensor:
        x: Tensor = argument_of(args, named, self._argument)
        if self._lengths is not None:
            return x.new_zeros([x.shape[at] if size is None else size for at, size in enumerate(self._lengths)])
        if torch.compiler.is_compiling():  # lengths may be symbols, which are no keys
            return x.new_zeros(self._ask(x.shape))
        if x.shape not in self._known:
            self._known[x.shape] = self._ask(x.shape)
        return x.new_zeros(self._known[x.shape])

    def _ask(self, shape: Sequence[int]) -> list[int]:
        """The shape of what comes out for one that comes in, with whatever number of channels."""
        axis, width = self._given
        ((module, calls),) = self._asked
        given = [width if at == axis else size for at, size in enumerate(shape)]
        before, dtype = calls.inputs[0][self._argument], next(module.parameters()).dtype
        asked = torch.utils._pytree.tree_map_only(Tensor, lambda held: held.to("meta"), calls.others)
        for key, own in calls.inputs[0].items():
            if own is not None:  # what was of the same shape is of the same shape
                asked[key] = torch.empty(given if own == before else own, device="meta", dtype=dtype)
        positions = [key for key in asked if isinstance(key, int)]
        named = {key: value for key, value in asked.items() if isinstance(key, str)}
        made = list(result_of(module(*(asked[key] for key in sorted(positions)), **named), self._result).shape)
        if self._made is not None:
            made[self._made[0]] = self._made[1]
        return made

    def _learned(self, shape: Sequence[int]) -> list[int | None] | None:
        """The length of each axis of what comes out, None for that of what comes in; None where it is neither."""
        larger = [size if at == self._given[0] else 2 * size for at, size in enumerate(shape)]
        known: list[tuple[Sequence[int], list[int]]] = []
        for given in (shape, larger, [larger[0], *shape[1:]]):
            try:
                known.append((given, self._ask(given)))
            except Exception:  # noqa: BLE001  (not every module takes every size, and says so when it is run)
                continue
        lengths: list[int | None] = []
        for at, size in enumerate(known[0][1] if known else ()):
            if at < len(shape) and at != self._given[0] and all(given[at] == made[at] for given, made in known):
                lengths.append(None)
            elif all(made[at] == size for _, made in known):
                lengths.append(size)
            else:
                return None
        return lengths or None


def _called(module: nn.Module, args: object, output: object) -> None:
    """Forward hook that makes modules call this one: PyTorch's encoder layers compute with the weights of theirs
    without a call, unless one of them has a hook."""


def _drop(network: nn.Module, analysis: Analysis, opened: Bools, calls: dict[str, Calls]) -> None:
    """Replace the modules of closed branches."""
    closed = [block for block in analysis.choices.blocks if not opened[block.gate]]
    if not closed:
        return
    ends = {analysis.places[block.mask].module: block for block in closed}
    for path in _dead(network, analysis, closed):
        block = next((block for end, block in ends.items() if is_within(end, path)), None)
        network.set_submodule(path, _absent(network.get_submodule(path), path, calls[path], block, analysis, opened))


def _dead(network: nn.Module, analysis: Analysis, closed: Sequence[Block]) -> list[str]:
    """The outermost modules with parameters that work for closed branches alone."""
    removed = frozenset[int]().union(*(block.nodes for block in closed))
    graph = analysis.choices.detached.model.graph
    constant = {tensor.name for tensor in graph.initializer}
    runs: dict[str, bool] = {}
    for position, node in enumerate(graph.node):
        if constant.issuperset(filter(None, node.input)):  # it only prepares a weight
            constant.update(node.output)
            continue
        path = module_of(node)
        while path:
            runs[path] = runs.get(path, False) or position not in removed
            path = path.rpartition(".")[0]
    dead = {path for path, is_running in runs.items() if not is_running and _has_parameters(network, path)}
    return [path for path in sorted(dead) if not any(is_within(path, other) and path != other for other in dead)]


def _has_parameters(network: nn.Module, path: str) -> bool:
    return any(True for _ in network.get_submodule(path).parameters())


def _absent(
    module: nn.Module, path: str, calls: Calls, block: Block | None, analysis: Analysis, opened: Bools
) -> Absent:
    if len(calls.inputs) != 1 or not _first(calls)[1] or not calls.outputs[0]:
        raise ContentError(
            f"{path} went with its branch, but is no module that is called once with a tensor, and gives one back",
            _DEPLOY,
        )
    ends, result = None, next(iter(calls.outputs[0]))
    if block is not None:
        place = analysis.places[block.mask]
        result = place.result if place.module == path else result
        ends = place.axis, int(np.count_nonzero(np.append(opened, True)[block.channels]))  # `NEVER` is the last one
    return Absent(module, calls, ends, result)


def _channel_axis(module: nn.Module, rank: int) -> int:
    """The axis of the channels in what a module reads: the last one of tokens, else the second."""
    first = next(each for each in module.modules() if any(True for _ in each.parameters(recurse=False)))
    tokens = isinstance(first, (nn.LayerNorm, nn.RMSNorm)) or next(first.parameters()).dim() == 2
    return rank - 1 if tokens else 1


def _first(calls: Calls) -> tuple[int | str, tuple[int, ...]]:
    """The first argument of a module that is a tensor, and its shape; () where none is."""
    given = calls.inputs[0].items()
    return next(((key, shape) for key, shape in given if shape is not None), (0, ()))


def _follow(network: nn.Module) -> list[str]:
    """The paths of the modules that have begun and not ended, the innermost last, as long as the network is run."""
    inside: list[str] = []
    for path, module in network.named_modules():

        def begin(module: nn.Module, args: object, path: str = path) -> None:
            inside.append(path)

        def end(module: nn.Module, args: object, output: object) -> None:
            inside.pop()

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(end)
    return inside


def _recount(running: nn.Module, small: nn.Module) -> None:
    """Let norms without parameters see how many channels they are given when `running`, a copy of `small`, is run.

    Both are told: nothing else says it.
    """
    for path, module in running.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)) and not own_tensors(module):
            count = partial(_count_channels, small.get_submodule(path))
            module.register_forward_pre_hook(count, with_kwargs=True)


def _count_channels(other: nn.Module, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    channels = next(iter((*args, *kwargs.values()))).shape[1]
    for each in (module, other):
        if isinstance(each, nn.GroupNorm):  # its groups go whole
            each.num_groups = each.num_groups * channels // each.num_channels
            each.num_channels = channels
        elif isinstance(each, nn.modules.batchnorm._NormBase):
            each.num_features = channels


@torch.no_grad()
def _require_equal(model: nn.Module, small: nn.Module, analysis: Analysis, opened: Bools) -> None:
    """Raise ContentError where gated and cut network differ in float64."""
    example = noise(analysis.example.to(device_of(model)), torch.float64)
    gated, ours = masking.copied(model).double(), masking.copied(small).double()
    _recount(ours, small)
    masking.write(gated, analysis, torch.from_numpy(opened).double())
    outputs = []
    for network in (gated, ours):
        inside = _follow(network)
        with evaluating(network):
            try:
                made = network(*example.args, **example.kwargs)
            except Exception as error:  # whatever a forward that counts on its widths raises
                why = f"{type(error).__name__}: {first_line(error)}"
                where = f"{type(model).__name__} cannot be cut as a module: {why}, in {inside[-1] or 'its own forward'}"
                raise ContentError(where, _DEPLOY) from error
        outputs.append([leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)])
    for one, other in zip(*outputs, strict=True):
        off = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) if one.shape == other.shape else 1.0
        if not off <= TOLERANCE:
            raise ContentError(
                f"the cut {type(model).__name__} differs from the gated one by {off:.2g} of its scale", _DEPLOY
            )
