"""The job for Slurm in docs/scale.md, run with stand-ins for Slurm, Ray, torchrun and clip-cid."""

import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
NODES = 2
NOTES = 'echo "$SLURM_PROCID {0} $*" | tr -s " " >> "$LOG"\n'
STAND_INS = {
    "scontrol": '[ "$*" = "show hostnames two-nodes" ] && printf "127.0.0.1\\nsecond\\n"\n',
    "srun": """
trap 'kill "${started[@]}"' TERM
started=()
for ((rank = 0; rank < SLURM_NNODES; rank++)); do SLURM_PROCID=$rank "$@" & started+=($!); done
wait "${started[@]}" && exit  # the code of the last one, or that of a signal
wait; exit 1
""",
    "ray": NOTES.format("ray")
    + """
trap 'echo "$SLURM_PROCID ray ends" >> "$LOG"; kill $!; exit 143' TERM
if [ "$2" = --head ]; then python3 -m http.server --bind 127.0.0.1 "$4" 2> /dev/null & else sleep 600 & fi
wait
""",
    "torchrun": NOTES.format("torchrun"),
    "clip-cid": """
until [ "$(grep -c "ray start" "$LOG")" = "$SLURM_NNODES" ]; do sleep 0.02; done
"""
    + NOTES.format("clip-cid")
    + '[ "$1" != "$FAILS" ]\n',
}


def job(folder: Path, port: int) -> str:
    """The script, at other places."""
    pages = (ROOT / "docs" / "scale.md").read_text()
    found = re.search(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", pages, re.DOTALL)
    assert found is not None
    script = found[1]
    for there, here in {"/shared/runs/": f"{folder}/", "/shared/": f"{folder}/", "6379": str(port)}.items():
        assert there in script
        script = script.replace(there, here)
    return script


def submitted(folder: Path, fails: str = "") -> tuple[int, list[str], int]:
    """The exit code of the job, what was started and ended, in order, and the port of Ray."""
    port = processes.free_port()
    for name, body in STAND_INS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "two-nodes", "SLURM_NNODES": str(NODES), "SLURM_JOB_ID": "7", "FAILS": fails}
    environment = {**os.environ, **slurm, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder / "log")}

    (folder / "job.sh").write_text(job(folder, port))
    with subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(processes.PATIENCE)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # as Slurm ends what a job leaves
    return code, (folder / "log").read_text().splitlines(), port


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def test_the_job_starts_ray_then_the_data_then_the_student(folder: Path):
    code, log, port = submitted(folder)
    assert code == 0, log
    assert (
        log[0] == f"0 ray start --head --port {port} --include-dashboard false --object-store-memory 80000000 --block"
    )
    assert log[1] == f"1 ray start --address 127.0.0.1:{port} --object-store-memory 80000000 --block"
    stages = [
        f" clip-cid {stage} {folder}/big --recipe {folder}/big.yaml --ray auto"
        for stage in ("embed", "balance", "cluster")
    ]
    assert log[2:5] == stages
    student = "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:29500 --rdzv-id 7"
    assert sorted(log[-3:-1]) == [
        f"{rank} torchrun {student} -m clip_cid distill {folder}/big" for rank in range(NODES)
    ]
    assert log[-1] == f" clip-cid run {folder}/big --recipe {folder}/big.yaml"
    assert sorted(log[-5:-3]) == ["0 ray ends", "1 ray ends"]
    assert len(log) == 10

    token = folder / "big.token-7"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text().strip())


def test_a_stage_that_fails_ends_the_job(folder: Path):
    code, log, _ = submitted(folder, fails="balance")
    assert code == 1
    assert log[-1].startswith(" clip-cid balance ")
    assert not any("torchrun" in line for line in log)
