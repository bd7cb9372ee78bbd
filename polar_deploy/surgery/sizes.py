"""Which sizes of its inputs a model takes, where it calls dimensions dynamic.

Exporters call dimensions dynamic that in truth take few sizes: a head that fits one picture, a table of 50 positions,
a U-Net that wants multiples of 64. The usual sizes are tried first, then those that its constants hint at, then others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import TYPE_CHECKING, TypeVar

from polar_deploy.errors import ContentError

if TYPE_CHECKING:
    import onnx

# A dimension: its size; its sizes at both probes where it depends on the input; its symbol; or unknown.
Dim = int | tuple[int, int] | str | None
Shape = tuple[Dim, ...]
Sizes = dict[str, int]  # of symbols
T = TypeVar("T")

BATCHES = (2, 3)
# Sizes that other dynamic dimensions (height, width) are tried at, and how far apart two of them are: five halvings
# make none of them equal, and the odd one tells floor from ceil. Networks that demand multiples of 32 get the second
# pair, those that demand squares the third.
PAIRS = ((224, 379, 32), (224, 384, 32), (224, 384, 0))
USUAL = 224
# What networks are made for, and small ones.
COMMON = (32, 64, 128, 16, 256, 8, 512, 96, 160, 192, 320, 384, 448, 640, 48, 28, 80, 112, 24, 40, 56, 72, 299, 4, 2, 1)
# What sound is made for, and long sequences; tried where inputs of that size are no larger than MOST_ELEMENTS.
LARGER = (1024, 2048, 4096, 8000, 16000, 16384, 22050, 24000, 32000, 44100, 48000, 65536, 80000, 160000)
MOST_ELEMENTS = 1 << 22
RATIOS = (1, 0.5, 2, 0.25, 4)  # of an input's sizes to those of the first one, as in pyramids of pictures
MOST_RELATED = 200
FIXED_BATCHES = (2, 4, 8, 16, 32, 64, 3, 5, 6, 7, 9, 10, 12, 24)  # that were baked into a graph
LARGEST_BATCH = 64
MOST_AT_ONCE = 2048  # of a baked batch times another size
LARGEST = 640  # of the sizes that are tried one by one when all else fails
LARGEST_HINT = 4096  # a constant's dimension above is no size of an input
MOST_NODES = 1 << 19  # looked at in a search: larger graphs get fewer tries
MOST_TRIES = 700


def input_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Declared shapes of the tensors that a user feeds; a dynamic dimension is a symbol, unnamed ones `input:axis`.

    Negative sizes are unnamed dimensions, as Paddle writes them. Inputs without a shape are not listed.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes: dict[str, Shape] = {}
    for value in model.graph.input:
        if value.name not in constants and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                dim.dim_value
                if dim.HasField("dim_value") and dim.dim_value >= 0
                else dim.dim_param or f"{value.name}:{axis}"
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            )
    return shapes


def fill(shapes: dict[str, Shape], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes with numbers in place of symbols."""
    return {
        name: tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in shape) for name, shape in shapes.items()
    }


def symbols(shapes: dict[str, Shape]) -> tuple[list[str], list[str]]:
    """Those that lead a shape (the batch), and the others."""
    first = [shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)]
    others = [dim for shape in shapes.values() for dim in shape if isinstance(dim, str) and dim not in first]
    return list(dict.fromkeys(first)), list(dict.fromkeys(others))


def assign(shapes: dict[str, Shape], batch: int, size: int = USUAL, apart: int = 0) -> Sizes:
    """`batch` for leading symbols, `size` for others, each of which is larger than the one before by `apart`."""
    first, others = symbols(shapes)
    return dict.fromkeys(first, batch) | {name: size + apart * number for number, name in enumerate(others)}


def candidates(model: onnx.ModelProto, batches: tuple[int, ...]) -> Iterator[Sizes]:
    """Sizes to try, the likeliest first; not too many for a large graph."""
    shapes = input_shapes(model)
    others = symbols(shapes)[1]
    hints = _hints(model)
    one_by_one = range(1, LARGEST + 1) if others else ()
    sizes = dict.fromkeys((USUAL, *hints, *COMMON, *one_by_one) if others else (USUAL,))
    alike = (assign(shapes, batch, size) for size in sizes for batch in batches)
    several = product((*hints[:6], USUAL, 32), repeat=len(others)) if 1 < len(others) < 4 else ()
    unlike = (
        assign(shapes, batch) | dict(zip(others, each, strict=True))
        for each in several
        if len(set(each)) > 1
        for batch in batches
    )
    baked = dict.fromkeys((*(hint for hint in hints if hint <= LARGEST_BATCH), *FIXED_BATCHES))
    likely = dict.fromkeys((USUAL, *hints[:4], *COMMON[:6]) if others else (USUAL,))
    in_batches = (
        assign(shapes, batch, size)
        for batch, size in product(baked, likely)
        if batch not in batches and (not others or batch * size <= MOST_AT_ONCE)
    )
    tries = min(MOST_TRIES, max(MOST_NODES // max(len(model.graph.node), 1) // 8, 40))
    yield from islice(alike, len(batches) * (1 + len(hints) + len(COMMON)))
    yield from islice(_related(shapes, batches), min(tries, MOST_RELATED))
    yield from islice(in_batches, tries)
    yield from _larger(shapes, batches)
    yield from islice(unlike, tries)
    yield from islice(alike, tries)


def _related(shapes: dict[str, Shape], batches: tuple[int, ...]) -> Iterator[Sizes]:
    """Sizes where each input is a part or a multiple of the first: pyramids first, then any, the nearest first."""
    others = symbols(shapes)[1]
    by_input = [[dim for dim in shape if dim in others] for shape in shapes.values()]
    inputs = [own for own in by_input if own]
    after = len(inputs) - 1
    pyramids = (tuple(ratio**level for level in range(1, after + 1)) for ratio in RATIOS[1:])
    several = dict.fromkeys((*pyramids, *islice(product(RATIOS, repeat=after), 1, MOST_RELATED)) if after > 0 else ())
    for ratios, batch in product(several, batches):
        sizes = assign(shapes, batch)
        for own, ratio in zip(
            inputs[:0:-1], ratios[::-1], strict=True
        ):  # an earlier input has a say on what they share
            sizes |= {str(dim): int(USUAL * ratio) for dim in own}
        sizes |= {str(dim): USUAL for dim in inputs[0]}
        if min(sizes.values()) > 0 and _elements(shapes, sizes) <= MOST_ELEMENTS:
            yield sizes


def _larger(shapes: dict[str, Shape], batches: tuple[int, ...]) -> Iterator[Sizes]:
    """Sizes above the usual ones, of inputs that do not grow too large with them."""
    for size, batch in product(LARGER if symbols(shapes)[1] else (), batches):
        sizes = assign(shapes, batch, size)
        if _elements(shapes, sizes) <= MOST_ELEMENTS:
            yield sizes


def _elements(shapes: dict[str, Shape], sizes: Sizes) -> int:
    return max(math.prod(shape) for shape in fill(shapes, sizes).values())


def _hints(model: onnx.ModelProto) -> list[int]:
    """Dimensions of constants: a table of positions tells how many there are. The rarest first: widths are many."""
    counts: dict[int, int] = {}
    for tensor in model.graph.initializer:
        for dim in tensor.dims[:-1] if len(tensor.dims) > 1 else ():
            if 1 < dim <= LARGEST_HINT:
                counts[dim] = counts.get(dim, 0) + 1
    return sorted(counts, key=counts.__getitem__)[:16]


def first_that(accepts: Callable[[Sizes], T], sizes: Iterator[Sizes]) -> tuple[Sizes, T] | None:
    """The first sizes at which `accepts` raises no ContentError, and what it gives."""
    for each in sizes:
        try:
            return each, accepts(each)
        except ContentError:
            continue
    return None


def two_probes(model: onnx.ModelProto, infer: Callable[[Sizes], T]) -> tuple[T, T] | None:
    """What `infer` says at two choices of sizes that differ in every dimension that is free to; None: at no choice.

    A dimension that takes one size only of those tried is the same in both.
    """
    shapes = input_shapes(model)
    for *pair, apart in PAIRS:
        try:
            first, second = (
                infer(assign(shapes, batch, size, apart)) for batch, size in zip(BATCHES, pair, strict=True)
            )
        except ContentError:
            continue  # the graph demands other sizes
        return first, second
    found = first_that(infer, candidates(model, (*BATCHES[:1], 1)))
    if found is None:
        return None
    base, one = found
    other = vary(shapes, base, infer)
    return one, infer(other) if other != base else one


def vary(shapes: dict[str, Shape], base: Sizes, infer: Callable[[Sizes], T]) -> Sizes:
    """`base` with other sizes of all symbols that take any, each by itself, and together if they take that too."""
    first, others = symbols(shapes)

    def takes(sizes: Sizes) -> bool:
        return min(sizes.values()) > 0 and first_that(infer, iter([sizes])) is not None

    sizes = dict(base)
    batch = base | dict.fromkeys(first, BATCHES[1])
    if first and takes(batch):
        sizes = batch
    together = [sizes | {name: step(base[name]) for name in others} for step in STEPS]
    chosen = next((each for each in together if takes(each)), None)
    sizes = chosen or sizes
    for number, name in enumerate(others):  # apart from one another, if that is taken
        steps = (each for step in STEPS if takes(each := sizes | {name: step(base[name])}) and each != sizes)
        if number or chosen is None:
            sizes = next(steps, sizes)
    return sizes


# From a size that is taken to another one that may be, see `vary`.
STEPS: tuple[Callable[[int], int], ...] = (
    lambda size: size + 1,
    lambda size: 3 * size,
    lambda size: 2 * size,
    lambda size: size - 1,
    lambda size: size // 2,
    lambda size: 1,
)
