"""Take over embeddings made elsewhere: write a manifest here; arrays that can be read in place stay there.

Arrays that cannot be read in place (members of a .npz, float64) or are to be scaled are converted once,
shard by shard.
"""

import collections
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from clip_cid import log, units
from clip_cid.data.embeddings.files import (
    FOLDERS,
    PROGRESS_FILE,
    SKIPPED_FILE,
    STORE_FILE,
    StoreFile,
    StoreInfo,
    StoreShard,
    array_header,
    check_column,
    check_unit,
    not_texts,
    read_table,
    read_texts,
    record_file,
    table_schema,
    write_array_blocks,
    write_info,
    write_table,
)
from clip_cid.data.embeddings.layouts import FIX, LayoutShard, Vectors, find_embeddings
from clip_cid.data.embeddings.rows_of_pairs import KeysOf
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.crops import Views
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError
from clip_cid.journal import Journal
from clip_cid.recipe import STORE_COLUMNS

_KEY_COLUMNS = ("key", "uid", "image_path", "id")
_CAPTION_COLUMNS = ("caption", "text")


def import_existing(
    source: Path,
    out: Path,
    *,
    normalize: bool = False,
    max_bad_share: float | None = None,
    views: Views | None = None,
    order_of: Pairs | None = None,
) -> None:
    """Make `out` a store that refers to `source`: a store of ours, or any layout of `layouts.py`.

    Every array is read once: lengths, values, and a digest of each file.

    Args:
        source: A folder or a file.
        out: The store to make; converted shards that a killed attempt on the same source left there are used.
        normalize: Scale rows to length one (into `out`) instead of refusing rows of another length.
        max_bad_share: Leave out rows that are zero or not finite, if they are no larger share, instead of refusing
            them; not for a store of ours.
        views: That the store must have. Without it, those of a store of ours are left out.
        order_of: The pairs whose order the rows have, and whose keys they get in place of their own.

    Raises:
        DataError: It is none of these, a part is missing or cut short, widths differ, keys repeat, a row is zero or not
            finite, or (without `normalize`) not of length 1; or rows and `order_of` differ in number.
    """
    source = source.absolute()  # not resolved: a link has the suffix that its target may lack
    out.mkdir(parents=True, exist_ok=True)

    if (source / STORE_FILE).is_file() or (source / PROGRESS_FILE).is_file():
        info = EmbeddingStore.open(source).info
        if order_of is not None:
            raise DataError(
                f"{source}: an embedding store of ours, whose keys are those of the pairs it was made from.",
                fix="Leave out embed.match: order.",
            )
        check_views(source, info.views, views)
        info = dataclasses.replace(info if views else _without_views(info), root=info.root or str(source))
        if (source / SKIPPED_FILE).is_file():
            shutil.copyfile(source / SKIPPED_FILE, out / SKIPPED_FILE)
    else:
        check_views(source, None, views)
        layout = find_embeddings(source)
        if order_of is not None:
            layout = in_order_of(layout, order_of, source)
        info = _take_over(source, layout, out, normalize=normalize, max_bad_share=max_bad_share)

    write_info(out, info)
    store = EmbeddingStore.open(out)
    if not len(store.keys) or not store.ok.any():
        raise DataError(f"{source}: no embeddings there.", fix=FIX)
    with log.progress("check", store.rows, unit="rows") as bar:
        store.check_values(bar.advance)


def check_views(source: Path, held: Views | None, wanted: Views | None) -> None:
    """Embeddings made elsewhere have the views that are wanted, if any are.

    Raises:
        DataError: They do not.
    """
    if wanted is None or held == wanted:
        return
    if held is None:
        raise DataError(
            f"{source}: embed.views: {wanted.count:,}, but these embeddings are of whole images only.",
            fix="Leave out embed.views, or let the embed stage compute them: name the teacher, without embed.existing.",
        )
    raise DataError(
        f"{source}: its views are {held}, but the recipe asks for {wanted}.",
        fix=f"Set embed.views: {held.count} and embed.view_crop_scale: {held.crop_scale:g}."
        if held.law == wanted.law
        else "Embed these views again: this version draws other crops.",
    )


def in_order_of(layout: Sequence[LayoutShard], pairs: Pairs, source: Path) -> list[LayoutShard]:
    """The same shards, whose rows have the keys of the pairs in their order.

    A row whose pair cannot be used has the name of its file and its number there, as without metadata.

    Raises:
        DataError: There are more or fewer rows than pairs.
    """
    rows = sum(shard.image.rows for shard in layout)
    if rows != len(pairs):
        raise DataError(
            f"{source}: {rows:,} embeddings, but {len(pairs):,} pairs, so embed.match: order cannot say which belongs to"
            " which.",
            fix="Give all pairs that were embedded and no others, in the order they had then.",
        )
    if layout[0].metadata is not None:
        log.warn(f"{source}: embed.match: order, so its own keys ({layout[0].metadata.name} ...) are not read")

    shards, first = list[LayoutShard](), 0
    for shard in layout:
        keys = pairs.keys(first, first + shard.image.rows)
        for row in pairs.known_bad.keys() & range(first, first + len(keys)):
            keys[row - first] = f"{shard.name}/{row - first}"
        shards.append(dataclasses.replace(shard, keys=pa.array(keys, pa.large_string())))
        first += len(keys)
    return shards


def keys_of(source: Path, layout: Sequence[LayoutShard]) -> KeysOf:
    """The keys that a store of these embeddings would have."""
    column = _columns(layout).key
    keys = [_keys(shard, column).cast(pa.large_string()) for shard in layout]
    return KeysOf(str(source), pa.concat_arrays(keys), column, made=layout[0].metadata is None)


def _without_views(info: StoreInfo) -> StoreInfo:
    shards = [
        dataclasses.replace(shard, files={kind: file for kind, file in shard.files.items() if kind != "view"})
        for shard in info.shards
    ]
    return dataclasses.replace(info, shards=tuple(shards), views=None)


def _take_over(
    source: Path, layout: Sequence[LayoutShard], out: Path, *, normalize: bool, max_bad_share: float | None
) -> StoreInfo:
    dtypes = {vectors.dtype.newbyteorder("=") for shard in layout for vectors in shard.vectors.values()}
    dtype = np.dtype(np.float16 if dtypes == {np.dtype(np.float16)} else np.float32)
    columns = _columns(layout)
    _log_plan(layout, out, dtype, normalize=normalize)

    shards: list[StoreShard] = []
    skipped = _Skipped(sum(shard.image.rows for shard in layout), max_bad_share)
    with log.progress("take over", skipped.total, unit="rows") as bar:
        for number, shard in enumerate(layout):
            ok = skipped.ok_rows(shard, columns.key, first_row=sum(before.rows for before in shards))
            files = {"metadata": _metadata_file(shard, out, number, columns.key, ok)}
            for kind, vectors in shard.vectors.items():
                name = f"{FOLDERS[kind]}/{FOLDERS[kind]}_{number:04d}.npy"
                files[kind] = _array_file(vectors, out, name, dtype, ok, normalize=normalize)
            rows = shard.image.rows
            shards.append(StoreShard(name=shard.name, rows=rows, ok=int(ok.sum()), more=0, files=files))
            bar.advance(rows)
    skipped.write(out / SKIPPED_FILE)

    return StoreInfo(
        teacher={"reference": f"unknown (taken over from {source})"} | _members(layout[0]),
        pairs=None,
        dim=layout[0].image.dim,
        dtype=dtype.name,
        fields=columns.fields,
        key_column=columns.key,
        captions_column=columns.caption,
        root=None,
        shards=tuple(shards),
    )


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The roles of the columns of the metadata."""

    key: str
    caption: str | None
    fields: tuple[str, ...]


def _columns(layout: Sequence[LayoutShard]) -> _Columns:
    """The columns of the first shard's metadata, which all shards have.

    Raises:
        DataError: There is no key, or no caption though there are text embeddings; or a shard lacks one of them, or
            has several keys in a row.
    """
    first = layout[0]
    if first.metadata is None:
        return _Columns("key", None, ())
    names = table_schema(first.metadata).names
    key, caption = (next((name for name in few if name in names), None) for few in (_KEY_COLUMNS, _CAPTION_COLUMNS))
    if first.keys is not None:
        key = "key"
    if key is None or (caption is None and first.text is not None):
        vectors = first.vectors_beside_keys
        others = units.shortened(", ".join(name or repr(name) for name in names if name not in vectors), 400)
        raise DataError(
            f"{first.metadata}: no column key, uid, image_path or id, or no caption or text, among {others}.",
            fix="Keys join embeddings to pairs; add the column, or leave"
            f" {'the other columns out (pandas: index=False)' if vectors else 'the metadata out'}.",
        )

    # Before anything is converted, which can take hours.
    for path in (shard.metadata for shard in layout if shard.metadata is not None):
        schema = table_schema(path)
        for name in (key, caption):
            if name is not None and not (name == key and first.keys is not None):
                check_column(path, schema, name)
        if first.keys is None and pa.types.is_nested(schema.field(key).type):
            raise not_texts(path, key, schema.field(key).type)
    left_out = {*STORE_COLUMNS, key, caption, *first.vectors_beside_keys}
    return _Columns(key, caption, tuple(name for name in names if name not in left_out))


class _Skipped:
    """The rows that are left out, because they have no direction: all zeros, or not finite."""

    def __init__(self, total: int, max_share: float | None) -> None:
        self.total, self._max_share = total, max_share
        self._entries: list[dict[str, Any]] = []

    def ok_rows(self, shard: LayoutShard, key_column: str, *, first_row: int) -> Bool[np.ndarray, " rows"]:
        """Which rows of a shard to take; all of them, unread, if no share may be left out.

        Raises:
            DataError: More rows are left out than may be.
        """
        ok = np.ones(shard.image.rows, dtype=bool)
        if self._max_share is None:
            return ok

        reasons: dict[int, str] = {}
        for kind, vectors in shard.vectors.items():
            start = 0
            for block in vectors.blocks():
                for row, what in _undirected(block).items():
                    reasons.setdefault(start + row, f"{kind} embedding {what}")
                start += len(block)

        ok[list(reasons)] = False
        keys = _keys(shard, key_column) if reasons else pa.array([])
        for row, reason in sorted(reasons.items()):
            key = keys[row].as_py()
            self._entries.append({"row": first_row + row, "key": key, "shard": shard.name, "reason": reason})
        self._check_share()
        return ok

    def write(self, path: Path) -> None:
        """List them, and log how many there are."""
        Journal(path).replace(*self._entries)
        if self._entries:
            log.warn(f"embed: {self._summary()} are left out; each is listed in {path.name}")

    def _check_share(self) -> None:
        share = self._max_share or 0
        if len(self._entries) > share * self.total:
            raise DataError(
                f"{self._summary()} cannot be used, more than embed.max_bad_share {share:g};"
                f" the first is {self._entries[0]['key']!r} in {self._entries[0]['shard']}.",
                fix="Compute them again, or raise embed.max_bad_share.",
            )

    def _summary(self) -> str:
        reasons = collections.Counter(entry["reason"] for entry in self._entries)
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        return f"{len(self._entries):,} of {self.total:,} rows ({kinds})"


def _undirected(block: Float[np.ndarray, "rows dim"]) -> dict[int, str]:
    """The rows that have no direction, and why."""
    peaks = np.abs(block).max(axis=1)
    bad = np.flatnonzero(~(np.isfinite(peaks) & (peaks > 0)))
    return {int(row): "is all zeros" if peaks[row] == 0 else "is not finite" for row in bad}


def _metadata_file(
    shard: LayoutShard, out: Path, number: int, key_column: str, ok: Bool[np.ndarray, " rows"]
) -> StoreFile:
    """The metadata where it is; or here, if it has no keys, holds vectors, or must say which rows are left out."""
    vectors = shard.vectors_beside_keys
    if shard.metadata is not None and shard.keys is None and not vectors and ok.all():
        return record_file(out, str(shard.metadata))
    if shard.metadata is None:
        table = pa.table({key_column: _keys(shard, key_column)})
    else:
        table = read_table(shard.metadata, without=vectors)
        replaced = ("ok",) if shard.keys is None else ("ok", key_column)
        table = table.drop_columns([name for name in table.column_names if name in replaced])
        if shard.keys is not None:
            table = table.append_column(key_column, shard.keys)

    name = f"{FOLDERS['metadata']}/{FOLDERS['metadata']}_{number:04d}.parquet"
    (out / name).parent.mkdir(exist_ok=True)
    write_table(out / name, table if ok.all() else table.append_column("ok", pa.array(ok)))
    return record_file(out, name)


def _keys(shard: LayoutShard, key_column: str) -> pa.Array:
    """The key of each row; without metadata the file's name and the row's number in it."""
    if shard.keys is not None:
        return shard.keys
    if shard.metadata is not None:
        return read_texts(shard.metadata, key_column)
    rows = pc.cast(pa.array(np.arange(shard.image.rows)), pa.large_string())
    stem, slash = (pa.scalar(text, pa.large_string()) for text in (shard.name, "/"))
    return pc.call_function("binary_join_element_wise", [stem, rows, slash])


def _array_file(
    vectors: Vectors, out: Path, name: str, dtype: np.dtype[Any], ok: Bool[np.ndarray, " rows"], *, normalize: bool
) -> StoreFile:
    """The array where it is, or converted into the store."""
    if ok.all() and not _must_convert(vectors, dtype, normalize=normalize):
        return record_file(out, str(vectors.path))
    path = out / name
    if not (path.is_file() and array_header(path) == ((vectors.rows, vectors.dim), dtype)):
        path.parent.mkdir(exist_ok=True)
        _convert(vectors, path, dtype, ok, normalize=normalize)
    return record_file(out, name)


def _must_convert(vectors: Vectors, dtype: np.dtype[Any], *, normalize: bool) -> bool:
    return normalize or vectors.member is not None or vectors.dtype != dtype


def _convert(
    vectors: Vectors, path: Path, dtype: np.dtype[Any], ok: Bool[np.ndarray, " rows"], *, normalize: bool
) -> None:
    """Write the ok rows as they are or scaled, and zeros for the others."""
    prepare = _scaled if normalize else _unit

    def prepared() -> Iterator[np.ndarray]:
        first_row = 0
        for block in vectors.blocks():
            good = ok[first_row : first_row + len(block)]
            rows = block if good.all() else np.where(good[:, None], block, np.zeros((), dtype=block.dtype))
            yield prepare(rows, good, str(vectors), first_row)
            first_row += len(block)

    write_array_blocks(path, (vectors.rows, vectors.dim), dtype, prepared())


def _unit(
    block: Float[np.ndarray, "rows dim"], ok: Bool[np.ndarray, " rows"], where: str, first_row: int
) -> Float[np.ndarray, "rows dim"]:
    """The rows as they are; each ok row must be of length one."""
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused
        narrow = block if block.dtype.itemsize == 2 else block.astype(np.float32)
    check_unit(narrow, ok, where=where, first_row=first_row)
    return narrow


def _scaled(
    block: Float[np.ndarray, "rows dim"], ok: Bool[np.ndarray, " rows"], where: str, first_row: int
) -> Float[np.ndarray, "rows dim"]:
    """The ok rows scaled to length one, in float64; the others are zeros and stay so.

    Raises:
        DataError: An ok row has no direction: it is all zeros, or not finite.
    """
    wide = block.astype(np.float64)
    undirected = {row: what for row, what in _undirected(wide).items() if ok[row]}
    if undirected:
        row = min(undirected)
        raise DataError(
            f"{where}: row {first_row + row:,} {undirected[row]} ({len(undirected):,} such rows among {len(block):,}).",
            fix="They have no direction to compare: compute them again, or leave them out by"
            " --embed.max-bad-share 0.01.",
        )
    wide[ok] /= np.abs(wide[ok]).max(axis=1, keepdims=True)  # so that no square overflows
    wide[ok] /= np.linalg.norm(wide[ok], axis=1, keepdims=True)
    return wide


def _members(shard: LayoutShard) -> dict[str, str]:
    """The names of the arrays taken from a .npz, for the store's record."""
    members = [vectors.member for vectors in shard.vectors.values() if vectors.member is not None]
    return {"arrays": ", ".join(members)} if members else {}


def _log_plan(layout: Sequence[LayoutShard], out: Path, dtype: np.dtype[Any], *, normalize: bool) -> None:
    """Log what is missing, and which arrays are converted and why."""
    if layout[0].text is None:
        log.info("embed     no text embeddings: balance and cluster need none, the instance loss does")
    if layout[0].metadata is None and layout[0].keys is None:
        log.info(f"embed     no metadata: keys are file and row, such as {layout[0].name + '/0'!r}")

    every = [vectors for shard in layout for vectors in shard.vectors.values()]
    converted = [vectors for vectors in every if _must_convert(vectors, dtype, normalize=normalize)]
    if not converted:
        return

    reasons = ["embed.normalize scales them"] if normalize else []
    inside = "members of a .npz" if layout[0].image.path.suffix == ".npz" else "columns of a table"
    reasons += [f"{inside} cannot be read in place"] if any(one.member for one in converted) else []
    kinds = sorted({one.dtype.name for one in converted if one.dtype != dtype})
    reasons += [f"{' and '.join(kinds)} become {dtype}"] if kinds else []
    size = sum(one.rows * one.dim for one in converted) * dtype.itemsize
    log.info(
        f"embed     {len(converted):,} arrays are converted once into {out}, {units.size(size)}: {'; '.join(reasons)}"
    )
