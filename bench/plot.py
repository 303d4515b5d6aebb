"""Draws what `latency.py --json` saved as grouped bars.

python bench/plot.py out.json out.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {
    "onnxruntime": "#4c78a8",
    "openvino": "#f58518",
    "mnn": "#54a24b",
    "ncnn": "#b279a2",
    "torch_compile": "#9d755d",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Each peer's time relative to graphopt's, by model; a panel for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = report["all_threads"]
    names = list(report["models"])
    size = (max(8, 2 + 1.3 * len(names)), 3.2 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False, sharex=True)
    for axis, threads in zip(axes[:, 0], panels, strict=True):
        _bars(axis, report, threads)
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}, batch 1, float32")
        axis.set_ylabel("time / graphopt's time")
        axis.axhline(1, color="black", linewidth=1, label="graphopt")
    axes[-1, 0].set_xticks(range(len(names)), names, rotation=20, ha="right")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axis: Any, report: dict[str, Any], threads: int) -> None:
    width = 0.8 / len(report["peers"])
    for number, peer in enumerate(report["peers"]):
        places, heights = [], []
        for place, result in enumerate(report["models"].values()):
            times = result["threads"][str(threads)]["times"]
            if peer in times:
                places.append(place - 0.4 + width * (number + 0.5))
                heights.append(times[peer]["min_ms"] / times["graphopt"]["min_ms"])
        axis.bar(places, heights, width, label=peer, color=COLOURS[peer])


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
