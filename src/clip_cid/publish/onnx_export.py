"""Both towers of an exported student as ONNX graphs; run by onnxruntime and compared before they appear."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid import extras
from clip_cid.errors import RunError
from clip_cid.models.clip import Clip
from clip_cid.models.loading import load_clip
from clip_cid.new_folder import new_folder
from clip_cid.run_folder import write_json

FOLDER, ABOUT = "onnx", "onnx.json"
OPSET = 20
TOLERANCE = 1e-5
"""Largest allowed difference of a coordinate of two unit embeddings. It is about 50 times the difference that
another order of float32 arithmetic made in seven architectures."""
_CAPTIONS = (
    "a photo of a cat.",
    "",
    "two red squares left of a circle",
    "the same word " * 200,  # fills the context, so the end of the text is at its last place
    "42",
    "Une photo d'un chien, près de la mer!",
    "a",
)
_BATCHES = (len(_CAPTIONS), 1, 3)  # none of them is the batch the graph is made with


class _ImageTower(torch.nn.Module):
    """Preprocessed pixels -> unit embeddings."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(pixels), dim=-1)


class _TextTower(torch.nn.Module):
    """Token ids -> unit embeddings."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_text(tokens), dim=-1)


@dataclass(frozen=True)
class Tower:
    """A tower to export, with rows to compare it on."""

    name: str
    module: torch.nn.Module
    input: str
    example: Tensor
    """As many rows as the largest of `_BATCHES`."""

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    @property
    def output(self) -> str:
        return f"{self.name}_embeddings"


def require_onnx() -> None:
    """Refuse before any work is done.

    Raises:
        MissingExtraError: The `onnx` extra is not installed.
    """
    extras.require("Export to ONNX", extras.ONNX)


def export_onnx(folder: Path) -> dict[str, float]:
    """Write `onnx/image.onnx`, `onnx/text.onnx` and `onnx/onnx.json` into an exported student.

    Inputs are `pixels` (batch, 3, height, width) float32, preprocessed as `onnx.json` says, and `tokens`
    (batch, context length) int64. Outputs are `image_embeddings` and `text_embeddings`, (batch, dim) float32
    of unit length. The batch size is free.
    Earlier graphs in the folder are replaced.

    Args:
        folder: What `export_student` wrote.

    Returns:
        Tower -> largest difference to PyTorch of any coordinate, over several batch sizes.

    Raises:
        MissingExtraError: The `onnx` extra is not installed.
        DataError: `folder` is not a whole export.
        RunError: A graph gives other embeddings than PyTorch, or fails; none is written then.
    """
    require_onnx()
    clip = load_clip(f"local-dir:{folder}")
    gaps: dict[str, float] = {}
    with new_folder(folder / FOLDER) as part:
        for tower in towers(clip):
            write_graph(tower, part / tower.file)
            gaps[tower.name] = compare(tower, part / tower.file)
        write_json(part / ABOUT, about(clip, gaps))
    return gaps


def towers(clip: Clip) -> tuple[Tower, Tower]:
    size = clip.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(len(_CAPTIONS), 3, height, width, generator=torch.Generator().manual_seed(0))
    return (
        Tower("image", _ImageTower(clip.model).eval(), "pixels", pixels),
        Tower("text", _TextTower(clip.model).eval(), "tokens", clip.tokenizer(list(_CAPTIONS))),
    )


def write_graph(tower: Tower, path: Path) -> None:
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            tower.module,
            (tower.example[:2].clone(),),  # a batch of one would be built in
            input_names=[tower.input],
            output_names=[tower.output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export made no program")
    _forget_sources(program.model)
    program.save(path)  # weights of 2 GB and more go to a file beside it by themselves


def _forget_sources(model: Any) -> None:
    """Drop what the converter notes of each node: the lines of the sources it comes from, by their local paths."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None


def session(path: Path, level: str = "ORT_ENABLE_ALL") -> Any:
    """A graph in onnxruntime, on the CPU.

    Args:
        path: The graph.
        level: How much onnxruntime optimizes it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(tower: Tower, path: Path, *, tolerance: float = TOLERANCE, level: str = "ORT_ENABLE_ALL") -> float:
    """The largest difference to PyTorch over all batches.

    Raises:
        RunError: It is above `tolerance`, or not a number, or onnxruntime refuses the graph.
    """
    fix = "No ONNX is written; the versions this release was tested with are in constraints.txt."
    largest = 0.0
    for rows in _BATCHES:
        batch = tower.example[:rows]
        with torch.inference_mode():
            ours = tower.module(batch)

        try:
            theirs = torch.from_numpy(session(path, level).run([tower.output], {tower.input: batch.numpy()})[0])
        except Exception as error:  # its errors share no class but this
            reason = " ".join(str(error).split())[:300]
            raise RunError(f"{path.name}: onnxruntime cannot run {rows} rows ({reason}).", fix=fix) from error

        if theirs.shape != ours.shape:
            raise RunError(f"{path.name}: gives {tuple(theirs.shape)}, not {tuple(ours.shape)}.", fix=fix)
        gap = float((theirs - ours).abs().max())
        if not gap <= tolerance:  # also true for NaN
            raise RunError(
                f"{path.name}: onnxruntime and PyTorch differ by up to {gap:.3g} for {rows} rows; {tolerance:g}"
                " is allowed.",
                fix=fix,
            )
        largest = max(largest, gap)
    return largest


def about(clip: Clip, gaps: dict[str, float]) -> dict[str, Any]:
    """The description of the graphs' inputs, for users without open_clip."""
    model: Any = clip.model
    both = towers(clip)
    bias = getattr(model, "logit_bias", None)

    return {
        "towers": {
            tower.name: {
                "file": tower.file,
                "input": {
                    "name": tower.input,
                    "type": str(tower.example.dtype).removeprefix("torch."),
                    "shape": ["batch", *tower.example.shape[1:]],
                },
                "output": {"name": tower.output, "type": "float32", "shape": ["batch", clip.dim], "unit_length": True},
                "largest_difference_to_pytorch": gaps[tower.name],
            }
            for tower in both
        },
        "preprocess": clip.preprocess_cfg,
        "tokenizer": "open_clip.get_tokenizer of the folder above this one",
        "logit_scale": float(model.logit_scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "compared": {"batch_sizes": list(_BATCHES), "tolerance": TOLERANCE},
        "opset": OPSET,
        "versions": {
            package: metadata.version(package)
            for package in ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")
        },
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter, which logs every optimization it skips."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
