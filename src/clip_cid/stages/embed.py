"""Teacher embeddings of every pair, computed once (paper sections 3.1 to 3.3)."""

import collections
import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from clip_cid import log, os_errors, units
from clip_cid.data.embeddings.from_pairs import embed_pairs
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.rows_of_pairs import join
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import StoreWriter
from clip_cid.data.pairs.pair import reason_kind
from clip_cid.data.pairs.pairs import Pairs, fingerprint_digest, open_pairs
from clip_cid.errors import RunError
from clip_cid.models.teacher import load_teacher
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.summaries import EmbedSummary


def run(folder: RunFolder, out: Path, recipe: Recipe) -> EmbedSummary:
    """Write the embedding store, or (`embed.existing`) take over one made elsewhere."""
    if recipe.embed.existing is not None:
        return _take_over(recipe.embed.existing, folder, out, recipe)

    pairs = _open_pairs(folder, recipe)
    teacher = load_teacher(recipe.embed, device=recipe.machine.device)
    writer = StoreWriter(
        out,
        teacher=teacher.identity,
        pairs=fingerprint_digest(recipe.pairs),
        dim=teacher.dim,
        fields=recipe.pairs.keep_fields,
        num_shards=len(pairs.shards),
    )
    log.info(
        f"embed     teacher {teacher.identity['reference']}: {teacher.dim} dimensions, {teacher.identity['precision']}"
    )

    rows_before, started = writer.rows, time.monotonic()
    with _room_on_disk(out, writer, pairs, dim=teacher.dim):
        embed_pairs(pairs, teacher, writer, recipe.pairs, recipe.machine)
        writer.finish()

    rate = (len(pairs) - rows_before) / max(time.monotonic() - started, 1e-9)
    reasons = collections.Counter(reason_kind(entry["reason"]) for entry in writer.skipped)
    return _summary(EmbeddingStore.open(out), dict(reasons.most_common()), images_per_s=round(rate, 1))


def _take_over(existing: Path, folder: RunFolder, out: Path, recipe: Recipe) -> EmbedSummary:
    import_existing(existing, out, normalize=recipe.embed.normalize, max_bad_share=recipe.embed.max_bad_share)
    store = EmbeddingStore.open(out)
    if recipe.pairs.source:
        pairs = _open_pairs(folder, recipe)
        rows = join(pairs.keys(0, len(pairs)), store, max_absent_share=recipe.pairs.max_bad_share)
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
    )


def _open_pairs(folder: RunFolder, recipe: Recipe) -> Pairs:
    return open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)


@contextlib.contextmanager
def _room_on_disk(out: Path, writer: StoreWriter, pairs: Pairs, *, dim: int) -> Iterator[None]:
    """Refuse to start if the disk has no room for the rest of the store; say what is kept if writing fails later."""

    def needed() -> int:
        return (len(pairs) - writer.rows) * dim * 2 * 2  # float16; image and first caption

    free = shutil.disk_usage(out).free
    if free < needed():
        raise RunError(
            f"{out}: {units.size(needed())} are needed for the embeddings, but {units.size(free)} are free.",
            fix="Free some room, or use a run folder on another disk.",
        )

    def what() -> str:
        done, room = len(writer.shards), units.size(max(needed(), 1_000_000))
        return f" after {done:,} of {len(pairs.shards):,} shards; the others take {room}"

    with os_errors.explained(out, what=what, kept="The finished shards are kept."):
        yield
