"""Triton kernels of the losses: run by its interpreter, compiled for GPUs that are not here, chosen and refused.

They never ran on a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clip_cid.method.distill import arithmetic
from clip_cid.method.distill.arithmetic import Arithmetic, arithmetic_of, loss_precision, why_no_triton
from clip_cid.method.distill.contrastive import Side, contrastive_loss
from clip_cid.method.distill.fused_cluster_loss import cluster_losses

triton = pytest.importorskip("triton")


@pytest.mark.slow
def test_by_the_interpreter_they_give_what_pytorch_gives():
    """Triton is an interpreter or a compiler for a whole process."""
    tests = Path(__file__).with_name("kernels_by_interpreter.py")
    how = ["-q", "-n", "0", "-p", "no:cacheprovider", "--no-showlocals"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *how, tests], env=environment, capture_output=True, text=True, check=False
    )
    assert re.search(r"^2\d passed in", done.stdout, re.MULTILINE), done.stdout[-4000:] + done.stderr[-2000:]


def test_it_is_refused_by_name_with_its_reason_and_not_chosen_on_a_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = torch.zeros(1)
    assert not arithmetic_of(rows).triton
    with loss_precision("fp32", "triton"), pytest.raises(ValueError, match="it needs CUDA, and the device is cpu"):
        arithmetic_of(rows)
    monkeypatch.setattr(arithmetic, "_has_triton", lambda: False)
    assert why_no_triton(torch.device("cuda")) == "the package triton is not installed"


def test_it_is_not_chosen_where_it_cannot_build_its_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As in images of Docker without a compiler, and with Debian's Python without its headers."""
    device, what_is_missing = torch.device("cuda"), arithmetic._what_triton_cannot_build.__wrapped__
    monkeypatch.setattr(arithmetic, "_what_triton_cannot_build", what_is_missing)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(arithmetic.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert why_no_triton(device) == f"it needs {tmp_path / 'Python.h'}, which is in the package python3-dev"
    (tmp_path / "Python.h").touch()
    assert why_no_triton(device) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_triton(device) == "it needs a C compiler: gcc, clang, or one that CC names"


def test_a_kernel_runs_where_its_logits_are(monkeypatch: pytest.MonkeyPatch):
    """Triton takes the current device, and the logits may be on another."""
    from clip_cid.method.distill import triton_kernels

    happened: list[Any] = []

    class Current:
        def __init__(self, logits: torch.Tensor) -> None:
            self._logits = logits

        def __enter__(self) -> None:
            happened.append(self._logits)

        def __exit__(self, *error: Any) -> None:
            happened.append("left")

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments, **options: happened.append(grid)

    monkeypatch.setattr(torch.cuda, "device_of", Current)
    monkeypatch.setattr(triton_kernels, "_cross_entropy", Kernel())
    logits = torch.zeros(3, 5)
    triton_kernels.cross_entropy(logits, 0)
    assert happened[0] is logits
    assert happened[1:] == [(3,), "left"]


def test_it_is_chosen_on_cuda_unless_pytorch_is_asked_for():
    class OnCuda:
        dtype, device = torch.float32, torch.device("cuda")

    rows: Any = OnCuda()
    undecorated: Any = getattr(arithmetic_of, "__wrapped__", arithmetic_of)
    assert undecorated(rows) == Arithmetic(torch.bfloat16, torch.float32, True)
    with loss_precision("fp32", "torch"):
        assert undecorated(rows) == Arithmetic(None, torch.float32)


SIGNATURES = {
    "_log_sum": "*fp32 *fp64 *fp64 *fp32 i32 i32",
    "_comparison": "*fp32 *fp32 *fp32 *fp64 *fp64 *fp64 *fp64 *fp32 i32 i32 i32",
    "_kl_slopes": "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32",
    "_cross_entropy": "*fp32 *fp32 i32 i32 i32",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SIGNATURES)
def test_each_kernel_compiles_for_a_gpu(name: str, capability: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """To the machine code of an A100 and an H100, without either."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clip_cid.method.distill import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    arguments = dict(zip(kernel.arg_names, [*SIGNATURES[name].split(), "constexpr"], strict=True))
    source = ASTSource(kernel, arguments, {(len(arguments) - 1,): 1024})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_kernels.OPTIONS)
    assert made.asm["cubin"]
    if name != "_kl_slopes":  # there each thread writes what it alone has read
        before = made.asm["ptx"].partition("st.global")[0]
        assert "bar.sync" in before.rpartition("ld.global")[2], "a thread may write what another has not read yet"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trained", [False, True])
def test_on_cuda_kernels_and_operations_give_the_same(trained: bool):
    def losses_and_gradients(kernels: Any) -> list[torch.Tensor]:
        student, centers = rows[0].clone().requires_grad_(), rows[2].repeat(30, 1).add(noise).requires_grad_(trained)
        with loss_precision("bf16", kernels):
            found = cluster_losses(student, centers, labels, teacher=rows[1], scale=16.0, block_centers=900)
            batch = contrastive_loss(Side.whole(student), Side.whole(rows[1]), torch.tensor(20.0, device="cuda"))
        assert found.kl is not None
        values = [found.cls, found.kl, batch]
        wanted = [student, centers] if trained else [student]
        return [*(value.detach() for value in values), *torch.autograd.grad(torch.stack(values).sum(), wanted)]

    generator = torch.Generator("cuda").manual_seed(0)
    rows = F.normalize(torch.randn(3, 100, 64, device="cuda", generator=generator), dim=2)
    noise = 0.1 * torch.randn(3000, 64, device="cuda", generator=generator)
    labels = torch.arange(100, device="cuda")
    for one, other in zip(losses_and_gradients("triton"), losses_and_gradients("torch"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
