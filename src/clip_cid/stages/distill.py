"""Train the student: CLIP loss, cluster-level and instance-level distillation (paper sections 3.2 and 3.3)."""

import dataclasses
import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int

from clip_cid import log
from clip_cid.data.embeddings import EmbeddingStore, rows_in_store
from clip_cid.data.evaluation_sets import open_set
from clip_cid.data.pairs import BadSample, Pairs, open_pairs
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.cluster_distillation import Shard, calibrated_scale
from clip_cid.method.fused_cluster_loss import soft_centers
from clip_cid.method.objective import Objective
from clip_cid.models.device import resolve_device
from clip_cid.models.export import export_student, usage
from clip_cid.models.student import Clip, build_student, keep_fewer_activations, train_transform
from clip_cid.models.teacher import weights_sha256
from clip_cid.recipe import DistillConfig, MachineConfig, Recipe
from clip_cid.run_folder import RunFolder, read_json, write_json
from clip_cid.training.batches import Batches, PairDataset, TrainingPairs, unit_teacher_rows
from clip_cid.training.distributed import Ranks, join_ranks
from clip_cid.training.loop import CHECKPOINTS, Plan, Trainer
from clip_cid.training.model import Distillation
from clip_cid.training.parallel import with_joint_statistics
from clip_cid.training.soft_targets import soft_targets
from clip_cid.training.validation import HeldOut, Validation, hold_out

_DONE = "summary.json"
_SOFT = "soft_centers"
_COMPARED_CAPTIONS = 100
_ASKED = 512  # teacher embeddings that tell the perplexity: its mean is then known to a few percent


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Train on the kept pairs and export; writes `student/`, `metrics.jsonl`, `skipped.jsonl` and `summary.json`.

    Under torchrun every process calls this; the first one keeps the records and exports.
    """
    machine = recipe.machine
    if machine.threads:
        torch.set_num_threads(machine.threads)
    with join_ranks(resolve_device(machine.device)) as ranks:
        refuse_without_float64(ranks.device, recipe)
        if ranks.all((out / _DONE).is_file())[0]:
            return _finish(folder, out) if ranks.is_first else {}
        work = prepare(folder, out, recipe, ranks)
        summary = {**work.trainer.run(), **work.teaching.summary}
        state, beside = work.trainer.student_state(), work.trainer.objective_state()
        if ranks.is_first:
            _leave(work, out, recipe, summary, state, beside)
        ranks.wait()
    return _finish(folder, out) if ranks.is_first else {}


@dataclasses.dataclass(frozen=True)
class Work:
    """All that a training consists of, checked and ready for its first step."""

    clip: Clip
    training: TrainingPairs
    store: EmbeddingStore | None
    teaching: "Teaching"
    trainer: Trainer


def prepare(folder: RunFolder, out: Path, recipe: Recipe, ranks: Ranks, *, soft_centers: bool = True) -> Work:
    """Open and check everything, join it and build the student; nothing has been learned yet.

    Args:
        folder: With the stages before this one.
        out: Where the training works.
        recipe: The settings.
        ranks: Who trains together.
        soft_centers: Whether to compute these now, where the training uses them: it takes a pass over all images.

    Raises:
        ConfigError: Settings do not fit each other or the data.
        DataError: The data contradict themselves or each other.
        RunError: A stage before this one has not finished, or ranks differ.
    """
    settings, machine = recipe.distill, recipe.machine
    with ranks.first_alone():
        pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=machine.cache_dir)
    store = EmbeddingStore.open(folder.stage("embed")) if recipe.has_teacher else None
    training = plain_pairs(pairs) if store is None else distilled_pairs(folder, recipe, pairs, store)
    centers = read_centers(folder, store) if store is not None and recipe.uses_clusters else None
    held_out: HeldOut | None = None
    if share := settings.validation.share:
        training, held_out = hold_out(training, share, batch_size=settings.batch_size, ranks=ranks.size)
    steps = count_steps(settings, len(training))
    teacher_dim = store.dim if store is not None else None
    clip = make_student(settings, teacher_dim, machine)
    teaching = read_teacher(settings, training, store, centers)
    objective = make_objective(settings, clip, teacher_dim, centers, scale=teaching.scale, ranks=ranks)
    model = Distillation(clip.model, objective, lock=settings.lock).train()  # but for the tower that is locked
    model.student = with_joint_statistics(model.student, ranks, machine.micro_batch)
    if centers is not None and training.labels is not None:
        _tell_negatives(settings, training.labels, len(centers))
    key = _key(settings, training, store, centers)
    ranks.agree("data or settings", key)
    ranks.agree("weights", weights_sha256(clip.model) if ranks.size > 1 else None)
    if soft_centers and centers is not None and uses_soft_centers(settings):
        with ranks.first_alone():
            training = with_soft_centers(training, centers, settings, out / _SOFT, teaching.scale, key, ranks.device)
    batches = make_batches(training, clip, recipe, ranks)
    validation = _validation(clip, held_out, recipe, ranks)
    trainer = Trainer(
        model,
        batches,
        settings,
        Plan(steps, key, recipe.pairs.max_bad_share),
        out=out,
        ranks=ranks,
        machine=machine,
        validation=validation,
    )
    return Work(clip, training, store, teaching, trainer)


def make_batches(training: TrainingPairs, clip: Clip, recipe: Recipe, ranks: Ranks) -> Batches:
    """The batches the student learns from."""
    settings = recipe.distill
    transform = train_transform(clip, crop_scale=settings.crop_scale, more=settings.augmentation)
    return Batches(
        training,
        _dataset(training, clip, recipe, transform),
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=recipe.machine.workers,
        pin=ranks.device.type == "cuda",
        ranks=ranks,
    )


def _validation(clip: Clip, held_out: HeldOut | None, recipe: Recipe, ranks: Ranks) -> Validation | None:
    """What to measure on the way; sets are opened now, so that a missing one is told before the first step."""
    settings = recipe.distill
    if not settings.validation.measures:
        return None
    sets = [
        open_set(name, where, max_pixels=recipe.pairs.max_pixels, splits=("test",))
        for name, where in settings.validation.sets.items()
    ]
    for labelled in sets:
        labelled.prompts(0)
    batches = None
    if held_out is not None:
        batches = Batches(
            held_out.pairs,
            _dataset(held_out.pairs, clip, recipe, clip.preprocess),
            batch_size=held_out.batch_size,
            seed=settings.seed,
            workers=recipe.machine.workers,
            pin=ranks.device.type == "cuda",
            ranks=ranks,
        )
    return Validation(clip, batches, sets, settings.weights.model_dump(), settings.seed, ranks)


def _dataset(training: TrainingPairs, clip: Clip, recipe: Recipe, transform: Any) -> PairDataset:
    return PairDataset(
        training,
        transform=transform,
        tokenizer=clip.tokenizer,
        max_pixels=recipe.pairs.max_pixels,
        seed=recipe.distill.seed,
    )


def _leave(
    work: Work,
    out: Path,
    recipe: Recipe,
    summary: dict[str, Any],
    state: dict[str, torch.Tensor],
    beside: dict[str, torch.Tensor],
) -> None:
    """Export the student with its final weights, in a model that knows nothing of ranks."""
    teacher_dim = work.store.dim if work.store is not None else None
    clip = make_student(recipe.distill, teacher_dim, recipe.machine.model_copy(update={"grad_checkpointing": False}))
    clip.model.load_state_dict(state)
    clip.model.eval()
    teacher = work.store.info.teacher if work.store is not None else None
    export_student(
        clip,
        out / "student",
        head_state=beside,
        provenance=_provenance(recipe, summary["steps"], summary["pairs_seen"], teacher),
    )
    device = str(work.trainer.ranks.device)
    write_json(out / _DONE, {**summary, "parameters": count_parameters(clip.model), "device": device})


def refuse_without_float64(device: torch.device, recipe: Recipe) -> None:
    """The divergences add up in float64, which Apple's devices do not have.

    Raises:
        ConfigError: The recipe has cluster losses or the affinity loss, and the device is one of these.
    """
    if device.type == "mps" and (recipe.uses_clusters or recipe.distill.weights.affinity > 0):
        raise ConfigError(
            "machine.device: mps has no float64, in which the cluster and affinity losses are added up.",
            fix="Set machine.device: cpu, or distill.weights.cluster_cls, cluster_kl and affinity to 0.",
        )


def _finish(folder: RunFolder, out: Path) -> dict[str, Any]:
    """The export is there: only now may the checkpoints go, so that no kill can lose the training."""
    if (out / CHECKPOINTS).exists():
        shutil.rmtree(out / CHECKPOINTS)
    shutil.rmtree(out / _SOFT, ignore_errors=True)
    log.info(usage(folder.path / "distill" / "student"))
    return read_json(out / _DONE)


def plain_pairs(pairs: Pairs) -> TrainingPairs:
    """All pairs, for plain CLIP training without a teacher."""
    rows = np.setdiff1d(np.arange(len(pairs)), np.fromiter(pairs.known_bad, dtype=np.int64))
    return TrainingPairs(pairs, rows, left_out=dict(pairs.known_bad))


def distilled_pairs(folder: RunFolder, recipe: Recipe, pairs: Pairs, store: EmbeddingStore) -> TrainingPairs:
    """The kept pairs, joined by key with what the teacher and the clustering say about them; checked before any step.

    Raises:
        DataError: The pairs, the embeddings, the kept rows and the labels do not belong together, or a loss needs the
            teacher's texts where the store has images only.
    """
    texts = recipe.uses_teacher_texts
    if texts:
        _ = store.texts  # refuses a store without them now, not at the first step
    kept = read_kept(folder, store) if recipe.balance.enabled else np.flatnonzero(store.ok)
    place = np.full(store.rows + 1, -1, dtype=np.int64)  # the last entry answers for -1, a pair the store does not have
    place[kept] = np.arange(len(kept))
    found = rows_in_store(pairs, store)
    places = place[found]
    places[np.fromiter(pairs.known_bad, dtype=np.int64)] = -1
    rows = np.flatnonzero(places >= 0)
    if len(rows) < len(kept):
        log.warn(
            f"{len(kept) - len(rows):,} of {len(kept):,} kept images are not among the pairs; trained without them"
        )
    labels = read_labels(folder, len(kept))[places[rows]] if recipe.uses_clusters else None
    if not (recipe.uses_teacher_images or texts or recipe.distill.head_perplexity):
        return TrainingPairs(pairs, rows, labels=labels)
    num_captions = store.num_captions[found[rows]] if texts else None
    if texts:
        _compare_captions(pairs, rows, store, found[rows])
    return TrainingPairs(pairs, rows, labels, store, found[rows], num_captions)


def read_kept(folder: RunFolder, store: EmbeddingStore) -> Int[np.ndarray, " kept"]:
    """Rows of the store that balance kept.

    Raises:
        DataError: They are not rows of this store that have embeddings.
    """
    path = folder.stage("balance") / "kept.npy"
    kept = np.load(path, allow_pickle=False)
    if kept.ndim != 1 or kept.dtype != np.int64 or not len(kept) or kept[0] < 0 or kept[-1] >= store.rows:
        raise DataError(f"{path}: not rows of a store of {store.rows:,}.", fix="Run the balance stage again.")
    if (np.diff(kept) <= 0).any() or not store.ok[kept].all():
        raise DataError(f"{path}: not ascending rows that have embeddings.", fix="Run the balance stage again.")
    return kept


def read_labels(folder: RunFolder, num_kept: int) -> Int[np.ndarray, " kept"]:
    """The cluster of each kept image.

    Raises:
        DataError: There is not one label for each.
    """
    path = folder.stage("cluster") / "labels.npy"
    labels = np.load(path, allow_pickle=False)
    if labels.shape != (num_kept,):
        raise DataError(
            f"{path}: {labels.size:,} labels, but {num_kept:,} images were kept.", fix="Run the cluster stage again."
        )
    return labels


def read_centers(folder: RunFolder, store: EmbeddingStore) -> Float[np.ndarray, "centers dim"]:
    """The cluster centers, in the teacher's space.

    Raises:
        DataError: They are of another width, or the labels name others.
    """
    path = folder.stage("cluster") / "centers.npy"
    centers = np.load(path, allow_pickle=False)
    again = "Run the cluster stage again, on these embeddings."
    if centers.ndim != 2 or centers.shape[1] != store.dim:
        raise DataError(f"{path}: shape {centers.shape}, but embeddings of width {store.dim}.", fix=again)
    if not (np.abs(np.linalg.norm(centers, axis=1) - 1) <= 1e-2).all():  # also false for NaN
        raise DataError(f"{path}: not all centers are unit vectors.", fix=again)
    labels = np.load(path.with_name("labels.npy"), allow_pickle=False)
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(centers)):
        raise DataError(f"{path}: {len(centers):,} centers, but labels up to {labels.max():,}.", fix=again)
    return centers.astype(np.float32)


def count_steps(settings: DistillConfig, num_pairs: int) -> int:
    """How many full batches the epochs hold together; what is left at the end of one opens the next.

    Raises:
        ConfigError: There are not enough pairs for one batch.
    """
    if settings.batch_size > num_pairs:
        raise ConfigError(
            f"distill.batch_size: {settings.batch_size:,}, but there are {num_pairs:,} pairs to train on.",
            fix=f"Set distill.batch_size to at most {num_pairs:,}, or give more pairs.",
        )
    return settings.steps or settings.epochs * num_pairs // settings.batch_size


def make_student(settings: DistillConfig, teacher_dim: int | None, machine: MachineConfig) -> Clip:
    """The student, on the CPU; as wide as the teacher when it is to meet it without a map."""
    width = teacher_dim if settings.alignment == "native" else None
    clip = build_student(
        settings.student,
        embed_dim=width,
        pretrained=settings.pretrained,
        seed=settings.seed,
        with_bias=settings.weights.siglip > 0,
    )
    if settings.lock != "none" and settings.pretrained is None:
        raise ConfigError(
            f"distill.lock: {settings.lock}, but nothing is loaded, so the tower would stay at random weights.",
            fix="Set distill.pretrained, or distill.lock: none.",
        )
    if machine.grad_checkpointing:
        keep_fewer_activations(clip)
    return clip


@dataclasses.dataclass(frozen=True)
class Teaching:
    """How sharply the teacher sees the centers."""

    scale: float
    """sigma."""
    perplexity: float | None
    """How many centers the teacher finds likely for an image, on average; None without clusters."""

    @property
    def summary(self) -> dict[str, float]:
        return {} if self.perplexity is None else {"head_scale": self.scale, "teacher_perplexity": self.perplexity}


def read_teacher(
    settings: DistillConfig,
    training: TrainingPairs,
    store: EmbeddingStore | None,
    centers: Float[np.ndarray, "centers dim"] | None,
) -> Teaching:
    """Sigma, as it is set or calibrated to `head_perplexity`, and the teacher's perplexity over all centers with it.

    Raises:
        ConfigError: No sigma gives the perplexity asked for.
    """
    if store is None or centers is None or training.store_rows is None:
        return Teaching(settings.head_scale, None)
    asked = np.unique(np.linspace(0, len(training) - 1, _ASKED).astype(np.int64))
    rows = training.store_rows[asked]
    teacher, table = unit_teacher_rows(store.images[rows], rows, "image"), torch.from_numpy(centers)
    scale = settings.head_scale
    if settings.head_perplexity is not None:
        try:
            scale = calibrated_scale(teacher, table, perplexity=settings.head_perplexity)
        except ValueError as error:
            raise ConfigError(
                f"distill.head_perplexity: {error}.", fix="Choose another, or leave it out and set distill.head_scale."
            ) from error
    softened = soft_centers(teacher, table, scale=scale, temperature=settings.temperature)
    found = Teaching(scale, float(softened.entropy.mean().exp()))
    log.info(
        f"distill   the teacher finds {found.perplexity:,.4g} of {len(centers):,} centers likely for an image"
        f" (perplexity, at sigma {scale:.4g} and temperature {settings.temperature:g})"
    )
    return found


def uses_soft_centers(settings: DistillConfig) -> bool:
    """Whether all that `L_kl` needs of the teacher can be computed once: all centers take part, and none moves."""
    return settings.weights.cluster_kl > 0 and settings.head_lr == 0 and settings.sample_rate == 1


def with_soft_centers(
    training: TrainingPairs,
    centers: Float[np.ndarray, "centers dim"],
    settings: DistillConfig,
    folder: Path,
    scale: float,
    key: str,
    device: torch.device,
) -> TrainingPairs:
    """The same pairs with the teacher's soft centers, computed or taken up from a killed attempt."""
    if training.store is None or training.store_rows is None:
        return training
    found = soft_targets(
        folder,
        training.store.images,
        training.store_rows,
        centers,
        scale=scale,
        temperature=settings.temperature,
        key=key,
        device=device,
    )
    return dataclasses.replace(training, soft_centers=found)


def make_objective(
    settings: DistillConfig,
    clip: Clip,
    teacher_dim: int | None,
    centers: Float[np.ndarray, "centers dim"] | None,
    *,
    scale: float,
    ranks: Ranks,
) -> Objective:
    """What learns beside the student. A head that learns is spread over the ranks: its gradient then stays where it is."""
    shard = None
    if centers is not None and settings.head_lr > 0 and ranks.size > 1:
        first, stop = Shard.bounds(len(centers), ranks.rank, ranks.size)
        shard, centers = Shard(first, len(centers), dist.distributed_c10d._get_default_group()), centers[first:stop]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # for the maps of `alignment: linear`
        return Objective(
            weights=settings.weights.model_dump(),
            student_dim=clip.dim,
            teacher_dim=teacher_dim,
            alignment=settings.alignment,
            centers=torch.from_numpy(centers) if centers is not None else None,
            shard=shard,
            head_scale=scale,
            train_head=settings.head_lr > 0,
            sample_rate=settings.sample_rate,
            logq=settings.logq,
            temperature=settings.temperature,
            teacher_scale=settings.teacher_scale,
            affinity_scale=settings.affinity_scale,
            share_scale=settings.share_scale,
        )


def distinct_labels(labels: Int[np.ndarray, " rows"], batch_size: int) -> float:
    """How many different clusters a random batch has on average."""
    shares = np.bincount(labels) / len(labels)
    return float((1 - (1 - shares) ** batch_size).sum())


def count_parameters(student: torch.nn.Module) -> dict[str, int]:
    """Numbers in the image tower, and in everything else, which is the text's."""
    image = sum(value.numel() for name, value in student.named_parameters() if name.startswith("visual."))
    return {"image": image, "text": sum(value.numel() for value in student.parameters()) - image}


def _tell_negatives(settings: DistillConfig, labels: Int[np.ndarray, " rows"], num_centers: int) -> None:
    """Say once when the centers of the batch fill the sample, so that no random negatives take part."""
    quota, own = round(settings.sample_rate * num_centers), distinct_labels(labels, settings.batch_size)
    if quota <= own:
        log.info(
            f"distill.sample_rate {settings.sample_rate:g} is {quota:,} of {num_centers:,} centers a step, but a batch of "
            f"{settings.batch_size:,} holds {own:,.0f} of them by itself: its own centers are the only negatives"
        )


def _compare_captions(
    pairs: Pairs, rows: Int[np.ndarray, " rows"], store: EmbeddingStore, store_rows: Int[np.ndarray, " rows"]
) -> None:
    """Look into some pairs: their captions must be the ones the teacher has read."""
    for index in np.unique(np.linspace(0, len(rows) - 1, min(_COMPARED_CAPTIONS, len(rows))).astype(np.int64)):
        try:
            ours = pairs.read(int(rows[index])).captions
        except BadSample:
            continue  # met again in training, where it is counted
        embedded = store.captions(int(store_rows[index]))[: int(store.num_captions[store_rows[index]])]
        theirs = tuple(caption.strip() for caption in embedded)
        if ours[: len(theirs)] != theirs:
            raise DataError(
                f"{pairs.key(int(rows[index]))!r} has the caption {ours[0]!r}, but its embedding is of {theirs[0]!r}.",
                fix="The captions changed after they were embedded; run the embed stage on these pairs.",
            )


def _key(
    settings: DistillConfig,
    training: TrainingPairs,
    store: EmbeddingStore | None,
    centers: Float[np.ndarray, "centers dim"] | None,
) -> str:
    """Digest of everything that decides the result."""
    digest = hashlib.sha256(json.dumps(settings.model_dump(mode="json"), sort_keys=True).encode())
    for rows in (training.rows, training.labels, training.store_rows, centers):
        digest.update(
            b"none" if rows is None else np.ascontiguousarray(rows).data
        )  # not a copy: centers may be gigabytes
    digest.update(json.dumps(store.info.teacher if store is not None else None, sort_keys=True).encode())
    return digest.hexdigest()


def _provenance(recipe: Recipe, steps: int, pairs_seen: int, teacher: dict[str, Any] | None) -> dict[str, Any]:
    """How the student came to be, for its folder."""
    packages = ("clip-cid", "torch", "open_clip_torch")
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"machine"}),
        "steps": steps,
        "pairs_seen": pairs_seen,
        "teacher": teacher,
        "versions": {package: metadata.version(package) for package in packages},
    }
