"""The removed share at other thresholds, from the balance's spanning forest; it reads no embedding."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from clip_cid import log, units
from clip_cid.data.balance.forest_file import FOREST_FILE, read_forest
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.errors import RunError
from clip_cid.figures import removed_share
from clip_cid.method.balance.forest import Forest
from clip_cid.method.distances import from_squared, to_squared
from clip_cid.new_folder import drop_left
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE

_FOLDER = "sweep"
_STEPS = 15
_METRICS = ("cosine", "squared_euclidean", "euclidean")


def sweep(folder: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table of thresholds; also writes `sweep/removed_share.svg` and `.csv` into the run.

    Raises:
        RunError: The balance stage has not run, or only took over rows kept elsewhere.
    """
    balance = folder.stage(BALANCE)
    record = folder.record(BALANCE)
    if record is None or not BalanceTables.exist(balance):
        raise RunError(
            f"{balance}: its kept rows were made elsewhere, so other thresholds are not known.",
            fix="Run the balance stage on the embeddings, without balance.existing.",
        )
    tables, stored = BalanceTables(balance), read_forest(balance / FOREST_FILE)
    images = int(record.summary["ok"])
    out = folder.path / _FOLDER
    out.mkdir(exist_ok=True)
    for name in ("removed_share.svg", "removed_share.csv"):
        drop_left(out / name)
    removed_share.draw(stored._replace(rows=images), threshold=tables.threshold, metric=tables.metric, out=out)
    log.info(f"balance   the curve is drawn in {out / 'removed_share.svg'}")
    forest, limit = Forest(*stored), _on_metric(stored.limit, tables.metric)
    ticks = np.round(MaxNLocator(nbins=_STEPS, steps=[1, 2, 2.5, 5, 10]).tick_values(0, limit), 12)
    steps = np.union1d(ticks[(ticks > 0) & (ticks < limit)], [tables.threshold, limit])
    columns = ["", *(name.replace("_", " ") for name in _METRICS), "removed", "share", "largest set"]
    return columns, [_line(forest, images, step, tables) for step in steps.tolist()]


def _line(forest: Forest, images: int, threshold: float, tables: BalanceTables) -> list[str]:
    squared = min(float(to_squared(np.array([threshold]), tables.metric)[0]), forest.limit)
    removed = forest.links(squared)
    largest = int(np.bincount(forest.sets(squared)).max())
    scales = [f"{_on_metric(squared, metric):.5g}" for metric in _METRICS]
    mark = "->" if threshold == tables.threshold else ""
    return [mark, *scales, f"{removed:,}", units.percent(removed / images, 2), f"{largest:,}"]


def _on_metric(squared: float, metric: str) -> float:
    return float(from_squared(np.array([squared]), metric)[0])
