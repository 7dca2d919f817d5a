"""What a command on a Ray cluster says when a node, a disk or a bucket fails; and that the same command goes on.

Three nodes, each in a network namespace (see ray_namespaces.py). A command is refused, which must be told in two lines;
then the fault is mended, and the same command must leave the bytes of one process. Needs Linux, root, `ip`, `setpriv`,
and for the disk a loop device with ext4: its blocks that are reserved for a group make it full for a node outside.

    python benchmarks/ray_refusals.py
    python benchmarks/ray_refusals.py --only disk bucket
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also of a process that is started with this file
from process_costs import machine as this_machine
from ray_namespaces import (
    BRIDGE,
    Work,
    address,
    cluster,
    inside,
    ip,
    kill,
    make_pairs,
    namespaces,
    prepare,
    start_node,
)

import clip_cid

_LAST, _SERVER, _SERVER_PORT = 2, "10.77.0.254", 5055
_FOR_GROUP, _GROUP = 40, 4242  # percent of the blocks of the small disk, which are for this group alone
_WITHOUT_GROUP = ["setpriv", "--clear-groups"]


class Failed(Exception):
    """Something did not hold."""


def refused(work: Work, run: str, stage: str, *flags: str, words: Sequence[str]) -> None:
    """The command must end with 1, and its last two lines hold these words."""
    began = time.perf_counter()
    code = work.run(stage, run, *flags)
    said = work.log(run).read_text().rstrip().splitlines()
    two = said[-2:]
    print(f"  {time.perf_counter() - began:.0f} s, exit code {code}", *two, sep="\n  | ", flush=True)
    whole = len(two) == 2 and two[0].startswith("clip-cid: ") and not any("Traceback" in line for line in said)
    lacking = [word for word in words if word not in "\n".join(two)]
    if code != 1 or not whole or lacking:
        raise Failed(f"exit code {code}; two lines: {whole}; without {lacking}")


def goes_on(work: Work, run: str, stage: str, *flags: str) -> None:
    """The same command ends with 0, and leaves the bytes of one process."""
    code = work.run(stage, run, *flags)
    equal = not code and work.digests(stage, run) == work.digests(stage, f"{stage}-here")
    said = work.log(run).read_text()
    kept = [line.strip() for line in said.splitlines() if "done before" in line or "taken over" in line][-1:]
    print(f"  the same command: exit code {code}, equal bytes: {equal} {kept or ''}", flush=True)
    if not equal:
        raise Failed(said[-1500:])


def restarted(work: Work, node: int, *, before: Sequence[str] = (), **more: str) -> None:
    """The node with other properties, in place of the one that runs."""
    kill(inside(node))
    start_node(node, {**work.environment, **more}, work.folder, before=before)


def all_restarted(work: Work, *nodes: int, head_cores: int = 1) -> None:
    """These nodes, or all, in place of those that run."""
    for node in range(3):
        kill(inside(node))
    for node in nodes or range(3):
        start_node(node, work.environment, work.folder, cores=1 if node else head_cores)


def there() -> list[str]:
    return ["--ray", f"{address(0)}:6379"]


def nobody(work: Work) -> None:
    """An address where no Ray is."""
    refused(work, "runs/nobody", "balance", *there(), words=["no Ray cluster at 10.77.0.1:6379", "same command"])
    refused(work, "runs/nobody", "balance", "--ray", "10.77.0.99:6379", words=["no Ray cluster at", "same command"])


def versions(work: Work) -> None:
    """A node that has another clip-cid of the same version number."""
    shutil.copytree(clip_cid.__path__[0], work.folder / "other" / "clip_cid")
    with (work.folder / "other" / "clip_cid" / "units.py").open("a") as handle:
        handle.write("# changed\n")
    path = f"{work.folder / 'other'}{os.pathsep}{work.environment['PYTHONPATH']}"
    restarted(work, _LAST, PYTHONPATH=path)
    refused(work, "runs/versions", "balance", *there(), words=["10.77.0.3", "other versions: clip-cid", "same command"])
    restarted(work, _LAST)
    goes_on(work, "runs/versions", "balance", *there())


def unseen(work: Work) -> None:
    """A node that does not see the run folder: others do its tasks; where it is the only one, it is named."""
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(work.folder / "runs")]
    restarted(work, _LAST, before=hide)
    goes_on(work, "runs/unseen", "balance", *there())
    said = work.log("runs/unseen").read_text()
    print(*(f"  | {line}" for line in said.splitlines() if "does not see" in line), sep="\n", flush=True)
    if "(10.77.0.3) does not see" not in said:
        raise Failed("the node is not named")

    all_restarted(work, 0, head_cores=0)
    restarted(work, _LAST, before=hide)
    refused(work, "runs/alone", "balance", *there(), words=["10.77.0.3", "does not see", "same command"])
    restarted(work, _LAST)
    goes_on(work, "runs/alone", "balance", *there())
    all_restarted(work)


def dies(work: Work) -> None:
    """The only node with cores dies for good; the head has none."""
    all_restarted(work, 0, 1, head_cores=0)
    began = time.perf_counter()
    code = work.run("balance", "runs/dies", *there(), act=lambda: kill(inside(1)))
    two = work.log("runs/dies").read_text().rstrip().splitlines()[-2:]
    print(f"  {time.perf_counter() - began:.0f} s, exit code {code}", *two, sep="\n  | ", flush=True)
    if code != 1 or "no node of this Ray cluster has a CPU" not in two[0] or "same command" not in two[1]:
        raise Failed("; ".join(two))
    start_node(1, work.environment, work.folder)
    goes_on(work, "runs/dies", "balance", *there())
    all_restarted(work)


def disk(work: Work) -> None:
    """The disk of the run folder is full for one node, and then for all."""
    image, small = work.folder / "disk.img", work.folder / "small"
    small.mkdir()
    subprocess.run(["truncate", "-s", "64M", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", str(_FOR_GROUP), str(image)], check=True)
    subprocess.run(["mount", "-o", f"loop,resuid=65534,resgid={_GROUP}", str(image), str(small)], check=True)
    os.setgroups([_GROUP])  # of all that is started from now on
    try:
        for who, run in (("one node", "small/one"), ("all", "small/all")):
            print(f" full for {who}", flush=True)
            if who == "one node":
                fill(small, before=_WITHOUT_GROUP)
                all_restarted(work, 0, head_cores=0)
                restarted(work, _LAST, before=_WITHOUT_GROUP)
                words = ["10.77.0.3", "the disk is full", "same command"]
            else:
                restarted(work, _LAST)
                fill(small)
                words = ["the disk is full", "same command"]
            refused(work, run, "balance", *there(), words=words)
            (small / "filler").unlink()
            goes_on(work, run, "balance", *there())
    finally:
        for node in range(3):
            kill(inside(node))
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    all_restarted(work)


def fill(folder: Path, before: Sequence[str] = ()) -> None:
    """Write until there is no room."""
    write = ["dd", "if=/dev/zero", f"of={folder / 'filler'}", "bs=4k"]
    subprocess.run([*before, *write], check=False, capture_output=True)
    os.sync()


def bucket(work: Work) -> None:
    """A bucket that the command may read and the nodes may not: with keys of another account, and with none at all."""
    with s3_server(work) as (keys_of, give_rights):
        source = ["--pairs.source", "s3://bucket/{00000,00025,00050,00075,00100}.tar"]
        flags = {"embed": [*source, *work.flags["embed"][2:]]}
        mine, others, nobody_there = (
            Work(work.folder, {**work.environment, **keys_of(user)}, work.least, flags)
            for user in ("may", "may-not", "")
        )
        if mine.run("embed", "runs/s3-here", "--machine.ray", "None"):
            raise Failed(mine.log("runs/s3-here").read_text()[-1500:])

        print(" the command itself", flush=True)
        words = ["s3://bucket/", "access is denied", "same command"]
        refused(others, "runs/denied", "embed", *there(), words=words)

        for who, of_nodes in (("keys without rights", others), ("no keys", nobody_there)):
            print(f" nodes: {who}", flush=True)
            all_restarted(of_nodes)
            run = f"runs/{who.replace(' ', '-')}"
            words = ["s3://bucket/", "access is denied", "10.77.0.", "same command"]
            refused(mine, run, "embed", *there(), words=words)
            if of_nodes is others:
                give_rights("may-not")
            else:
                all_restarted(mine)
            same(mine, run)

        print(" a node without s3fs", flush=True)
        (work.folder / "without").mkdir()
        (work.folder / "without" / "sitecustomize.py").write_text("import sys\nsys.modules['s3fs'] = None\n")
        path = f"{work.folder / 'without'}{os.pathsep}{work.environment['PYTHONPATH']}"
        all_restarted(mine, 0, head_cores=0)
        restarted(mine, _LAST, PYTHONPATH=path)
        words = ["10.77.0.3", "s3fs", 'pip install "clip-cid[s3]"']
        refused(mine, "runs/without", "embed", *there(), words=words)
        restarted(mine, _LAST)
        same(mine, "runs/without")
    all_restarted(work)


def same(work: Work, run: str) -> None:
    code = work.run("embed", run, *there())
    equal = not code and work.digests("embed", run) == work.digests("embed", "runs/s3-here")
    print(f"  the same command: exit code {code}, equal bytes: {equal}", flush=True)
    if not equal:
        raise Failed(work.log(run).read_text()[-1500:])


@contextlib.contextmanager
def s3_server(work: Work) -> Generator[tuple[Callable[[str], dict[str, str]], Callable[[str], None]]]:
    """Moto's S3 on the switch between the nodes, with accounts `may` and `may-not`: their variables, and what gives rights."""
    url = f"http://{_SERVER}:{_SERVER_PORT}"
    made = work.folder / "accounts.json"
    rights = {"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}], "Version": "2012-10-17"}
    prelude = f"""
import boto3, json, sys
from pathlib import Path
keys = dict(endpoint_url={url!r}, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y")
s3, iam, rights = boto3.client("s3", **keys), boto3.client("iam", **keys), {json.dumps(rights)!r}
"""
    make = """
s3.create_bucket(Bucket="bucket")
for path in sorted(Path("pairs").glob("*.tar")):
    s3.put_object(Bucket="bucket", Key=path.name, Body=path.read_bytes())
found = {}
for user in ("may", "may-not"):
    iam.create_user(UserName=user)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    found[user] = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
iam.put_user_policy(UserName="may", PolicyName="all", PolicyDocument=rights)
Path("accounts.json").write_text(json.dumps(found))
"""

    def do(code: str) -> None:
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=work.folder, env=work.environment, check=True, capture_output=True)

    def guard(after: str) -> None:
        """Rights count from now on, or not."""
        header = {"Content-Type": "text/plain"}  # else the body is taken for a form
        request = f"u.Request('{url}/moto-api/reset-auth', b'{after}', {header})"
        do(f"import urllib.request as u; u.urlopen({request})")

    def keys_of(user: str) -> dict[str, str]:
        place = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        return {**place, **(json.loads(made.read_text())[user] if user else {})}

    def give_rights(user: str) -> None:
        guard("inf")
        do(f"{prelude}\niam.put_user_policy(UserName={user!r}, PolicyName='all', PolicyDocument=rights)")
        guard("0")

    script = Path(sys.executable).with_name("moto_server")
    serve = [str(script), "-H", _SERVER, "-p", str(_SERVER_PORT)]
    ip("address", "add", f"{_SERVER}/24", "dev", BRIDGE)
    server_of = {**work.environment, "INITIAL_NO_AUTH_ACTION_COUNT": "inf"}
    with subprocess.Popen(serve, env=server_of, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(subprocess.CalledProcessError):
                    guard("inf")
                    break
                time.sleep(0.5)
            do(prelude + make)
            guard("0")
            yield keys_of, give_rights
        finally:
            server.kill()


_CASES: dict[str, Callable[[Work], None]] = {
    "versions": versions,
    "unseen": unseen,
    "dies": dies,
    "disk": disk,
    "bucket": bucket,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["nobody", *_CASES], default=["nobody", *_CASES])
    options = parser.parse_args()
    print(datetime.date.today(), this_machine())

    failed: list[str] = []
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, namespaces():
        work = prepare(Path(folder), 6_000, 600, 1_000)
        (work.folder / "runs").mkdir()
        if work.run("balance", "balance-here"):
            raise SystemExit("balance in one process fails")
        if "bucket" in options.only:
            make_pairs(work, 125)
        if "nobody" in options.only:
            failed += tried("nobody", nobody, work)
        with cluster(work.environment, work.folder):
            if "nobody" in options.only:
                goes_on(work, "runs/nobody", "balance", *there())
            for what, case in _CASES.items():
                if what in options.only:
                    failed += tried(what, case, work)
    print(f"failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


def tried(what: str, case: Callable[[Work], None], work: Work) -> list[str]:
    """Its name if it does not hold."""
    print(f"{what}: {(case.__doc__ or '').strip()}", flush=True)
    try:
        case(work)
    except Failed as error:
        print(f"  DOES NOT HOLD: {error}", flush=True)
        return [what]
    return []


if __name__ == "__main__":
    main()
