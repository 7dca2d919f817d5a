"""Run tasks on the nodes of a Ray cluster. The only module that knows Ray.

A task is a plain remote function: it gets a name of some bytes, reads and writes files of the shared run folder, and
returns nothing. So Ray may do it again after a process or a node has died, and a late one may be done twice. No data
pass through Ray's object store.
"""

import collections
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import itertools
import math
import os
import pickle
import platform
import socket
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import threadpoolctl

from clip_cid import extras, log, os_errors
from clip_cid.errors import ClipCidError, ConfigError, MissingExtraError, RunError
from clip_cid.run_folder import own_mark
from clip_cid.tasks import DoTask, Task, sendable

AUTO = "auto"
_CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # where `ray start` leaves the address of its cluster
_TOKEN_FILE = Path("~/.ray/auth_token")
_PACKAGES = ("ray", "numpy", "scipy", "torch", "pyarrow", "pillow", "open_clip_torch")
_ENVIRONMENT = "CLIP_CID_"
_RETRIES = 3
_LATE, _LATE_START = 3.0, 2.0  # times the median, and times what the first process needed to start and do a task
_UNSEEN_SECONDS = 90.0  # longer than a host remembers that a file is not there
_LOOK_SECONDS = 2.0  # that a task waits for the folder, before another node may have it
_ANSWER_SECONDS = 10.0
_WITHOUT_NODES_SECONDS = 120.0
_WITHOUT_HEAD_SECONDS, _HEAD_EVERY = 30.0, 2.0  # Ray ends this process, in words of its own, after 60
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": str(_RETRIES),  # by default without end
}
"""Of Ray, in the environment of the process that joins a cluster, unless others are set.

RAY_grpc_client_keepalive_time_ms is not among them: nodes that were started without it end the connection ("too many
pings"), and with it every task of more than half a minute. What is on a node that was cut off is handed out twice.
"""
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and no settings
_SETTINGS_FRAME = 4  # the kind of frame that every HTTP/2 server sends first


def run_tasks(
    tasks: Sequence[Task],
    begin: Callable[[], DoTask],
    *,
    address: str,
    folder: Path,
    on_done: Callable[[Task], Any],
    leaves: Callable[[Task], Path] | None = None,
    gpus: int = 0,
) -> None:
    """Do every task, in any order, on the nodes of a cluster.

    Args:
        tasks: The tasks to do.
        begin: Opens what the tasks read and returns the function that does one; called once in each process.
        address: HOST:PORT of a cluster in which this host is a node, or `auto`.
        folder: Where the tasks write. Every node must see it.
        on_done: Called in this process with each finished task.
        leaves: What a task leaves, if this host must see it before `on_done`.
        gpus: GPUs that a task needs; without any it needs one core.

    Raises:
        ClipCidError: As a task or `begin` raised it; or there is no such cluster, or one of its nodes differs.
    """
    if not tasks:
        return

    cluster = _connected(address)
    with _shared_sign(folder) as sign:
        # What each node needs, in order to work as this process would.
        order = _Order(
            sign=str(sign),
            patience=_UNSEEN_SECONDS,
            folder=os.getcwd(),
            environment={name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
            versions=_versions(),
            threads=0 if gpus else 1,
            begin=pickle.dumps(begin),
        )

        # A task counts once this host sees what it leaves: a shared disk may show it late.
        with contextlib.closing(_Round(cluster, order, tasks, gpus)) as work:
            for task in work.finished():
                if leaves is not None and not _appears(leaves(task), _UNSEEN_SECONDS):
                    raise RunError(
                        f"{leaves(task)}: a node has written it, and this host does not see it.",
                        fix="See that every node has the same folder there, then run the same command again.",
                    )
                on_done(task)


def disconnect() -> None:
    """Leave the cluster if this process has joined one: its worker processes end and give back what they hold."""
    if _connected.cache_info().currsize:
        _connected.cache_clear()
        _ray().shutdown()


# The process that hands out the tasks.


class _Order(NamedTuple):
    """What every task of a round brings along."""

    sign: str
    """A file in the shared folder, of a name that nobody has used before. It also names the round."""
    patience: float
    """Seconds until a node does not see it."""
    folder: str
    """Where the command was started: relative paths begin there."""
    environment: dict[str, str]
    versions: dict[str, str]
    threads: int
    """Of a process; 0 leaves it to the libraries."""
    begin: bytes


class _Attempt(NamedTuple):
    """A task that is on a node, or waits for one."""

    number: int
    since: float
    nodes: frozenset[str]
    """One of these has it."""


class _Round:
    """The tasks of one call, some of which are on the nodes at any time."""

    def __init__(self, cluster: "_Cluster", order: _Order, tasks: Sequence[Any], gpus: int) -> None:
        self._cluster, self._order, self._tasks, self._gpus = cluster, order, tasks, gpus
        self._waiting = collections.deque(range(len(tasks)))
        self._attempts: dict[Any, _Attempt] = {}
        self._seconds: list[float] = []
        """From the handing out to the end, of each finished task."""
        self._doubled: set[int] = set()
        self._done: set[int] = set()
        self._unseen: dict[str, float] = {}
        """Nodes that did not see the folder, and since when."""

    def finished(self) -> Iterator[Any]:
        """Each task, when it is done."""
        while len(self._done) < len(self._tasks):
            slots, nodes = self._cluster.slots(self._gpus)
            while self._waiting and self._safe(nodes) < 2 * slots:
                self._hand_out(self._waiting.popleft(), nodes)
            if not self._waiting and self._safe(nodes) < slots:
                self._double_late(nodes)

            for attempt, outcome in self._cluster.ended(self._attempts):
                number, since, _ = self._attempts.pop(attempt)
                if number in self._done or not self._counts(number, outcome):
                    continue
                self._done.add(number)
                self._seconds.append(time.monotonic() - since)
                self._cluster.first_seconds = self._cluster.first_seconds or self._seconds[0]
                yield self._tasks[number]

    def close(self) -> None:
        """End what still runs: second copies, or all after an error."""
        self._cluster.end(list(self._attempts))

    def _hand_out(self, number: int, nodes: frozenset[str]) -> None:
        attempt = self._cluster.start(self._order, pickle.dumps(self._tasks[number]), self._gpus)
        self._attempts[attempt] = _Attempt(number, time.monotonic(), nodes)

    def _safe(self, nodes: frozenset[str]) -> int:
        """How many attempts are on these nodes. One that was handed out before a node was lost may be on that one."""
        return sum(attempt.nodes <= nodes for attempt in self._attempts.values())

    def _double_late(self, nodes: frozenset[str]) -> None:
        """Hand out again, once, what takes much longer than others did: its node may be slow, or cut off.

        And what may be on a lost node, copies included: where the network was cut, Ray may wait for minutes before it
        does such a task again. What waits for a new process is not late: its copy would end that process, and the next
        tasks would wait for another one.
        """
        late = -math.inf
        if self._seconds:
            patience = max(_LATE * statistics.median(self._seconds), _LATE_START * self._cluster.first_seconds)
            late = time.monotonic() - patience
        safe = {attempt.number for attempt in self._attempts.values() if attempt.nodes <= nodes}
        for number, since, had in list(self._attempts.values()):
            is_late, may_be_lost = since < late and number not in self._doubled, not had <= nodes
            if is_late or (may_be_lost and number not in safe):
                self._doubled.add(number)
                safe.add(number)
                self._hand_out(number, nodes)

    def _counts(self, number: int, outcome: bytes | Exception | None) -> bool:
        """Whether the task is done; another copy may be when this one has died.

        Raises:
            Exception: As the task raised it.
            RunError: Its process died, again and again.
        """
        if isinstance(outcome, bytes):
            error = pickle.loads(outcome)
            if isinstance(error, _UnseenError) and self._may_appear(error):
                if not self._is_on_a_node(number):
                    self._waiting.append(number)
                return False
            raise error
        if outcome is None:
            return True
        if self._is_on_a_node(number):
            return False
        raise self._cluster.explained(outcome, self._tasks[number])

    def _is_on_a_node(self, number: int) -> bool:
        return any(attempt.number == number for attempt in self._attempts.values())

    def _may_appear(self, error: "_UnseenError") -> bool:
        """Whether a node may see the folder soon. Others do its tasks meanwhile, so it is named in any case."""
        since = self._unseen.setdefault(error.node, time.monotonic())
        self._cluster.warn_once(f"{error.problem.removesuffix('.')}; other nodes do its tasks")
        return time.monotonic() - since <= self._order.patience


class _Cluster:
    """What we use of Ray."""

    def __init__(self, address: str) -> None:
        self._ray, self._address = _ray(), address
        self._remote = self._ray.remote(_do)
        self.first_seconds = 0.0
        """From the first task that is handed out until it is done, which needs a new process; 0 before that."""
        self._without_nodes_since: float | None = None
        self._warned: set[str] = set()
        self._known: set[str] = set()
        """Every node that there has been."""
        self._places: list[str] = []
        """Nodes that get tasks in turn, once one is lost; each as often as it does tasks at once.

        Ray asks few nodes at a time where a task may go, and one whose network is cut leaves it waiting for minutes. It
        asks anew for tasks that are to go to a certain node.
        """
        self._turns = itertools.count()
        self._slots: dict[int, tuple[float, int, frozenset[str]]] = {}

    def slots(self, gpus: int) -> tuple[int, frozenset[str]]:
        """Tasks that the nodes can do at once, at least 1, and the nodes; as of some seconds ago at most.

        Raises:
            RunError: For some time no node could do any, or the head node did not answer.
        """
        since, slots, nodes = self._slots.get(gpus, (-_HEAD_EVERY, 0, frozenset()))
        if not slots or time.monotonic() - since > _HEAD_EVERY:
            slots, nodes = self._slots_now(gpus)
            self._slots[gpus] = time.monotonic(), slots, nodes
        return slots, nodes

    def warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warn(text)

    def _check_head(self) -> None:
        """Without its head node Ray's calls wait for a minute, and then end this process."""
        deadline = time.monotonic() + _WITHOUT_HEAD_SECONDS
        while why := _no_server(self._address):
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self._address}: the head node of this Ray cluster does not answer any more ({why}).",
                    fix="Start the cluster again (`ray start --head --port 6379`), or take --machine.ray None, then run"
                    " the same command again; finished tasks are kept.",
                )
            time.sleep(_HEAD_EVERY)

    def _slots_now(self, gpus: int) -> tuple[int, frozenset[str]]:
        self._check_head()
        resource, needed = ("GPU", gpus) if gpus else ("CPU", 1)
        alive = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        places = [name for name, has in alive.items() for _ in range(int(has.get(resource, 0)) // needed)]
        self._known |= alive.keys()
        self._places = places if self._known > alive.keys() else []
        if places:
            self._without_nodes_since = None
            return len(places), frozenset(alive)

        now = time.monotonic()
        self._without_nodes_since = self._without_nodes_since or now
        if now - self._without_nodes_since > _WITHOUT_NODES_SECONDS:
            raise RunError(
                f"{self._address}: no node of this Ray cluster has a {resource} for tasks.",
                fix="Start nodes (`ray start --address ...`), then run the same command again; finished tasks are kept.",
            )
        return 1, frozenset(alive)

    def start(self, order: _Order, task: bytes, gpus: int) -> Any:
        """Have a node do a task."""
        where: Any = "SPREAD"
        if self._places:
            of_node = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
            where = of_node(self._places[next(self._turns) % len(self._places)], soft=True)
        needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
        if gpus:
            needs["max_calls"] = 0  # else a new process, and the teacher loaded anew, for each task
        return self._remote.options(max_retries=_RETRIES, scheduling_strategy=where, **needs).remote(order, task)

    def ended(self, attempts: Sequence[Any] | dict[Any, Any]) -> list[tuple[Any, bytes | Exception | None]]:
        """The attempts that have ended, soon; with None, an error of the task as bytes, or an error of Ray."""
        ready, _ = self._ray.wait(list(attempts), num_returns=1, timeout=1.0)
        return [(attempt, self._outcome(attempt)) for attempt in ready]

    def end(self, attempts: Sequence[Any]) -> None:
        """End attempts, and wait for that as long as a reachable node needs."""
        for attempt in attempts:
            self._ray.cancel(attempt, force=True)
        if attempts:
            self._ray.wait(attempts, num_returns=len(attempts), timeout=_ANSWER_SECONDS)

    def explained(self, error: Exception, task: Any) -> ClipCidError:
        """What Ray says of a task, in two lines."""
        kinds = self._ray.exceptions
        again = "then run the same command again; finished tasks are kept."
        if isinstance(error, kinds.RayTaskError):  # before our code began
            where = f"node {getattr(error, 'ip', 'of unknown address')}"
            cause = getattr(error, "cause", None) or error
            return RunError(
                f"{where}: cannot run clip-cid ({str(cause).strip().splitlines()[-1]}).",
                fix=f"Install there what is installed here, clip-cid {_versions()['clip-cid']}; {again}",
            )
        if isinstance(error, kinds.OutOfMemoryError):
            return RunError(
                f"task {task}: memory ran out on its node, {_RETRIES + 1} times.",
                fix=f"Start nodes that do fewer tasks at once (`ray start --num-cpus N`), {again}",
            )
        return RunError(
            f"task {task}: the processes that did it died ({type(error).__name__}), {_RETRIES + 1} times.",
            fix=f"Most often memory ran out: start nodes that do fewer tasks at once (`ray start --num-cpus N`), {again}",
        )

    def _outcome(self, attempt: Any) -> bytes | Exception | None:
        try:
            return self._ray.get(attempt)
        except self._ray.exceptions.RayError as error:
            return error


@functools.lru_cache(maxsize=1)
def _connected(address: str) -> _Cluster:
    """The cluster, joined by this process as a driver.

    Raises:
        MissingExtraError: Ray is not installed.
        ClipCidError: There is no such cluster, or it does not take this process.
    """
    extras.require("machine.ray", extras.RAY)
    found = _address(address)
    _look_for_server(found)

    # Before Ray is imported: it reads these once.
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"

    ray = _ray()
    if ray.is_initialized():  # of an earlier address
        ray.shutdown()
    try:
        ray.init(address=found, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        raise RunError(
            f"{found}: the Ray cluster does not take this process ({_last_line(error)}).",
            fix="Start the command on a node of the cluster, with its versions of Python and Ray and, where it has one,"
            " its token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH); docs/scale.md has an example.",
        ) from error
    cores, own_gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    alive = sum(node["Alive"] for node in ray.nodes())  # lost ones are listed, too
    log.info(f"ray       {found}: {alive} nodes, {cores} CPUs, {own_gpus} GPUs")
    return _Cluster(found)


def _address(address: str) -> str:
    """HOST:PORT; of `auto` the one that Ray itself would take.

    Raises:
        ConfigError: The address has another form.
        RunError: No Ray runs here.
    """
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS") or _current_cluster()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ConfigError(
            f"machine.ray: {address} is no address of a Ray cluster.",
            fix="Give HOST:PORT as `ray start --head --port 6379` printed it, or auto for the cluster of this host.",
        )
    return address


def _current_cluster() -> str:
    try:
        return _CURRENT_CLUSTER.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise RunError(
            "machine.ray: auto, but no Ray runs on this host.",
            fix="Start one here (`ray start --head --port 6379`, or --address HOST:PORT for a cluster that runs), then"
            " run the same command again.",
        ) from error


def _look_for_server(address: str) -> None:
    """See that a server like Ray's answers; Ray itself tries for minutes.

    Raises:
        RunError: Nobody answers, or something else does.
    """
    if why := _no_server(address):
        raise RunError(
            f"machine.ray: no Ray cluster at {address} ({why}).",
            fix="Start it (`ray start --head --port 6379`), correct the address, or do without Ray (add"
            " `--machine.ray None`), then run the same command again; finished tasks are kept.",
        )


def _no_server(address: str) -> str:
    """Why no server like Ray's answers there; empty if one does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS") in ("1", "true"):
                return ""
            connection.sendall(_HTTP2)
            frame = connection.recv(9)
    except (OSError, OverflowError) as error:
        return str(error)
    return "" if len(frame) > 3 and frame[3] == _SETTINGS_FRAME else "something else answers"


def _has_token() -> bool:
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or _TOKEN_FILE.expanduser().is_file()


@contextlib.contextmanager
def _shared_sign(folder: Path) -> Generator[Path]:
    """A new file that every node must see."""
    folder.mkdir(parents=True, exist_ok=True)
    sign = folder.resolve() / f".shared.tmp-{own_mark()}"
    sign.touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def _ray() -> Any:
    """Ray, which need not be installed; our types end here."""
    return importlib.import_module("ray")


# The processes on the nodes.


class _UnseenError(RunError):
    """A node does not see the folder, or not yet."""

    def __init__(self, folder: Path, node: str, *, fix: str) -> None:
        super().__init__(f"{folder}: node {node} does not see what the command has written there.", fix=fix)
        self.node = node


_opened: tuple[str, DoTask] | None = None  # of this process: the round, and what `begin` returned


def _do(order: _Order, task: bytes) -> bytes | None:
    """Do a task; an error comes back as bytes, since Ray would wrap it."""
    try:
        _open(order)(pickle.loads(task))
    except Exception as error:
        return pickle.dumps(sendable(_of_this_node(error)))
    return None


def _open(order: _Order) -> DoTask:
    """What `begin` opens, once in each process and round."""
    global _opened
    if _opened is None or _opened[0] != order.sign:
        _opened = None
        _check_node(order)
        os.environ.update(order.environment)
        if order.threads:
            threadpoolctl.threadpool_limits(order.threads)
        _opened = order.sign, pickle.loads(order.begin)()
    return _opened[1]


def _of_this_node(error: Exception) -> Exception:
    """Name this node where the fault may be its own: its memory, its disk, its rights, what is installed."""
    if isinstance(error, MemoryError):
        return RunError(
            f"memory ran out on node {_own_node()}.",
            fix="Start nodes that do fewer tasks at once (`ray start --num-cpus N`), then run the same command again;"
            " finished tasks are kept.",
        )
    if known := os_errors.explain(error, what=f", seen from node {_own_node()}", kept="Finished tasks are kept."):
        return known
    if isinstance(error, MissingExtraError) or (
        isinstance(error, ClipCidError) and isinstance(error.__cause__, OSError)
    ):
        error.problem = f"node {_own_node()}: {error.problem}"
    return error


def _check_node(order: _Order) -> None:
    """See that this node has the software and the folders of the process that hands out the tasks.

    Raises:
        RunError: It has not.
    """
    own = _versions()
    differ = [f"{name} {own.get(name)}, not {wanted}" for name, wanted in order.versions.items() if own[name] != wanted]
    if differ:
        raise RunError(
            f"node {_own_node()} has other versions: {'; '.join(differ)}.",
            fix="Install the same on every node and start its Ray again, then run the same command again; finished"
            " tasks are kept.",
        )

    # The folder that holds the results: seen, and the same one; and written.
    sign = Path(order.sign)
    shared = "Give a path at which every node has the same folder, then run the same command again."
    if not _appears(sign, min(order.patience, _LOOK_SECONDS)):
        raise _UnseenError(sign.parent, _own_node(), fix=shared)
    try:
        own_sign = sign.with_name(f".shared.tmp-{own_mark()}")
        own_sign.touch()
        own_sign.unlink()
    except OSError as error:
        raise RunError(
            f"{sign.parent}: node {_own_node()} cannot write there ({error.strerror}).",
            fix="Start Ray there as a user who may, then run the same command again; finished tasks are kept.",
        ) from error

    # Where relative paths begin.
    try:
        os.chdir(order.folder)
    except OSError as error:
        raise RunError(
            f"{order.folder}: the command was started there, and node {_own_node()} has no such folder.",
            fix="Start it in a folder that every node has, such as the one above the run folder.",
        ) from error


def _appears(path: Path, seconds: float) -> bool:
    """Whether a file is there, or soon will be for a host that remembers it as absent."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _own_node() -> str:
    return f"{socket.gethostname()} ({_ray().util.get_node_ip_address()})"


@functools.cache
def _versions() -> dict[str, str]:
    """What must be equal on all nodes, the contents of this package among them."""
    versions = {"clip-cid": f"{metadata.version('clip-cid')} ({_digest_of_package()})"}
    versions["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def _digest_of_package() -> str:
    """Tells two states of the source apart that have one version."""
    spec = importlib.util.find_spec("clip_cid")
    assert spec is not None, "this module is in it"
    assert spec.submodule_search_locations is not None, "it is a package"
    root, digest = Path(spec.submodule_search_locations[0]), hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__
