"""Masks on the modules of a user's own network: hooks that multiply what a module reads, or what it gives back.

A mask is a buffer of the module that carries it (not part of its state_dict), so that it goes where the module goes: to
another device, into a copy, through `torch.save`, from process to process. The hooks hold no state of their own but
what a mask was last seen to be.

Where a mask is the same for the whole batch, the weight's input columns can be multiplied as well as the activations:
whichever is smaller, so that a mask costs next to nothing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polar_deploy.errors import UsageError
from polar_deploy.export import device_of
from polar_deploy.gating.analysis import Analysis
from polar_deploy.gating.places import Place, argument_of, result_of, with_result

INPUT, OUTPUT = "polar_deploy_input_mask", "polar_deploy_output_mask"  # names of the buffers
_Arguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COMPUTING = ("forward", "_conv_forward")  # the methods in which layers compute, which subclasses replace


class Listener(Protocol):
    """Who sees what passes a mask while gates learn, and may put something else in its place."""

    def passes(self, module: nn.Module, name: str, x: Tensor, mask: Tensor, axes: tuple[int, int]) -> Tensor | None:
        """What goes on instead of `x` * `mask`; None: that product. axes: of the samples, and of the channels."""
        ...


_listeners: list[weakref.ref[Listener]] = []  # weak: whoever drops his gates in the middle of a step listens no more
_compiled = False  # whether a module with a mask ever went through torch.compile


def listen(listener: Listener, *, on: bool) -> None:
    """Start or stop to show a listener all that passes masks."""
    others = [held for held in _listeners if held() is not None and held() is not listener]
    _listeners[:] = [*others, weakref.ref(listener)] if on else others


def is_compiled() -> bool:
    """Whether a module with a mask ever went through torch.compile: compiled code shows nothing to listeners."""
    return _compiled


def _note_compiled() -> bool:
    """Runs while a graph is compiled, and is no part of it."""
    global _compiled
    _compiled = True
    return True


# All that torch.compiler.assume_constant_result does once it has imported torch._dynamo, which takes as long as torch.
_note_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _methods(layer: type[nn.Module]) -> tuple[object, ...]:
    return tuple(getattr(layer, name, None) for name in _COMPUTING)


_PLAIN = {_methods(layer) for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)}


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer computes with `weight` as it is, so that a mask may go into it: no method is someone else's."""
    return _methods(type(module)) in _PLAIN and not any(name in vars(module) for name in _COMPUTING)


class _Masking:
    """What the two hooks share: the mask, and whether all of it is open."""

    def __init__(self, place: Place, name: str) -> None:
        self._axes, self._name = (place.batch, place.axis), name
        self._seen: tuple[int, int] | None = None
        self._is_open = False

    def __getstate__(self) -> dict[str, object]:
        """Without what was seen: a copy has another mask, which may have the same id."""
        return {**vars(self), "_seen": None}

    def _open(self, mask: Tensor) -> bool:
        """Whether the mask lets everything through; looks at it only where it was written to since the last time."""
        if mask.is_inference():
            return False
        now = id(mask), mask._version
        if now != self._seen:
            self._seen, self._is_open = now, bool((mask == 1).all())
        return self._is_open

    def _heard(self, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor | None:
        for held in _listeners:
            listener = held()
            replaced = listener.passes(module, self._name, x, mask, self._axes) if listener is not None else None
            if replaced is not None:
                return replaced
        return None

    def _product(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask.to(x.dtype)


class MaskInput(_Masking):
    """Forward pre-hook, with keywords: one argument is multiplied by the module's mask, or the weight that reads it."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, INPUT)
        assert place.argument is not None
        self._argument = place.argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
        x, mask = argument_of(args, kwargs, self._argument), getattr(module, INPUT)
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():
                _note_compiled()
            return self._with(args, kwargs, self._product(x, mask))
        _take_back(module)  # after an interrupt no hook is called: it would still be there
        replaced = self._heard(module, x, mask) if _listeners else None
        if replaced is not None:
            return self._with(args, kwargs, replaced)
        if self._open(mask):
            return None
        weight = module._parameters.get("weight")
        if weight is not None and weight.numel() < x.numel() and _is_plain(module):
            vars(module)["weight"] = _masked_weight(module, mask)  # found before the parameter of that name
            return None
        return self._with(args, kwargs, self._product(x, mask))

    def _with(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> _Arguments:
        if isinstance(self._argument, str):
            return args, kwargs | {self._argument: x}
        return (*args[: self._argument], x, *args[self._argument + 1 :]), kwargs


def restore_weight(module: nn.Module, args: object, output: object) -> None:
    """Forward hook, called after errors too: takes back the weight that `MaskInput` put in place."""
    _take_back(module)


def _take_back(module: nn.Module) -> None:
    if "weight" in module._parameters:  # else it is not ours: old weight norms and pruning keep theirs in this place
        vars(module).pop("weight", None)


class MaskOutput(_Masking):
    """Forward hook: what the module gives back, or one thing of several, is multiplied by its mask."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, OUTPUT)
        self._result = place.result

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        x, mask = result_of(output, self._result), getattr(module, OUTPUT)
        if torch.compiler.is_compiling():
            return with_result(output, self._result, self._product(x, mask))
        replaced = self._heard(module, x, mask) if _listeners else None
        if replaced is not None:
            return with_result(output, self._result, replaced)
        return None if self._open(mask) else with_result(output, self._result, self._product(x, mask))


def _masked_weight(module: nn.Module, mask: Tensor) -> Tensor:
    """The weight with the columns that read closed channels at zero."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    mask, kernel = mask.to(weight.dtype), (1,) * (weight.dim() - 2)
    if isinstance(module, _TRANSPOSED):
        return weight * mask.reshape(-1, 1, *kernel)
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return weight * mask.reshape(1, -1, *kernel)
    blocks = weight.reshape(groups, -1, *weight.shape[1:]) * mask.reshape(groups, 1, -1, *kernel)
    return blocks.reshape(weight.shape)


def attach(network: nn.Module, places: Sequence[Place], widths: Sequence[int]) -> list[RemovableHandle]:
    """Put open masks on the modules of `places`, each once; returns the handles that take the hooks away again."""
    handles: list[RemovableHandle] = []
    device = device_of(network)
    _require_layers(network, places)
    seen: set[tuple[str, bool]] = set()
    for place, width in zip(places, widths, strict=True):
        if (place.module, place.argument is None) in seen:
            continue
        seen.add((place.module, place.argument is None))
        module = network.get_submodule(place.module)
        shape = (width, *(1,) * (place.rank - place.axis - 1))  # as it is multiplied: then an exporter keeps its name
        module.register_buffer(buffer(place), torch.ones(shape, device=device), persistent=False)
        if place.argument is None:
            handles.append(module.register_forward_hook(MaskOutput(place)))
        else:
            handles.append(module.register_forward_pre_hook(MaskInput(place), with_kwargs=True))
            handles.append(module.register_forward_hook(restore_weight, always_call=True))
    return handles


def _require_layers(network: nn.Module, places: Sequence[Place]) -> None:
    """Raise UsageError where a network lacks a module that is to carry a mask."""
    known = {path for path, _ in network.named_modules()}
    for place in places:
        if place.module not in known:
            raise UsageError(
                f"the analysis has a layer {place.module}, which {type(network).__name__} has not",
                "analyse this network, or leave `analysis` out",
            )


def detach(network: nn.Module, places: Sequence[Place], handles: Sequence[RemovableHandle]) -> None:
    """Take hooks and masks off again."""
    for handle in handles:
        handle.remove()
    for place in places:
        network.get_submodule(place.module)._buffers.pop(buffer(place), None)
        network.get_submodule(place.module)._non_persistent_buffers_set.discard(buffer(place))


def copied(network: nn.Module) -> nn.Module:
    """A deep copy, which PyTorch refuses where a module keeps something that was computed, such as its attention."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        _take_back(module)
        for held in torch.utils._pytree.tree_leaves(vars(module)):
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    return copy.deepcopy(network, memo)


def stripped(network: nn.Module) -> nn.Module:
    """A copy of a network without masks and their hooks."""
    bare = copied(network)
    for module in bare.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Masking) or hook is restore_weight:
                    del hooks[key]
        for name in (INPUT, OUTPUT):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
    return bare


@torch.no_grad()
def write(network: nn.Module, analysis: Analysis, values: Tensor) -> None:
    """Set the masks of `network`, or of a copy of it, by its gates; those that do not change are not touched.

    Args:
        values: of the gates, float [gates]: 1 open, 0 closed; channels without a gate stay open.
    """
    known = torch.cat([values, values.new_ones(1)])  # `NEVER` is the last one
    for place, gates in zip(analysis.places, analysis.gate_of(values.device), strict=True):
        mask = _mask(network, place)
        value = known[gates].to(mask).reshape(mask.shape)
        if not torch.equal(mask, value):
            mask.copy_(value)


def read(network: nn.Module, places: Sequence[Place]) -> list[Tensor]:
    """The masks of `network` as they stand."""
    return [_mask(network, place).clone() for place in places]


def _mask(network: nn.Module, place: Place) -> Tensor:
    try:
        return network.get_submodule(place.module).get_buffer(buffer(place))
    except AttributeError as error:
        raise UsageError(
            f"{type(network).__name__} has no mask on {place.module}",
            "use the network that has the gates, or a copy of it, with its layers as they were, and before `detach`",
        ) from error


def require_bare(network: nn.Module) -> None:
    """Raise UsageError where a network has masks: a second one on the same channels would not be counted."""
    for path, module in network.named_modules():
        if INPUT in module._buffers or OUTPUT in module._buffers:
            raise UsageError(
                f"{type(network).__name__} has gates already, on {path or 'itself'}",
                "call `detach` of those, or make the network anew",
            )


class Carriers:
    """Which place a mask is of, by the module that carries it.

    Modules are known by their ids, and held: an id that was given back would soon be that of somebody else's module.
    """

    def __init__(self, network: nn.Module, places: Sequence[Place]) -> None:
        self._modules = [network.get_submodule(place.module) for place in places]
        numbered = zip(self._modules, places, range(len(places)), strict=True)
        self._index = {(id(module), buffer(place)): index for module, place, index in reversed([*numbered])}

    def place(self, module: nn.Module, name: str) -> int | None:
        """The first place whose mask is the buffer `name` of this very module; None: there is none."""
        return self._index.get((id(module), name))


def buffer(place: Place) -> str:
    """The name of the buffer that holds a place's mask."""
    return OUTPUT if place.argument is None else INPUT
