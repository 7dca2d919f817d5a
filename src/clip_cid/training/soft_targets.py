"""The soft centers of all training images, computed once before the first step and kept beside the checkpoints."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int

from clip_cid import log
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.method.unit_rows import Rows
from clip_cid.run_folder import read_json, write_json
from clip_cid.training.batches import SoftTargets, unit_teacher_rows

_ROWS = 8192
_DONE = "done.json"


def soft_targets(
    folder: Path,
    images: Rows,
    store_rows: Int[np.ndarray, " rows"],
    centers: Float[np.ndarray, "centers dim"],
    *,
    scale: float,
    temperature: float,
    key: str,
    device: torch.device,
) -> SoftTargets:
    """Mu and H of the teacher for each training row; `soft_centre` in docs/method.md.

    They are float32: in float16 the divergence would be wrong by more than a well-taught student's. A killed attempt
    is gone on with, block by block, if it had the same `key`.

    Args:
        folder: Where `mean.npy` (rows, dim), `entropy.npy` (rows,) and `done.json` are or will be.
        images: The teacher's stored image embeddings (rows, dim).
        store_rows: The row of these for each training row.
        centers: Unit rows, all of them.
        scale: sigma.
        temperature: tau.
        key: Digest of everything that decides the result.
        device: Where the products are computed.

    Raises:
        DataError: A teacher vector is not of unit length.
    """
    folder.mkdir(exist_ok=True)
    mean, entropy = folder / "mean.npy", folder / "entropy.npy"
    done = _rows_done(folder, key) if mean.is_file() and entropy.is_file() else 0
    mode = "r+" if done else "w+"
    kept = SoftTargets(
        np.lib.format.open_memmap(mean, mode, np.float32, (len(store_rows), images.shape[1])),
        np.lib.format.open_memmap(entropy, mode, np.float64, (len(store_rows),)),
        scale / temperature,
    )
    table = torch.from_numpy(centers).to(device)
    with log.progress("soft centers", len(store_rows), unit="images", start=done) as bar:
        for start in range(done, len(store_rows), _ROWS):
            rows = store_rows[start : start + _ROWS]
            teacher = unit_teacher_rows(images[rows], rows, "image").to(device)
            found = soft_centers(teacher, table, scale=scale, temperature=temperature)
            kept.mean[start : start + _ROWS] = found.mean.cpu().numpy()
            kept.entropy[start : start + _ROWS] = found.entropy.cpu().numpy()
            _note(folder, kept, {"key": key, "rows": start + len(rows)})
            bar.advance(len(rows))
    return kept


def _rows_done(folder: Path, key: str) -> int:
    path = folder / _DONE
    found = read_json(path) if path.is_file() else {}
    return int(found["rows"]) if found.get("key") == key else 0


def _note(folder: Path, kept: SoftTargets, state: dict[str, Any]) -> None:
    """Only what is on the disk counts as done."""
    for array in (kept.mean, kept.entropy):
        cast(np.memmap, array).flush()
    write_json(folder / _DONE, state)
