"""The errors that open_clip raises, and the warnings that it logs to the root logger."""

import contextlib
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from clip_cid.errors import ConfigError

LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError),
    *(SafetensorError, pickle.UnpicklingError, EOFError),
)
"""The errors that open_clip, torch and safetensors raise for a broken folder."""


def missing_package(name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{name}: this model needs a package that is not installed ({one_line(error)}).",
        fix=f"pip install {error.name or 'transformers'}",
    )


def clean_name(name: str) -> str:
    """open_clip also knows `ViT-B/32` as `ViT-B-32`."""
    return name.replace("/", "-")


def one_line(message: object) -> str:
    text = " ".join(str(message).split()) or type(message).__name__
    return text if len(text) <= 300 else text[:300] + "..."


@contextlib.contextmanager
def open_clip_warnings() -> Iterator[list[str]]:
    """Keep what open_clip logs away from the console and give its warnings to the caller."""
    logged: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "open_clip" not in Path(record.pathname).parts:
            return True
        if record.levelno >= logging.WARNING:
            logged.append(record.getMessage())
        return False

    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)  # without any handler, logging.warning would install one for good
    root.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # settled in models/loading.py
            yield logged
    finally:
        root.removeFilter(keep)
        root.removeHandler(silent)
