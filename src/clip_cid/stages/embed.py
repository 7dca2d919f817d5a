"""Teacher embeddings of every pair, computed once (paper sections 3.1 to 3.3)."""

import collections
import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_cid import engine, log, os_errors, units
from clip_cid.data.embeddings.files import PROGRESS_FILE, STORE_FILE, StoreInfo, StoreShard, read_info
from clip_cid.data.embeddings.finished_shards import FinishedShards, read_shards, views_in
from clip_cid.data.embeddings.from_pairs import (
    check_bad_share,
    check_known_bad,
    embed_pairs,
    shards_to_embed,
    warn_of,
)
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.lone_shards import (
    LoneShard,
    embed_lone_shard,
    lone_shard,
    lone_stores,
    read_lone_shard,
    remember_contents,
)
from clip_cid.data.embeddings.rows_of_pairs import rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import StoreWriter
from clip_cid.data.pairs.contents import keep_contents, shard_contents
from clip_cid.data.pairs.crops import Views, views_of
from clip_cid.data.pairs.pair import reason_kind
from clip_cid.data.pairs.pairs import Pairs, open_indexing, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.errors import DataError, RunError
from clip_cid.models.device import hardware_of
from clip_cid.recipe import Recipe
from clip_cid.run_folder import WORK, RunFolder, remove_folder
from clip_cid.stage_names import EMBED
from clip_cid.summaries import EmbedSummary

if TYPE_CHECKING:
    from clip_cid.models.teacher import Teacher

_SOURCES_A_TASK = 16
_LONE_SHARDS = f"{WORK}/shards"
"""In the work folder: what a cluster has embedded."""


def run(folder: RunFolder, out: Path, recipe: Recipe) -> EmbedSummary:
    """Write the embedding store, or (`embed.existing`) take over one made elsewhere."""
    if recipe.embed.existing is not None:
        return _take_over(recipe.embed.existing, folder, out, recipe)

    from clip_cid.models.teacher import load_teacher  # with open_clip, which an import does not need

    pairs = _open_pairs(folder, recipe)
    teacher = load_teacher(recipe.embed, device=recipe.machine.device)
    writer, finished = _begin(folder, out, recipe, pairs, teacher)
    if writer.views is not None:
        log.info(f"embed     views {writer.views}, of each image")
    log.info(
        f"embed     teacher {teacher.identity['reference']}: {teacher.dim} dimensions, {teacher.identity['precision']}"
    )

    started = time.monotonic()
    with _room_on_disk(out, writer, pairs, dim=teacher.dim):
        check_known_bad(pairs, writer, recipe.pairs)
        folder.accept()
        embedded = 0
        if recipe.machine.ray is not None:
            embedded = _embed_on_cluster(folder, out, recipe, pairs, teacher, writer, finished)
            finished = _finished(folder, out, writer)
        embedded += embed_pairs(
            pairs,
            teacher,
            writer,
            finished,
            folder.digests,
            recipe.pairs,
            recipe.machine,
            made_on=hardware_of(teacher.device),
        )
        writer.finish()
    _say_of_hardware(writer)
    _say_of_before(folder, writer)

    rate = embedded / max(time.monotonic() - started, 1e-9)
    reasons = collections.Counter(reason_kind(entry["reason"]) for entry in writer.skipped)
    return _summary(EmbeddingStore.open(out), dict(reasons.most_common()), images_per_s=round(rate, 1))


def _begin(
    folder: RunFolder, out: Path, recipe: Recipe, pairs: Pairs, teacher: "Teacher"
) -> tuple[StoreWriter, FinishedShards]:
    """The store to write, with the shards that are finished, and what earlier stores hold.

    A killed attempt is resumed if its shards are those the pairs begin with. If not, since pairs were added in front,
    mended or damaged on disk, its store is moved aside and its shards are taken over from there.
    """

    def store() -> StoreWriter:
        return StoreWriter(
            out,
            teacher=teacher.identity,
            dim=teacher.dim,
            fields=recipe.pairs.keep_fields,
            num_shards=len(pairs.shards),
            views=views_of(recipe.embed),
        )

    if not _fields_are(out, recipe.pairs.keep_fields):
        folder.begin_again(EMBED)
    remember_contents(out / _LONE_SHARDS, pairs, folder.digests)
    writer = store()
    numbers = range(min(len(writer.shards), len(pairs.shards)))
    contents = [shard_contents(pairs, number, folder.digests).rows for number in numbers]
    if writer.whole_shards(contents) < len(writer.shards):
        aside = folder.begin_again(EMBED)
        log.warn(
            f"embed: {len(writer.shards):,} finished shards are of other pairs or damaged; they are kept in {aside}"
        )
        writer = store()

    return writer, _finished(folder, out, writer)


def _finished(folder: RunFolder, out: Path, writer: StoreWriter) -> FinishedShards:
    """What earlier stores hold, and what a cluster has embedded for this one."""
    return FinishedShards([*_earlier(folder), *lone_stores(out / _LONE_SHARDS)], writer.made_from)


def _earlier(folder: RunFolder) -> list[Path]:
    return [] if folder.forgets(EMBED) else [folder.path / EMBED, *folder.asides(EMBED)]


def _embed_on_cluster(
    folder: RunFolder,
    out: Path,
    recipe: Recipe,
    pairs: Pairs,
    teacher: "Teacher",
    writer: StoreWriter,
    finished: FinishedShards,
) -> int:
    """Have a cluster embed every shard that no store holds; returns their rows. The store takes them over afterwards."""
    lone = out / _LONE_SHARDS
    lone.mkdir(parents=True, exist_ok=True)
    has_earlier = any((store / name).is_file() for store in _earlier(folder) for name in (STORE_FILE, PROGRESS_FILE))
    numbers = shards_to_embed(pairs, len(writer.shards), finished, folder.digests, read=has_earlier)
    todo = [lone_shard(lone, pairs, number) for number in numbers]
    for damaged in {task.store for task in todo} & {*lone_stores(lone)}:
        remove_folder(damaged)

    bad, remarks = list[dict[str, Any]](), collections.Counter[str]()
    rows = sum(pairs.shards[number].rows for number in numbers)
    with log.progress("embed", len(pairs), unit="images", start=len(pairs) - rows) as bar:

        def on_done(task: LoneShard) -> None:
            shard = read_lone_shard(task, pairs)
            keep_contents(pairs, task.number, shard.contents, folder.digests)
            bad.extend(shard.skipped)
            remarks.update(shard.remarks)
            check_bad_share(writer, bad, len(pairs), recipe.pairs)
            bar.advance(pairs.shards[task.number].rows)

        engine.run_tasks(
            todo,
            functools.partial(_open_task, folder.index, recipe, teacher.device.type, writer.views),
            machine=recipe.machine,
            folder=lone,
            processes=1,
            on_done=on_done,
            leaves=lambda task: task.store,
            gpus=1 if teacher.device.type == "cuda" else 0,
        )
    warn_of(remarks)
    return rows


def _open_task(index: Path, recipe: Recipe, device: str, views: Views | None) -> Callable[[LoneShard], None]:
    """Open what the tasks read; in each process once."""
    from clip_cid.models.teacher import load_teacher

    teacher = load_teacher(recipe.embed, device=device)
    return functools.partial(
        embed_lone_shard,
        pairs=open_pairs(recipe.pairs, index=index, cache_dir=recipe.machine.cache_dir),
        encoder=teacher,
        identity=teacher.identity,
        views=views,
        settings=recipe.pairs,
        machine=recipe.machine,
        made_on=hardware_of(teacher.device),
    )


def _say_of_hardware(writer: StoreWriter) -> None:
    """Warn of a store that several kinds of hardware have made."""
    rows = collections.Counter[str]()
    for shard in writer.shards:
        if shard.made_on is not None:
            rows[shard.made_on] += shard.rows
    if len(rows) > 1:
        kinds = ", ".join(f"{name} ({count:,} images)" for name, count in rows.most_common())
        log.warn(f"embed: made on {kinds}; the embeddings of one image may differ in their last bits between them")


def _fields_are(out: Path, fields: tuple[str, ...]) -> bool:
    """Whether unfinished work keeps these fields, too; a record that cannot be read is not our concern here."""
    try:
        held = read_shards(out)
    except DataError:
        return True
    return held is None or held[0].get("fields") == list(fields)


def _say_of_import(folder: RunFolder, out: Path) -> None:
    """Whether the store is the present one, taken over from another place or with other files beside it."""
    if not folder.has(EMBED):
        return
    try:
        before, now = (_without_places(read_info(store)) for store in (folder.path / EMBED, out))
    except DataError:
        return
    folder.say_of_before(EMBED, same=before == now, all_of_it=before == now)


def _without_places(info: StoreInfo) -> tuple[StoreInfo, list[tuple[Any, ...]]]:
    """The facts of a store, and of each shard its rows and the digests of its files."""
    shards = [
        (shard.rows, shard.ok, shard.more, sorted((kind, file.sha256) for kind, file in shard.files.items()))
        for shard in info.shards
    ]
    return dataclasses.replace(info, shards=(), root=None, teacher={}), shards


def _say_of_before(folder: RunFolder, writer: StoreWriter) -> None:
    """How the new store stands to the present one: the same embeddings in the same order, or all of them and more."""
    if not folder.has(EMBED) or folder.forgets(EMBED):
        return
    try:
        held = read_shards(folder.path / EMBED)
    except DataError:
        return
    before, views = ([], None) if held is None else (held[1], views_in(held[0]))

    # The training compares the settings of the views by itself, so other views change nothing for the stages between.
    with_views = views == writer.views
    same = [_arrays(shard, with_views) for shard in before] == [_arrays(shard, with_views) for shard in writer.shards]
    known = all(shard.contents is not None for shard in before)
    held_all = {_arrays(shard, with_views) for shard in before} <= {
        _arrays(shard, with_views) for shard in writer.shards
    }
    folder.say_of_before(
        EMBED, same=known and same, all_of_it=known and held_all and (with_views or _more(views, writer.views))
    )


def _more(before: Views | None, now: Views | None) -> bool:
    """Whether the views of before are among those of now."""
    if before is None or now is None:
        return before is None
    return dataclasses.replace(before, count=now.count) == now and before.count <= now.count


def _arrays(shard: StoreShard, with_views: bool) -> tuple[str | None, tuple[str, ...]]:
    """The contents of a shard, and the digests of its embeddings."""
    left_out = {"metadata"} if with_views else {"metadata", "view"}
    return shard.contents, tuple(file.sha256 for kind, file in sorted(shard.files.items()) if kind not in left_out)


def _take_over(existing: Path, folder: RunFolder, out: Path, recipe: Recipe) -> EmbedSummary:
    embed = recipe.embed
    pairs = _open_pairs(folder, recipe) if recipe.pairs.source else None
    import_existing(
        existing,
        out,
        normalize=embed.normalize,
        max_bad_share=embed.max_bad_share,
        views=views_of(embed),
        order_of=pairs if embed.match == "order" else None,
    )
    _say_of_import(folder, out)
    store = EmbeddingStore.open(out)
    if pairs is not None:
        rows = rows_in_store(pairs, store, max_absent_share=recipe.pairs.max_bad_share)
        log.info(f"embed     {(rows >= 0).sum():,} of {len(pairs):,} pairs have an embedding in {existing}")
    return _summary(store, {"not embedded": store.rows - int(store.ok.sum())}, images_per_s=None)


def _summary(store: EmbeddingStore, skipped: dict[str, int], *, images_per_s: float | None) -> EmbedSummary:
    return EmbedSummary(
        images=store.rows,
        ok=int(store.ok.sum()),
        dim=store.dim,
        teacher=store.info.teacher["reference"],
        bytes=sum(file.bytes for shard in store.info.shards for file in shard.files.values()),
        skipped=skipped,
        images_per_s=images_per_s,
        views=store.info.views.count if store.info.views is not None else None,
        without_caption=sum(shard.without_text for shard in store.info.shards) or None,
    )


def _open_pairs(folder: RunFolder, recipe: Recipe) -> Pairs:
    if recipe.machine.ray is not None:
        _index_on_cluster(folder, recipe)
    return open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)


def _index_on_cluster(folder: RunFolder, recipe: Recipe) -> None:
    """Have a cluster index the sources, some a task; those that are indexed already take it no time."""
    count = len(find_sources(recipe.pairs))
    some = [range(first, min(first + _SOURCES_A_TASK, count)) for first in range(0, count, _SOURCES_A_TASK)]
    folder.index.mkdir(parents=True, exist_ok=True)
    with log.progress("index", count, unit="shards") as bar:
        engine.run_tasks(
            some,
            functools.partial(
                open_indexing, recipe.pairs, index=folder.index.absolute(), cache_dir=recipe.machine.cache_dir
            ),
            machine=recipe.machine,
            folder=folder.index,
            processes=1,
            on_done=lambda numbers: bar.advance(len(numbers)),
        )


@contextlib.contextmanager
def _room_on_disk(out: Path, writer: StoreWriter, pairs: Pairs, *, dim: int) -> Iterator[None]:
    """Refuse to start if the disk has no room for the rest of the store; say what is kept if writing fails later."""

    def needed() -> int:
        each = 2 + (writer.views.count if writer.views is not None else 0)  # image, first caption, views
        return (len(pairs) - writer.rows) * dim * each * 2  # float16

    free = shutil.disk_usage(out).free
    if free < needed():
        views = f", {writer.views.count:,} views of each image among them" if writer.views is not None else ""
        raise RunError(
            f"{out}: {units.size(needed())} are needed for the embeddings{views}, but {units.size(free)} are free.",
            fix="Free some room, or use a run folder on another disk.",
        )

    def what() -> str:
        done, room = len(writer.shards), units.size(max(needed(), 1_000_000))
        return f" after {done:,} of {len(pairs.shards):,} shards; the others take {room}"

    with os_errors.explained(out, what=what, kept="The finished shards are kept."):
        yield
