"""Hosts that are network namespaces of this machine: each with a name and an address of its own, and real traffic."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

INTERFACE = "net0"


class Host(NamedTuple):
    name: str
    address: str

    def start(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command there; it sees the files of this machine."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *named, *command],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self) -> None:
        """`kill -9` of every process there, as when the machine loses its power."""
        for number in _ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need root, ip and unshare"
    try:
        with hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"


@contextlib.contextmanager
def hosts(count: int) -> Generator[list[Host]]:
    """So many hosts that reach each other through a switch; they and their processes end with the block."""
    mark = f"cid{os.getpid()}"
    switch, made = f"{mark}s", list[Host]()
    _ip("netns", "add", switch)
    try:
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number in range(count):
            host = Host(f"{mark}h{number}", f"10.77.0.{number + 1}")
            _ip("netns", "add", host.name)
            made.append(host)
            _ip("-n", switch, "link", "add", f"to{number}", "type", "veth", "peer", INTERFACE, "netns", host.name)
            _ip("-n", switch, "link", "set", f"to{number}", "master", "switch", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield made
    finally:
        for host in made:
            host.kill()
            _ip("netns", "delete", host.name)
        _ip("netns", "delete", switch)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
