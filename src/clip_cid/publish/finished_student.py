"""The student of a finished run, checked before it goes anywhere."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from clip_cid.errors import RunError
from clip_cid.models.architectures import read_config
from clip_cid.models.public_names import local_names
from clip_cid.models.references import CONFIG_FILE
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL

_FROM_HUB = ("hf_model_name", "hf_tokenizer_name")


def finished_student(run: RunFolder) -> Path:
    """The folder of the student.

    Raises:
        RunError: The distill stage has not finished, or a file of it is not as it was written.
    """
    student = run.stage(DISTILL) / "student"
    if changed := run.changed_files(DISTILL, digests=True):
        raise RunError(
            f"{run.path}: the distill stage is not as it was written ({'; '.join(changed[:3])}).",
            fix=f"Restore it, or train again: `clip-cid distill {run.path} --force`.",
        )
    return student


def local_parts(student: Path) -> list[str]:
    """What the model is made of that only this machine has: with such a part, nobody else can load it."""
    model_cfg, _ = read_config(student / CONFIG_FILE)
    apart = [name for name in names_on_hub(student) if Path(name).exists() or not _may_be_on_hub(name)]
    return list(dict.fromkeys([*local_names(model_cfg), *apart]))


def names_on_hub(student: Path) -> list[str]:
    """Text tower and tokenizer that transformers would fetch by name."""
    text_cfg: dict[str, Any] = read_config(student / CONFIG_FILE)[0]["text_cfg"]
    return list(dict.fromkeys(text_cfg[key] for key in _FROM_HUB if isinstance(text_cfg.get(key), str)))


def nobody_can_load(student: Path, parts: list[str]) -> RunError:
    return RunError(
        f"{student}: its model_cfg names what only this machine has ({', '.join(parts)}), so it cannot be loaded"
        " elsewhere.",
        fix="Train with a tokenizer and a text tower that have a name on the Hub.",
    )


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") <= 1
