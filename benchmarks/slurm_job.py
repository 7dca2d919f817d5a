"""The job for Slurm in docs/scale.md, run as it stands there, with stand-ins for `srun` and `scontrol`.

Two nodes, each a network namespace with a host name and an address of its own (see ray_namespaces.py); Ray, torchrun
and clip-cid are the real ones. Only the places of the files and the processes a node (1 for 8) are others. The stages
that make data must leave the bytes of one process; the job is then submitted again. Needs Linux, root and `ip`.

    python benchmarks/slurm_job.py
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also of a process that is started with this file
from process_costs import machine as this_machine
from ray_namespaces import INTERFACE, Work, address, inside, ip, kill, make_pairs, name, namespaces, prepare

_NODES = 2
_STAND_INS = {
    "scontrol": 'printf "slurm%s\\n" 0 1\n',
    "srun": """
trap 'kill "${started[@]}"' TERM
started=()
for rank in 0 1; do
  SLURM_PROCID=$rank ip netns exec $STAND_IN_NODE$rank unshare --uts sh -c \\
    'hostname slurm$SLURM_PROCID && exec "$@"' - "$@" & started+=($!)
done
code=0
for process in "${started[@]}"; do wait $process || code=$?; done
exit $code
""",
}


def job(work: Work) -> str:
    """The script of the page, at other places."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text()
    found = re.search(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", page, re.DOTALL)
    assert found is not None, "the page has it"
    return found[1].replace("/shared/", f"{work.folder}/").replace("--nproc-per-node 8", "--nproc-per-node 1")


def submit(work: Work) -> int:
    """Run the job on the first node; its exit code."""
    slurm = {"SLURM_JOB_NODELIST": "slurm[0-1]", "SLURM_NNODES": str(_NODES), "SLURM_JOB_ID": "7"}
    path = f"{work.folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    there = ["ip", "netns", "exec", name(0), "unshare", "--uts", "sh", "-c", 'hostname slurm0 && exec "$@"', "-"]
    environment = {**work.environment, **slurm, "PATH": path, "STAND_IN_NODE": name(0)[:-1]}
    for variable in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        del environment[variable]  # the job sets them
    with (work.folder / "job.log").open("ab") as log:
        return subprocess.run(
            [*there, "bash", "job.sh"], cwd=work.folder, env=environment, check=False, stdout=log, stderr=log
        ).returncode


def name_hosts() -> None:
    """Each node knows the names of all, and has a way out, by which Ray finds its address."""
    for node in range(_NODES):
        hosts = Path("/etc/netns") / name(node) / "hosts"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        named = (f"{address(one)} slurm{one}" for one in range(_NODES))
        hosts.write_text("\n".join(["127.0.0.1 localhost", *named, ""]))
        hosts.with_name("resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody, who refuses at once
        ip("-n", name(node), "route", "add", "default", "dev", INTERFACE)


def forget_hosts() -> None:
    for node in range(_NODES):
        shutil.rmtree(Path("/etc/netns") / name(node))


def main() -> None:
    print(datetime.date.today(), this_machine())
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, namespaces():
        work = prepare(Path(folder), 100, 600, 1_000)
        make_pairs(work, 125)
        recipe = {
            "pairs": {"source": ["pairs/*.tar"]},
            "embed": {"teacher": "run:teacher"},
            "balance": {"threshold": 0.002},
            "cluster": {"num_centers": 8, "iterations": 3},
            "distill": {"student": "cid-tiny", "batch_size": 8, "steps": 12, "warmup_steps": 1},
            "machine": {"workers": 0, "threads": 1, "tensorboard": "off"},
        }
        (work.folder / "big.yaml").write_text(json.dumps(recipe))
        for stage in ("embed", "balance", "cluster"):
            command = [sys.executable, "-m", "clip_cid", stage, "here", "--recipe", "big.yaml"]
            subprocess.run(command, cwd=work.folder, env=work.environment, check=True, capture_output=True)

        (work.folder / "runs").mkdir()
        (work.folder / "bin").mkdir()
        for program, body in _STAND_INS.items():
            (path := work.folder / "bin" / program).write_text(f"#!/bin/bash\n{body}")
            path.chmod(0o755)
        (work.folder / "job.sh").write_text(job(work))

        name_hosts()
        try:
            for submission in ("first", "again"):
                began = time.perf_counter()
                code = submit(work)
                print(f"{submission}: {time.perf_counter() - began:.0f} s, exit code {code}", flush=True)
        finally:
            for node in range(_NODES):
                kill(inside(node))
            forget_hosts()

        said = (work.folder / "job.log").read_text()
        if code:
            raise SystemExit(said[-3000:])
        stages = ("embed", "balance", "cluster")
        equal = [work.digests(stage, "runs/big") == work.digests(stage, "here") for stage in stages]
        record = json.loads((work.folder / "runs/big/distill/manifest.json").read_text())
        print(f"equal bytes of {', '.join(stages)}: {equal}; {record['summary']['processes']} processes trained")
        words = re.compile(r"ray  |\w+ +(up to date|missing)")
        print(*(line for line in said.splitlines() if words.match(line)), sep="\n")
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
