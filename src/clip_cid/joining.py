"""The embeddings of several teachers as one store: `clip-cid join`.

    store.json, img_emb/, text_emb/, ...   a store like any other, in the order of the first teacher's
    transforms.safetensors                 the rotation and the weight of each teacher, in float64
    skipped.jsonl                          the rows that a teacher has no embedding of

Rows are joined by key, block by block. Files appear whole, so the same command resumes a killed one.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Float64, Int
from safetensors import safe_open
from safetensors.numpy import save

from clip_cid import log, os_errors, units
from clip_cid.data.embeddings.files import (
    FOLDERS,
    PROGRESS_FILE,
    SKIPPED_FILE,
    STORE_FILE,
    StoreShard,
    record_file,
    write_array_blocks,
    write_info,
)
from clip_cid.data.embeddings.finished_shards import has_its_bytes, read_shards
from clip_cid.data.embeddings.rows_of_pairs import rows_by_key
from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.file_digests import sha256_file
from clip_cid.journal import Journal
from clip_cid.method.joined_space import equal_weights, even_rotation, join_rows
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.stage_names import EMBED

TRANSFORMS_FILE = "transforms.safetensors"
_SAMPLE = 65_536  # rows that give the covariance
_BLOCK_ROWS = 8192
_COMPARED_CAPTIONS = 100
_MOST = 0.9  # of the cosine, for one teacher; those of usual models differ by a factor of two


class Transform(NamedTuple):
    """How the rows of one teacher enter the joined space."""

    rotation: Float64[np.ndarray, "dim dim"]
    weight: float
    variance: float
    """Mean squared distance of its unit rows from their mean."""


def join_teachers(sources: Sequence[Path], out: Path) -> EmbeddingStore:
    """Join stores by key into a store at `out`; see `joined_space` in docs/method.md.

    Args:
        sources: Stores of ours, or runs with a finished embed stage; the first gives the order of the rows.
        out: The folder to make.

    Raises:
        ConfigError: There are no stores.
        DataError: A source is no store, stores have no key in common, captions differ, or `out` holds something else.
        RunError: Another process works in `out`, or the disk has no room.
    """
    for path in (*sources, out):
        os_errors.refuse_address(path)
    if not sources:
        raise ConfigError("join: no stores to join.", fix="Name two or more, then the folder to make.")
    stores = [EmbeddingStore.open(_store_folder(source)) for source in sources]
    made_from = {"joined_from": [sha256_file(store.path / STORE_FILE) for store in stores]}

    with RunFolder(out).lock():
        shards, skipped = _begin(out, made_from)
        if not (out / STORE_FILE).is_file():
            joint = _Joint(stores)
            joint.refuse_other_captions()
            joint.refuse_other_sizes()
            _check_room(out, joint)
            transforms = _transforms(out, joint)
            _write(out, joint, transforms, shards, skipped)
        (out / PROGRESS_FILE).unlink(missing_ok=True)
        joined = EmbeddingStore.open(out)
    _say(joined)
    return joined


def read_transforms(folder: Path) -> list[Transform]:
    """The transforms of a joined store, in the order of its teachers: to bring other rows into its space.

    Raises:
        DataError: They cannot be read.
    """
    path = folder / TRANSFORMS_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            return [
                Transform(file.get_tensor(f"rotation_{number}"), float(weight), float(variance))
                for number, (weight, variance) in enumerate(
                    zip(file.get_tensor("weights"), file.get_tensor("variances"), strict=True)
                )
            ]
    except Exception as error:  # its errors share no class but this
        raise DataError(
            f"{path}: the transforms of joined teachers cannot be read ({error}).",
            fix="Delete the folder, and join again.",
        ) from error


class _Joint:
    """Several stores, row by row: the rows are those of the first."""

    def __init__(self, stores: Sequence[EmbeddingStore]) -> None:
        self.stores, self.first = stores, stores[0]
        self.has_texts = all(store.has_texts for store in stores)
        self.dim = sum(store.dim for store in stores)
        every = {store.info.views for store in stores}
        self.views = self.first.info.views if len(every) == 1 else None  # the crops are those of the keys in each store
        if self.views is None and every != {None}:
            log.warn("the stores have not the same views, so the joined store has whole images only")
        self._places = [_places(self.first, store) for store in stores]
        self.ok, self.absent = self._joined_rows()
        if without := [str(store.path) for store in stores if not store.has_texts and not self.has_texts]:
            log.warn(f"{', '.join(without)}: images only, so the joined store has no text embeddings")

    def rows_in(self, number: int, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Where a store has these rows."""
        places = self._places[number]
        return rows if places is None else places[rows]

    def joined(
        self, kind: str, rows: Int[np.ndarray, " n"], numbers: Int[np.ndarray, " n"], transforms: Sequence[Transform]
    ) -> Float[np.ndarray, "n dim"]:
        """Joined rows of those that are ok: of images, of their captions (kind `text`) or views of these numbers."""
        parts: list[np.ndarray] = []
        for place, store in enumerate(self.stores):
            own = self.rows_in(place, rows)
            read = {"text": store.text_for, "view": store.view_for}.get(kind)
            parts.append((store.images[own] if read is None else read(own, numbers)).astype(np.float32))
        rotations = [transform.rotation.astype(np.float32) for transform in transforms]
        return join_rows(parts, rotations, [transform.weight for transform in transforms])

    def refuse_other_captions(self) -> None:
        """The text embeddings of a row must be of the same captions.

        Raises:
            DataError: They are not.
        """
        if not self.has_texts:
            return
        good = np.flatnonzero(self.ok)
        counts = self.first.num_captions[good]
        for number, store in enumerate(self.stores):
            others = store.num_captions[self.rows_in(number, good)]
            if (different := np.flatnonzero(others != counts)).size:
                row = different[0]
                raise DataError(
                    f"{store.path}: {self.first.keys[good[row]]!r} has embeddings of {others[row]} captions, but of"
                    f" {counts[row]} in {self.first.path} ({different.size:,} such rows).",
                    fix="Embed the same pairs with each teacher.",
                )

        for row in np.unique(np.linspace(0, len(good) - 1, _COMPARED_CAPTIONS).astype(np.int64)):
            every = [
                [caption.strip() for caption in store.captions(int(self.rows_in(number, good[row : row + 1])[0]))]
                for number, store in enumerate(self.stores)
                if store.info.captions_column is not None
            ]
            if any(captions[: counts[row]] != every[0][: counts[row]] for captions in every):
                raise DataError(
                    f"{self.first.keys[good[row]]!r}: the stores embedded different captions"
                    f" ({', '.join(repr(captions[0]) for captions in every)}).",
                    fix="Embed the same pairs with each teacher.",
                )

    def refuse_other_sizes(self) -> None:
        """The views of a row must be of the same crops, which follow from the size of its image.

        Raises:
            DataError: They are not.
        """
        if self.views is None:
            return
        good = np.flatnonzero(self.ok)
        sizes = self.first.sizes[good]
        for number, store in enumerate(self.stores):
            others = store.sizes[self.rows_in(number, good)]
            if (different := np.flatnonzero((others != sizes).any(axis=1))).size:
                row = different[0]
                here, there = (" x ".join(f"{side:,}" for side in some[row]) for some in (sizes, others))
                raise DataError(
                    f"{store.path}: the views of {self.first.keys[good[row]]!r} are of an image of {there} pixels, but"
                    f" of {here} in {self.first.path} ({different.size:,} such rows).",
                    fix="Embed the same images with each teacher.",
                )

    def _joined_rows(self) -> tuple[Bool[np.ndarray, " rows"], list[tuple[str, Bool[np.ndarray, " rows"]]]]:
        """The rows that every store has; and for each store those that it is the first not to have."""
        ok = np.ones(self.first.rows, dtype=bool)
        absent: list[tuple[str, np.ndarray]] = []
        for number, store in enumerate(self.stores):
            places = self._places[number]
            has = (
                store.ok if places is None else (places >= 0) & store.ok[places]
            )  # of -1 any row, which does not count
            if count := int((ok & ~has).sum()):
                log.warn(
                    f"{store.path}: {count:,} of {self.first.rows:,} rows have no embedding there; they are left out"
                )
            absent.append((str(store.info.teacher.get("reference", "unknown")), ok & ~has))
            ok &= has
        if not ok.any():
            raise DataError(
                f"{', '.join(str(store.path) for store in self.stores)}: no row has an embedding of each teacher.",
                fix="Join stores of the same pairs: keys must be equal.",
            )
        return ok, absent


def _store_folder(source: Path) -> Path:
    """The store itself, or that of a run."""
    if (source / STORE_FILE).is_file() or (source / PROGRESS_FILE).is_file():
        return source
    if RunFolder(source).has(EMBED):
        return RunFolder(source).stage(EMBED)
    raise DataError(
        f"{source}: neither an embedding store nor a run with a finished embed stage.",
        fix="Embed with each teacher first; embeddings made elsewhere by `clip-cid embed RUN --embeddings PATH`.",
    )


def _places(first: EmbeddingStore, store: EmbeddingStore) -> Int[np.ndarray, " rows"] | None:
    """The row in `store` of each row of `first`, -1 where it has none; None if they are the same."""
    if store.keys.packed.equals(first.keys.packed):
        return None
    return rows_by_key(first.keys.packed, store)


def _begin(out: Path, made_from: dict[str, Any]) -> tuple[list[StoreShard], list[dict[str, Any]]]:
    """The whole shards that an earlier attempt at the same join has left, with the rows they leave out.

    Raises:
        DataError: The folder holds something else.
    """
    journal = Journal(out / PROGRESS_FILE)
    journal.drop_torn_line()
    if (held := read_shards(out)) is None:
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise _something_else(out)
        journal.replace(made_from)
        return [], []

    before, shards, skipped = held
    if before.get("teacher", before).get("joined_from") != made_from["joined_from"]:
        raise _something_else(out)
    if not journal.path.is_file():
        return shards, skipped

    # Those on the disk as they were written; the first one that is not ends them.
    whole = list(itertools.takewhile(lambda shard: has_its_bytes(out, shard), shards))
    rows = sum(shard.rows for shard in whole)
    skipped = [entry for entry in skipped if entry["row"] < rows]
    if len(whole) < len(shards):
        entries = [{"shard": dataclasses.asdict(shard), "skipped": []} for shard in whole]
        if entries:
            entries[0]["skipped"] = skipped
        journal.replace(made_from, *entries)
    return whole, skipped


def _something_else(out: Path) -> DataError:
    return DataError(
        f"{out}: holds something else than a join of these stores.", fix="Give another folder, or delete it."
    )


def _check_room(out: Path, joint: _Joint) -> None:
    views = joint.views.count if joint.views is not None else 0
    needed = 2 * joint.dim * joint.first.rows * (1 + joint.has_texts + views)
    present = sum(path.stat().st_size for path in out.rglob("*.npy"))
    free = shutil.disk_usage(out).free
    if free < needed - present:
        raise RunError(
            f"{out}: {units.size(needed - present)} are needed for the joined embeddings, but {units.size(free)} are"
            " free.",
            fix="Free some room, or use a folder on another disk.",
        )


def _transforms(out: Path, joint: _Joint) -> list[Transform]:
    """Those that an earlier attempt has measured; else from a sample of the rows."""
    if (out / TRANSFORMS_FILE).is_file():
        return read_transforms(out)

    good = np.flatnonzero(joint.ok)
    chosen = np.random.default_rng(0).choice(len(good), min(_SAMPLE, len(good)), replace=False, shuffle=False)
    sample = good[np.sort(chosen)]
    covariances = [
        _covariance(store.images, joint.rows_in(number, sample)) for number, store in enumerate(joint.stores)
    ]
    variances = [float(np.trace(covariance)) for covariance in covariances]
    try:
        weights = equal_weights(variances)
    except ValueError as error:
        raise DataError(f"{out}: {error}.", fix="Leave out the teacher whose embeddings are all equal.") from error

    rotations = {f"rotation_{number}": even_rotation(one) for number, one in enumerate(covariances)}
    with atomic_file(out / TRANSFORMS_FILE) as temporary:
        temporary.write_bytes(save({**rotations, "weights": weights, "variances": np.array(variances)}))
    return read_transforms(out)


def _covariance(vectors: ShardedRows, rows: Int[np.ndarray, " n"]) -> Float64[np.ndarray, "dim dim"]:
    """Of the rows at length one, in float64."""
    dim = vectors.shape[1]
    total, products = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = vectors[rows[start : start + _BLOCK_ROWS]].astype(np.float64)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        total += block.sum(axis=0)
        products += block.T @ block
    mean = total / len(rows)
    return products / len(rows) - np.outer(mean, mean)


def _write(
    out: Path,
    joint: _Joint,
    transforms: Sequence[Transform],
    shards: list[StoreShard],
    skipped: list[dict[str, Any]],
) -> None:
    """The shards that are not there yet, and at last the manifest."""
    first, journal = joint.first.info, Journal(out / PROGRESS_FILE)
    done = sum(shard.rows for shard in shards)
    with log.progress("join", joint.first.rows, unit="rows", start=done) as bar:
        for number in range(len(shards), len(first.shards)):
            rows = np.arange(done, done + first.shards[number].rows)
            shard, left_out = _write_shard(out, joint, transforms, number, rows)
            journal.append({"shard": dataclasses.asdict(shard), "skipped": left_out})
            journal.sync()
            shards.append(shard)
            skipped += left_out
            done += shard.rows
            bar.advance(shard.rows)

    Journal(out / SKIPPED_FILE).replace(*skipped)
    teachers = [
        {**store.info.teacher, "dim": store.dim, "variance": transform.variance, "weight": transform.weight}
        for store, transform in zip(joint.stores, transforms, strict=True)
    ]
    teacher = {
        "reference": " + ".join(str(one.get("reference", "unknown")) for one in teachers),
        "joined": teachers,
        "transforms_sha256": sha256_file(out / TRANSFORMS_FILE),
        "joined_from": journal.read()[0]["joined_from"],
    }
    info = dataclasses.replace(
        first,
        teacher=teacher,
        pairs=None,
        dim=joint.dim,
        dtype="float16",
        root=None,
        shards=tuple(shards),
        views=joint.views,
    )
    write_info(out, info)


def _write_shard(
    out: Path, joint: _Joint, transforms: Sequence[Transform], number: int, rows: Int[np.ndarray, " rows"]
) -> tuple[StoreShard, list[dict[str, Any]]]:
    """One shard of the first store; returns it, and its rows that are left out."""
    shard, ok = joint.first.info.shards[number], joint.ok[rows]
    further = np.maximum(joint.first.num_captions[rows] * ok - 1, 0) if joint.has_texts else np.zeros_like(rows)
    more, views = int(further.sum()), joint.views.count if joint.views is not None else 0

    digits = max(4, len(str(len(joint.first.info.shards) - 1)))
    wanted = {"image": True, "text": joint.has_texts, "more_text": more > 0, "view": views > 0, "metadata": True}
    suffixes = {kind: "parquet" if kind == "metadata" else "npy" for kind, there in wanted.items() if there}
    files = {kind: f"{FOLDERS[kind]}/{FOLDERS[kind]}_{number:0{digits}d}.{end}" for kind, end in suffixes.items()}
    for name in files.values():
        (out / name).parent.mkdir(exist_ok=True)

    half, count = np.dtype(np.float16), len(rows)
    for kind in ("image", "text"):
        if kind in files:
            write_array_blocks(out / files[kind], (count, joint.dim), half, _blocks(joint, kind, rows, transforms))
    if more:
        texts = _further_texts(joint, rows, further, transforms)
        write_array_blocks(out / files["more_text"], (more, joint.dim), half, texts)
    if views:
        crops = _blocks(joint, "view", rows, transforms, each=views)
        write_array_blocks(out / files["view"], (count, views, joint.dim), half, crops)
    source = Path(joint.first.info.root or joint.first.path) / shard.files["metadata"].path
    _write_metadata(source, out / files["metadata"], ok)

    left_out = [
        {"row": row, "key": joint.first.keys[row], "shard": shard.name, "reason": f"no embedding of {teacher}"}
        for teacher, absent in joint.absent
        for row in rows[absent[rows]].tolist()
    ]
    recorded = {kind: record_file(out, name) for kind, name in files.items()}
    alone = int((ok & (joint.first.num_captions[rows] == 0)).sum()) if joint.has_texts else 0
    joined = StoreShard(shard.name, count, int(ok.sum()), more, recorded, without_text=alone)
    return joined, sorted(left_out, key=lambda one: one["row"])


def _blocks(
    joint: _Joint, kind: str, rows: Int[np.ndarray, " rows"], transforms: Sequence[Transform], *, each: int = 1
) -> Iterator[np.ndarray]:
    """Images, first captions, or the views of each image; zeros for rows that are not ok, or without a caption."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        good = joint.ok[block]
        if kind == "text":
            good &= joint.first.num_captions[block] > 0
        numbers = np.tile(np.arange(each), int(good.sum()))
        joined = np.zeros((len(block) * each, joint.dim), dtype=np.float16)
        joined[np.repeat(good, each)] = joint.joined(kind, np.repeat(block[good], each), numbers, transforms)
        yield joined


def _further_texts(
    joint: _Joint, rows: Int[np.ndarray, " rows"], further: Int[np.ndarray, " rows"], transforms: Sequence[Transform]
) -> Iterator[np.ndarray]:
    """The captions after the first, in the order of the rows."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        counts = further[start : start + _BLOCK_ROWS]
        each = np.repeat(rows[start : start + _BLOCK_ROWS], counts)
        numbers = 1 + np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield joint.joined("text", each, numbers, transforms)


def _write_metadata(source: Path, path: Path, ok: Bool[np.ndarray, " rows"]) -> None:
    """The metadata of a shard, with the rows that are ok now."""
    with pq.ParquetFile(source) as table, atomic_file(path) as temporary:
        others = [name for name in table.schema_arrow.names if name != "ok"]
        schema = pa.schema([*(table.schema_arrow.field(name) for name in others), pa.field("ok", pa.bool_())])
        with pq.ParquetWriter(temporary, schema) as writer:
            done = 0
            for batch in table.iter_batches(_BLOCK_ROWS, columns=others):
                columns = [batch.column(name) for name in others]
                writer.write_batch(pa.record_batch([*columns, pa.array(ok[done : done + len(batch)])], schema=schema))
                done += len(batch)


def _say(joined: EmbeddingStore) -> None:
    """The teachers with their weights, and how many rows there are."""
    rows = [
        [str(one.get("reference")), f"{one['dim']:,}", f"{one['variance']:.3f}", units.percent(one["weight"] ** 2)]
        for one in joined.info.teacher["joined"]
    ]
    if (largest := max(one["weight"] ** 2 for one in joined.info.teacher["joined"])) > _MOST and len(rows) > 1:
        log.warn(
            f"{joined.path}: one teacher has {units.percent(largest)} of every cosine: its embeddings lie so close"
            " together that the others have to be scaled down to weigh no more"
        )
    log.table(["teacher", "width", "variance of its rows", "share of the cosine"], rows, title="Joined teachers")
    texts = "images and texts" if joined.has_texts else "images"
    log.say(
        f"{joined.path}: {texts} of {int(joined.ok.sum()):,} of {joined.rows:,} rows in {joined.dim:,} dimensions."
        f" Use them with --embeddings {joined.path}"
    )
