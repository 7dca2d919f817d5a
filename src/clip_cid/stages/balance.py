"""Image semantic balance over the stored teacher embeddings (paper section 3.1)."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_cid import log, tasks
from clip_cid.data.balance.array_folder import has_arrays, load_arrays, new_array, save_array, save_arrays
from clip_cid.data.balance.forest_file import FOREST_FILE, read_forest, write_forest
from clip_cid.data.balance.kinds import classify
from clip_cid.data.balance.tables import write_tables
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.balance.forest import Forest, Links, join_links, whole_forest
from clip_cid.method.balance.known_pairs import carry_over, match_rows
from clip_cid.method.balance.near_pairs import Prepared, Task, near_links, prepare, row_hashes
from clip_cid.method.balance.pair_plan import make_plan
from clip_cid.method.balance.semantic_balance import agreement, check_keep, keep_one_of_each, search_limit
from clip_cid.method.balance.set_explanation import chain_summary, explain, giant_warning
from clip_cid.method.codes import Coding
from clip_cid.method.distances import from_squared, threshold_for, threshold_on
from clip_cid.method.unit_rows import UnitRows
from clip_cid.models.device import resolve_device
from clip_cid.recipe import Metric, Recipe
from clip_cid.run_folder import MANIFEST, RunFolder, read_json, sha256_file

_WORK = "work"
_HASHES = "row_hashes"
_LONG = 60.0  # expected seconds from which more processes are worth their start
_WINDOW_SHARE, _LARGEST_WINDOW = 1 / 8, 1 << 30  # of the memory that is left; bytes
_CLASSIFY_SEED = 0


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Keep one image of each set.

    Writes `kept.npy`, `set_of.npy`, `kept.parquet` (the balanced list, by key), `forest.parquet` and `row_hashes.npy` (from
    which other thresholds and later additions are answered), and the tables of sets and members.
    """
    settings = recipe.balance
    store = EmbeddingStore.open(folder.stage("embed"))
    good = np.flatnonzero(store.ok)
    if settings.existing is not None:
        kept = _read_kept(settings.existing, store)
        set_of = np.full(store.rows, -1, dtype=np.int64)
        set_of[kept] = np.arange(len(kept))
        return {**_leave(out, store, good, kept, set_of), "from": str(settings.existing)}
    images = _unit_rows(store, good, "images")
    texts = _unit_rows(store, good, "texts") if store.has_texts else None
    limit, radius = _limits(recipe, images, texts)
    forest = _Forests(folder, out, recipe, store, good, images, limit).forest()
    squared = _squared(recipe, forest)
    chosen, group_of = keep_one_of_each(images, texts, forest.sets(squared), keep=settings.keep, squared_radius=radius)
    write_forest(out / FOREST_FILE, _of_rows(forest, good, store.rows))
    set_of = np.full(store.rows, -1, dtype=np.int64)
    set_of[good] = group_of
    summary = _leave(out, store, good, good[chosen], set_of)
    summary["threshold"] = {metric: threshold_for(squared, metric) for metric in get_args(Metric)}
    log.info("balance   threshold " + ", ".join(f"{name} {value:.5g}" for name, value in summary["threshold"].items()))
    summary |= _explained(folder, out, recipe, store, good, images, (chosen, group_of, forest, squared))
    if settings.truth_field is not None:
        summary |= _against_truth(store, set_of, settings.truth_field)
    shutil.rmtree(out / _WORK, ignore_errors=True)
    return summary


def _unit_rows(store: EmbeddingStore, good: np.ndarray, kind: str) -> UnitRows:
    rows = store.images if kind == "images" else store.texts
    try:
        return UnitRows(_selected(rows, good, store.rows), name=kind, any_length=False)
    except ValueError as error:
        raise DataError(f"{store.path}: {error}", fix="Run the embed stage again, with --force.") from error


def _selected(rows: Any, good: np.ndarray, count: int) -> Any:
    return rows if len(good) == count else rows.select(good)


def _limits(recipe: Recipe, images: UnitRows, texts: UnitRows | None) -> tuple[float, float | None]:
    """The squared distance up to which pairs are looked for, and the squared radius."""
    settings = recipe.balance
    try:
        check_keep(images, texts, settings.keep)
        limit = search_limit(settings.metric, settings.threshold, settings.max_threshold, settings.target_removed)
        if settings.max_radius is None:
            return limit, None
        return limit, threshold_on(settings.metric, settings.max_radius, "squared_euclidean")
    except ValueError as error:
        raise ConfigError(
            f"balance: {error}",
            fix="Give distances on the scale of balance.metric; best_caption needs embeddings of captions.",
        ) from error


def _squared(recipe: Recipe, forest: Forest) -> float:
    settings = recipe.balance
    if settings.target_removed is None:
        return threshold_on(settings.metric, settings.threshold, "squared_euclidean")
    try:
        return forest.squared_for(settings.target_removed)
    except ValueError as error:
        largest = from_squared(forest.limit, settings.metric)
        raise ConfigError(
            f"balance.target_removed: {settings.target_removed:g} of the images, but the {settings.metric} distance"
            f" {largest:g} removes {len(forest.squared) / forest.rows:.4f} of them.",
            fix="Give a larger balance.max_threshold, or a smaller share.",
        ) from error


class _Forests:
    """Makes the forest of the good rows: what an earlier one knows, and the near pairs of the rows that it does not."""

    def __init__(
        self,
        folder: RunFolder,
        out: Path,
        recipe: Recipe,
        store: EmbeddingStore,
        good: np.ndarray,
        images: UnitRows,
        limit: float,
    ) -> None:
        self._folder, self._out, self._work, self._recipe = folder, out, out / _WORK, recipe
        self._store, self._good, self._images, self._limit = store, good, images, limit
        self._seconds = 0.0  # expected of one core

    def forest(self) -> Forest:
        """Also leaves the rows' digests, by which a later run recognizes them."""
        carried, known = self._earlier()
        parts = [carried]
        if not known.all():
            prepared = self._prepared(known)
            self._run(prepared)
            parts += [prepared.identical(), *(self._links(task) for task in prepared.tasks())]
            self._leave_hashes(np.asarray(prepared.hashes))
        return whole_forest(len(self._images), join_links(parts), self._limit)

    def _earlier(self) -> tuple[Links, np.ndarray]:
        """Links that hold, and the rows whose pairs with each other are known: of the earlier run that knows most."""
        images = self._images
        best = join_links([]), np.zeros(len(images), dtype=bool)
        named, own = self._recipe.balance.grow_from, self._folder.earlier("balance")
        sources = [named] if named is not None else []
        if own is not None and (own / FOREST_FILE).is_file():
            sources.append(own)
        if not sources:
            return best
        hashes = np.concatenate([row_hashes(images.raw(block)) for block in images.blocks(images.cached_rows)])
        for path in sources:
            forest, of_forest = _read_earlier(path)
            found = carry_over(forest, match_rows(of_forest, hashes), len(images), self._limit)
            if found[1].sum() > best[1].sum():
                best = found
        if best[1].any():
            log.info(
                f"balance   known from an earlier run: the pairs among {best[1].sum():,} of {len(images):,} images"
            )
        self._leave_hashes(hashes)
        return best

    def _prepared(self, known: np.ndarray) -> Prepared:
        """As a killed attempt left it, or made now."""
        device = resolve_device(self._recipe.machine.device)
        name = str(device) if device.type == "cuda" else "cpu"  # what other devices lose in a product is not known
        if has_arrays(self._work):
            prepared, _, self._seconds = _load_prepared(self._work)
            if prepared.device == name:
                return prepared
            shutil.rmtree(self._work)
        layout = make_plan(self._images, self._limit, device=name, new_rows=int((~known).sum()))
        log.info(f"balance   plan: {layout.describe()}")
        prepared = prepare(
            self._images,
            self._limit,
            layout,
            new=~known,
            allocate=functools.partial(new_array, self._work),
            window_bytes=int(min(_WINDOW_SHARE * tasks.available_memory(), _LARGEST_WINDOW)),
        )
        self._seconds = layout.estimate.seconds if layout.estimate else 0.0
        _save_prepared(self._work, prepared, self._images.lengths, self._seconds)
        for path in self._work.glob("*_by_row.npy"):
            path.unlink()
        return prepared

    def _run(self, prepared: Prepared) -> None:
        """Do the tasks that no earlier attempt has finished."""
        every = prepared.tasks()
        if not every:  # every new row is identical to one that is known
            return
        todo = [task for task in every if not _links_file(self._work, task).is_file()]
        work = {task: prepared.work(task) for task in every}
        total, rows = sum(work.values()), len(self._images)
        done = total - sum(work[task] for task in todo)
        if len(todo) < len(every):
            log.info(f"balance   {len(every) - len(todo)} of {len(every)} tasks were done before")
        begin = functools.partial(_begin, self._work, self._store.path)
        start = told = int(rows * done / total)
        with log.progress("balance", rows, start=start) as bar:

            def advance(task: Task) -> None:
                nonlocal done, told
                done += work[task]
                now = round(rows * done / total)
                bar.advance(now - told)
                told = now

            tasks.run_tasks(todo, begin, processes=self._processes(prepared), on_done=advance)

    def _processes(self, prepared: Prepared) -> int:
        machine = self._recipe.machine
        if prepared.device != "cpu":
            return 1
        if machine.balance_processes:
            return machine.balance_processes
        return (machine.threads or tasks.available_cores()) if self._seconds > _LONG else 1

    def _links(self, task: Task) -> Links:
        left, right, squared = np.load(_links_file(self._work, task), allow_pickle=False)
        return Links(left.view(np.int64), right.view(np.int64), squared.view(np.float64))

    def _leave_hashes(self, hashes: np.ndarray) -> None:
        of_store = np.zeros((self._store.rows, 2), dtype=np.uint64)
        of_store[self._good] = hashes
        save_array(self._out / f"{_HASHES}.npy", of_store)


def _save_prepared(work: Path, prepared: Prepared, lengths: np.ndarray, seconds: float) -> None:
    values = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    words = {name: value for name, value in values.items() if name not in arrays}
    words["coding"] = dataclasses.asdict(prepared.coding)
    save_arrays(work, arrays | {"lengths": lengths}, words | {"seconds": seconds})


def _load_prepared(work: Path) -> tuple[Prepared, np.ndarray, float]:
    """What the tasks read, the lengths of the rows, and the seconds expected."""
    arrays, words = load_arrays(work)
    lengths, seconds, coding = arrays.pop("lengths"), words.pop("seconds"), Coding(**words.pop("coding"))
    return Prepared(**arrays, **words, coding=coding), lengths, seconds


def _begin(work: Path, store_path: Path) -> Any:
    """What a process needs for the tasks."""
    prepared, lengths, _ = _load_prepared(work)
    store = EmbeddingStore.open(store_path)
    rows = _selected(store.images, np.flatnonzero(store.ok), store.rows)
    images = UnitRows(rows, name="images", any_length=False, lengths=lengths)
    return functools.partial(_do, work, prepared, images)


def _do(work: Path, prepared: Prepared, images: UnitRows, task: Task) -> None:
    left, right, squared = near_links(prepared, images, task)
    save_array(
        _links_file(work, task), np.stack([left.view(np.uint64), right.view(np.uint64), squared.view(np.uint64)])
    )


def _links_file(work: Path, task: Task) -> Path:
    return work / f"links-{task[0]:05d}-{task[1]:05d}.npy"


def _of_rows(forest: Forest, good: np.ndarray, rows: int) -> Forest:
    """The same forest with the store's row numbers, whose order is that of the good rows."""
    return Forest(rows, good[forest.left], good[forest.right], forest.squared, forest.limit)


def _read_earlier(path: Path) -> tuple[Forest, np.ndarray]:
    """A forest and the digests of its rows, numbered over the rows that were good then."""
    record = path / MANIFEST
    written = read_json(record)["files"] if record.is_file() else {}
    for name in (FOREST_FILE, f"{_HASHES}.npy"):
        if name not in written or not (path / name).is_file() or sha256_file(path / name) != written[name]["sha256"]:
            raise DataError(
                f"{path / name}: not there as a finished balance stage wrote it.",
                fix="balance.grow_from is the folder RUN/balance of a finished run.",
            )
    stored = read_forest(path / FOREST_FILE)
    try:
        hashes = np.load(path / f"{_HASHES}.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path / _HASHES}.npy: cannot be read ({error}).", fix="Run that balance again.") from error
    if hashes.dtype != np.uint64 or hashes.shape != (stored.rows, 2):
        raise DataError(
            f"{path}: {_HASHES}.npy is not of the forest's {stored.rows:,} rows.", fix="Run that balance again."
        )
    good = np.flatnonzero(hashes.any(axis=1))
    left, right = np.searchsorted(good, stored.left), np.searchsorted(good, stored.right)
    return Forest(len(good), left, right, stored.squared, stored.limit), hashes[good]


def _leave(out: Path, store: EmbeddingStore, good: np.ndarray, kept: np.ndarray, set_of: np.ndarray) -> dict[str, Any]:
    """Write who is kept, and count."""
    np.save(out / "kept.npy", kept)
    np.save(out / "set_of.npy", set_of)
    sizes = np.bincount(set_of[set_of >= 0], minlength=len(kept))
    keys = store.keys.packed.take(pa.array(kept))
    pq.write_table(pa.table({"key": keys, "row": kept, "set_size": sizes}), out / "kept.parquet")
    return {
        "images": store.rows,
        "ok": len(good),
        "kept": len(kept),
        "removed": len(good) - len(kept),
        "removed_share": 1 - len(kept) / len(good),
        "sets_with_duplicates": int((sizes > 1).sum()),
        "largest_set": int(sizes.max()),
    }


def _explained(
    folder: RunFolder,
    out: Path,
    recipe: Recipe,
    store: EmbeddingStore,
    good: np.ndarray,
    images: UnitRows,
    balanced: tuple[np.ndarray, np.ndarray, Forest, float],
) -> dict[str, Any]:
    """Write the tables of sets and members; what they say in short."""
    settings = recipe.balance
    chosen, group_of, forest, squared = balanced
    threshold = threshold_for(squared, settings.metric)
    with log.progress("explain", len(images) - len(chosen)) as bar:
        found = explain(images, chosen, group_of, forest, squared, on_progress=bar.advance)
    chains = chain_summary(found, rows=len(images), squared=squared, metric=settings.metric)
    if len(chains["distance"]):
        spread = ", ".join(f"{share} {value:.4g}" for share, value in chains["distance"].items())
        log.info(
            f"balance   {settings.metric} distance of removed images to the kept one, by quantile: {spread};"
            f" {100 * chains['beyond_threshold_share']:.2f} % are beyond the threshold"
        )
    if (warning := giant_warning(chains, metric=settings.metric, threshold=threshold)) is not None:
        log.warn(f"balance: {warning}; balance.max_radius bounds that distance")
    found = found.with_rows(good)
    removed, kept_for = found.row[found.removed], found.kept[found.owner][found.removed]
    count = min(settings.classify, len(removed))
    with log.progress("classify", count) as bar:
        kinds = classify(
            folder,
            recipe,
            store.keys,
            removed,
            kept_for,
            images=settings.classify,
            seed=_CLASSIFY_SEED,
            on_progress=bar.advance,
        )
    columns = found.set_columns(settings.metric), found.member_columns(settings.metric)
    number = None if kinds is None else kinds.number
    write_tables(out, store.keys.packed, *columns, metric=settings.metric, threshold=threshold, kinds=number)
    if kinds is None:
        return {"chains": chains}
    shares = kinds.summary()
    log.info(
        f"balance   {shares['drawn']:,} removed images looked at: "
        + ", ".join(
            f"{100 * shares[kind]['share']:.1f} % {kind} ({100 * shares[kind]['low']:.1f} to {100 * shares[kind]['high']:.1f})"
            for kind in ("perceptual", "semantic")
            if shares[kind]["share"] is not None
        )
    )
    return {"chains": chains, "kinds": shares}


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
    groups, _ = store.classes(field)
    named = np.where(groups < 0, -1, set_of)  # a row without a group says nothing about its set
    found = agreement(named, groups)
    if not found.rows:
        log.warn(f"balance.truth_field: no image has {field!r}, so the sets are compared with nothing")
        return {}
    redundant = 1 - len(np.unique(groups[named >= 0])) / found.rows
    truth = {"field": field, "precision": found.precision, "recall": found.recall, "redundant_share": redundant}
    return {"truth": truth}
