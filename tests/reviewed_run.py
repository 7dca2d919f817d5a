"""A finished balance with pictures and captions, made in a second: a chain, equal images, a pair, and some alone."""

from pathlib import Path

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_cid import cli
from clip_cid.recipe import read_run_recipe
from clip_cid.review.opened_run import OpenedRun
from clip_cid.run_folder import RunFolder

DEGREES = (0, 4, 9, 12, 13, 90, 90, 180, 200, 203)
"""At the threshold of 6 degrees the sets are {0, 1, 2, 3, 4}, {5, 6} and {8, 9}; row 7 is alone."""
SETS = ([0, 1, 2, 3, 4], [5, 6], [8, 9])
THRESHOLD = 2 * np.sin(np.radians(6) / 2)
LIMIT = 2 * np.sin(np.radians(40) / 2)
NAMES = tuple(f"{'wolf' if row < 5 else 'fox'}-{row}" for row in range(len(DEGREES)))
HOSTILE = "<img src=x onerror=alert(1)>"
"""The caption of the last image."""


def squared(degrees: float) -> float:
    return float((2 * np.sin(np.radians(degrees) / 2)) ** 2)


def reviewed_run(path: Path, *, degrees: tuple[float, ...] = DEGREES) -> Path:
    """The run folder below `path`; its pairs and embeddings lie beside it."""
    (path / "pictures").mkdir(parents=True)
    for row, (name, angle) in enumerate(zip(NAMES, degrees, strict=False)):
        picture = np.full((40 + row, 60, 3), (int(angle), 90, 160), dtype=np.uint8)
        picture[: 5 + 3 * row, : 4 * row + 2] = 255
        Image.fromarray(picture).save(path / "pictures" / f"{name}.png")
        (path / "pictures" / f"{name}.txt").write_text(HOSTILE if row == len(DEGREES) - 1 else f"a {name} looks at you")

    angles = np.radians(degrees)
    rows = oracles.unit(np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)
    captions = [(path / "pictures" / f"{name}.txt").read_text() for name in NAMES[: len(rows)]]
    for folder in ("img_emb", "metadata"):
        (path / "embeddings" / folder).mkdir(parents=True)
    np.save(path / "embeddings" / "img_emb" / "img_emb_0.npy", rows)
    table = pa.table({"key": NAMES[: len(rows)], "caption": captions})
    pq.write_table(table, path / "embeddings" / "metadata" / "metadata_0.parquet")

    (path / "recipe.yaml").write_text(
        f"pairs: {{source: [{path / 'pictures'}]}}\n"
        f"embed: {{existing: {path / 'embeddings'}}}\n"
        f"balance: {{metric: euclidean, threshold: {THRESHOLD}, max_threshold: {LIMIT}}}\n"
        f"machine: {{cache_dir: {path / 'cache'}, workers: 0}}\n"
    )
    assert cli.main(["embed", str(path / "run"), "--recipe", str(path / "recipe.yaml")]) == 0
    assert cli.main(["balance", str(path / "run")]) == 0
    return path / "run"


def opened(run: Path) -> OpenedRun:
    return OpenedRun(RunFolder(run), read_run_recipe(run / "recipe.yaml"))
