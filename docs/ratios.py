"""Draw ``ratios.svg``: the table of attention in ``benchmarks.md``, on one axis.

python docs/ratios.py
"""

import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from svg import INK, LOOK, of_figure

HERE = Path(__file__).parent
WON, LOST = "#4a86dd", "#d9822b"


def rows() -> list[tuple[str, str, float]]:
    """What was done, the peer, and our time relative to it."""
    page = (HERE / "benchmarks.md").read_text(encoding="utf-8")
    table = page.partition("## Attention")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (.+?) \| (.+?) \| ([\d.]+) \| [\d.]+ \|", table, flags=re.MULTILINE)
    return [(what, peer, float(ratio)) for what, peer, ratio in found]


def page() -> str:
    """The picture."""
    bars = rows()[::-1]
    with rc_context(LOOK):
        figure = Figure(figsize=(8.6, 0.34 * len(bars) + 1.0), layout="constrained")
        ax = figure.subplots()
        ratios = [ratio for *_, ratio in bars]
        # A bar begins at 1, where both take the same time.
        ax.barh(
            range(len(bars)),
            [ratio - 1 for ratio in ratios],
            left=1,
            height=0.6,
            color=[WON if ratio < 1 else LOST for ratio in ratios],
        )
        for i, ratio in enumerate(ratios):
            ax.text(
                ratio * (0.95 if ratio < 1 else 1.05), i, f"{ratio:g}", va="center", ha="right" if ratio < 1 else "left"
            )
        ax.axvline(1, color=INK, linewidth=1)
        ax.set(xscale="log", xlim=(0.025, 2.6), ylim=(-0.6, len(bars) - 0.4))
        ax.set_yticks(range(len(bars)), [f"{what}, against {peer}" for what, peer, _ in bars])
        ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
        ax.minorticks_off()
        ax.set_xlabel("our time, the peer's is 1: lower is better")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        return of_figure(figure)


if __name__ == "__main__":
    (HERE / "ratios.svg").write_text(page(), encoding="utf-8")
