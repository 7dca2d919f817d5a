"""Figures of patches and activation maps of the models, on images of an evaluation set."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_cid.evaluation.scores import STUDENT
from clip_cid.figures import activation_maps, patch_pca
from clip_cid.models import patches
from clip_cid.models.clip import Clip
from clip_cid.report.drawing import set_images
from clip_cid.report.drawing.figure import Figure, Numbers
from clip_cid.report.drawing.run_inputs import RunInputs
from clip_cid.report.drawing.stored_inputs import LeftOut

_PCA_CLASSES, _PCA_IMAGES, _PROMPTED_IMAGES = 3, 6, 6


def _patch_pca(inputs: RunInputs, out: Path) -> Numbers:
    """Foreground and colors of all models follow the teacher's, or the student's if it has no patches."""
    models, left_out = inputs.patched
    labelled = inputs.labelled
    classes = [
        patch_pca.ClassPatches(
            name=labelled.class_names[images[0].label],
            images=[one.row for one in images],
            pictures=_as_seen(models[STUDENT], images),
            models=_components(models, images),
        )
        for images in _chosen(inputs, classes=_PCA_CLASSES, each=_PCA_IMAGES)
    ]
    return {"set": labelled.name, "models": patch_pca.draw(classes, out), "left_out": left_out}


def _patch_pca_caption(numbers: Numbers) -> str:
    caption = (
        f"Patches of images of the set {numbers['set']}. The first principal component over all images of a class"
        " separates foreground from background (black). The first three components of the foreground are red, green"
        " and blue. One color means one thing in all images of a class"
    )
    if len(numbers["models"]) > 1:
        caption += (
            ", and about the same in all models, because their components are rotated to fit. The shared foreground is"
            " the foreground of both models as a share of the foreground of either"
        )
    return f"{caption}."


def _components(
    models: dict[str, Clip], images: list[set_images.LabelledImage]
) -> dict[str, patch_pca.PatchComponents]:
    by_model: dict[str, patch_pca.PatchComponents] = {}
    for name, clip in models.items():
        tokens = patches.patch_tokens(clip, set_images.pixels(clip, images)).float().cpu().numpy()
        by_model[name] = patch_pca.components(tokens, like=next(iter(by_model.values()), None))
    return by_model


def _activation_maps(inputs: RunInputs, out: Path) -> Numbers:
    """Images of different classes, each with the first prompt of its class."""
    models, left_out = inputs.patched
    labelled = inputs.labelled
    if not labelled.templates:
        raise LeftOut(f"the set {labelled.name} has no prompts")

    images = [one for of_class in _chosen(inputs, classes=_PROMPTED_IMAGES, each=1) for one in of_class]
    prompts = [labelled.prompts(one.label)[0] for one in images]
    by_model = {name: _maps_and_cosines(clip, images, prompts) for name, clip in models.items()}

    shown = [
        activation_maps.PromptedImage(
            image=one.row,
            label=labelled.class_names[one.label],
            prompt=prompts[place],
            picture=picture,
            maps={name: maps[place] for name, (maps, _) in by_model.items()},
            cosines={name: float(cosines[place]) for name, (_, cosines) in by_model.items()},
        )
        for place, (one, picture) in enumerate(zip(images, _as_seen(models[STUDENT], images), strict=True))
    ]
    means = activation_maps.draw(shown, out)
    return {"set": labelled.name, "prompts": prompts, "models": means, "left_out": left_out}


def _activation_maps_caption(numbers: Numbers) -> str:
    return (
        "Class activation maps (Grad-CAM before the last block's attention) of the cosine between an image of the set"
        f" {numbers['set']} and the prompt of its class, such as “{numbers['prompts'][0]}”. Yellow is where the map is"
        " largest; each map has its own scale, and a map of zeros has no yellow. The numbers are the cosines."
    )


def _maps_and_cosines(
    clip: Clip, images: list[set_images.LabelledImage], prompts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    model: Any = clip.model
    with torch.inference_mode():
        texts = model.encode_text(clip.tokenizer(prompts).to(clip.device), normalize=True)
    grad_cam = patches.grad_cam(clip, set_images.pixels(clip, images), texts.clone())
    maps, cosines = (values.float().cpu().numpy() for values in grad_cam)
    return maps, cosines


def _chosen(inputs: RunInputs, *, classes: int, each: int) -> list[list[set_images.LabelledImage]]:
    images = set_images.choose(inputs.labelled, classes=classes, each=each, seed=inputs.recipe.draw.seed)
    if not images:
        raise LeftOut(f"no test image of the set {inputs.labelled.name} can be decoded")
    return images


def _as_seen(clip: Clip, images: list[set_images.LabelledImage]) -> list[np.ndarray]:
    return [set_images.as_seen(clip, pixels) for pixels in set_images.pixels(clip, images)]


FIGURES = (
    Figure(
        "activation_maps",
        _activation_maps,
        section="inside",
        description="Images, and below them the activation map of each model for the prompt",
        caption=_activation_maps_caption,
        of_data=True,
    ),
    Figure(
        "patch_pca",
        _patch_pca,
        section="inside",
        description="Images of some classes, and below them their patches in color as each model sees them",
        caption=_patch_pca_caption,
        of_data=True,
    ),
)
