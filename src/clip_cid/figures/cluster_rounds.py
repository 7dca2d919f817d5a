"""The objective of k-means by round."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from clip_cid.figures import style
from clip_cid.summaries import KmeansRound


def draw(history: Sequence[KmeansRound], out: Path) -> dict[str, float]:
    """Write `cluster_rounds.svg`, and `.csv` with the imbalance and the empty clusters of each round beside it."""
    rounds = list(range(1, len(history) + 1))
    columns = {name: [getattr(one, name) for one in history] for name in ("objective", "imbalance", "empty")}
    style.write_csv(out / "cluster_rounds.csv", {"round": rounds, **columns})
    with style.new_figure(2.6) as figure:
        axes = figure.add_subplot()
        axes.set(xlabel="round", ylabel="objective (Eq. 1)")
        axes.plot(rounds, columns["objective"], color=style.BLUE, marker="." if len(rounds) <= 40 else None)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        style.save_svg(figure, out / "cluster_rounds.svg")
    return {"rounds": len(rounds), "first": columns["objective"][0], "last": columns["objective"][-1]}
