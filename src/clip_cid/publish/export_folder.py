"""A student as a folder of its own, with the forms that were wanted; all of it appears at once, or nothing."""

import contextlib
from pathlib import Path

from clip_cid import log, os_errors
from clip_cid.models.export import PARTS, copy_student, refuse_no_place, usage
from clip_cid.new_folder import new_folder
from clip_cid.publish import onnx_export, onnx_precision, transformers_export
from clip_cid.publish.finished_student import finished_student, local_parts
from clip_cid.publish.onnx_precision import Precision
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder


def export_folder(
    run: RunFolder, out: Path, recipe: Recipe, *, exact_onnx: bool, less: Precision | None, allowed: float, hf: bool
) -> str:
    """Export the student of a run; an earlier export at `out` is replaced when all parts of the new one hold.

    Args:
        run: Its distill stage must have finished.
        out: The folder.
        recipe: Of the run; read for `less` only.
        exact_onnx: Whether graphs in float32 are wanted.
        less: Of graphs in another precision, if these are wanted.
        allowed: Points that a score of these may drop by.
        hf: Whether a folder for transformers is wanted.

    Returns:
        The lines that load it.

    Raises:
        MissingExtraError: A form needs an extra that is not installed.
        ConfigError: `less` is wanted of a run without evaluation sets.
        RunError: `out` holds something else, or a form is refused; `out` is as it was then.
    """
    # What can be refused at once.
    student = finished_student(run)
    refuse_no_place(out)
    if exact_onnx:
        onnx_export.require_onnx()
    if less is not None:
        onnx_precision.require(less, recipe)
    if hf:
        transformers_export.require_transformers()
        transformers_export.refuse_unmapped(student)

    said: list[str] = []
    earlier = [name for name in PARTS if (out / name).exists()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(os_errors.explained(out))
        graphs = None
        if less is not None:
            graphs = stack.enter_context(onnx_precision.converted(run, student, recipe, less, allowed=allowed))

        part = stack.enter_context(new_folder(out))
        copy_student(student, part)
        if less is not None and graphs is not None:
            said.append(onnx_precision.place(graphs, part, out, less))
        if exact_onnx:
            gaps = onnx_export.export_onnx(part)
            said.append(f"# ONNX: {out / onnx_export.FOLDER}; largest difference to PyTorch: {_listed(gaps)}")
        if hf:
            gaps = transformers_export.export_transformers(part)
            loading = transformers_export.usage(part, out)
            said.append(f"{loading}# largest difference to open_clip: {_listed(gaps)}")

    if gone := [name for name in earlier if not (out / name).exists()]:
        log.warn(f"{out}: the earlier export is replaced, and its {', '.join(gone)} with it")
    if local := local_parts(out):
        log.warn(f"{out}: loads on this machine only, as its model_cfg names {', '.join(local)}")
    return "\n".join([usage(out), *said])


def _listed(gaps: dict[str, float]) -> str:
    return ", ".join(f"{name} {gap:.2g}" for name, gap in gaps.items())
