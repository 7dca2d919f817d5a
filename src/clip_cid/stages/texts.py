"""The teacher's embeddings of the texts of `distill.texts`, which need no image."""

from pathlib import Path

from clip_cid import log, os_errors
from clip_cid.data.embeddings.of_texts import embed_texts
from clip_cid.data.text_files import read_text_lines
from clip_cid.models.teacher import load_teacher
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.summaries import TextsSummary


def run(folder: RunFolder, out: Path, recipe: Recipe) -> TextsSummary:
    """Embed every text once; writes `texts.parquet`, `texts.npy` and `texts.json`."""
    lines = read_text_lines(recipe.distill.text_files, setting="distill.texts")
    if lines.empty or lines.repeated:
        log.warn(f"texts: {lines.empty:,} empty lines are left out, and {lines.repeated:,} that repeat another")

    teacher = load_teacher(recipe.embed, device=recipe.machine.device)
    folder.accept()
    with os_errors.explained(out, kept="The texts that were embedded are kept."):
        truncated = embed_texts(out, lines.texts, teacher, batch=recipe.machine.embed_batch)
    if truncated:
        log.warn(
            f"texts: {truncated:,} of {len(lines.texts):,} are longer than the teacher's context and lose their end"
        )

    return TextsSummary(
        texts=len(lines.texts),
        dim=teacher.dim,
        teacher=teacher.identity["reference"],
        empty=lines.empty,
        repeated=lines.repeated,
        truncated=truncated,
    )
