"""The web application of `clip-cid review`: routes, and nothing else."""

import functools
import json
import threading
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from clip_cid import log, os_errors
from clip_cid.data.balance.decisions import Kind
from clip_cid.data.balance.kinds import KINDS
from clip_cid.errors import ClipCidError
from clip_cid.method.distances import LARGEST
from clip_cid.review.answers import Answer, Answers, numbers
from clip_cid.review.decision_log import ContradictionError
from clip_cid.review.guard import Guard
from clip_cid.review.listing import ORDERS, Order, Wanted
from clip_cid.review.opened_run import OpenedRun
from clip_cid.review.pictures import Encoded, NoPictureError, RowPictures

_FILES = {
    "": ("review.html", "text/html"),
    "review.js": ("review.js", "text/javascript"),
    "review.css": ("review.css", "text/css"),
    "review.svg": ("review.svg", "image/svg+xml"),
}
_LONGEST_BODY = 1 << 20  # bytes of a request
_KEPT_AT_BROWSER = "private, max-age=86400"


def make_app(run: OpenedRun, *, token: str) -> Starlette:
    """The application about one run; every address begins with the token."""
    served = _Served(Answers(run), run, RowPictures(run.folder, run.recipe, run.store))
    routes = [
        Route("/{name:path}", served.file, methods=["GET"]),
    ]
    api: Mapping[str, Callable[[Request], Answer]] = {
        "about": lambda request: served.answers.about(),
        "threshold": served.threshold,
        "sets": served.sets,
        "set": served.set,
        "kind": served.kind,
        "decisions": lambda request: served.answers.decisions(),
    }
    routes[:0] = [Route(f"/api/{name}", _answering(answer), methods=["GET"]) for name, answer in api.items()]
    routes[:0] = [
        Route("/api/decide", _deciding(served.decide), methods=["POST"]),
        Route("/api/undo", _deciding(served.undo), methods=["POST"]),
        Route("/small/{row:int}", _picturing(served.pictures.small), methods=["GET"]),
        Route("/full/{row:int}", _picturing(served.pictures.full), methods=["GET"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)])


class _Served:
    """Requests as questions to `Answers`."""

    def __init__(self, answers: Answers, run: OpenedRun, pictures: RowPictures) -> None:
        self.answers, self._run, self.pictures = answers, run, pictures
        self._is_cold = True

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            return Response("Not found.\n", status_code=404, media_type="text/plain")
        file, media_type = _FILES[name]
        return Response(_static(file), media_type=media_type, headers={"Cache-Control": "no-cache"})

    def threshold(self, request: Request) -> Answer:
        given = request.query_params
        if "share" in given:
            return self.answers.threshold_for(_number(given, "share"))
        if (scale := given.get("scale")) is not None:
            if scale not in LARGEST:
                raise ValueError(f"there is no scale {scale!r}")
            return self.answers.threshold_on(scale, _number(given, "value"))
        return self.answers.threshold(_number(given, "squared"))

    def sets(self, request: Request) -> Answer:
        given = request.query_params
        order: Order | None = next((order for order in ORDERS if order == given.get("order", ORDERS[0])), None)
        if order is None:
            raise ValueError(f"there is no order {given['order']!r}")
        kind = given.get("kind", "")
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}")
        wanted = Wanted(
            order=order,
            page=_whole(given, "page", 0),
            seed=_whole(given, "seed", 0),
            text=given.get("text", "").strip(),
            source=given.get("source", ""),
            kind=kind,
            least=_whole(given, "least", 2),
            most=_whole(given, "most", None),
            decided={"yes": True, "no": False}.get(given.get("decided", "")),
        )
        answer = self.answers.sets(_number(given, "squared"), wanted)
        self._warm_up()
        return answer

    def _warm_up(self) -> None:
        """Once, when the first sets are found: what the next questions need, beside them."""
        if self._is_cold:
            self._is_cold = False
            threading.Thread(target=self._run.warm_up, daemon=True).start()

    def set(self, request: Request) -> Answer:
        given = request.query_params
        return self.answers.set_of(_number(given, "squared"), _whole(given, "row", -1), _whole(given, "page", 0))

    def kind(self, request: Request) -> Answer:
        given = request.query_params
        rows = [_whole(given, name, -1) for name in ("row", "other")]
        if not all(0 <= row < self._run.store.rows for row in rows):
            raise ValueError(f"there are no images {rows}")
        return {"kind": self.pictures.alike(*rows)}

    def decide(self, body: Any) -> Answer:
        kind: Kind | None = next((kind for kind in get_args(Kind) if kind == body.get("decision")), None)
        if kind is None:
            raise ValueError(f"there is no decision {body.get('decision')!r}")
        rows = numbers(body.get("rows") or [])
        if not all(0 <= row < self._run.store.rows and self._run.store.ok[row] for row in rows):
            raise ValueError("rows: there is no such image")
        line = self._run.decide(kind, rows)
        return {"id": line.id, **self.answers.decisions()}

    def undo(self, body: Any) -> Answer:
        undone = self._run.log.undo(body.get("id"))
        return {"undone": None if undone is None else undone.kind, **self.answers.decisions()}


def _answering(answer: Callable[[Request], Answer]) -> Callable[..., Any]:
    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(_explained, functools.partial(answer, request))

    return endpoint


def _deciding(decide: Callable[[Any], Answer]) -> Callable[..., Any]:
    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _problem("A decision is JSON.", "", 415)
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > _LONGEST_BODY:
                return _problem("Too many images at once.", "Decide about fewer.", 413)

        def act() -> Answer:
            body = _json(content)
            return decide(body)

        return await run_in_threadpool(_explained, act)

    return endpoint


def _picturing(picture: Callable[[int], Encoded]) -> Callable[..., Any]:
    def endpoint(request: Request) -> Response:
        try:
            content, media_type = picture(request.path_params["row"])
        except (NoPictureError, IndexError) as error:
            return Response(f"{error}\n", status_code=404, media_type="text/plain")
        return Response(content, media_type=media_type, headers={"Cache-Control": _KEPT_AT_BROWSER})

    return endpoint


def _explained(act: Callable[[], Answer]) -> Response:
    """The answer, or in words why there is none; a failure of the machine is said on the console, too."""
    try:
        return JSONResponse(act(), headers={"Cache-Control": "no-store"})
    except ContradictionError as error:
        return _problem(error.problem, error.fix, 409, undo=error.earlier.id)
    except ValueError as error:
        return _problem(str(error), "", 400)
    except ClipCidError as error:
        return _problem(error.problem, error.fix, 500)
    except OSError as error:
        explained = os_errors.explain(error)
        problem, fix = (str(error), "") if explained is None else (explained.problem, explained.fix)
        log.warn(f"review: {problem}")
        return _problem(problem, fix, 500)


def _problem(problem: str, fix: str, status: int, **more: str) -> Response:
    return JSONResponse({"problem": problem, "fix": fix, **more}, status_code=status)


def _json(content: bytes) -> Any:
    body = json.loads(content)
    if not isinstance(body, dict):
        raise ValueError("a decision is an object")
    return body


def _number(given: Mapping[str, str], name: str) -> float:
    try:
        return float(given[name])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}: must be a number, got {given.get(name)!r}") from error


def _whole(given: Mapping[str, str], name: str, default: Any) -> Any:
    text = given.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError(f"{name}: must be a whole number from 0, got {text!r}")
    return int(text)


@functools.cache
def _static(name: str) -> bytes:
    return resources.files("clip_cid.review").joinpath("static", name).read_bytes()
