"""What a network costs by a device's file: its MACs, with every width counted as the device packs it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from polar_deploy.costs import Cost, Factor, Floats, Layer, State, Term
from polar_deploy.devices import Chosen
from polar_deploy.devices.device import Kind
from polar_deploy.devices.width_costs import Side
from polar_deploy.surgery.choices import Choices

SIDES: tuple[Side, ...] = ("output", "input")  # of a layer's factors


def device_cost(chosen: Chosen, choices: Choices) -> Cost:
    """The cost of a network on a device as a function of what is kept, in a unit of its own: only shares mean anything.

    A layer costs its MACs, at what one costs in a layer of its kind, with the channels that the device computes in
    place of those that are there (`WidthCosts.packed`); as many of its weights (`weight`); the channels that it moves
    (`moved`); and what it costs besides to read a width that no kernel likes (`surcharge`). Sums of branches cost by
    the element (`added`), and other layers without weights nothing. Channels of several sites that are read or written
    as one count as they are. The formula is ours.
    """
    terms = tuple(term for layer in choices.layers for term in _terms(chosen, layer))
    if added := chosen.costs.added:
        terms += tuple(replace(term, coefficient=added * term.coefficient) for term in choices.additions)
    whole = State(tuple(site.width for site in choices.sites), (True,) * len(choices.blocks))
    return Cost(sum(term(whole) for term in terms), terms)


def _terms(chosen: Chosen, layer: Layer) -> list[Term]:
    kind: Kind = "conv1x1" if layer.kernel == 1 else "depthwise3x3" if layer.depthwise else "conv3x3"
    costs, macs = chosen.costs, layer.macs
    pixels = macs.coefficient / layer.kernel
    packed = [
        factor if len(factor.tables) > 1 else _with(factor, costs.packed(_widths(factor), kind, side))
        for factor, side in zip(macs.factors, SIDES, strict=False)
    ]
    product = macs.coefficient * costs.each(kind) + layer.weights * costs.weight(kind)
    terms = [Term(product, tuple(packed), macs.blocks)]
    if moved := costs.moved(kind):
        terms += [Term(pixels * moved, (factor,), macs.blocks) for factor in macs.factors]
    if not layer.depthwise:
        terms += [Term(pixels, factors, macs.blocks) for factors in _surcharges(chosen, kind, *macs.factors)]
    return terms


def _surcharges(chosen: Chosen, kind: Kind, written: Factor, read: Factor) -> list[tuple[Factor, Factor]]:
    """Products of what is written, as far as it is on offer and as far as it is not, and of what is read.

    Only of channels that another layer writes, whose share of what was measured is in it: not of an image's.
    """
    if len(written.tables) > 1 or len(read.tables) != 1:
        return []
    outputs, inputs = _widths(written), _widths(read)
    on_offer = np.vectorize(chosen.offers, otypes=[bool])(outputs.astype(int))
    products = []
    for offered in (True, False):
        of_these = (on_offer == offered) & (outputs > 0)
        fixed, each = chosen.costs.surcharge(inputs, kind, beside_offered=offered)
        for written_alike, cost in ((of_these * 1.0, fixed), (of_these * outputs, each)):
            if cost.any():
                products.append((_with(written, written_alike), _with(read, cost)))
    return products


def _widths(factor: Factor) -> Floats:
    """The channels that a factor of one site counts, by its width; [] of one that is the same at any."""
    return np.asarray(factor.constant + next(iter(factor.tables.values()), 0.0), float)


def _with(factor: Factor, values: Floats) -> Factor:
    """The factor with other values in the place of `_widths`."""
    return Factor(0.0, dict.fromkeys(factor.tables, values)) if factor.tables else Factor(float(values))
