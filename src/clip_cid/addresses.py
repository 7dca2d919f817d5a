"""Addresses of files elsewhere, `s3://bucket/key` and the like, and what of one may be shown and kept."""

import re
from urllib.parse import unquote, urlparse

OBJECT_STORES = ("s3", "gs", "az", "hf")
"""Those whose folders can be listed."""
_KNOWN = re.compile(rf"({'|'.join((*OBJECT_STORES, 'http', 'https'))})://", re.IGNORECASE)

_WEB_USER = re.compile(r"(\bhttps?://)[^\s/?#]*@", re.IGNORECASE)
_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#@:]*:[^\s/?#]*@", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&;#])([^\s=&;#?'\"<>]+)=([^\s&;#'\"<>]+)")
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_SECRET = re.compile(
    r"sig|token|secret|key|pass|pwd|credential|auth|policy|session|^x-|^(se|sp|sr|st|sv|spr|sip|skoid|sktid|ske|skv)$",
    re.IGNORECASE,
)
_LONGEST_PLAIN = 40  # characters; a value without a telling name that is longer may be a secret, too


def is_remote(place: object) -> bool:
    """Whether a place is an address that can be read, and not a path."""
    return isinstance(place, str) and _KNOWN.match(place) is not None


def scheme_of(address: str) -> str:
    """What stands before the colon, in small letters."""
    return address.partition(":")[0].lower()


def path_of(address: str) -> str:
    """The path in an address; of an object store with the bucket in front, whose names may have any letters."""
    if scheme_of(address) in OBJECT_STORES:
        return address.partition("://")[2]
    return unquote(urlparse(address).path)


def with_suffix(address: str, suffix: str) -> str:
    """The address of the file of the same name with another suffix; what signs an address stays."""
    path, mark, query = address, "", ""
    if scheme_of(address) not in OBJECT_STORES:
        path, mark, query = address.partition("?")
    folder, slash, last = path.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}{suffix}{mark}{query}"


def without_secrets(text: str) -> str:
    """A text whose addresses have neither user and password nor what signs them: `?X-Amz-Signature=...`."""
    return _ADDRESS.sub(lambda match: _of_one(match[0]), text)


def _of_one(address: str) -> str:
    address = _PASSWORD.sub(r"\1", _WEB_USER.sub(r"\1", address))
    return _PARAMETER.sub(_parameter, address)


def _parameter(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    secret = _SECRET.search(name) is not None or len(value) > _LONGEST_PLAIN
    return f"{mark}{name}={'...' if secret else value}"
