"""Fig. 4: how the weights of the last block's last layer are distributed."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import NullLocator

from clip_cid.figures import style

_BINS = 121
_NEAR_ZERO = 1e-3
_LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.weight")


def last_layer(names: Iterable[str]) -> str | None:
    """The parameter drawn: `mlp.c_proj` of the image tower's last block; None for a tower without one."""
    blocks = {int(match[1]): name for name in names if (match := _LAYER.fullmatch(name))}
    return blocks[max(blocks)] if blocks else None


def describe(weights: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Spread, tails (excess kurtosis: 0 for a normal distribution) and the share of weights near zero."""
    centered = weights - weights.mean()
    variance = float((centered**2).mean())
    if variance == 0:
        raise ValueError(f"weights: all {len(weights):,} are equal to {weights[0]}")
    return {
        "std": variance**0.5,
        "excess_kurtosis": float((centered**4).mean()) / variance**2 - 3,
        "near_zero_share": float((np.abs(weights) < _NEAR_ZERO).mean()),
    }


def draw(models: Mapping[str, Float[np.ndarray, " n"]], out: Path) -> dict[str, dict[str, float]]:
    """Write `weights.svg` and `.csv`: density of each model's weights in the same bins, on a logarithmic axis."""
    limit = max(float(np.abs(values).max()) for values in models.values())
    edges = np.linspace(-limit, limit, _BINS + 1)
    densities = {name: np.histogram(values, edges, density=True)[0] for name, values in models.items()}
    columns = {"from": edges[:-1].tolist(), "to": edges[1:].tolist()}
    style.write_csv(out / "weights.csv", columns | {name: d.tolist() for name, d in densities.items()})
    colors = style.model_colors(list(models))
    with style.new_figure(3.2) as figure:
        axes = figure.add_subplot()
        axes.set(yscale="log", xlabel="weight", ylabel="density")
        for name, density in densities.items():
            axes.stairs(np.where(density > 0, density, np.nan), edges, color=colors[name], label=name, linewidth=1.4)
        lowest = min(density[density > 0].min() for density in densities.values())
        axes.set_ylim(bottom=min(lowest, max(density.max() for density in densities.values()) / 100) / 1.5)
        axes.yaxis.set_major_formatter(style.plain_ticks())
        axes.yaxis.set_minor_locator(NullLocator())
        if len(models) > 1:
            figure.legend(loc="outside upper left", ncols=len(models))
        style.save_svg(figure, out / "weights.svg")
    return {name: describe(values) for name, values in models.items()}
