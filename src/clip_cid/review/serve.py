"""`clip-cid review`: the page on this machine, until Ctrl-C."""

import contextlib
import errno
import secrets
import socket

import uvicorn

from clip_cid import log
from clip_cid.errors import ConfigError
from clip_cid.review.app import make_app
from clip_cid.review.opened_run import OpenedRun

HOST = "127.0.0.1"

_SECONDS_TO_END = 3  # for answers in progress


def serve(run: OpenedRun, *, port: int) -> None:
    """Serve the page about a run until the process is interrupted.

    Args:
        run: Opened.
        port: Of this machine; 0 takes one that is free.

    Raises:
        ConfigError: The port cannot be used.
    """
    token = secrets.token_urlsafe(32)
    with listening(port) as listener:
        app = make_app(run, token=token)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # it would show the token
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        log.say(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        log.say(f"Open this address in a browser on this machine. Decisions go to {run.log.path}. Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])

    decided = len(run.log.read().lines)
    if decided:
        log.say(
            f"{decided:,} decisions hold; `clip-cid balance {run.folder.path} --balance.decisions {run.log.path}` obeys them."
        )


def listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is used by another program" if used else f"cannot be used ({error})"
        raise ConfigError(f"--port: {port} {reason}.", fix="Give another port, or leave --port out.") from error
    return listener
