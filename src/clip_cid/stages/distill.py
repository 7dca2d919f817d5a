"""Train the student: CLIP loss, cluster-level and instance-level distillation (paper sections 3.2 and 3.3)."""

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_cid import log
from clip_cid.models.costs import count_parameters
from clip_cid.models.device import resolve_device
from clip_cid.models.export import export_student, usage
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, read_json, write_json
from clip_cid.stage_names import DISTILL
from clip_cid.summaries import DistillSummary, read_summary
from clip_cid.training.assemble import LABELS, SOFT_CENTERS, Training, make_student, prepare, refuse_without_float64
from clip_cid.training.loop import CHECKPOINTS
from clip_cid.training.ranks.distributed import join_ranks

_DONE = "summary.json"


def run(folder: RunFolder, out: Path, recipe: Recipe) -> DistillSummary | None:
    """Train on the kept pairs and export; writes `student/`, `metrics.jsonl`, `skipped.jsonl` and `summary.json`.

    Under torchrun every process calls this. The main process keeps the records and exports; it alone has a summary.
    """
    machine = recipe.machine
    if machine.threads:
        torch.set_num_threads(machine.threads)

    with join_ranks(resolve_device(machine.device)) as ranks:
        refuse_without_float64(ranks.device, recipe)
        if ranks.from_main(ranks.is_main and (out / _DONE).is_file()):
            return _finish(folder, out) if ranks.is_main else None

        training = prepare(folder, out, recipe, ranks)
        folder.accept()
        summary = {**training.trainer.run(), **training.sharpness.summary}
        if ranks.is_main:
            trainer = training.trainer
            _export(training, out, recipe, summary, trainer.student_state(), trainer.objective_state())
        ranks.wait()

    return _finish(folder, out) if ranks.is_main else None


def _export(
    training: Training,
    out: Path,
    recipe: Recipe,
    summary: dict[str, Any],
    student: dict[str, Tensor],
    beside: dict[str, Tensor],
) -> None:
    """Export the student with its final weights, in a plain model without ranks."""
    store = training.inputs.store
    machine = recipe.machine.model_copy(update={"grad_checkpointing": False})
    teacher_dim = store.dim if store is not None else None
    clip = make_student(recipe.distill, teacher_dim, machine, text_tower=training.text_tower)
    clip.model.load_state_dict(student)
    clip.model.eval()

    teacher = store.info.teacher if store is not None else None
    provenance = _provenance(recipe, summary["steps"], summary["pairs_seen"], teacher)
    export_student(clip, out / "student", head_state=beside, provenance=provenance)

    parameters = count_parameters(clip.model)
    write_json(out / _DONE, {**summary, "parameters": parameters, "device": str(training.trainer.ranks.device)})


def _finish(folder: RunFolder, out: Path) -> DistillSummary:
    """Remove the checkpoints; only after the export is complete, so that no kill can lose the training."""
    if (out / CHECKPOINTS).exists():
        shutil.rmtree(out / CHECKPOINTS)
    for first_pass in (SOFT_CENTERS, LABELS):
        shutil.rmtree(out / first_pass, ignore_errors=True)
    log.info(usage(folder.path / DISTILL / "student"))
    return read_summary(DistillSummary, read_json(out / _DONE))


def _provenance(recipe: Recipe, steps: int, pairs_seen: int, teacher: dict[str, Any] | None) -> dict[str, Any]:
    """How the student was made, for its folder."""
    packages = ("clip-cid", "torch", "open_clip_torch")
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"machine"}),
        "steps": steps,
        "pairs_seen": pairs_seen,
        "teacher": teacher,
        "versions": {package: metadata.version(package) for package in packages},
    }
