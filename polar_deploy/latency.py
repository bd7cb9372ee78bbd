"""latency-table.json: reading it, and what it predicts. No torch: gates, stages and reports all read it.

A site saves D_s(n) milliseconds of the full network's T when n of its gates are open: measured, made monotone, straight
lines between. Savings add up, with two corrections: what lies in a closed block is gone with it, and what two sites
save of a layer that they meet in counts once.

    latency = T - sum_s A_s D_s + sum_(s,t) A_st k_st D_s D_t

A_s is the product of the gates of the blocks around s, A_st of those around s or t, and k_st is such that the two sites
cost what was measured of both together. (Let the layer take c, and all that the sites could save be b_s and b_t: then
c (1 - D_s / b_s) (1 - D_t / b_t), which a layer of w_s times w_t channels costs, has just this product in it, with
k_st = c / (b_s b_t).) Exact wherever one site alone is cut. The formula is ours.

Small savings are measured with errors as large as themselves, and a choice picks those that came out too large. So a
table may hold *checks*: whole sub-networks, predicted and measured. All savings are scaled by what those really saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from polar_deploy.errors import ContentError, MachineError
from polar_deploy.workspace import read_json

SCHEMA = 1
MOST_NOISE = 0.15  # share of the full network's time by which all savings together may come out too large
LEAST_LEFT = 0.01  # what is taken to be left of it then: something always is
MOST_CORRECTION = 0.15  # that checks may call for: more, and the measurement was disturbed
_AGAIN = "make it again: polar-deploy engines table GATED.onnx --target TARGET --out FILE"


class DisturbedError(MachineError):
    """The measurements of a table contradict each other."""


@dataclass(frozen=True)
class Entry:
    """One site: its open gates `widths`, ascending, its own last, and the milliseconds `saved` there; a block's: 0, 1.

    `within` are the indices of the blocks that hold it.
    """

    name: str
    kind: str
    width: int
    widths: tuple[int, ...]
    saved: tuple[float, ...]
    within: tuple[int, ...]


@dataclass(frozen=True)
class LatencyTable:
    """What a network takes on a target, by how many gates of each site are open.

    `overlaps`: (site, site, k) in 1 / ms, see above.
    """

    target: str
    batch: int
    full_ms: float
    sites: tuple[Entry, ...]
    overlaps: tuple[tuple[int, int, float], ...]

    def predicted_ms(self, opened: Mapping[str, int]) -> float:
        """Milliseconds of one inference with so many gates open at each site; a block has one gate.

        Raises:
            ContentError: these are not the table's sites.
        """
        if opened.keys() != {site.name for site in self.sites}:
            odd = sorted(opened.keys() ^ {site.name for site in self.sites})
            raise ContentError(f"the latency table and the gates differ in the sites {', '.join(odd[:3])}", _AGAIN)
        counts = [opened[site.name] for site in self.sites]
        around = [prod(counts[block] for block in site.within) for site in self.sites]
        saves = [float(np.interp(n, site.widths, site.saved)) for n, site in zip(counts, self.sites, strict=True)]
        alone = sum(a * d for a, d in zip(around, saves, strict=True))
        twice = sum(around[s] * around[t] * k * saves[s] * saves[t] for s, t, k in self.overlaps)
        return self.full_ms - alone + twice


def correction(document: Mapping[str, Any]) -> float:
    """How far the sub-networks of a table's checks, in the mean, were from what it predicts, as a share of that."""
    checks = document.get("checks", [])
    return float(np.mean([abs(check["ms"] / check["predicted_ms"] - 1) for check in checks])) if checks else 0.0


def key(path: Path) -> str | None:
    """What the pipeline wrote into a table of its own about the circumstances; None: nothing, or no table."""
    try:
        document = read_json(path)
    except ContentError:  # damaged: one that is made anew takes its place
        return None
    return document.get("key") if isinstance(document, dict) else None


def read(path: Path, target: str | None = None, batch: int | None = None) -> LatencyTable:
    """Read and check a latency-table.json; `target` (its name) and `batch`: what it has to be for.

    Raises:
        UsageError: there is no such file.
        ContentError: it is no latency table, or one for another target.
    """
    document = read_json(path)
    try:
        table = parsed(document)
        checks = document.get("checks", [])
        saved, predicted = (sum(table.full_ms - check[key] for check in checks) for key in ("ms", "predicted_ms"))
        table = _scaled(table, saved / predicted) if saved > 0 and predicted > 0 else table
    except DisturbedError as error:
        raise ContentError(f"{path} is no latency table: {error.what}", error.todo) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ContentError(f"{path} is no latency table: {type(error).__name__}: {error}", _AGAIN) from error
    if target is not None and table.target != target:
        raise ContentError(f"{path} was measured on {table.target}, the target is {target}", _AGAIN)
    if batch is not None and table.batch != batch:
        raise ContentError(f"{path} was measured at batch {table.batch}, the verdict is at batch {batch}", _AGAIN)
    return table


def parsed(document: Any) -> LatencyTable:
    """The table in the content of a latency-table.json, as single sites were measured.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: it holds none.
        DisturbedError: what it holds cannot be.
    """
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}, this version reads {SCHEMA}")
    full_ms, listed = float(document["full_ms"]), document["sites"]
    index = {site["name"]: position for position, site in enumerate(listed)}
    if not (isfinite(full_ms) and full_ms > 0):
        raise ValueError(f"full_ms is {full_ms}")
    if not index or len(index) != len(listed):
        raise ValueError("a site is listed twice, or there is none")
    sites = [_entry(site, full_ms, index) for site in listed]
    if any(sites[around].kind != "block" for site in sites for around in site.within):
        raise ValueError("a site lies within something that is no block")
    overlaps = _bounded(sites, [_overlap(each, sites, index, full_ms) for each in document["overlaps"]])
    table = LatencyTable(document["target"], int(document["batch"]), full_ms, _holding(sites, overlaps), overlaps)
    saved = full_ms - table.predicted_ms({site.name: site.widths[0] for site in sites})
    if saved >= (1 + MOST_NOISE) * full_ms:
        raise DisturbedError(
            f"the sites save {saved:g} ms, but the full network takes {full_ms:g} ms",
            "measure the latency table while nothing else runs on the machine",
        )
    return _scaled(table, min(1.0, (1 - LEAST_LEFT) * full_ms / saved)) if saved > 0 else table


def _scaled(table: LatencyTable, factor: float) -> LatencyTable:
    """All savings, and overlaps, times a factor."""
    sites = tuple(replace(site, saved=tuple(factor * each for each in site.saved)) for site in table.sites)
    return replace(table, sites=sites, overlaps=tuple((s, t, k / factor) for s, t, k in table.overlaps))


def _entry(site: Mapping[str, Any], full_ms: float, index: Mapping[str, int]) -> Entry:
    widths, ms = [int(w) for w in site["widths"]], [float(each) for each in site["ms"]]
    own = 1 if site["kind"] == "block" else int(site["width"])
    ascends = widths == sorted(set(widths)) and widths[-1:] == [own] and widths[0] >= 0
    if len(ms) != len(widths) or not ascends or (site["kind"] == "block" and widths != [0, 1]):
        raise ValueError(f"site {site['name']!r}: widths must ascend to {own}, with a latency for each")
    if not all(isfinite(each) and each > 0 for each in ms):
        raise ValueError(f"site {site['name']!r}: latencies must be positive")
    saved = [full_ms - min(each, full_ms) for each in ascending(ms[:-1])] + [0.0]
    within = tuple(index[name] for name in site["within"])
    return Entry(site["name"], site["kind"], int(site["width"]), tuple(widths), tuple(saved), within)


def ascending(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in the sum of squares: a wider layer never gets cheaper.

    Pool adjacent violators (Barlow et al., Statistical Inference under Order Restrictions, 1972).
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _overlap(
    overlap: Mapping[str, Any], sites: Sequence[Entry], index: Mapping[str, int], full_ms: float
) -> tuple[int, int, float]:
    s, t = (index[name] for name in overlap["sites"])
    alone = [sites[i].saved[sites[i].widths.index(n)] for i, n in zip((s, t), overlap["open"], strict=True)]
    twice = sum(alone) - (full_ms - float(overlap["ms"]))
    return s, t, max(0.0, twice) / (alone[0] * alone[1]) if min(alone) > 0 else 0.0


def _bounded(sites: Sequence[Entry], overlaps: Sequence[tuple[int, int, float]]) -> tuple[tuple[int, int, float], ...]:
    """Overlaps cut back, where noise made them too large, until no site gets dearer by being cut."""
    shares: list[dict[int, float]] = [{} for _ in sites]  # site -> the other -> what this takes back of its saving
    for s, t, k in overlaps:
        shares[s][t], shares[t][s] = k * sites[t].saved[0], k * sites[s].saved[0]
    taken = [_together(sites, each) for each in shares]
    return tuple((s, t, k / max(1.0, taken[s], taken[t])) for s, t, k in overlaps)


def _together(sites: Sequence[Entry], shares: Mapping[int, float]) -> float:
    """The most that some sites' shares come to at once: those of a block, or else of what it holds."""
    total = 0.0
    for site, share in shares.items():
        if not shares.keys() & set(sites[site].within):
            total += max(share, sum(inner for other, inner in shares.items() if site in sites[other].within))
    return total


def _holding(sites: Sequence[Entry], overlaps: Sequence[tuple[int, int, float]]) -> tuple[Entry, ...]:
    """Blocks that save, where noise made that too little, at least what all that they hold could save."""
    held = list(sites)
    blocks = {block for site in sites for block in site.within}
    for block in sorted(blocks, key=lambda b: sum(b in site.within for site in sites)):  # the inner ones first
        inside = {i for i, site in enumerate(held) if block in site.within}
        outermost = {i for i in inside if not inside & set(held[i].within)}
        saved = sum(held[i].saved[0] for i in outermost)
        saved -= sum(k * held[s].saved[0] * held[t].saved[0] for s, t, k in overlaps if {s, t} <= outermost)
        most = max(saved, held[block].saved[0])
        held[block] = replace(held[block], saved=(most, 0.0))
    return tuple(held)
