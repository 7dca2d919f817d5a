"""The balanced list of a run for use elsewhere: keys and rows, tables, and on request the kept pairs as WebDataset tars.

    keys.txt               a key a line, in the order of the embedding store
    keys.parquet           the same, column `key`
    rows.npy               the row of each in the embedding store, int64, ascending
    captions.parquet       with balance.merge_captions: kept rows with the captions of their whole set
    removed.parquet        the rows that are not kept: why, how far from which kept row
    tables/NAME            of pairs from tables: the kept rows, in the form they came in
    shards/00000.tar ...   the kept pairs in the order of the pairs, their files byte for byte
    manifest.json          what it was made from and a digest of each shard; `finished` says whether all is there

A file appears only when it is whole, and a shard depends only on the list and its number. So after a kill
the shards with the right digests are kept, and the others are written.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int, Int64

from clip_cid import log, os_errors, units
from clip_cid.data.balance.captions_file import CAPTIONS_FILE, read_captions
from clip_cid.data.embeddings.files import write_table
from clip_cid.data.embeddings.rows_of_pairs import rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_array_of_stage, read_npy
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.sample_parts import IMAGE_EXTENSIONS
from clip_cid.data.pairs.sources import find_sources
from clip_cid.data.pairs.tars import METADATA
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.file_digests import digest, sha256_file
from clip_cid.journal import Journal
from clip_cid.method.cluster.even_sample import cap_clusters, clusters_of_clusters, draw_of_clusters, even_shares
from clip_cid.models.public_names import public_name
from clip_cid.publish.removed_rows import CAPPED, REMOVED_TABLE, SHARED, Removed, removed_rows, write_removed
from clip_cid.recipe import PairsConfig, Recipe
from clip_cid.run_folder import RunFolder, atomic_file, write_json
from clip_cid.stage_names import BALANCE, CLUSTER, EMBED

MANIFEST, KEYS_TEXT, KEYS_TABLE, SHARDS = "manifest.json", "keys.txt", "keys.parquet", "shards"
ROWS, TABLES = "rows.npy", "tables"
_FORMAT, _VERSION = "clip-cid subset", 1
_JOURNAL = "finished.jsonl"  # in the folder of the shards, while they are being written
_LINES_AT_ONCE = 100_000
_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"\0\0\0\x0cjP  ": "jp2",
    b"\xff\x4f\xff\x51": "j2k",
}

File = tuple[str, bytes]
"""A member of a tar: name and contents."""
_Samples = Callable[[Int64[np.ndarray, " rows"]], Generator[list[File]]]
"""Gives the files of each of some rows of the pairs."""


@dataclasses.dataclass(frozen=True)
class ClusterDraw:
    """What a list takes of the clusters; everything, as it stands."""

    per_cluster: int | None = None
    """At most so many images of a cluster."""
    total: int | None = None
    """So many images, shared evenly by the clusters."""
    levels: tuple[int, ...] = ()
    """The total is shared by clusters of clusters first: so many at each level, the lowest first."""

    @property
    def reads_clusters(self) -> bool:
        return self != ClusterDraw()

    def check(self) -> None:
        """Refuse numbers out of their limits.

        Raises:
            ConfigError: One is.
        """
        for flag, value, what in (
            ("--per-cluster", self.per_cluster, "the most images of a cluster"),
            ("--total", self.total, "the number of images to list"),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{flag}: must be at least 1, got {value:,}.", fix=f"Give {what}.")
        if self.levels and self.total is None:
            raise ConfigError(
                "--levels: there is no total to share among the clusters of clusters.",
                fix="Give --total NUMBER too, or --per-cluster NUMBER alone for the same cap on every cluster.",
            )


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The balanced list, and what is not in it."""

    rows: Int64[np.ndarray, " kept"]
    """Of the embedding store, ascending."""
    keys: pa.LargeStringArray
    identity: dict[str, Any]
    """How many, and digests: what makes it this list and no other."""
    removed: Removed
    store: EmbeddingStore


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which tars there are to be."""

    shard_size: int
    """Pairs in each tar but the last."""
    count: int
    sources: dict[str, Any]
    """Public names of where the pairs are, a digest of the true ones, and one of the contents."""

    @property
    def described(self) -> dict[str, Any]:
        return {"shard_size": self.shard_size, "sources": self.sources}

    @property
    def names(self) -> list[str]:
        number = -(-self.count // self.shard_size)
        digits = max(5, len(str(number - 1)))
        return [f"{SHARDS}/{place:0{digits}d}.tar" for place in range(number)]

    def rows_of(self, shard: int) -> slice:
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))


def export_subset(
    folder: RunFolder, recipe: Recipe, out: Path, *, shard_size: int | None, draw: ClusterDraw = ClusterDraw()
) -> str:
    """Write the kept list of a run and, with `shard_size`, its pairs as tars of that many; finished tars are kept.

    With `draw`, only what it takes of the clusters.

    Returns:
        A line that says what is there now.

    Raises:
        ConfigError: `shard_size` or `draw` is out of its limits, `shard_size` is not what `out` was begun with, or
            there are no pairs to write.
        RunError: The balance stage has not finished, its files changed, or it is older than the embeddings.
        DataError: `out` holds something else, kept keys are not among the pairs, or a pair cannot be read.
    """
    os_errors.refuse_address(out)
    if shard_size is not None and shard_size < 1:
        raise ConfigError(
            f"--shard-size: must be at least 1, got {shard_size}.", fix="Give the number of pairs in a tar."
        )
    draw.check()

    kept = _read_kept(folder, recipe, draw)
    plan = _plan(folder, recipe.pairs, kept, shard_size)
    _check_out(out, kept, plan)
    with RunFolder(out).lock():
        manifest = _check_out(out, kept, plan)
        _remove_torn(out)
        if plan is None:
            return _export_lists(folder, recipe, out, kept, manifest)
        return _export_shards(folder, recipe, out, kept, plan, manifest)


def _export_lists(folder: RunFolder, recipe: Recipe, out: Path, kept: _Kept, manifest: dict[str, Any]) -> str:
    """The lists and tables alone; tars that are there stay as they are."""
    shards, finished = manifest.get("shards"), True
    if not manifest:  # first, so that the folder of a killed export is known as ours
        _write_manifest(out, kept, None, finished=False)
    written = _write_lists(folder, recipe, out, kept)

    if shards is not None and not manifest["finished"]:
        finished = False
        log.warn(f"{out}: its tars are unfinished; --shards --shard-size {shards['shard_size']} continues them")
    _write_manifest(out, kept, shards, finished=finished)
    return f"{out}: {len(kept.keys):,} keys and rows in {', '.join(written)}; the others in {REMOVED_TABLE}."


def _export_shards(
    folder: RunFolder, recipe: Recipe, out: Path, kept: _Kept, plan: _Plan, manifest: dict[str, Any]
) -> str:
    """Write the keys and the missing tars; every refusal comes before the first write."""
    recorded = (manifest.get("shards") or {}).get("files", [])
    journal = Journal(out / SHARDS / _JOURNAL)
    good = _good_shards(out, [*recorded, *_finished(journal)])

    if all(name in good for name in plan.names):
        samples, rows = None, kept.rows[:0]
    else:
        samples, rows = _samples_to_write(folder, recipe, kept)
        if not manifest:
            _write_manifest(out, kept, plan.described, finished=False)
        journal.path.parent.mkdir(exist_ok=True)
        journal.replace(*good.values())
        _write_manifest(out, kept, plan.described, finished=False)

    _write_lists(folder, recipe, out, kept)
    files = good if samples is None else _write_shards(out, plan, good, samples, rows, journal)
    listed = [files[name] for name in plan.names]
    _write_manifest(out, kept, {**plan.described, "files": listed}, finished=True)
    journal.path.unlink(missing_ok=True)
    together = units.size(sum(file["bytes"] for file in listed))
    return f"{out}: {len(kept.keys):,} keys, and their pairs in {len(listed):,} tars of {together} together."


def member_stem(key: str) -> str:
    """A key as the name of a tar's member without extension; `key_of_stem` gives the key back.

    A dot would end the key, and a leading slash or `..` would leave the folder, so they become %2E and %2F. Characters
    that are special on other systems are written alike. Keys without them stay as they are, in any language.
    """
    special = r'[.%\\:*?"<>|\x00-\x1f\x7f]'
    if "" in key.split("/"):  # a slash at an end, or two together
        special = r'[./%\\:*?"<>|\x00-\x1f\x7f]'
    stem = re.sub(special, lambda match: f"%{ord(match[0]):02X}", key)
    return stem.replace("_", "%5F") if METADATA.match(stem) else stem


def key_of_stem(stem: str) -> str:
    """The key that `member_stem` made this of."""
    return unquote(stem, errors="strict")


def _read_kept(folder: RunFolder, recipe: Recipe, draw: ClusterDraw) -> _Kept:
    """The kept rows and their keys, as the balance stage left them; of the clusters what the draw takes."""
    balance, again = folder.stage(BALANCE), f"Run `clip-cid balance {folder.path} --force` and repeat this command."
    if changed := folder.changed_files(BALANCE, digests=False):
        raise RunError(f"{balance}: not as the stage left it ({'; '.join(changed)}).", fix=again)

    try:
        table = pq.read_table(balance / "kept.parquet", columns=["key", "row"])
        rows = read_npy(balance / "kept.npy")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{balance}: cannot be read ({error}).", fix=again) from error
    if rows.dtype != np.int64 or not np.array_equal(rows, table.column("row").to_numpy()):
        raise RunError(f"{balance}: kept.npy and kept.parquet name different rows.", fix=again)

    keys = table.column("key").cast(pa.large_string()).combine_chunks()
    keys = pa.concat_arrays(keys.chunks) if isinstance(keys, pa.ChunkedArray) else keys
    broken = pc.call_function("match_substring_regex", [keys], pc.MatchSubstringOptions("[\r\n]"))
    if count := pc.call_function("sum", [broken]).as_py():
        sample = keys.filter(broken)[0].as_py()
        raise DataError(
            f"{balance}: {count:,} keys hold a line break, such as {sample!r}, so they cannot stand one a line.",
            fix="Give the pairs other keys (pairs.key_column, or file names without line breaks), or read"
            " kept.parquet there.",
        )

    store = EmbeddingStore.open(folder.stage(EMBED))
    _check_same_store(folder, store, rows, keys)
    stays = _drawn(folder, recipe, store, len(rows), draw) if draw.reads_clusters else np.ones(len(rows), bool)
    left_out = SHARED if draw.total is not None else CAPPED
    removed = removed_rows(folder, store, rows, capped=rows[~stays], why=left_out)
    rows, keys = rows[stays], keys.filter(pa.array(stays))

    of_keys = hashlib.sha256()
    for line in _lines(keys):
        of_keys.update(line)
    identity = {
        "count": len(rows),
        "kept_sha256": sha256_file(balance / "kept.npy"),
        "keys_sha256": of_keys.hexdigest(),
    }
    return _Kept(rows, keys, identity, removed, store)


def _drawn(
    folder: RunFolder, recipe: Recipe, store: EmbeddingStore, kept: int, draw: ClusterDraw
) -> Bool[np.ndarray, " kept"]:
    """Which of the kept rows the draw takes."""
    clusters = folder.stage(CLUSTER)
    folder.verify(CLUSTER)
    labels = read_array_of_stage(clusters / "labels.npy")
    if len(labels) != kept:
        raise RunError(
            f"{clusters}: labels of {len(labels):,} rows, but {kept:,} are kept.",
            fix=f"Run `clip-cid cluster {folder.path}` and repeat this command.",
        )

    if draw.total is None:
        assert draw.per_cluster is not None, "a draw takes a total, or so many of a cluster"
        return cap_clusters(labels, draw.per_cluster)

    # Of the clusters that have images, renumbered.
    used, labels = np.unique(labels, return_inverse=True)
    most = np.bincount(labels)
    if draw.per_cluster is not None:
        most = np.minimum(most, min(draw.per_cluster, len(labels)))
    parents = _hierarchy(folder, recipe, store, used, draw.levels) if draw.levels else []
    shares = even_shares(draw.total, most, parents)
    _say_shares(shares, parents)
    return draw_of_clusters(labels, shares)


def _hierarchy(
    folder: RunFolder, recipe: Recipe, store: EmbeddingStore, used: Int[np.ndarray, " used"], levels: Sequence[int]
) -> list[Int[np.ndarray, " _"]]:
    """The hierarchy over these clusters, as `clusters_of_clusters`.

    Raises:
        ConfigError: A level has not fewer clusters than there are below.
    """
    from clip_cid.models.device import resolve_device  # torch, which the lists do without
    from clip_cid.training.join import read_centers

    device = str(resolve_device(recipe.machine.device))
    try:
        return clusters_of_clusters(read_centers(folder, store)[used], levels, device=device)
    except ValueError as error:
        raise ConfigError(
            f"--levels {' '.join(map(str, levels))}: {error}.",
            fix=f"Give numbers that fall, the first below {len(used):,}, the clusters of this run that have images;"
            " a tenth from level to level is usual.",
        ) from error


def _say_shares(shares: Int64[np.ndarray, " clusters"], parents: Sequence[Int[np.ndarray, " _"]]) -> None:
    """How evenly the top level gives."""
    of_top = shares
    for above in parents:
        of_top = np.bincount(above, of_top).astype(np.int64)
    what = "cluster" if not parents else "cluster of clusters"
    log.info(
        f"subset    {shares.sum():,} images, {of_top.min():,} to {of_top.max():,} (median {np.median(of_top):,.0f}) of"
        f" each of {len(of_top):,} {what if len(of_top) == 1 else what.replace('cluster', 'clusters', 1)}"
    )


def _check_same_store(
    folder: RunFolder, store: EmbeddingStore, rows: Int64[np.ndarray, " kept"], keys: pa.LargeStringArray
) -> None:
    if rows.max(initial=-1) >= store.rows or not store.keys.packed.take(pa.array(rows)).equals(keys):
        raise RunError(
            f"{folder.path}: the kept keys are not those of the embeddings; embed was run again after balance.",
            fix=f"Run `clip-cid balance {folder.path}` and repeat this command, into a new folder.",
        )


def _lines(keys: pa.LargeStringArray) -> Generator[bytes]:
    for start in range(0, len(keys), _LINES_AT_ONCE):
        yield "".join(f"{key}\n" for key in keys.slice(start, _LINES_AT_ONCE).to_pylist()).encode()


def _plan(folder: RunFolder, pairs: PairsConfig, kept: _Kept, shard_size: int | None) -> _Plan | None:
    if shard_size is None:
        return None
    if not pairs.source:
        raise ConfigError(
            "--shards: this run has embeddings but no pairs (pairs.source is empty), so there are no files to write.",
            fix="Leave --shards out for the keys alone, or set pairs.source in the run's recipe.yaml to the pairs the "
            "embeddings were made from.",
        )
    record = folder.record(EMBED)
    contents = record.inputs.get("pairs.source") if record is not None else None
    names = [public_name(source) for source in pairs.source]
    sources = {"source": names, "source_sha256": digest(list(pairs.source)), "contents": contents}
    return _Plan(shard_size, len(kept.keys), sources)


def _same_pairs(planned: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether tars are of these pairs: of the same contents, or from the same place where nobody recorded contents."""
    if now["contents"] is None:
        return planned.get("source_sha256", digest(planned["source"])) == now["source_sha256"]
    return planned.get("contents") == now["contents"]


def _check_out(out: Path, kept: _Kept, plan: _Plan | None) -> dict[str, Any]:
    """The manifest at `out`, which must be of this list; empty when the folder is new or empty.

    Raises:
        DataError: Something else is there.
        ConfigError: The tars there are of another size.
    """
    other = "Give another folder, or delete this one first."
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: a file, not a folder.", fix=other)
    if not (out / MANIFEST).is_file():
        if out.exists() and (names := sorted(path.name for path in out.iterdir() if not path.name.startswith("."))):
            raise DataError(f"{out}: holds other files, such as {names[0]!r}.", fix=other)
        return {}

    try:
        before = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if (before["format"], before["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {before['format']!r}, version {before['version']}")
        differ = [name for name, value in kept.identity.items() if before[name] != value]
        planned: dict[str, Any] | None = before["shards"]
        _ = before["finished"]
        same_pairs = plan is None or planned is None or _same_pairs(planned["sources"], plan.sources)
        same_size = plan is None or planned is None or planned["shard_size"] == plan.shard_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / MANIFEST}: not a subset of this version ({error}).", fix=other) from error

    if differ:
        raise DataError(
            f"{out}: a subset of another run or of another balance, or another share of its clusters"
            f" ({before['count']:,} keys there, "
            f"{len(kept.keys):,} now; {', '.join(differ)} differ).",
            fix=other,
        )

    if planned is not None and not same_pairs:
        raise DataError(f"{out}: its tars are of other pairs ({', '.join(planned['sources']['source'])}).", fix=other)
    if plan is not None and planned is not None and not same_size:
        raise ConfigError(
            f"{out}: its tars are of {planned['shard_size']:,} pairs each, not {plan.shard_size:,}.",
            fix=f"Continue with --shard-size {planned['shard_size']}, or give another folder.",
        )
    return before


def _remove_torn(out: Path) -> None:
    """What a killed process was writing."""
    for torn in [path for folder in (out, out / SHARDS, out / TABLES) for path in folder.glob(".*.tmp-*")]:
        torn.unlink(missing_ok=True)


def _write_lists(folder: RunFolder, recipe: Recipe, out: Path, kept: _Kept) -> list[str]:
    """Write all but the tars; returns the names of what holds the kept rows."""
    with atomic_file(out / KEYS_TEXT) as temporary, temporary.open("wb") as handle:
        handle.writelines(_lines(kept.keys))
    write_table(out / KEYS_TABLE, pa.table({"key": kept.keys}))
    with atomic_file(out / ROWS) as temporary, temporary.open("wb") as handle:
        np.save(handle, kept.rows)
    write_removed(out, kept.removed, kept.store.keys.packed)
    _write_captions(folder, out, kept)
    return [KEYS_TEXT, KEYS_TABLE, ROWS, *_write_tables(folder, recipe, out, kept)]


def _write_captions(folder: RunFolder, out: Path, kept: _Kept) -> None:
    """Write the captions of whole sets, of the listed rows."""
    merged = read_captions(folder.stage(BALANCE))
    listed = [(row, key) for row, key in zip(kept.rows.tolist(), kept.keys.to_pylist(), strict=True) if row in merged]
    if listed:
        captions = [merged[row] for row, _ in listed]
        write_table(out / CAPTIONS_FILE, pa.table({"key": [key for _, key in listed], "captions": captions}))


def _write_tables(folder: RunFolder, recipe: Recipe, out: Path, kept: _Kept) -> list[str]:
    """Write the kept rows of pairs from tables, in the form they came in.

    Where the tables are gone or others, it is said, since the lists need no pairs.
    """
    try:
        if not any(source.format.has_rows for source in find_sources(recipe.pairs)[:1]):
            return []
        pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)
        if not pairs.has_rows:
            log.info(f"subset    no {TABLES}/, because the tables hold the images; --shards writes the kept pairs")
            return []
        rows = _rows_of_pairs(recipe.pairs, pairs, kept)
        (out / TABLES).mkdir(exist_ok=True)
        return [str(path.relative_to(out)) for path in pairs.copy_rows(rows, out / TABLES)]
    except DataError as error:
        log.warn(f"subset: {TABLES}/ is not written. {error.problem}")
        return []


def _write_manifest(out: Path, kept: _Kept, shards: dict[str, Any] | None, *, finished: bool) -> None:
    head = {"format": _FORMAT, "version": _VERSION, "finished": finished}
    write_json(out / MANIFEST, {**head, **kept.identity, "shards": shards})


def _samples_to_write(folder: RunFolder, recipe: Recipe, kept: _Kept) -> tuple[_Samples, Int64[np.ndarray, " kept"]]:
    """The function that gives the files of rows of the pairs, and the kept rows."""
    pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)
    rows = _rows_of_pairs(recipe.pairs, pairs, kept)
    if pairs.has_members:
        return pairs.original_files, rows
    merged = {kept.store.keys[row]: captions for row, captions in read_captions(folder.stage(BALANCE)).items()}
    return _MadeSamples(pairs, recipe.pairs.captions_field, merged), rows


def _write_shards(
    out: Path,
    plan: _Plan,
    good: dict[str, dict[str, Any]],
    samples: _Samples,
    rows: Int64[np.ndarray, " kept"],
    journal: Journal,
) -> dict[str, dict[str, Any]]:
    """Every tar that is not among the good ones; returns the record of each by its name."""
    names, files = plan.names, dict(good)
    todo = [number for number, name in enumerate(names) if name not in good]
    if good:
        log.info(f"subset    {len(good):,} of {len(names):,} tars are there with the right digests")

    done = sum(file["pairs"] for file in good.values())
    with log.progress("subset", len(rows), unit="pairs", start=done) as bar:
        stream = samples(np.concatenate([rows[plan.rows_of(number)] for number in todo]))
        for number in todo:
            name, count = names[number], len(rows[plan.rows_of(number)])
            files[name] = {"name": name, **_write_tar(out / name, itertools.islice(stream, count), bar)}
            assert files[name]["pairs"] == count, "every row gives a sample"
            journal.append(files[name])
            journal.sync()

    if isinstance(samples, _MadeSamples):
        samples.warn_of_unusual()
    return files


def _finished(journal: Journal) -> list[dict[str, Any]]:
    """The records of the tars that a killed export has finished; none if they were damaged."""
    try:
        lines = journal.read()
    except ValueError as error:
        log.warn(f"{journal.path}: damaged ({error}); the tars that it lists are written again")
        return []
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("name"), str)]


def _good_shards(out: Path, recorded: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The recorded tars that are as they were written, by name."""
    latest = {file["name"]: file for file in recorded if {"name", "pairs", "bytes", "sha256"} <= file.keys()}
    good: dict[str, dict[str, Any]] = {}
    with log.progress("digest", len(latest), unit="tars") as bar:
        for name, file in latest.items():
            path = out / name
            if path.is_file() and path.stat().st_size == file["bytes"] and sha256_file(path) == file["sha256"]:
                good[name] = file
            bar.advance(1)
    return good


def _rows_of_pairs(settings: PairsConfig, pairs: Pairs, kept: _Kept) -> Int64[np.ndarray, " kept"]:
    """The kept pairs' rows among the pairs, ascending; joined by key.

    Raises:
        DataError: Kept keys are not among the pairs, or their pairs cannot be used.
    """
    store = kept.store
    is_kept = np.zeros(store.rows + 1, dtype=bool)  # the last entry answers for -1, a pair the store does not have
    is_kept[kept.rows] = True
    store_rows = rows_in_store(pairs, store, max_absent_share=1.0)
    usable = is_kept[store_rows]
    usable[np.fromiter(pairs.known_bad, dtype=np.int64)] = False
    rows = np.flatnonzero(usable)

    if len(rows) < len(kept.rows):
        is_kept[store_rows[rows]] = False
        missing = store.keys[int(np.flatnonzero(is_kept)[0])]
        raise DataError(
            f"{len(kept.rows) - len(rows):,} of {len(kept.rows):,} kept keys are not among the usable pairs of "
            f"{', '.join(settings.source)}, such as {missing!r}; the pairs' keys look like {pairs.key(0)!r}.",
            fix="Set pairs.source in the run's recipe.yaml to all the pairs the embeddings were made from (keys"
            " must be equal), or leave --shards out: the keys need no pairs.",
        )
    return rows


def _write_tar(path: Path, samples: Iterable[list[File]], bar: log.Bar) -> dict[str, Any]:
    """Write a tar that depends on its members' names and bytes only; returns the number of samples, size and digest."""
    pairs = 0
    with atomic_file(path) as temporary:
        with tarfile.TarFile(temporary, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for files in samples:
                for name, data in files:
                    member = tarfile.TarInfo(name)  # owner 0, time 0, mode 644
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                pairs += 1
                bar.advance(1)
        return {"pairs": pairs, "bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}


class _MadeSamples:
    """The files of pairs from a table or folder: the image as it is, the first caption, and a json with the rest."""

    def __init__(self, pairs: Pairs, captions_field: str, merged: Mapping[str, Sequence[str]]) -> None:
        """`merged` has the captions of the sets of some keys; imported embeddings know one of each image only."""
        self._pairs, self._captions_field, self._merged = pairs, captions_field, merged
        self._unusual: list[str] = []

    def __call__(self, rows: Int64[np.ndarray, " rows"]) -> Generator[list[File]]:
        for row in rows.tolist():
            try:
                pair = self._pairs.read(row)
            except BadSample as error:
                raise DataError(
                    f"{self._pairs.key(row)!r} was kept, but cannot be read any more: {error.reason}.",
                    fix="Bring the file back and run the same command again; the finished tars are kept.",
                ) from error

            extension = image_extension(self._pairs.image_name(row), pair.image)
            if extension not in IMAGE_EXTENSIONS:
                self._unusual.append(pair.key)
            stem = member_stem(pair.key)
            captions = list(pair.captions)
            if merged := self._merged.get(pair.key):
                captions = list(dict.fromkeys([*captions, *merged]))
            described = {**pair.fields, self._captions_field: captions, "key": pair.key}
            yield [
                (f"{stem}.{extension}", pair.image),
                *((f"{stem}.txt", caption.encode()) for caption in pair.captions[:1]),
                (f"{stem}.json", json.dumps(described, ensure_ascii=False).encode()),
            ]

    def warn_of_unusual(self) -> None:
        """Say once how many images have an extension that loaders of tars do not read."""
        if self._unusual:
            log.warn(
                f"{len(self._unusual):,} images are not .{', .'.join(IMAGE_EXTENSIONS)} and kept their own"
                f" extension, so most loaders of WebDataset tars will skip them; the first is {self._unusual[0]!r}"
            )


def image_extension(name: str, image: bytes) -> str:
    """The extension of an image in a tar: its own if tars know it, else the one that its first bytes mean."""
    own = os.path.splitext(name)[1].lower().removeprefix(".")
    if own in IMAGE_EXTENSIONS:
        return own
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp" and image[8:12] in (b"avif", b"avis"):
        return "avif"
    known = next((extension for magic, extension in _MAGIC.items() if image.startswith(magic)), None)
    return known or (own if own.isalnum() and own.isascii() else "image")
