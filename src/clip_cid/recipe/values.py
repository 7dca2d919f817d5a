"""The kinds of values that settings of several sections have."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PositiveInt
from pydantic_core import PydanticCustomError

from clip_cid import os_errors
from clip_cid.addresses import is_remote, without_secrets

Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
AUTO: Literal["auto"] = "auto"
"""A number that is chosen by the number of pairs, when the stage begins (`auto_numbers`)."""
PositiveOrAuto = PositiveInt | Literal["auto"]


def settled(number: int | Literal["auto"]) -> int:
    """The value of a setting that may be `auto`, in a recipe that is settled (`auto_numbers.settle`)."""
    assert number != AUTO, "the recipe is not settled"
    return number


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted(value for value, times in Counter(values).items() if times > 1):
        raise PydanticCustomError("twice", "{names} is named twice", {"names": ", ".join(twice)})
    return values


def _not_at_an_address(value: str) -> str:
    if not value.startswith("run:") and re.search(r"(?:^|[:/])[a-z0-9]+://", value, re.IGNORECASE):
        raise PydanticCustomError(
            "model_address",
            "models are not read from addresses ({it}): fetch the file or the folder, or name hf-hub:ORG/NAME",
            {"it": without_secrets(value)},
        )
    return value


def _printable(value: str) -> str:
    if not (value.strip() and value.isprintable()):
        raise PydanticCustomError("name", "a name should be of characters that can be printed")
    return value


ModelName = Annotated[str, AfterValidator(_printable)]
Model = Annotated[str, AfterValidator(_not_at_an_address)]
"""A model or its weights, by name or path."""
SetName = Annotated[str, Field(max_length=100), AfterValidator(_printable)]  # a part of names of files
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""A list of texts; one text alone is a list of one."""


def _as_text(path: Path) -> str:
    return os_errors.address_of(path) or str(path)


def _to_be_kept(place: str) -> str:
    """A command stays as it is: without its words it would be another one."""
    return without_secrets(place) if is_remote(place) else place


def _all_to_be_kept(places: tuple[str, ...]) -> list[str]:
    return [_to_be_kept(place) for place in places]


Place = Annotated[str, PlainSerializer(_to_be_kept, return_type=str, when_used="json")]
"""A path or an address. A run folder keeps an address without its password and without what signs it."""
Input = Annotated[
    Path, PlainSerializer(lambda path: without_secrets(_as_text(path)), return_type=str, when_used="json")
]
"""A path that may also be an address."""
Places = Annotated[Texts, PlainSerializer(_all_to_be_kept, return_type=list[str], when_used="json")]
"""A list of these."""
