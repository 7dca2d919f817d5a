"""An exported student as a folder of Hugging Face transformers, loaded again and compared before it appears."""

import contextlib
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor

from clip_cid import extras
from clip_cid.errors import RunError
from clip_cid.models.clip import Clip
from clip_cid.models.loading import load_clip
from clip_cid.new_folder import new_folder
from clip_cid.publish.transformers_towers import Mapped, mapped
from clip_cid.run_folder import read_json

FOLDER = "transformers"
TOLERANCE = 1e-5
"""Largest allowed difference of a coordinate of two unit embeddings, as for ONNX, and of a normalized pixel."""
_CAPTIONS = (
    "a photo of a cat.",
    "",
    "two red squares left of a circle",
    "the same word " * 200,  # fills the context
    "It\u2019s a \u201cred\u201d_square, isn't it?!",
    "Une photo d'un chien,\n pr\u00e8s  de la mer!",
    "A 42 \u732b",
)
_SIDES = (61, 97, 128, 203, 350)  # of images, whose crops begin at whole and at half pixels
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_FIX = "No folder of transformers is written; the versions this release was tested with are in constraints.txt."


def require_transformers() -> None:
    """Refuse before any work is done.

    Raises:
        MissingExtraError: The `transformers` extra is not installed.
    """
    extras.require("Export to transformers", extras.TRANSFORMERS)


def refuse_unmapped(student: Path) -> None:
    """Refuse a student whose towers transformers does not have.

    Raises:
        RunError: As `transformers_towers.mapped`.
    """
    mapped(load_clip(f"local-dir:{student}"))


def export_transformers(folder: Path) -> dict[str, float]:
    """Write `transformers/` into an exported student: model, processor and tokenizer. An earlier one is replaced.

    The folder is loaded again. Pixels, and the embeddings of both towers, must be open_clip's up to `TOLERANCE`.

    Args:
        folder: What `export_student` wrote.

    Returns:
        What was compared -> its largest difference.

    Raises:
        MissingExtraError: The `transformers` extra is not installed.
        RunError: A tower does not map, or an output differs; nothing is written then.
    """
    require_transformers()
    clip = load_clip(f"local-dir:{folder}")
    target = mapped(clip)
    with new_folder(folder / FOLDER) as part, _quiet():
        _write(clip, target, part)
        return _compare(clip, target, part)


def usage(folder: Path, out: Path) -> str:
    """The lines to paste.

    Args:
        folder: The exported student.
        out: Where it will be.
    """
    path = (out / FOLDER).resolve()
    (name,) = read_json(folder / FOLDER / "config.json")["architectures"]
    return f"""\
# transformers: pip install transformers torchvision pillow
from transformers import AutoProcessor, {name}
model = {name}.from_pretrained("{path}")
processor = AutoProcessor.from_pretrained("{path}", backend="pil")
"""


def _write(clip: Clip, target: Mapped, folder: Path) -> None:
    import transformers

    kind = "CLIP" if target.kind == "clip" else "Siglip"
    config = getattr(transformers, f"{kind}Config")(**target.config)
    model = getattr(transformers, target.model_class)(config)
    try:
        model.load_state_dict({name: value.float().contiguous() for name, value in target.weights.items()})
    except RuntimeError as error:
        raise RunError(f"{clip.name}: {' '.join(str(error).split())[:300]}", fix=_FIX) from error
    model.save_pretrained(folder)

    images = getattr(transformers, f"{kind}ImageProcessor")(**_image_options(clip))
    tokenizer = _tokenizer(clip, with_mask=target.kind == "clip")
    getattr(transformers, f"{kind}Processor")(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


def _image_options(clip: Clip) -> dict[str, Any]:
    """The student's own preprocessing, as the image processors of transformers name it."""
    cfg = clip.preprocess_cfg
    side, squash = clip.image_side, cfg["resize_mode"] == "squash"
    square = {"height": side, "width": side}
    resample = Image.Resampling.BILINEAR if cfg["interpolation"] == "bilinear" else Image.Resampling.BICUBIC
    return {
        "size": square if squash else {"shortest_edge": side},
        "do_center_crop": not squash,
        "crop_size": square,
        "resample": int(resample),
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
        "do_convert_rgb": True,
    }


def _tokenizer(clip: Clip, *, with_mask: bool) -> Any:
    """The student's tokenizer with its cleaning of texts built in.

    `PreTrainedTokenizerFast` is loaded as it was saved; a class of its own would build its own cleaning again.

    Args:
        clip: The student.
        with_mask: Off, padding is read like any other token, as SigLIP does.
    """
    from transformers import PreTrainedTokenizerFast

    own = isinstance(clip.tokenizer, SimpleTokenizer)
    backend, options = _clips_tokenizer(clip.tokenizer) if own else _tokenizer_of_transformers(clip.tokenizer)
    backend.normalizer = _cleaned(clip, backend.normalizer, "lower" if own else "whitespace")
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=clip.model_cfg["text_cfg"].get("context_length", 77),
        model_input_names=["input_ids", "attention_mask"] if with_mask else ["input_ids"],
        clean_up_tokenization_spaces=False,
        **options,
    )


def _clips_tokenizer(ours: Any) -> tuple[Any, dict[str, Any]]:
    from tokenizers import normalizers
    from transformers import CLIPTokenizer

    words = sorted(ours.encoder, key=lambda word: ours.encoder[word])[:-2]
    vocab = {word: place for place, word in enumerate([*words, _BEGIN, _END])}
    merges: Any = list(ours.bpe_ranks)
    backend = CLIPTokenizer(vocab=vocab, merges=merges).backend_tokenizer
    backend.normalizer = normalizers.NFC()
    return backend, {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": _END}


def _tokenizer_of_transformers(ours: Any) -> tuple[Any, dict[str, Any]]:
    sides = {name: getattr(ours.tokenizer, name) for name in ("padding_side", "truncation_side")}
    return ours.tokenizer.backend_tokenizer, {**ours.tokenizer.special_tokens_map, **sides}


def _cleaned(clip: Clip, normalizer: Any, default: str) -> Any:
    """open_clip's cleaning of texts before the tokenizer's own, but for what ftfy mends besides curly quotes."""
    from tokenizers import Regex, normalizers

    kind = (clip.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}).get("clean", default)
    steps: list[Any] = [
        normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
    ]
    if kind == "canonicalize":
        others = "".join(f"\\{mark}" for mark in string.punctuation)
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{others}]"), "")]
    if kind in ("lower", "canonicalize"):
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*steps, *([] if normalizer is None else [normalizer])])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _compare(clip: Clip, target: Mapped, folder: Path) -> dict[str, float]:
    """Load the folder and compare it with the student.

    Raises:
        RunError: It does not load, or an output differs by more than `TOLERANCE`.
    """
    import transformers

    try:
        model = getattr(transformers, target.model_class).from_pretrained(folder).eval()
        processor: Any = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        images = _images(clip)
        theirs = _outputs(model, processor, images, target.kind)
    except Exception as error:  # its errors share no class but this
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{FOLDER}: transformers cannot run it ({reason}).", fix=_FIX) from error

    differences: dict[str, float] = {}
    for name, ours in _outputs_of_student(clip, images).items():
        gap = float((theirs[name] - ours).abs().max()) if theirs[name].shape == ours.shape else float("nan")
        if not gap <= TOLERANCE:  # also true for NaN
            raise RunError(
                f"{FOLDER}: {name} of transformers and open_clip differ by up to {gap:.3g}; {TOLERANCE:g} is allowed.",
                fix=_FIX,
            )
        differences[name] = gap
    return differences


def _images(clip: Clip) -> list[Image.Image]:
    """Images of odd and even sides; without those that transformers crops one pixel before open_clip.

    Where a half pixel is left on each side, torchvision rounds to the even one and transformers down.
    """
    noise = np.random.default_rng(0)
    shapes = [(height, width) for height in _SIDES for width in _SIDES if not _crops_elsewhere(clip, height, width)]
    return [Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes[::2]]


def _crops_elsewhere(clip: Clip, height: int, width: int) -> bool:
    longer = clip.image_side * max(height, width) // min(height, width)
    return clip.preprocess_cfg["resize_mode"] == "shortest" and (longer - clip.image_side) % 4 == 3


def _outputs(model: Any, processor: Any, images: list[Image.Image], kind: str) -> dict[str, Tensor]:
    padding = True if kind == "clip" else "max_length"
    inputs = processor(text=list(_CAPTIONS), images=images, padding=padding, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        outputs, scale = model(**inputs), model.logit_scale.detach().reshape(-1)
        return {
            "pixels": inputs["pixel_values"],
            "image embeddings": outputs.image_embeds,
            "text embeddings": outputs.text_embeds,
            "logit scale": scale,
            "logits": outputs.logits_per_image / scale.exp(),
        }


def _outputs_of_student(clip: Clip, images: list[Image.Image]) -> dict[str, Tensor]:
    model: Any = clip.model
    bias = getattr(model, "logit_bias", None)
    pixels = torch.stack([clip.preprocess(image) for image in images])
    with torch.inference_mode():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(clip.tokenizer(list(_CAPTIONS)), normalize=True)
        scale = model.logit_scale.detach().reshape(-1)
        logits = image @ text.T + (0 if bias is None else bias.detach() / scale.exp())
    return {
        "pixels": pixels,
        "image embeddings": image,
        "text embeddings": text,
        "logit scale": scale,
        "logits": logits,
    }
