"""What `clip-cid run` would refuse, sooner or later: settings, pairs and files that do not fit each other."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from clip_cid.auto_numbers import Settled, settle
from clip_cid.data.balance.decisions import read_decisions
from clip_cid.data.balance.kept_file import read_kept_elsewhere
from clip_cid.data.embeddings.files import STORE_FILE, read_info
from clip_cid.data.embeddings.importing import check_views, in_order_of, keys_of
from clip_cid.data.embeddings.layouts import find_embeddings
from clip_cid.data.embeddings.rows_of_pairs import KeysOf, refuse_other_keys, rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_npy
from clip_cid.data.pairs.crops import views_of
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.data.sets.evaluation_sets import MissingSetError, open_set
from clip_cid.data.text_files import read_text_lines
from clip_cid.errors import ClipCidError, ConfigError, DataError
from clip_cid.evaluation.near_sets import find_sets
from clip_cid.made_from import Origins
from clip_cid.method.balance.semantic_balance import BalanceRule
from clip_cid.models.loading import known_architecture
from clip_cid.models.teacher import teacher_reference
from clip_cid.pipeline import State, active_stages, require_extras
from clip_cid.recipe import DistillConfig, Recipe, auto_settings, settled
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE, CLUSTER, EMBED, TEXTS
from clip_cid.stages.cluster import OF_TEXTS, read_clusters
from clip_cid.training.assemble import (
    count_steps,
    largest_epoch,
    make_student,
    read_inputs,
    refuse_too_many_labels,
    split_off,
)
from clip_cid.training.join import plain_pairs, read_kept, refuse_readers_of_captions
from clip_cid.training.kept_texts import text_tower_reference
from clip_cid.training.optimizer import refuse_long_warmup
from clip_cid.training.ranks.distributed import ALONE
from clip_cid.training.ranks.parallel import with_joint_statistics

_MOST_KEYS = 1 << 24  # that are compared in memory, at some 100 bytes each


@dataclass(frozen=True)
class _Images:
    """The images that balance and cluster will see, as far as is known before they run."""

    rows: int
    """Of the embedding store."""
    most: int
    """How many can be kept."""
    has_texts: bool
    dim: int | None = None
    """Of their embeddings, if these are there."""
    captions: int | None = None
    """How many captions they have at most, if that is known."""
    kept: bool = False
    """Whether `most` are those that were kept."""


def find_misfits(folder: RunFolder, recipe: Recipe, missing: Sequence[State]) -> tuple[list[ClipCidError], list[str]]:
    """All of them that are known before the training is tried; and what evaluate would leave out with a warning.

    Args:
        folder: The run, which is only read.
        recipe: The settings.
        missing: The stages before the training that are to run.
    """
    found: list[ClipCidError] = []
    names = {state.stage.name for state in missing}
    images: _Images | None = None

    # The pairs, and how many images the first missing stage has.
    if names:
        _check_pairs(folder, recipe, found)
        with noted(found):
            images = _images(folder, recipe, names, found)

    # Each stage that is to run.
    if images is not None and EMBED in names:
        with noted(found):
            _check_texts(recipe, images)
    if EMBED in names:
        with noted(found):
            _check_text_tower(recipe)
    if images is not None and BALANCE in names:
        with noted(found):
            _check_balance(folder, recipe, images, embedded=EMBED not in names)
    if images is not None and CLUSTER in names:
        _check_clusters(recipe, images, found)
        with noted(found):
            _check_head(recipe)
        with noted(found):
            _check_labels(recipe)
    if TEXTS in names:
        with noted(found):
            read_text_lines(recipe.distill.text_files, setting="distill.texts")
    with noted(found):
        require_extras(RunFolder(folder.path, read_only=True), recipe)
    left_out = _check_evaluation(recipe, found)
    return found, left_out


def settle_for(folder: RunFolder, recipe: Recipe, missing: Sequence[State]) -> Settled:
    """The recipe with a number for each `auto`; if the kept pairs are not known yet, as if all were kept.

    Args:
        folder: The run, which is only read.
        recipe: The settings.
        missing: The stages before the training that are to run.
    """
    names = {state.stage.name for state in missing}
    if not names & {EMBED, BALANCE}:
        settled = Origins(folder, recipe, active_stages(recipe)).settled()
        if not auto_settings(settled.recipe):
            return settled

    with contextlib.suppress(ClipCidError):  # which is said by those who need the pairs
        if (images := _images(folder, recipe, names)) is not None:
            return settle(recipe, images.most)
    return settle(recipe, 0)


def of_training(folder: RunFolder, recipe: Recipe, missing: Sequence[State], width: int | None) -> list[ClipCidError]:
    """What else stands against a training that cannot be tried, and so was not seen there.

    Args:
        folder: The run, which is only read.
        recipe: The settings.
        missing: The stages before the training that are to run.
        width: Of the teacher's embeddings, if it is known.
    """
    found: list[ClipCidError] = []
    if not missing:
        with noted(found):
            inputs = read_inputs(folder, recipe, ALONE)
            _check_length(recipe.distill, inputs.pairs.epoch_size(recipe.distill.per_cluster))
    with noted(found):
        student = make_student(recipe.distill, width, recipe.machine)
        with_joint_statistics(student.model.train(), ALONE, recipe.machine.micro_batch)
    return found


def raise_together(found: Sequence[ClipCidError]) -> None:
    """Raise the only one as it is, or one error that lists all."""
    found = _different(found)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = (f"{error.problem}\n    {error.fix}" for error in found)
        raise ConfigError(
            "\n  ".join([f"check: {len(found)} problems, each of which stops the run", *lines]),
            fix="Mend them all, and check again.",
        )


@contextlib.contextmanager
def noted(found: list[ClipCidError]) -> Iterator[None]:
    """An error of ours inside is put on the list."""
    try:
        yield
    except ClipCidError as error:
        found.append(error)


def _different(found: Sequence[ClipCidError]) -> list[ClipCidError]:
    return list({error.problem: error for error in found}.values())


def _check_pairs(folder: RunFolder, recipe: Recipe, found: list[ClipCidError]) -> None:
    """The numbers of a training on all pairs; balance leaves fewer."""
    with noted(found):
        pairs = _pairs(folder, recipe)
        if not pairs.may_have_captions:
            with noted(found):
                refuse_readers_of_captions(recipe, len(pairs))
        training = plain_pairs(pairs)
        with noted(found):
            training, _ = split_off(training, recipe.distill, ALONE)
        _check_length(recipe.distill, largest_epoch(recipe, len(training)))


def _check_length(settings: DistillConfig, epoch_pairs: int) -> None:
    refuse_long_warmup(settings, count_steps(settings, epoch_pairs))


def _images(
    folder: RunFolder, recipe: Recipe, missing: set[str], found: list[ClipCidError] | None = None
) -> _Images | None:
    """None without a teacher. Keys that do not match are noted, if `found` is given."""
    if not recipe.has_teacher:
        return None

    if EMBED not in missing:
        store = EmbeddingStore.open(folder.stage(EMBED))
        balanced = recipe.balance.enabled and BALANCE not in missing
        kept = read_kept(folder, store) if balanced else np.flatnonzero(store.ok)
        return _of_store(store, kept, balanced or not recipe.balance.enabled)

    existing = recipe.embed.existing
    if existing is None:
        pairs = _pairs(folder, recipe)
        return _Images(len(pairs), len(plain_pairs(pairs)), has_texts=True)
    if (existing / STORE_FILE).is_file():
        store = EmbeddingStore.open(existing)
        check_views(existing, store.info.views, views_of(recipe.embed))
        if found is not None and recipe.pairs.source:
            with noted(found):
                rows_in_store(_pairs(folder, recipe), store, max_absent_share=recipe.pairs.max_bad_share)
        return _of_store(store, np.flatnonzero(store.ok), not recipe.balance.enabled)
    check_views(existing, None, views_of(recipe.embed))
    shards = find_embeddings(existing)
    rows = sum(shard.image.rows for shard in shards)
    if recipe.embed.match == "order":
        in_order_of(shards, _pairs(folder, recipe), existing)
    elif found is not None and recipe.pairs.source and rows <= _MOST_KEYS:
        with noted(found):
            _check_keys(_pairs(folder, recipe), keys_of(existing, shards), recipe)
    has_texts = all(shard.text is not None for shard in shards)
    return _Images(rows, rows, has_texts, captions=rows if has_texts else None)


def _pairs(folder: RunFolder, recipe: Recipe) -> Pairs:
    return open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)


def _check_keys(pairs: Pairs, keys: KeysOf, recipe: Recipe) -> None:
    if len(pairs) <= _MOST_KEYS:
        refuse_other_keys(pairs, keys, max_absent_share=recipe.pairs.max_bad_share)


def _of_store(store: EmbeddingStore, kept: Int[np.ndarray, " kept"], are_kept: bool) -> _Images:
    captions = int(store.num_captions[kept].sum()) if store.has_texts else None
    return _Images(store.rows, len(kept), store.has_texts, store.dim, captions, are_kept)


def _check_texts(recipe: Recipe, images: _Images) -> None:
    if recipe.cluster.texts and recipe.uses(CLUSTER) and not images.has_texts:
        raise ConfigError(
            f"cluster.texts: true, but {recipe.embed.existing} has images only.",
            fix="Give embeddings of the captions too, or set cluster.texts: false.",
        )
    if recipe.uses_teacher_texts and not images.has_texts:
        raise ConfigError(
            f"distill.weights: a loss reads the teacher's texts, but {recipe.embed.existing} has images only.",
            fix="Give embeddings of the captions too, or set the weights of those losses to 0.",
        )


def _check_text_tower(recipe: Recipe) -> None:
    """The teacher whose text tower is kept is named, and its architecture is known."""
    if not (recipe.distill.keeps_text_tower and recipe.has_teacher):
        return
    existing = recipe.embed.existing
    if existing is None:
        teacher: dict[str, Any] = {"reference": teacher_reference(recipe.embed), "model_cfg": None}
    else:
        teacher = read_info(existing).teacher if (existing / STORE_FILE).is_file() else {"reference": str(existing)}
    known_architecture(text_tower_reference(recipe.distill, teacher))


def _check_balance(folder: RunFolder, recipe: Recipe, images: _Images, *, embedded: bool) -> None:
    settings = recipe.balance
    if settings.existing is not None:
        ok = EmbeddingStore.open(folder.stage(EMBED)).ok if embedded else np.ones(images.rows, dtype=bool)
        read_kept_elsewhere(settings.existing, ok)
        return

    try:
        BalanceRule(
            settings.threshold,
            settings.metric,
            settings.max_threshold,
            settings.target_removed,
            max_radius=settings.max_radius,
        )
    except ValueError as error:
        raise ConfigError(f"balance: {error}", fix="Give distances on the scale of balance.metric.") from error
    if "best_caption" in settings.keep and not images.has_texts:
        raise ConfigError(
            "balance.keep: best_caption needs embeddings of captions.", fix="Set balance.keep: nearest_centroid."
        )
    if settings.decisions is not None:
        read_decisions(settings.decisions)
    for path in settings.protected_lists:
        read_text_lines([path], setting="balance.protect")
    find_sets(settings.against, recipe)
    if settings.grow_from is not None and not settings.grow_from.is_dir():
        raise DataError(
            f"balance.grow_from: {settings.grow_from} is no folder.", fix="Name the folder RUN/balance of a run."
        )


def _check_clusters(recipe: Recipe, images: _Images, found: list[ClipCidError]) -> None:
    settings = recipe.cluster
    if settings.existing is not None:
        with noted(found):
            _check_clusters_elsewhere(settings.existing, settings.texts, images)
        return

    wanted = [("num_centers", settled(settings.num_centers), images.most, "images are kept", "images")]
    if settings.texts and images.captions is not None:
        wanted.append(("num_text_centers", settings.text_centers, images.captions, "captions are kept", "captions"))
    for setting, centers, most, are_kept, rows in wanted:
        if centers > most:
            found.append(
                ConfigError(
                    f"cluster.{setting}: {centers:,} centers, but at most {most:,} {are_kept}.",
                    fix=f"Set cluster.{setting} to {max(1, most // 20):,} or so (20 {rows} a cluster).",
                )
            )


def _check_clusters_elsewhere(existing: Path, texts: bool, images: _Images) -> None:
    """They can be read; and they are of the kept images, if it is known which these are."""
    if images.kept and images.dim is not None:
        read_clusters(existing, dim=images.dim, kept=images.most)
        if texts and images.captions is not None:
            read_clusters(existing, dim=images.dim, kept=images.captions, prefix=OF_TEXTS)
        return

    of_texts = ("text_centers.npy", "text_labels.npy") if texts else ()
    for name in ("centers.npy", "labels.npy", *of_texts):
        try:
            read_npy(existing / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            made_with = " with cluster.texts: true" if name in of_texts else ""
            raise DataError(
                f"{existing}: cannot read {name} ({error}).", fix=f"Give the cluster folder of a run{made_with}."
            ) from error


def _check_head(recipe: Recipe) -> None:
    perplexity = recipe.distill.head_perplexity
    if perplexity is not None and (centers := _num_centers(recipe)) is not None and perplexity >= centers:
        raise ConfigError(
            f"distill.head_perplexity: {perplexity:g} likely centers, but there are only {centers:,}.",
            fix="Choose a smaller one, or leave it out and set distill.head_scale.",
        )


def _check_labels(recipe: Recipe) -> None:
    if recipe.uses_several_labels and (centers := _num_centers(recipe)) is not None:
        refuse_too_many_labels(recipe.distill, centers)


def _num_centers(recipe: Recipe) -> int | None:
    """None if they are elsewhere and cannot be read, which is said elsewhere."""
    existing = recipe.cluster.existing
    if existing is None:
        return settled(recipe.cluster.num_centers)
    try:
        return len(read_npy(existing / "centers.npy", mmap_mode="r"))
    except (OSError, ValueError, TypeError):
        return None


def _check_evaluation(recipe: Recipe, found: list[ClipCidError]) -> list[str]:
    """Sets and models that evaluate would refuse, after hours; returns the missing sets, which it leaves out."""
    settings = recipe.evaluate
    left_out: list[str] = []
    for name, where in settings.sets.items():
        with noted(found):
            try:
                _open_set(name, where, recipe)
            except MissingSetError as error:
                left_out.append(error.problem)
    for name, source in settings.retrieval.items():
        try:
            find_sources(recipe.pairs.model_copy(update={"source": source}))
        except ClipCidError as error:
            left_out.append(f"evaluate.retrieval.{name}: {error.problem}")
    for name, reference in settings.compare.items():
        try:
            known_architecture(reference)
        except ClipCidError as error:
            found.append(DataError(f"evaluate.compare.{name}: {error.problem}", fix=error.fix))

    if left_out and len(left_out) == len(settings.sets) + len(settings.retrieval):
        found.append(
            DataError(
                f"evaluate: none of {len(left_out)} sets exists ({'; '.join(left_out)}).",
                fix="Name sets that exist in evaluate.sets or evaluate.retrieval; builtin:digits always does.",
            )
        )
    return left_out


def _open_set(name: str, where: str, recipe: Recipe) -> None:
    cache_dir = recipe.machine.cache_dir
    test = open_set(name, where, max_pixels=recipe.pairs.max_pixels, splits=("test",), cache_dir=cache_dir)
    if recipe.evaluate.zero_shot:
        test.prompts(0)
