"""The table and the figure of `balance_speed.py`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from balance_methods import METHODS, Method


def table(results: dict[str, Any]) -> str:
    """Medians, with the lowest and the highest in brackets; times against FAISS are medians of the ratios within a round."""
    about, runs = results["machine"], results["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    loads = [run["load_before"] for run in runs if "load_before" in run]
    text = [
        f"{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, one thread; commit {about['commit']};"
        f" Python {about['python']}, {versions}. Cosine distance {results['options']['threshold']:g}, best read with"
        f" the load in mind: {min(loads, default=0):.1f} to {max(loads, default=0):.1f} when runs began.",
        *(f"Left out: {line}." for line in results["left_out"]),
    ]

    for data in results["data"]:
        place = {key: data[key] for key in ("kind", "rows", "dim")}
        here = [run for run in runs if all(run[key] == value for key, value in place.items())]
        true = next((run["true_pairs"] for run in here if "true_pairs" in run), None)
        text += [
            "",
            f"**{data['kind']}, {data['rows']:,} x {data['dim']}**: mean cosine {data['mean_cosine']:.2f}"
            + (f", {true:,} true pairs." if true is not None else "."),
            "",
            "| method | CPU s | faster than faiss | than numpy | wall s | CPU s with imports | RSS, MiB | anonymous, MiB"
            " | pairs | recall | removed | by its rule | exact | kept |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(
            run["method"] for run in sorted(here, key=lambda run: METHODS.index(run["method"]))
        ):
            text.append(_line(method, [run for run in here if run["method"] == method], here))
    return "\n".join(text) + "\n"


def _line(method: str, runs: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]]) -> str:
    good = [run for run in runs if "cpu_s" in run]
    if not good:
        why = next(run.get("skipped") or run.get("failed") for run in runs)
        return f"| {method} | {why} |" + " |" * 12

    last = good[-1]
    if any(run.get("sets_digest") != last.get("sets_digest") for run in good):
        last = last | {"exact": "varies"}
    exact = {None: "", True: "yes", False: "no"}.get(last.get("exact"), "varies")

    cells = [
        f"{method}" + (f" ({len(runs) - len(good)} of {len(runs)} runs failed)" if len(good) < len(runs) else ""),
        _spread([run["cpu_s"] for run in good]),
        _spread(_ratios("faiss", good, here), "x"),
        _spread(_ratios("numpy", good, here), "x"),
        _spread([run["wall_s"] for run in good]),
        _spread([run["cpu_with_imports_s"] for run in good]),
        f"{statistics.median(run['rss_mib'] for run in good):,.0f}",
        f"{statistics.median(run['anonymous_mib'] for run in good):,.0f}",
        f"{last['pairs']:,}" if "pairs" in last else "",
        f"{last['recall']:.4f}" if "recall" in last else "",
        f"{100 * last['removed']:.2f} %",
        f"{100 * last['removed_by_its_rule']:.2f} %" if "removed_by_its_rule" in last else "",
        exact,
        last.get("kept_digest", ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratios(peer: Method, good: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]]) -> list[float]:
    """How many times the peer's CPU seconds are those of these runs, round by round."""
    seconds = {run["round"]: run["cpu_s"] for run in here if run["method"] == peer and "cpu_s" in run}
    return [seconds[run["round"]] / run["cpu_s"] for run in good if run["round"] in seconds]


def _spread(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return ""
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in _quantiles(values))
    return f"{middle}{unit}" + (f" ({low}..{high})" if len(values) > 1 else "")


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def draw(results: dict[str, Any], out: Path) -> None:
    """One line a method, CPU seconds against rows, and what a quadratic would be; a panel for each kind and width."""
    from clip_cid.figures import style

    lines: dict[tuple[str, int], dict[str, dict[int, list[float]]]] = {}
    for run in results["runs"]:
        if "cpu_s" in run:
            panel = lines.setdefault((run["kind"], run["dim"]), {})
            panel.setdefault(run["method"], {}).setdefault(run["rows"], []).append(run["cpu_s"])
    if not lines:
        return

    points = [
        (kind, dim, method, rows, *_quantiles(panel[method][rows]))
        for (kind, dim), panel in lines.items()
        for method in METHODS
        if method in panel
        for rows in sorted(panel[method])
    ]
    names = ("kind", "dim", "method", "rows", "cpu_s_low", "cpu_s_median", "cpu_s_high")
    style.write_csv(out / "scaling.csv", {name: [point[at] for point in points] for at, name in enumerate(names)})

    colors: dict[str, str] = dict(
        zip(METHODS, (style.VERMILLION, style.ORANGE, style.BLUE, style.GREEN, style.SKY, style.PURPLE), strict=True)
    )
    across = min(2, len(lines))
    down = -(-len(lines) // across)
    with style.new_figure(0.6 + 3.0 * down, width=style.WIDTH * (1 if across == 1 else 1.5)) as figure:
        panels = figure.subplots(down, across, squeeze=False)
        for axes in panels.flat[len(lines) :]:
            axes.set_visible(False)
        for axes, ((kind, dim), panel) in zip(panels.flat, lines.items(), strict=False):
            for method in (method for method in METHODS if method in panel):
                sizes = sorted(panel[method])
                low, middle, high = zip(*(_quantiles(panel[method][rows]) for rows in sizes), strict=True)
                axes.plot(sizes, middle, color=colors[method], marker="o", markersize=3.5, label=method)
                axes.vlines(sizes, low, high, color=colors[method], linewidth=1)

            # What a quadratic would be, from the smallest size on.
            sizes = sorted({rows for method in panel.values() for rows in method})
            steep = panel.get("clip-cid") or panel[next(iter(panel))]
            begin = min(steep)
            rows = np.array([sizes[0], sizes[-1]], dtype=np.float64)
            quadratic = statistics.median(steep[begin]) * (rows / begin) ** 2
            axes.plot(rows, quadratic, color=style.MUTED, linewidth=1, linestyle=":", label="quadratic")

            axes.set(xscale="log", yscale="log", xlabel=f"rows ({kind}, {dim} columns)", ylabel="CPU seconds")
            axes.set_xticks(
                sizes, [f"{size / 1000:,.4g}k" if size < 1_000_000 else f"{size / 1e6:g}M" for size in sizes]
            )
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(style.plain_ticks())
        handles = {
            label: handle
            for axes in panels.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
        style.save_svg(figure, out / "scaling.svg")
