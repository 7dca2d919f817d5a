"""The optional parts of the package: what each holds, and the refusal of work whose part is not installed.

Balance, clusters of stored embeddings and lists of what is kept need none of them.
"""

import importlib.util
from collections.abc import Collection

from clip_cid.errors import MissingExtraError

DISTILL, EVALUATE, REPORT = "distill", "evaluate", "report"
ONNX, TRANSFORMERS, TENSORBOARD, RAY, REVIEW = "onnx", "transformers", "tensorboard", "ray", "review"
S3, GS, AZ, HF, LANCE = "s3", "gs", "az", "hf", "lance"
_MODELS = ("open_clip", "torchvision", "timm", "huggingface_hub", "jinja2")
MODULES: dict[str, tuple[str, ...]] = {
    DISTILL: _MODELS,
    EVALUATE: (*_MODELS, "sklearn"),
    REPORT: ("matplotlib", "sklearn", "jinja2"),
    ONNX: ("onnx", "onnxruntime", "onnxscript"),
    TRANSFORMERS: ("transformers",),
    TENSORBOARD: ("tensorboard",),
    RAY: ("ray",),
    REVIEW: ("starlette", "uvicorn"),
    S3: ("s3fs",),
    GS: ("gcsfs",),
    AZ: ("adlfs",),
    HF: ("huggingface_hub",),
    LANCE: ("lance",),
}
"""Extra of pyproject.toml -> the modules that its packages bring and that we import."""


def require(feature: str, *extras: str) -> None:
    """Refuse before any work is done; nothing is imported.

    Raises:
        MissingExtraError: A module of these extras is not installed; all of it is named at once.
    """
    lacking = {extra: modules for extra in extras if (modules := absent(extra))}
    if lacking:
        modules = tuple(dict.fromkeys(module for modules in lacking.values() for module in modules))
        raise MissingExtraError(feature, ",".join(_fewest(lacking)), modules)


def absent(extra: str) -> tuple[str, ...]:
    """The modules of an extra that are not installed."""
    return tuple(module for module in MODULES[extra] if importlib.util.find_spec(module) is None)


def _fewest(extras: Collection[str]) -> list[str]:
    """Without those that another one of them brings."""
    return [
        extra
        for extra in dict.fromkeys(extras)
        if not any(set(MODULES[extra]) < set(MODULES[other]) for other in extras)
    ]
