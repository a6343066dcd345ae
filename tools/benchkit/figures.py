"""The pictures that the documents show: a few comparisons chosen from the recorded runs, each against its peers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchkit.chart import OURS, PEER, caption, median_entries, pyplot
from benchkit.report import BenchError, say


@dataclass(frozen=True)
class Panel:
    """One axis: a heading, and for each bar its label and the benchmark's name."""
    heading: str
    bars: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Figure:
    name: str
    source: str
    title: str
    unit: str
    ours: str
    panels: tuple[Panel, ...]


def _per_peer(pattern: str, peers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((label, pattern.format(peer)) for label, peer in peers)


_IOVA = (("iovane", "iovane"), ("Linux iova.c", "linux"), ("mutex over maps", "mutex_map"), ("jemalloc (offsets)", "jemalloc"),
         ("oneTBB malloc (offsets)", "tbbmalloc"), ("mimalloc (offsets)", "mimalloc"), ("floor: own array", "floor_array"))
_PIN = (("iovane", "index_lease_and_drop/{}"), ("UCX rcache", "peer_ucx_rcache_get_and_put/{}"),
        ("ordered map, mutex", "peer_ordered_map_and_mutex/{}"), ("floor: lookup only", "floor_two_level_lookup/{}"))


def _pin(size: str) -> tuple[tuple[str, str], ...]:
    return tuple((label, name.format(size)) for label, name in _PIN)


FIGURES = (
    Figure("iova", "iova_bench.json", "Allocate and free an IOVA interval, 10,000 live", "ns per pair", "^iovane", (
        Panel("4 KiB, allocate then free", _per_peer("pair/{}/4K/live:10000", _IOVA)),
        Panel("2 MiB, at random", _per_peer("churn/{}/2M/live:10000", _IOVA)),
        Panel("mixed sizes, at random", _per_peer("churn/{}/mixed/live:10000", _IOVA)))),
    Figure("pinning", "pin_index_bench.json", "Find a registered region, hold it, let it go", "ns per hit", "^iovane", (
        Panel("100 regions", _pin("100/1/real_time")),
        Panel("10,000 regions, uniform", _pin("10000/1/real_time")),
        Panel("1,000,000 regions, uniform", _pin("1000000/1/real_time")))),
    Figure("viommu", "viommu_bench.json", "A guest changes its IOMMU's tables: from its bytes to a staged batch",
           "ns per leaf entry", "^iovane", (
        Panel("runs of 1 page", (("iovane, VT-d", "BM_VtdPages/pages:1/host:0"), ("iovane, PAPR", "BM_PaprPut/host:0"),
                                 ("one call per leaf, one lock", "BM_BaselinePerLeaf/pages:1"))),
        Panel("runs of 32 pages", (("iovane, VT-d", "BM_VtdPages/pages:32/host:0"),
                                   ("one call per leaf, one lock", "BM_BaselinePerLeaf/pages:32"))),
        Panel("runs of 512 pages", (("iovane, VT-d", "BM_VtdPages/pages:512/host:0"),
                                    ("iovane, PAPR list", "BM_PaprIndirect/host:0"),
                                    ("one call per leaf, one lock", "BM_BaselinePerLeaf/pages:512"))))),
    Figure("stage1", "stage1_bench.json", "Stage-1 mode beside map and unmap calls, both on the software IOMMU",
           "ns per 4 KiB page", "^iovane", (
        Panel("map, batches of 64", (("iovane stage-1", "backend_cost/stage1_map/64"),
                                     ("iommufd calls", "backend_cost/iommufd_map/64"))),
        Panel("strict unmap, batches of 64", (("iovane stage-1", "backend_cost/stage1_unmap/64"),
                                              ("iommufd calls", "backend_cost/iommufd_unmap/64"))),
        Panel("map, then unmap, one thread", (("iovane stage-1", "shared_space/stage1_pairs/real_time/threads:1"),
                                               ("iommufd calls", "shared_space/iommufd_pairs/real_time/threads:1"))))),
)


def _per_item(entry: dict) -> float:
    """Nanoseconds per item where the program counts items, so that batches of any size compare."""
    rate = entry.get("items_per_second")
    return 1e9 / rate if rate else entry["real_time"]


def _draw(figure: Figure, result: dict, out: Path) -> None:
    values = {name: _per_item(entry) for name, entry in median_entries(result)}
    plot = pyplot()
    rows = max(len(panel.bars) for panel in figure.panels)
    drawn, every = plot.subplots(1, len(figure.panels), figsize=(3.6 * len(figure.panels), 1.2 + 0.26 * rows), layout="constrained")
    shown: list[str] = []
    for axes, panel in zip(every, figure.panels):
        bars = [(label, values[name]) for label, name in panel.bars if name in values]
        if not any(re.search(figure.ours, label) for label, _ in bars):
            plot.close(drawn)
            raise BenchError(f"{figure.source}: has no row of ours for \"{panel.heading}\": record it again, tools/bench run")
        labels, lengths = [label for label, _ in bars], [value for _, value in bars]
        strips = axes.barh(labels, lengths, color=[OURS if re.search(figure.ours, label) else PEER for label in labels])
        axes.bar_label(strips, labels=[f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in lengths], padding=3)
        if labels == shown:
            axes.tick_params(labelleft=False)
        shown = labels
        if max(lengths) > 30 * min(lengths):
            axes.set_xscale("log")
            axes.set_xlabel("logarithmic", fontsize=7)  # a reader compares lengths
        axes.set_title(panel.heading, loc="left", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(f"{figure.title}: {figure.unit}", x=0.01, ha="left", fontweight="bold", fontsize=11)
    drawn.supxlabel(caption(result["context"]), fontsize=7)
    drawn.savefig(out, metadata={"Date": None})
    plot.close(drawn)


def draw_all(folder: Path) -> None:
    """Draws each figure whose run is in `folder`, beside it."""
    count = 0
    for figure in FIGURES:
        source = folder / figure.source
        if not source.exists():
            say(f"no {source}: figure {figure.name} is left out")
            continue
        _draw(figure, json.loads(source.read_text()), folder / f"{figure.name}.svg")
        say(f"wrote {folder / figure.name}.svg")
        count += 1
    if not count:
        raise BenchError(f"{folder} holds none of the runs that figures are drawn from: {', '.join(f.source for f in FIGURES)}")
