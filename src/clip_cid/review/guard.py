"""Who may ask: only a page of this program, opened with its token, in a browser on this machine.

A page of another site that the browser shows at the same time must neither read nor decide. The token keeps out
whoever does not have the address; the host keeps out names that were pointed at this machine (DNS rebinding); the
origin keeps out forms and scripts of other sites (CSRF).
"""

import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Middleware: refuses whatever is not from this program's own page, and has every answer say so to the browser.

    The first part of the path is the token; what follows is the path that the application sees.
    """

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no web sockets
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        refused = _refusal(Request(scope))
        _, _, path = scope["path"].partition("/")
        token, slash, path = path.partition("/")
        if refused is None and not secrets.compare_digest(token.encode(), self._token.encode()):
            refused = PlainTextResponse("Open the address that `clip-cid review` printed.\n", status_code=404)
        if refused is not None:
            await refused(scope, receive, with_headers)
            return
        if not slash:  # the addresses on the page are relative
            await RedirectResponse(f"/{self._token}/")(scope, receive, with_headers)
            return
        inner = f"/{path}"
        await self._app({**scope, "path": inner, "raw_path": inner.encode()}, receive, with_headers)


def _refusal(request: Request) -> PlainTextResponse | None:
    headers: Headers = request.headers
    host = headers.get("host", "")
    if _host_name(host) not in HOSTS:
        return PlainTextResponse("This page is for browsers on this machine.\n", status_code=421)

    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
    of_ours = origin is None or origin == f"http://{host}"
    if not of_ours or site not in ("same-origin", "none"):
        return PlainTextResponse("Another site asked.\n", status_code=403)
    if request.method not in ("GET", "HEAD") and origin is None:
        return PlainTextResponse("Only the page itself may decide.\n", status_code=403)
    return None


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
        return None if parts.username is not None or parts.path else parts.hostname
    except ValueError:
        return None
