"""Image semantic balance over the stored teacher embeddings (paper section 3.1)."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_cid import log
from clip_cid.data.embeddings import EmbeddingStore
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.semantic_balance import agreement, balance, threshold_on
from clip_cid.recipe import Metric, Recipe
from clip_cid.run_folder import RunFolder


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Keep one image of each set; writes `kept.npy`, `set_of.npy` and `kept.parquet` (the balanced list, by key)."""
    settings = recipe.balance
    store = EmbeddingStore.open(folder.stage("embed"))
    good = np.flatnonzero(store.ok)
    set_of = np.full(store.rows, -1, dtype=np.int64)
    if settings.existing is not None:
        kept = _read_kept(settings.existing, store)
        set_of[kept] = np.arange(len(kept))
    else:
        with log.progress("balance", len(good)) as bar:
            result = _balance(store, good, recipe, bar)
        kept = good[result.kept]
        set_of[good] = result.set_of
    np.save(out / "kept.npy", kept)
    np.save(out / "set_of.npy", set_of)
    sizes = np.bincount(set_of[set_of >= 0], minlength=len(kept))
    keys = store.keys.packed.take(pa.array(kept))
    pq.write_table(pa.table({"key": keys, "row": kept, "set_size": sizes}), out / "kept.parquet")
    summary = {
        "images": store.rows,
        "ok": len(good),
        "kept": len(kept),
        "removed": len(good) - len(kept),
        "removed_share": 1 - len(kept) / len(good),
        "sets_with_duplicates": int((sizes > 1).sum()),
        "largest_set": int(sizes.max()),
    }
    if settings.existing is not None:
        return {**summary, "from": str(settings.existing)}
    summary["threshold"] = {
        metric: threshold_on(settings.metric, settings.threshold, metric) for metric in get_args(Metric)
    }
    log.info("balance   threshold " + ", ".join(f"{name} {value:.5g}" for name, value in summary["threshold"].items()))
    if settings.truth_field is not None:
        summary["truth"] = _against_truth(store, set_of, settings.truth_field)
    return summary


def _balance(store: EmbeddingStore, good: np.ndarray, recipe: Recipe, bar: log.Bar) -> Any:
    try:
        return balance(
            store.images.select(good),
            threshold=recipe.balance.threshold,
            metric=recipe.balance.metric,
            text_embeddings=store.texts.select(good),
            block_rows=recipe.machine.distance_block,
            on_progress=bar.advance,
        )
    except ValueError as error:
        if "threshold" not in str(error):
            raise DataError(f"{store.path}: {error}", fix="Run the embed stage again, with --force.") from error
        raise ConfigError(
            f"balance.threshold: {error}", fix="Give a distance on the scale of balance.metric."
        ) from error


def _read_kept(path: Path, store: EmbeddingStore) -> np.ndarray:
    """Kept rows made elsewhere: sorted, without repeats, and each a good row of this store."""
    fix = "It must be a .npy of sorted, different row numbers of the embedding store."
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array ({error}).", fix=fix) from error
    if kept.ndim != 1 or kept.dtype.kind not in "iu" or len(kept) == 0:
        raise DataError(f"{path}: holds {kept.dtype} of shape {kept.shape}, not row numbers.", fix=fix)
    kept = kept.astype(np.int64)
    if (np.diff(kept) <= 0).any():
        raise DataError(f"{path}: row numbers are not sorted and different.", fix=fix)
    if kept[0] < 0 or kept[-1] >= store.rows:
        raise DataError(f"{path}: row {kept[0]:,} or {kept[-1]:,} is outside the store's {store.rows:,} rows.", fix=fix)
    if not store.ok[kept].all():
        bad = kept[~store.ok[kept]]
        raise DataError(f"{path}: {len(bad):,} rows have no embedding, the first is row {bad[0]:,}.", fix=fix)
    return kept


def _against_truth(store: EmbeddingStore, set_of: np.ndarray, field: str) -> dict[str, Any]:
    """Precision and recall of the pairs in one set, against the groups that the data itself names."""
    truth = np.asarray(store.field(field))
    named = np.where(truth == "", -1, set_of)  # a row without a group says nothing about its set
    found = agreement(named, truth)
    redundant = 1 - len(np.unique(truth[named >= 0])) / max(found.rows, 1)
    return {"field": field, "precision": found.precision, "recall": found.recall, "redundant_share": redundant}
