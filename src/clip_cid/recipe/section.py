"""What every section of a recipe is: frozen, of known names, and of values that can be stored."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

from clip_cid import os_errors
from clip_cid.addresses import is_remote


class Config(BaseModel):
    """A section: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    at_addresses: ClassVar[tuple[str, ...]] = ()
    """The paths that may also be addresses."""

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_stored(cls, value: Any, info: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 63:
            raise PydanticCustomError("too_large", "input should fit into 64 bits")
        if any(re.search(r"[\0\ud800-\udfff]", text) for text in _texts_in(value)):
            raise PydanticCustomError("not_text", "input should be text without zero bytes, in UTF-8")
        address = os_errors.address_of(value) if isinstance(value, Path) else ""
        if address and not (info.field_name in cls.at_addresses and is_remote(address)):
            raise PydanticCustomError("address", "input should be a path on this machine, not {it}", {"it": address})
        return value


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = tuple(cast(dict[Any, Any], value).items())
    if isinstance(value, tuple):
        for part in cast(tuple[Any, ...], value):
            yield from _texts_in(part)
    elif isinstance(value, str | Path):
        yield str(value)
