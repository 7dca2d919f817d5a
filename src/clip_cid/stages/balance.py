"""Image semantic balance over the stored teacher embeddings (paper section 3.1)."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from jaxtyping import Int

from clip_cid import engine, log, tasks, units
from clip_cid.data.array_folder import ArrayFolder
from clip_cid.data.balance.against_file import NearSet, write_against
from clip_cid.data.balance.captions_file import write_captions
from clip_cid.data.balance.decided_file import write_decided
from clip_cid.data.balance.decisions import read_decisions, rows_named
from clip_cid.data.balance.forest_file import FOREST_FILE, read_earlier, write_forest, write_row_hashes
from clip_cid.data.balance.kept_file import read_kept_elsewhere, write_kept
from clip_cid.data.balance.kinds import Kinds, classify
from clip_cid.data.balance.protected import protected_rows
from clip_cid.data.balance.tables import write_tables
from clip_cid.data.embeddings.files import read_info
from clip_cid.data.embeddings.ok_rows import OkRows
from clip_cid.data.embeddings.row_values import FileSizes, field_numbers, pixels
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.evaluation.near_sets import SetRows, open_sets
from clip_cid.method.balance.chaining import chain_summary, giant_warning
from clip_cid.method.balance.decided_sets import DecidedRows
from clip_cid.method.balance.forest import Forest, ShareOutOfReach
from clip_cid.method.balance.kept_rows import Keep, check_keep
from clip_cid.method.balance.known_pairs import EarlierForest, KnownPairs, known_pairs
from clip_cid.method.balance.near_targets import KeptAndNear, NearTargets, near_targets
from clip_cid.method.balance.pair_agreement import agreement
from clip_cid.method.balance.preferred_rows import Rule
from clip_cid.method.balance.prepared_rows import PreparedRows
from clip_cid.method.balance.row_hashes import all_row_hashes
from clip_cid.method.balance.semantic_balance import Balance, BalanceRule, balance_rows, choose_kept, similarity_warning
from clip_cid.method.balance.set_explanation import Explanation, explain
from clip_cid.method.distances import from_squared, threshold_for
from clip_cid.method.jobs import Job, NotPrepared, Progress
from clip_cid.method.unit_rows import UnitRows
from clip_cid.models.device import resolve_device
from clip_cid.recipe import LARGEST_FILE, OF_FIELD, BalanceConfig, MachineConfig, Metric, Recipe
from clip_cid.run_folder import WORK, RunFolder
from clip_cid.stage_names import BALANCE, EMBED
from clip_cid.summaries import AgainstSet, BalanceSummary, BalanceTruth, Chains

_LONG = 60.0  # expected seconds from which more processes are worth their start
_CLASSIFY_SEED = 0
_FEW_KEPT = 0.1  # of the images; the paper keeps 0.563


def run(folder: RunFolder, out: Path, recipe: Recipe) -> BalanceSummary:
    """Keep one image of each set.

    Writes `kept.npy`, `set_of.npy` and `kept.parquet` (the balanced list, by key); `forest.parquet` and
    `row_hashes.npy`, for other thresholds and later additions; and the tables of sets and members.
    """
    settings = recipe.balance
    store = EmbeddingStore.open(folder.stage(EMBED))
    if settings.existing is not None:
        return _kept_elsewhere(out, store, settings.existing)

    if settings.merge_captions and store.info.captions_column is None:
        raise ConfigError(
            "balance.merge_captions: these embeddings have no captions.",
            fix="Leave it out, or take embeddings with their captions in the metadata.",
        )

    # Balance the rows that have an embedding.
    rows = _rows(store)
    rule = _rule(settings, rows, _keep(folder, recipe, store, rows.stored))
    known = _known(folder, settings, rows.images, rule.limit)
    known, decided = _decided(settings, store, rows, known)
    obeyed = _with_protected(settings, store, rows.stored, decided)
    sets, near = _near_sets(folder, recipe, rows.images, rule)
    folder.accept()
    work = _Work(store.path, out / WORK, recipe.machine)
    rows = work.share(rows)
    balance = _balance(work, recipe, rows, rule, known, obeyed, near)
    if not len(balance.kept):
        raise DataError(
            f"{settings.decisions or 'balance.against'}: every image is removed.",
            fix="Undo some decisions in `clip-cid review`, or give a smaller threshold.",
        )

    # In the store's numbers.
    store.map_keys(work.arrays.path)
    set_of = rows.stored.for_all(balance.set_of, lambda: np.full(store.rows, -1, dtype=np.int64))
    counts = _write_kept(out, store, rows.stored.in_store(balance.kept), set_of)
    _write_forest(out, store.rows, rows.stored, balance, work.arrays)
    if decided is not None:
        _write_decided(out, store, rows.stored, balance, decided)
    against = _write_against(out, store, rows.stored, balance, sets, near) if sets else None

    if (warning := similarity_warning(rule, balance) or _warning_of_few(folder, settings, balance)) is not None:
        log.warn(f"balance: {warning}")
    threshold = {metric: threshold_for(balance.squared_threshold, metric) for metric in get_args(Metric)}
    log.info("balance   threshold " + ", ".join(f"{name} {value:.5g}" for name, value in threshold.items()))

    explanation, chains = _explain(work, rows.images, balance)
    if (good := rows.stored.arrays.get("good")) is not None:
        explanation = explanation.with_rows(good)
    kinds = _kinds(folder, recipe, store, explanation)
    _write_tables(out, store, explanation, balance, kinds)
    if settings.merge_captions:
        _write_captions(out, store, explanation, work.arrays)

    truth = None if settings.truth_field is None else _against_truth(store, set_of, settings.truth_field)
    shares = None if kinds is None else kinds.summary()
    return replace(counts, threshold=threshold, chains=chains, kinds=shares, truth=truth, against=against)


def _warning_of_few(folder: RunFolder, settings: BalanceConfig, balance: Balance) -> str | None:
    """A sentence about a threshold that removes nearly all, as where a teacher's embeddings lie close together."""
    rows, kept = len(balance.set_of), len(balance.kept)
    if settings.target_removed is not None or kept >= _FEW_KEPT * rows:
        return None
    return (
        f"keeps {kept:,} of {rows:,} images: threshold {settings.threshold:g} may be wide for these embeddings, whose"
        f" images may lie close together; `clip-cid balance {folder.path} --sweep` shows what smaller ones remove"
    )


def kept_of_sets(
    folder: RunFolder,
    recipe: Recipe,
    store: EmbeddingStore,
    rows: Int[np.ndarray, " rows"],
    labels: Int[np.ndarray, " rows"],
    decided: DecidedRows | None,
) -> Int[np.ndarray, " rows"]:
    """For each of these rows the one the stage would keep for it, -1 for none.

    Args:
        folder: The run.
        recipe: Says how to choose.
        store: The embeddings.
        rows: Every row of some sets, ascending.
        labels: The set of each.
        decided: By places in `rows`.
    """
    chosen = _rows(store, rows)
    rule = _rule(recipe.balance, chosen, _keep(folder, recipe, store, chosen.stored))
    kept, set_of = choose_kept(chosen.images, chosen.texts, rule, labels, decided)
    return np.where(set_of >= 0, rows[kept[set_of]], -1) if len(kept) else np.full(len(rows), -1)


class _Rows(NamedTuple):
    """Rows of a store."""

    stored: OkRows
    images: UnitRows
    texts: UnitRows | None


def _rows(store: EmbeddingStore, some: Int[np.ndarray, " some"] | None = None) -> _Rows:
    """Some of those with an embedding, or all of them."""
    stored = OkRows.of(store, some)
    try:
        images = UnitRows(stored.images, name="images", any_length=False)
        texts = None if stored.texts is None else UnitRows(stored.texts, name="texts", any_length=False)
    except ValueError as error:
        raise DataError(f"{store.path}: {error}", fix="Run the embed stage again, with --force.") from error
    return _Rows(stored, images, texts)


class _Work:
    """Where the stage works: the arrays that tasks read and leave, and the processes that do them."""

    def __init__(self, store_path: Path, path: Path, machine: MachineConfig) -> None:
        self.arrays = ArrayFolder(path)
        self._rows, self._store_path, self._machine = ArrayFolder(path / "rows"), store_path, machine

    def share(self, rows: _Rows) -> _Rows:
        """The same rows for every process: what was read of metadata and measured is mapped from the disk."""
        lengths = {"image_lengths": rows.images.lengths}
        if rows.texts is not None:
            lengths["text_lengths"] = rows.texts.lengths
        self._rows.save_all({**rows.stored.arrays, **lengths}, {})
        return _shared_rows(self._store_path, self._rows)

    def run_job(self, job: Job, missing: Sequence[Any]) -> None:
        """Do what is missing of a job: a `clip_cid.method.jobs.RunJob`."""
        if done := len(job.tasks) - len(missing):
            log.info(f"{job.title:<9} {done:,} of {len(job.tasks):,} tasks were done before")
        progress = Progress(job, missing)
        with log.progress(job.title, job.rows, start=progress.rows) as bar:
            engine.run_tasks(
                missing,
                functools.partial(_open_job, job, self.arrays, self._store_path, self._rows),
                machine=self._machine,
                folder=self.arrays.path,
                processes=self._processes(job),
                leaves=lambda task: self.arrays.file(job.array(task)),
                gpus=0 if job.device == "cpu" else 1,
                on_done=lambda task: bar.advance(progress.finish(task)),
            )

    def _processes(self, job: Job) -> int:
        if job.device != "cpu":
            return 1
        if self._machine.balance_processes:
            return self._machine.balance_processes
        return (self._machine.threads or tasks.available_cores()) if job.seconds > _LONG else 1


def _open_job(job: Job, arrays: ArrayFolder, store_path: Path, shared: ArrayFolder) -> Callable[[Any], None]:
    """Open what the tasks read; in each process once."""
    rows = _shared_rows(store_path, shared)
    try:
        return job.open(arrays, rows.images, rows.texts)
    except NotPrepared as error:
        raise _unreadable(arrays.path) from error


def _shared_rows(store_path: Path, shared: ArrayFolder) -> _Rows:
    if (saved := shared.load_all()) is None:
        raise _unreadable(shared.path)
    arrays, _ = saved
    stored = OkRows(EmbeddingStore(store_path, read_info(store_path)), arrays)
    images = UnitRows(stored.images, name="images", any_length=False, lengths=arrays["image_lengths"])
    if stored.texts is None:
        return _Rows(stored, images, None)
    texts = UnitRows(stored.texts, name="texts", any_length=False, lengths=arrays["text_lengths"])
    return _Rows(stored, images, texts)


def _unreadable(path: Path) -> RunError:
    return RunError(
        f"{path}: what was prepared for the tasks cannot be read any more.",
        fix="Check the disk, then run the same command again; what is missing is done again.",
    )


def _kept_elsewhere(out: Path, store: EmbeddingStore, path: Path) -> BalanceSummary:
    kept = read_kept_elsewhere(path, store.ok)
    set_of = np.full(store.rows, -1, dtype=np.int64)
    set_of[kept] = np.arange(len(kept))
    return replace(_write_kept(out, store, kept, set_of), from_=str(path))


def _rule(settings: BalanceConfig, rows: _Rows, keep: Keep | tuple[Rule, ...]) -> BalanceRule:
    try:
        for rule in keep if isinstance(keep, tuple) else (keep,):
            check_keep(rows.images, rows.texts, "nearest_centroid" if callable(rule) else rule)
        return BalanceRule(
            threshold=settings.threshold,
            metric=settings.metric,
            max_threshold=settings.max_threshold,
            target_removed=settings.target_removed,
            keep=keep,
            max_radius=settings.max_radius,
        )
    except ValueError as error:
        raise ConfigError(
            f"balance: {error}",
            fix="Give distances on the scale of balance.metric; best_caption needs embeddings of captions.",
        ) from error


def _keep(folder: RunFolder, recipe: Recipe, store: EmbeddingStore, stored: OkRows) -> Keep | tuple[Rule, ...]:
    """The rule that chooses the kept image, or several in their order; rows are numbered as those with an embedding."""

    def rule(name: str) -> Rule:
        if name in get_args(Keep):
            return cast(Keep, name)
        if name == LARGEST_FILE:
            pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)
            return FileSizes(store, pairs, stored.in_store(np.arange(len(stored))))
        field = name.removeprefix(OF_FIELD)
        values = pixels(store) if field == name else field_numbers(store, field)
        return values[stored.in_store(np.arange(len(stored)))].__getitem__

    names = recipe.balance.keep
    if len(names) == 1 and names[0] in get_args(Keep):
        return cast(Keep, names[0])
    rules: tuple[Rule, ...] = tuple(rule(name) for name in names)
    return rules


def _known(folder: RunFolder, settings: BalanceConfig, images: UnitRows, limit: float) -> KnownPairs:
    """Known pairs from the run named by `grow_from`, or from the present results of this run."""
    own = folder.earlier(BALANCE)
    folders = [] if settings.grow_from is None else [settings.grow_from]
    if own is not None and (own / FOREST_FILE).is_file():
        folders.append(own)

    earlier = [EarlierForest(Forest(*forest), hashes) for forest, hashes in map(read_earlier, folders)]
    known = known_pairs(images, earlier, limit)
    if known.rows.any():
        log.info(f"balance   an earlier run knows the pairs among {known.rows.sum():,} of {len(images):,} images")
    return known


def _decided(
    settings: BalanceConfig, store: EmbeddingStore, rows: _Rows, known: KnownPairs
) -> tuple[KnownPairs, DecidedRows | None]:
    """What a person has decided about the rows; the digests that find them serve the comparison, too.

    Raises:
        DataError: The file is no list of decisions, or none of them is about these images.
    """
    decisions = None if settings.decisions is None else read_decisions(settings.decisions)
    if not decisions:
        return known, None

    hashes = all_row_hashes(rows.images) if known.hashes is None else known.hashes
    named = rows_named(decisions, hashes, lambda row: store.keys[int(rows.stored.in_store(np.array([row]))[0])])
    of = len({*decisions.keep, *decisions.remove, *(image for pair in decisions.apart for image in pair)})
    if len(named.gone) == of:
        raise DataError(
            f"{settings.decisions}: none of the {units.counted(of, 'image')} it decides about is here, by its embedding.",
            fix="Give the decisions that were made on these embeddings; those of another teacher cannot be used.",
        )
    if named.gone:
        log.warn(
            f"balance.decisions: of {units.counted(of, 'image')} decided about, {len(named.gone):,} not found here, such as"
            f" {named.gone[0].key!r}; decisions hold for the others"
        )
    log.info(
        f"balance   decisions of {settings.decisions}: {units.counted(len(named.apart), 'pair')} apart,"
        f" {len(named.keep):,} to keep, {len(named.remove):,} to remove"
    )
    return replace(known, hashes=hashes), DecidedRows(named.apart, named.keep, named.remove)


def _with_protected(
    settings: BalanceConfig, store: EmbeddingStore, stored: OkRows, decided: DecidedRows | None
) -> DecidedRows | None:
    """The decisions, with the images of `balance.protect` to be kept.

    Raises:
        DataError: An entry names no image, or a person has decided to remove one of them.
    """
    if not settings.protect:
        return decided
    shards = [(shard.name, shard.rows) for shard in store.info.shards]
    named = protected_rows(settings.protected_sources, settings.protected_lists, shards, store.keys.packed)
    protected = stored.places(named)
    decided = decided or DecidedRows()
    if len(both := np.intersect1d(protected, decided.remove)):
        raise DataError(
            f"balance.protect and {settings.decisions}: the one keeps and the other removes"
            f" {units.counted(len(both), 'image')}, such as {store.keys[int(stored.in_store(both)[0])]!r}.",
            fix="Undo that decision in `clip-cid review`, or leave them out of balance.protect.",
        )
    log.info(f"balance   {units.counted(len(protected), 'image')} protected by balance.protect")
    return replace(decided, keep=np.union1d(decided.keep, protected))


def _near_sets(
    folder: RunFolder, recipe: Recipe, images: UnitRows, rule: BalanceRule
) -> tuple[list[SetRows], list[NearTargets]]:
    """The sets of `balance.against`, and the images near each, as far as any threshold of the rule."""
    device = resolve_device(recipe.machine.device)
    sets = open_sets(
        recipe.balance.against, recipe, dim=images.dim, encoder=functools.partial(_teacher_encoder, folder, recipe)
    )
    near: list[NearTargets] = []
    for one in sets:
        with log.progress(f"against {one.name}", len(images)) as bar:
            comparing = str(device) if device.type == "cuda" else "cpu"
            near.append(near_targets(images, one.rows, rule.limit, device=comparing, on_progress=bar.advance))
    return sets, near


def _teacher_encoder(folder: RunFolder, recipe: Recipe) -> Any:
    """The teacher, whose features of evaluation sets are kept beside the index of the run."""
    from clip_cid.evaluation.features import Encoder  # open_clip, which a balance of stored embeddings does without
    from clip_cid.models.loading import load_clip
    from clip_cid.models.teacher import teacher_reference

    device = resolve_device(recipe.machine.device)
    return Encoder(
        "teacher",
        load_clip(teacher_reference(recipe.embed), device=str(device)),
        folder.index / "against",
        device=device,
        batch_size=recipe.machine.embed_batch,
        workers=recipe.machine.workers,
    )


def _write_against(
    out: Path,
    store: EmbeddingStore,
    stored: OkRows,
    balance: Balance,
    sets: Sequence[SetRows],
    near: Sequence[NearTargets],
) -> list[AgainstSet]:
    """List the images that were removed for an evaluation set, each with the nearest image there."""
    listed = [
        NearSet(
            one.name,
            stored.in_store(found.rows),
            [one.names(row) for row in found.target.tolist()],
            from_squared(found.squared, balance.metric),
        )
        for one, found in zip(sets, (own.within(balance.squared_threshold) for own in near), strict=True)
    ]
    write_against(out, store.keys.packed, listed, metric=balance.metric)
    compared = [
        AgainstSet(name=one.name, images=len(one.rows), unreadable=one.unreadable, near=len(found.rows))
        for one, found in zip(sets, listed, strict=True)
    ]
    for one in compared:
        log.info(
            f"balance   {one.name}: {units.counted(one.near, 'image')} within the threshold of one of its {one.images:,}"
        )
    return compared


def _balance(
    work: _Work,
    recipe: Recipe,
    rows: _Rows,
    rule: BalanceRule,
    known: KnownPairs,
    decided: DecidedRows | None,
    near: Sequence[NearTargets],
) -> Balance:
    """Balance with arrays on the disk and tasks in processes; an interrupted stage repeats none of them."""
    if work.arrays.has_facts and not (work.arrays.is_whole() and PreparedRows.load(work.arrays)):
        log.info("balance   what a killed attempt left is incomplete or of another version; its tasks run again")
        work.arrays.clear()

    device = resolve_device(recipe.machine.device)
    try:
        return balance_rows(
            rows.images,
            rows.texts,
            rule,
            device=str(device) if device.type == "cuda" else "cpu",  # the rounding error of other devices is not known
            known=known,
            store=work.arrays,
            decided=decided,
            near=near,
            run_job=work.run_job,
            on_plan=lambda layout: log.info(f"balance   plan: {layout.describe()}"),
        )
    except KeptAndNear as error:
        raise DataError(
            f"balance.against removes {units.counted(len(error.rows), 'image')} that balance.protect or balance.decisions"
            " keeps.",
            fix="Leave them out of what is kept, or leave out that set; both cannot hold.",
        ) from error
    except ShareOutOfReach as error:
        largest = from_squared(rule.limit, rule.metric)
        raise ConfigError(
            f"balance.target_removed: {rule.target_removed:g} of the images, but the {rule.metric} distance {largest:g}"
            f" removes {error.largest:.4f} of them.",
            fix="Give a larger balance.max_threshold, or a smaller share.",
        ) from error


def _write_kept(
    out: Path, store: EmbeddingStore, kept: Int[np.ndarray, " kept"], set_of: Int[np.ndarray, " rows"]
) -> BalanceSummary:
    """Write who is kept, and count."""
    sizes = write_kept(out, store.keys.packed, kept, set_of)
    ok = int(store.ok.sum())
    return BalanceSummary(
        images=store.rows,
        ok=ok,
        kept=len(kept),
        removed=ok - len(kept),
        removed_share=1 - len(kept) / ok,
        sets_with_duplicates=int((sizes > 1).sum()),
        largest_set=int(sizes.max()),
    )


def _write_forest(out: Path, rows: int, stored: OkRows, balance: Balance, work: ArrayFolder) -> None:
    """In the store's numbers, whose order is that of the rows that were balanced."""
    forest = balance.forest
    left, right = stored.in_store(forest.left), stored.in_store(forest.right)
    write_forest(out / FOREST_FILE, Forest(rows, left, right, forest.squared, forest.limit))
    zeros = functools.partial(work.new, "hashes_of_store", (rows, 2), np.dtype(np.uint64))
    write_row_hashes(out, stored.for_all(balance.row_hashes, zeros))


def _write_decided(out: Path, store: EmbeddingStore, stored: OkRows, balance: Balance, decided: DecidedRows) -> None:
    """In the store's numbers."""
    forest, cut = balance.forest, balance.cut
    write_decided(
        out,
        store.keys.packed,
        keep=stored.in_store(decided.keep),
        remove=stored.in_store(decided.remove),
        apart=stored.in_store(decided.apart),
        cut=cut,
        ends=stored.in_store(np.stack([forest.left[cut], forest.right[cut]], axis=1)),
    )


def _explain(work: _Work, images: UnitRows, balance: Balance) -> tuple[Explanation, Chains]:
    """Why each image was removed, and how much chaining there is."""
    squared, metric = balance.squared_threshold, balance.metric
    explanation = explain(
        images, balance.kept, balance.set_of, balance.joined, squared, store=work.arrays, run_job=work.run_job
    )
    chains = chain_summary(explanation, rows=len(images), squared=squared, metric=metric)
    _log_chains(chains, metric, threshold_for(squared, metric))
    return explanation, chains


def _log_chains(chains: Chains, metric: Metric, threshold: float) -> None:
    if chains.distance:
        half, most = chains.distance["0.5"], chains.distance["0.99"]
        log.info(
            f"balance   half of the removed images are within {half:.4g} of the one kept, 99 % within {most:.4g}"
            f" ({metric.replace('_', ' ')}); {units.percent(chains.beyond_threshold_share, 2)} are farther than"
            " the threshold"
        )
    if (warning := giant_warning(chains, metric=metric, threshold=threshold)) is not None:
        log.warn(f"balance: {warning}; balance.max_radius bounds that distance")


def _kinds(folder: RunFolder, recipe: Recipe, store: EmbeddingStore, explanation: Explanation) -> Kinds | None:
    """Perceptual or semantic, of a sample of the removed images."""
    removed = explanation.row[explanation.removed]
    kept_for = explanation.kept[explanation.owner][explanation.removed]
    with log.progress("classify", min(recipe.balance.classify, len(removed))) as bar:
        kinds = classify(
            folder,
            recipe,
            store.keys,
            removed,
            kept_for,
            images=recipe.balance.classify,
            seed=_CLASSIFY_SEED,
            on_progress=bar.advance,
        )
    if kinds is None:
        return None

    shares = kinds.summary()
    log.info(
        f"balance   {shares.drawn:,} removed images compared by their pixels: "
        + ", ".join(
            f"{units.percent(one.share)} {kind} ({units.in_percent(one.low)} to {units.in_percent(one.high)})"
            for kind, one in (("perceptual", shares.perceptual), ("semantic", shares.semantic))
            if one.share is not None
        )
    )
    return kinds


def _write_tables(
    out: Path, store: EmbeddingStore, explanation: Explanation, balance: Balance, kinds: Kinds | None
) -> None:
    metric = balance.metric
    write_tables(
        out,
        store.keys.packed,
        explanation.set_columns(metric),
        explanation.member_columns(metric),
        metric=metric,
        threshold=threshold_for(balance.squared_threshold, metric),
        kinds=None if kinds is None else kinds.number,
    )


def _write_captions(out: Path, store: EmbeddingStore, explanation: Explanation, work: ArrayFolder) -> None:
    """The captions of each set, for its kept image."""
    write_captions(
        out,
        kept=explanation.kept,
        rows=explanation.row,
        owner=explanation.owner,
        keys=store.keys.packed,
        captions=store.mapped_captions(work.path),
    )


def _against_truth(store: EmbeddingStore, set_of: Int[np.ndarray, " rows"], field: str) -> BalanceTruth | None:
    """Precision and recall of the pairs in one set, against the groups that the data names."""
    groups, _ = store.classes(field)
    named = np.where(groups < 0, -1, set_of)  # a row without a group says nothing about its set
    pairs = agreement(named, groups)
    if not pairs.rows:
        log.warn(f"balance.truth_field: no image has {field!r}, so precision and recall are not computed")
        return None
    redundant = 1 - len(np.unique(groups[named >= 0])) / pairs.rows
    return BalanceTruth(field=field, precision=pairs.precision, recall=pairs.recall, redundant_share=redundant)
