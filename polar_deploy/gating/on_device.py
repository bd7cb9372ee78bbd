"""What a network costs by a device's file: its MACs, with every width counted as the device packs it."""

from __future__ import annotations

from functools import partial

import numpy as np

from polar_deploy.costs import Cost, Factor, Layer, State, Term
from polar_deploy.devices import Chosen
from polar_deploy.devices.device import Kind, Side
from polar_deploy.surgery.choices import Choices

SIDES: tuple[Side, ...] = ("output", "input")  # of a layer's factors


def device_cost(chosen: Chosen, choices: Choices) -> Cost:
    """The cost of a network on a device as a function of what is kept, in a unit of its own: only shares mean anything.

    A layer costs its MACs, at what one costs in a layer of its kind, with the channels that the device computes in
    place of those that are there (`Device.packed`), and the channels that it moves (`Device.moved`): a width that no
    kernel likes is laid out anew where it is written and where it is read. Channels of several sites that are read as
    one count as they are, and what does not multiply costs nothing. The formula is ours.
    """
    terms = tuple(term for layer in choices.layers for term in _terms(chosen, layer))
    whole = State(tuple(site.width for site in choices.sites), (True,) * len(choices.blocks))
    return Cost(sum(term(whole) for term in terms), terms)


def _terms(chosen: Chosen, layer: Layer) -> list[Term]:
    kind: Kind = "conv1x1" if layer.kernel == 1 else "depthwise3x3" if layer.depthwise else "conv3x3"
    device, precision, macs = chosen.device, chosen.precision, layer.macs
    factors = (_packed(chosen, factor, kind, side) for factor, side in zip(macs.factors, SIDES, strict=False))
    terms = [Term(macs.coefficient * device.each(precision, kind), tuple(factors), macs.blocks)]
    if moved := device.moved(precision, kind):
        pixels = macs.coefficient / layer.kernel
        laid_out = (_packed(chosen, factor, kind, "input") for factor in macs.factors)
        terms += [Term(pixels * moved, (factor,), macs.blocks) for factor in laid_out]
    return terms


def _packed(chosen: Chosen, factor: Factor, kind: Kind, side: Side) -> Factor:
    """The factor in packed channels."""
    if len(factor.tables) > 1:
        return factor
    packed = partial(chosen.device.packed, precision=chosen.precision, layer=kind, side=side)
    if not factor.tables:
        return Factor(float(packed(np.array(factor.constant))))
    ((site, table),) = factor.tables.items()
    return Factor(0.0, {site: packed(factor.constant + table)})
