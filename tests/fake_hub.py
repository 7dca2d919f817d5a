"""A Hugging Face Hub of one process: the requests huggingface_hub makes to create, fill and read a model repository."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_the_token_of_the_test"
OWNER = "me"  # the only namespace the token may write to
LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0")


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        """Refuse requests whose path has this in it, as too large: huggingface_hub does not repeat such a request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.server.broken is not None and self.server.broken in path:
            return self._json(413, {"error": "too much for this hub"})
        if path.startswith("/lfs/"):
            return self._lfs(path.removeprefix("/lfs/"), body)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._json(401, {"error": "Invalid username or password."}, headers)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        repo = self.server.repos.get(name)
        if repo is None:
            return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        rest = path.partition(name)[2]
        if self.command in ("POST", "PUT") and not name.startswith(f"{OWNER}/"):
            return self._json(403, {"error": "You don't have the rights"})
        return self._repository(name, repo, rest, body)

    def _repository(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        if rest in ("", "/revision/main"):
            siblings = [{"rfilename": file} for file in repo.files]
            return self._json(
                200, {"id": name, "modelId": name, "private": repo.private, "sha": repo.sha, "siblings": siblings}
            )
        if rest.startswith("/tree/"):
            return self._json(
                200,
                [
                    {"type": "file", "path": file, "size": len(data), "oid": _git_oid(data)}
                    for file, data in repo.files.items()
                ],
            )
        if rest.startswith("/resolve/"):
            return self._resolve(repo, rest.split("/", 3)[3])
        if rest.startswith("/preupload/"):
            return self._json(200, {"files": [_upload_mode(repo, file) for file in json.loads(body)["files"]]})
        if rest == ".git/info/lfs/objects/batch":
            return self._json(
                200, {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]}
            )
        if rest.startswith("/commit/"):
            return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        return self._json(404, {"error": f"no such address: {rest}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if asked["organization"] != OWNER:
            return self._json(
                403, {"error": f"You don't have the rights to create a model under {asked['organization']}"}
            )
        if name in self.server.repos:
            return self._json(409, {"error": "You already created this model repo", **url})
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.server.repos[name] = Repo(private=private)
        return self._json(200, url)

    def _validate(self, content: str) -> None:
        license = yaml.safe_load(content.split("---")[1]).get("license")
        errors = [] if license in (None, *LICENSES) else [{"message": f'"license" must be one of {list(LICENSES)}'}]
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to send a large file; nowhere when it is here already."""
        here = wanted["oid"] in self.server.blobs
        href = f"{self.server.url}/lfs/{wanted['oid']}"
        return wanted if here else {**wanted, "actions": {"upload": {"href": href}}}

    def _lfs(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json(400, {"error": "other bytes than announced"})
        self.server.blobs[oid] = body
        return self._json(200, {})

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        self._json(200, {"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def _resolve(self, repo: Repo, file: str) -> None:
        if file not in repo.files:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = repo.files[file]
        return self._send(200, data, {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": repo.sha})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _upload_mode(repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    present = repo.files.get(file["path"])
    oid = None if present is None else hashlib.sha256(present).hexdigest() if mode == "lfs" else _git_oid(present)
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
