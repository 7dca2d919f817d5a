"""ONNX graphs in float16 or int8, made by onnxruntime's converters, published only if their scores hold."""

import logging
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from clip_cid import extras
from clip_cid.errors import RunError
from clip_cid.models.loading import load_clip
from clip_cid.publish import onnx_export
from clip_cid.publish.model_card import markdown_text
from clip_cid.publish.onnx_gate import Drop, Drops, measure_drops, refuse_without_sets
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, write_json

Precision = Literal["fp16", "int8"]
ALLOWED = 1.0
"""Points that a score may drop by."""
CARD = "README.md"
_QUANTIZED = ["MatMul", "Gemm", "Attention", "Gather"]
"""Products with weights, and the table of tokens. Convolutions stay in float32: they need calibration."""
_LEVELS = {"fp16": "ORT_ENABLE_EXTENDED", "int8": "ORT_ENABLE_ALL"}
"""Optimization levels of onnxruntime on the CPU. With all, onnxruntime 1.31 crashes on products in float16."""


def require(precision: Precision, recipe: Recipe) -> None:
    """Refuse before any work is done.

    Raises:
        MissingExtraError: The `onnx` or the `evaluate` extra is not installed.
        ConfigError: The run has no sets to measure on.
    """
    extras.require(f"--onnx {precision}", extras.ONNX, extras.EVALUATE)
    refuse_without_sets(recipe, precision)


@contextmanager
def converted(
    run: RunFolder, student: Path, recipe: Recipe, precision: Precision, *, allowed: float
) -> Generator[Path]:
    """A temporary folder with both graphs, `onnx.json` and a card, whose scores were measured on the run's sets.

    Args:
        run: The run.
        student: The folder of its student.
        recipe: Of the run.
        precision: Of weights and products.
        allowed: How many points a score may drop by.

    Raises:
        RunError: A graph cannot be made or run, or a score drops by more.
    """
    with tempfile.TemporaryDirectory() as temporary:
        scratch, folder = Path(temporary), Path(temporary) / "graphs"
        folder.mkdir()
        clip = load_clip(f"local-dir:{student}")
        sessions: dict[str, Any] = {}
        gaps: dict[str, float] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for tower in onnx_export.towers(clip):
            exact, path = scratch / tower.file, folder / tower.file
            onnx_export.write_graph(tower, exact)
            onnx_export.compare(tower, exact)
            _convert(exact, path, precision)
            gaps[tower.name] = onnx_export.compare(tower, path, tolerance=2.0, level=_LEVELS[precision])
            sessions[tower.name] = onnx_export.session(path, _LEVELS[precision])
            sizes[tower.name] = _bytes(exact), _bytes(path)

        drops = measure_drops(run, student, recipe, sessions, scratch)
        drops.refuse(precision, allowed=allowed)
        about = onnx_export.about(clip, gaps)
        about["compared"] = {"batch_sizes": about["compared"]["batch_sizes"]}
        about["versions"]["onnx-ir"] = metadata.version("onnx-ir")
        about |= {
            "precision": precision,
            "graph_optimization_level": _LEVELS[precision],
            "bytes": {name: {"fp32": before, precision: after} for name, (before, after) in sizes.items()},
            "scores": [row.as_json() for row in drops.rows],
            "sets_not_measured": drops.missing,
            "max_drop": allowed,
        }
        write_json(folder / onnx_export.ABOUT, about)
        (folder / CARD).write_text(_card(drops, precision, sizes, allowed), encoding="utf-8")
        yield folder


def place(graphs: Path, part: Path, out: Path, precision: Precision) -> str:
    """Put what `converted` made into an export that will be at `out`; says where it is and what it loses."""
    name = f"{onnx_export.FOLDER}-{precision}"
    shutil.copytree(graphs, part / name)
    return f"# ONNX in {precision}: {out / name}; the drop of each score is in {out / name / CARD}"


def _convert(exact: Path, path: Path, precision: Precision) -> None:
    """Write a graph in another precision; inputs and outputs stay as they are.

    Raises:
        RunError: onnxruntime's converter cannot.
    """
    try:
        with _quiet():
            (_to_float16 if precision == "fp16" else _to_int8)(exact, path)
    except Exception as error:  # its errors share no class but this
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{path.name}: onnxruntime cannot convert it to {precision} ({reason}).",
            fix="Nothing is written. Use --onnx; the versions this release was tested with are in constraints.txt.",
        ) from error


def _to_float16(exact: Path, path: Path) -> None:
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import TopologicalSortPass
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = onnx_ir.from_proto(convert_float_to_float16(onnx.load(exact), keep_io_types=True))
    TopologicalSortPass()(graph)  # the converter leaves its casts at the end
    onnx.save(onnx_ir.to_proto(graph), path)


def _to_int8(exact: Path, path: Path) -> None:
    """Weights in int8 by output channel, activations when they are known. 7 bits of it: without VNNI, 8 overflow."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(exact)
    del graph.graph.value_info[:]  # it contradicts what is inferred when a weight is turned
    bare = exact.with_suffix(".bare.onnx")
    onnx.save(graph, bare)
    quantize_dynamic(
        bare,
        path,
        op_types_to_quantize=_QUANTIZED,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )


def _bytes(path: Path) -> int:
    """Of a graph with the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the quantization, which advises a step that is not needed here."""
    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)


def _card(drops: Drops, precision: str, sizes: dict[str, tuple[int, int]], allowed: float) -> str:
    """What the graphs are, what they lose, and how to run them."""
    saved = ", ".join(
        f"{name} {after / 1e6:.1f} MB instead of {before / 1e6:.1f}" for name, (before, after) in sizes.items()
    )
    missing = f"\nNot measured: {', '.join(map(markdown_text, drops.missing))}.\n" if drops.missing else ""
    lines = "\n".join(map(_line, drops.rows))
    return f"""\
# ONNX graphs in {precision}

Both towers of the student in the folder above, made with onnxruntime: {saved}.

## What they lose

In percent and points, on the same images, with the 95 % interval of a paired bootstrap. No score drops by more than
{allowed:g} points.

| set | protocol | metric | n | student | {precision} | drop |
|---|---|---|---|---|---|---|
{lines}
{missing}
## Use

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.{_LEVELS[precision]}
image = onnxruntime.InferenceSession("image.onnx", options)
text = onnxruntime.InferenceSession("text.onnx", options)
```

Inputs and outputs are described in `onnx.json`.
"""


def _line(row: Drop) -> str:
    cells = [
        markdown_text(row.set),
        row.task.replace("_", " "),
        markdown_text(row.metric.replace("_", " ")),
        "-" if row.n is None else f"{row.n:,}",
        f"{100 * row.student:.1f}",
        f"{100 * row.graphs:.1f}",
        f"{100 * row.drop:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]",
    ]
    return f"| {' | '.join(cells)} |"
