"""How far the ONNX graphs of an architecture are from PyTorch, with random weights; the numbers of docs/export.md.

    python benchmarks/onnx_difference.py --models cid-tiny RN50

One line a model: the largest difference of any coordinate of the unit embeddings, for each tower, and the seconds of the export.
"""

import tempfile
import time
from pathlib import Path

import tyro

from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.publish.onnx_export import export_onnx

MODELS = ("cid-tiny", "cid-conv", "ViT-B-32", "ViT-B-16-quickgelu", "RN50", "convnext_base", "MobileCLIP-S1")


def main(models: tuple[str, ...] = MODELS) -> None:
    for name in models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "student"
            export_student(build_student(name, embed_dim=None, seed=1), folder, head_state={}, provenance={})
            started = time.monotonic()
            gaps = export_onnx(folder)
        seconds = time.monotonic() - started
        print(name, *(f"{tower} {gap:.2g}" for tower, gap in gaps.items()), f"{seconds:.0f} s", sep="\t", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
