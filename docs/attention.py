"""Draw ``attention.svg``: time and memory of attention against length, as ``benchmarks/lengths.py`` measured them.

python docs/attention.py
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from svg import INK, LOOK, of_figure

HERE = Path(__file__).parent
NAMES = {"jaxmask": "jaxmask", "jax.nn": "jax.nn", "tokamax": "tokamax", "SDPA": "SDPA", "Flex": "FlexAttention"}
COLOURS = {"jaxmask": "#4a86dd", "jax.nn": "#8b949e", "tokamax": "#b07cc6", "SDPA": "#d9822b", "Flex": "#3d9a6a"}
STOPS = (
    "Lines stop where jax.nn writes out all scores, tokamax computes all pairs, and SDPA is given the mask written out."
)


def page() -> str:
    """The picture."""
    measured = json.loads((HERE / "attention.json").read_text(encoding="utf-8"))
    with rc_context(LOOK):
        figure = Figure(figsize=(9.2, 4.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        draw(time, measured["time"], 1, "CPU time, that of jaxmask at 1k is 1")
        draw(memory, measured["memory"], 2**20, "memory beside the inputs, MiB")
        time.set_title("Time grows with the length, not with its square", fontsize=10, loc="left")
        memory.set_title("Memory grows with the length, not with its square", fontsize=10, loc="left")
        handles, labels = time.get_legend_handles_labels()
        below: dict[str, Any] = {"loc": "outside lower center", "ncols": len(labels), "frameon": False}
        figure.legend(handles, labels, title=STOPS, title_fontsize=8, **below)
        return of_figure(figure)


def draw(ax: Any, lines: dict[str, list[tuple[int, float]]], unit: float, label: str) -> None:
    """A line for each peer, ours above the others."""
    for name, points in lines.items():
        lengths, values = zip(*points, strict=True)
        ours = name == "jaxmask"
        style = {"linewidth": 2.6 if ours else 1.4, "zorder": 3 if ours else 2, "markersize": 5 if ours else 4}
        ax.plot(lengths, [value / unit for value in values], "o-", color=COLOURS[name], label=NAMES[name], **style)
    ax.margins(x=0.14, y=0.1)
    ticks = [length for length, _ in lines["jaxmask"]]
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label}: lower is better")
    ax.set_xticks(ticks, [f"{length // 1024}k" for length in ticks])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(color=INK, alpha=0.15)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    (HERE / "attention.svg").write_text(page(), encoding="utf-8")
