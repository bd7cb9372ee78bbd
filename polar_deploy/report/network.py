"""What became of the network: layer by layer, site by site, and where the savings came from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polar_deploy import onnx_files
from polar_deploy.documents.gates import GateSite
from polar_deploy.documents.report import Layer, Network, Reduced, Saving, Site, SiteSaving
from polar_deploy.documents.surgery import LayerChange, SurgeryReport
from polar_deploy.documents.training_log import Epoch
from polar_deploy.latency import LatencyTable

if TYPE_CHECKING:
    from onnx import NodeProto


def network(surgery: SurgeryReport, gated: Path, ungated: dict[str, str]) -> Network:
    """What became of the network.

    Args:
        surgery: surgery.json.
        gated: the graph before surgery, which knows the layers by their names in the model.
        ungated: layers without gates, and why.
    """
    nodes = onnx_files.read(gated, external=False, check=False).graph.node
    names = _module_names(nodes)
    words = names | _other_names(nodes, names)
    block_of: dict[str, int] = {}
    for index, block in enumerate(surgery.blocks_removed):
        for node in block.layers:
            block_of.setdefault(node, index)  # a block behind another removed one lists that one's layers, too
    return Network(
        layers=[
            Layer(
                **{name: getattr(layer, name) for name in LayerChange.model_fields if name != "name"},
                name=names.get(layer.name, layer.name),
                removed_block=block_of.get(layer.name),
            )
            for layer in surgery.layers
        ],
        not_cut=[
            cut.model_copy(update={name: _in_words(each, words) for name, each in cut if isinstance(each, str)})
            for cut in surgery.cuts_not_made
        ],
        unsupported=surgery.unsupported,
        ungated=ungated,
    )


def _module_names(nodes: Sequence[NodeProto]) -> dict[str, str]:
    """Nodes of an ONNX graph by the module whose weight they read; those that share a weight keep their own names."""
    found = {
        node.name or node.output[0]: name.removesuffix(".weight")
        for node in nodes
        for name in node.input[1:2]
        if name.endswith(".weight")
    }
    readers = Counter(found.values())
    return {node: module for node, module in found.items() if readers[module] == 1}


def _other_names(nodes: Sequence[NodeProto], modules: Mapping[str, str]) -> dict[str, str]:
    """Gates by the sites that they are of, and what a module computes by that module."""
    found = {}
    for node in nodes:
        site = onnx_files.metadata(node).get(onnx_files.SITE)
        if site is not None:
            found[node.name] = f"gate of {site.replace(',', ', ')}"
        if node.name in modules:
            found |= dict.fromkeys(node.output, f"the output of {modules[node.name]}")
    return found


def _in_words(text: str, names: Mapping[str, str]) -> str:
    """A text in which nodes and tensors go by the names that a reader of the model knows."""
    return re.sub(r"[^\s,;]+", lambda word: names.get(word[0], word[0]), text)


def sites(gates: Iterable[GateSite], log: Iterable[Epoch]) -> list[Site]:
    """Every place for gates: its width, how many gates stayed open, and when that changed, as (epoch, open)."""
    opened = [(each.epoch, each.open) for each in log if each.open is not None]
    return [
        Site(
            name=site.name,
            kind=site.kind,
            width=site.width,
            open=len(site.open),
            changes=_changes(site.width, [(epoch, counts[index]) for epoch, counts in opened if index < len(counts)]),
        )
        for index, site in enumerate(gates)
    ]


def _changes(width: int, opened: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found = [(0, width)]
    for epoch, count in opened:
        if count != found[-1][1]:
            found.append((epoch, count))
    return found[1:]


def saving(layers: Iterable[Layer], cost: Reduced, name: Literal["macs", "params"]) -> Saving:
    """What of the full network's cost is left, and what went with whole or by narrower layers."""
    removed = sum(getattr(layer, name)[0] for layer in layers if not layer.outputs[1])
    saved = cost.full - cost.compressed
    return Saving(left=cost.compressed, removed=min(removed, saved), narrowed=saved - min(removed, saved))


def saved_ms(table: LatencyTable, opened: Mapping[str, int]) -> list[SiteSaving]:
    """Milliseconds that each site saves by the table, one after the other: they add up to what is predicted.

    Blocks come first, so that what lies in a removed block is not counted again.
    """
    state = {site.name: site.widths[-1] for site in table.sites}
    left, found = table.full_ms, {}
    for site in sorted(table.sites, key=lambda site: site.kind != "block"):
        state[site.name] = opened[site.name]
        now = table.predicted_ms(state)
        found[site.name] = left - now
        left = now
    return [SiteSaving(name=site.name, kind=site.kind, ms=round(found[site.name], 6)) for site in table.sites]
