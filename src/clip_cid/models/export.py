"""Export the student as a folder that open_clip, the Hub and CLIP_benchmark load; test it by a reload first."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_cid.errors import RunError
from clip_cid.models.clip import Clip
from clip_cid.models.loading import load_clip
from clip_cid.models.open_clip_errors import open_clip_warnings
from clip_cid.models.public_names import public_provenance
from clip_cid.models.references import CONFIG_FILE, WEIGHTS_FILE
from clip_cid.new_folder import new_folder, refuse_foreign

HEAD_FILE = "cid_head.safetensors"
_OF_TOKENIZERS = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja"),
}
PARTS = ("onnx", "onnx-fp16", "onnx-int8", "transformers")
"""Folders that an export may have."""


def export_student(clip: Clip, out: Path, *, head_state: Mapping[str, Tensor], provenance: dict[str, Any]) -> None:
    """Write `clip` as a folder for `open_clip.create_model_and_transforms("local-dir:...")`.

    The folder is written beside `out`, reloaded by open_clip, and takes its place only if both towers give bit-equal
    outputs. An earlier export at `out` is replaced.

    Args:
        clip: The student; its weights are left where they are.
        out: The folder to make.
        head_state: What was trained beside the student (alignment, cluster head); may be empty.
        provenance: How it came to be; kept under `clip_cid` in the configuration, where open_clip does not look,
            without secrets and local paths.

    Raises:
        RunError: As `refuse_no_place`, or the reloaded model differs.
    """
    refuse_no_place(out)
    with new_folder(out) as part:
        _write(clip, part, head_state, provenance)
        _self_test(clip, part)


def refuse_no_place(out: Path) -> None:
    """Refuse a folder in whose place no export may stand: only an earlier export is replaced.

    Raises:
        RunError: `out` holds something else, or files of others, or is a part of a run's stage.
    """
    names = {CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE, *PARTS, *_OF_TOKENIZERS}
    refuse_foreign(out, "an export of clip-cid", is_one=_is_ours, names=names)


def usage(out: Path) -> str:
    """The lines to paste: load the student in Python, or pass it to CLIP_benchmark."""
    path = out.resolve()
    return f"""\
# Python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{path}")
tokenizer = open_clip.get_tokenizer("local-dir:{path}")

# CLIP_benchmark: pip install clip-benchmark requests "numpy<2.4"
# --output must not contain {{model}}: the path of the model has slashes
clip_benchmark eval --model "local-dir:{path}" --pretrained "" \\
  --dataset cifar10 --dataset_root data --task zeroshot_classification --output "{{dataset}}_{{task}}.json"
"""


def copy_student(source: Path, out: Path) -> None:
    """Export a finished student again elsewhere, with the same checks.

    Raises:
        DataError: `source` is not a whole export.
        RunError: As `export_student`.
    """
    clip = load_clip(f"local-dir:{source}")
    head_state = load_file(source / HEAD_FILE) if (source / HEAD_FILE).is_file() else {}
    provenance = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8")).get("clip_cid", {})
    export_student(clip, out, head_state=head_state, provenance=provenance)


def _write(clip: Clip, folder: Path, head_state: Mapping[str, Tensor], provenance: dict[str, Any]) -> None:
    model = _unwrapped(clip.model)
    model_cfg = {key: value for key, value in clip.model_cfg.items() if key != "init_logit_bias"}
    bias = getattr(model, "logit_bias", None)
    if bias is not None:
        model_cfg["init_logit_bias"] = float(bias.detach())  # open_clip makes room for a bias only when this is there

    config = {"model_cfg": model_cfg, "preprocess_cfg": clip.preprocess_cfg, "clip_cid": public_provenance(provenance)}
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    save_file(_plain(model.state_dict()), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if head_state:
        save_file(_plain(head_state), folder / HEAD_FILE, metadata={"format": "pt"})
    if isinstance(clip.tokenizer, HFTokenizer):
        clip.tokenizer.save_pretrained(str(folder))  # local-dir: looks for the tokenizer here and nowhere else


def _is_ours(folder: Path) -> bool:
    """Whether the model of a folder is an export of this package."""
    try:
        return "clip_cid" in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, under the names they have when nothing is compiled."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name}: not finite, so the student is not exported.",
                fix="The training diverged; lower distill.lr or set distill.grad_clip_norm.",
            )
        plain[name.replace("_orig_mod.", "")] = tensor.detach().cpu().contiguous().clone()
    return plain


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def _self_test(clip: Clip, folder: Path) -> None:
    """Reload the folder with open_clip alone and compare pixels, tokens and both outputs, bit by bit."""
    with open_clip_warnings():
        source = f"local-dir:{folder}"
        model, preprocess = cast(tuple[Any, Any], open_clip.create_model_from_pretrained(source, device=clip.device))
        tokenizer = open_clip.get_tokenizer(source)

    noise = np.random.default_rng(0).integers(0, 256, size=(3, 61, 97, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    captions = ["a photo of a cat.", "two red squares left of a circle", ""]

    ours = _outputs(_unwrapped(clip.model), clip.preprocess, clip.tokenizer, images, captions)
    theirs = _outputs(model, preprocess, tokenizer, images, captions)
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            gap = float((tensor.float() - theirs[name].float()).abs().max())
            raise RunError(
                f"{folder}: the exported student was reloaded and gives other {name} (largest difference {gap:.3g}).",
                fix="The export is refused; check that the installed open_clip is the one the student was"
                " trained with.",
            )


def _outputs(
    model: Any, preprocess: Any, tokenizer: Any, images: list[Image.Image], captions: list[str]
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    pixels = torch.stack([preprocess(image) for image in images])
    tokens = tokenizer(captions)

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            image, text = model.encode_image(pixels.to(device)), model.encode_text(tokens.to(device))
    finally:
        model.train(training)

    return {
        "pixels": pixels,
        "tokens": tokens,
        "image embeddings": image,
        "text embeddings": text,
        "logit scale": model.logit_scale.detach(),
    }
