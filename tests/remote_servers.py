"""Servers of one process that stand for those elsewhere: a web server that reads by range, the Hub, S3 (moto's)."""

import hashlib
import importlib.util
import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from clip_cid.remote import object_stores
from clip_cid.remote.remembered import forget

needs_s3 = pytest.mark.skipif(
    not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")), reason="needs moto and s3fs"
)
needs_hub = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub")


@dataclass
class Answers:
    """The files of a server, how it behaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    by_range: bool = True
    tags: bool = True
    """Whether answers have an ETag."""
    login: str | None = None
    """`user:password` that each request must have."""
    failures: list[Callable[["Handler"], None]] = field(default_factory=list)
    """Each takes the place of the answer to one request."""
    requests: list[str] = field(default_factory=list)
    """Path and range of each."""
    sent: int = 0
    """Bytes of files."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def answers(self) -> Answers:
        return self.server.answers  # pyright: ignore[reportAttributeAccessIssue]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.answers.requests.append(f"{path} {self.headers.get('Range', 'whole')}")
        if self.answers.failures:
            return self.answers.failures.pop(0)(self)
        if self.answers.login is not None and not self._is_logged_in():
            return self.send(401, b"")
        if path not in self.answers.files:
            return self.send(404, b"")
        self.send_file(self.answers.files[path])

    def _is_logged_in(self) -> bool:
        import base64

        word = base64.b64encode((self.answers.login or "").encode()).decode()
        return self.headers.get("Authorization") == f"Basic {word}"

    def send_file(self, data: bytes) -> None:
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": tag} if self.answers.tags else {}
        if self.headers.get("If-Match", tag) != tag:
            return self.send(412, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.answers.by_range:
            return self.send(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first > last:
            return self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        part = data[first : last + 1]
        self.answers.sent += len(part)
        self.send(206, part, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def cut(self) -> None:
        """Promise all that was asked for, send half of it, and hang up."""
        data, send = self.answers.files[self.path], self.wfile.write

        def half(part: Any) -> int:
            return send(part if part[:5] == b"HTTP/" else part[: len(part) // 2])

        self.wfile.write = half
        self.send_file(data)
        self.close_connection = True


class _Hub(Handler):
    """Datasets on the Hub: `ORG/NAME/path` among the files, read with the requests of HfFileSystem."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.answers.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if self.answers.failures:
            return self.answers.failures.pop(0)(self)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if resolved := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name = f"{resolved[1]}/{resolved[3]}"
            return self.send_file(self.answers.files[name]) if name in self.answers.files else self._absent("Entry")
        if not (asked := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)):
            return self._absent("Entry")

        repo, what, inside = asked[1], asked[2], asked[4] or ""
        here = {
            name.removeprefix(f"{repo}/"): data
            for name, data in self.answers.files.items()
            if name.startswith(f"{repo}/")
        }
        if not here:
            return self._absent("Repo")
        if what in (None, "revision"):
            return self._json(
                {"id": repo, "sha": self._commit(here), "siblings": [{"rfilename": name} for name in here]}
            )
        if what == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([_entry(name, here[name]) for name in paths if name in here])
        recursive = parse_qs(address.query).get("recursive", ["False"])[0].lower() == "true"
        return self._json(_tree(here, inside, recursive=recursive))

    def _commit(self, here: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted(here.items())).encode()).hexdigest()

    def _absent(self, what: str) -> None:
        self.send(
            404, b'{"error": "not found"}', {"X-Error-Code": f"{what}NotFound", "Content-Type": "application/json"}
        )

    def _json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _tree(here: dict[str, bytes], inside: str, *, recursive: bool) -> list[dict[str, Any]]:
    start = f"{inside}/" if inside else ""
    below = {name: data for name, data in here.items() if name.startswith(start)}
    folders = {start + rest.partition("/")[0] for name in below if "/" in (rest := name.removeprefix(start))}
    entries = [{"type": "directory", "path": name, "size": 0, "oid": "0"} for name in sorted(folders)]
    return entries + [
        _entry(name, data) for name, data in below.items() if recursive or "/" not in name.removeprefix(start)
    ]


@contextmanager
def _served(handler: type[Handler]) -> Iterator[tuple[str, Answers]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    answers = server.answers = Answers()  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", answers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def web() -> Iterator[tuple[str, Answers]]:
    """The address of a web server, and its answers."""
    with _served(Handler) as served:
        yield served


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """The answers of the Hub that `hf://` means in this test."""
    from huggingface_hub import constants, hf_file_system

    with _served(_Hub) as (url, answers):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", url)
        for module in (constants, hf_file_system):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        object_stores.close_all()
        yield answers
        object_stores.close_all()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the S3 that `s3://` means in this test, with a bucket `bucket`."""
    import boto3  # pyright: ignore[reportMissingImports]
    from moto.server import ThreadedMotoServer  # pyright: ignore[reportMissingImports]

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()  # what earlier tests left
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIATESTKEY",
        "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="bucket")
    object_stores.close_all()
    yield client
    object_stores.close_all()
    server.stop()


class Place:
    """Where files can be put, and how an address there begins."""

    def __init__(self, kind: str, fixture: Any) -> None:
        self.kind, self._fixture = kind, fixture

    def put(self, name: str, data: bytes) -> str:
        forget()
        if self.kind == "web":
            url, answers = self._fixture
            answers.files[f"/{name}"] = data
            return f"{url}/{name}"
        if self.kind == "hub":
            self._fixture.files[f"me/set/{name}"] = data
            return f"hf://datasets/me/set/{name}"
        self._fixture.put_object(Bucket="bucket", Key=f"set/{name}", Body=data)
        return f"s3://bucket/set/{name}"


@pytest.fixture(params=["web", pytest.param("hub", marks=needs_hub), pytest.param("s3", marks=needs_s3)])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param, request.getfixturevalue(request.param))
