"""The environment that a run sets up, the environment that a worker finds, and the names of devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.devices import resolve_device
from ktonum.errors import UsageError

VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTEST_XDIST_WORKER", "KTONUM_AUDIT_RUN")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes these variables, and restores them afterwards."""
    for name in (*VARIABLES, "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_run_on_the_cpu_sets_up_its_process_and_leaves_no_folder(tmp_path: Path) -> None:
    with AuditProcess.begin("cpu", import_from=str(tmp_path)) as process:
        assert process.device == "cpu" and process.folder.is_dir() and not process.worker
        assert os.environ["TRITON_INTERPRET"] == os.environ["OMP_NUM_THREADS"] == "1"
        assert sys.path[0] == str(tmp_path)
    assert not process.folder.exists() and "KTONUM_AUDIT_RUN" not in os.environ


def test_threads_that_the_user_chose_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with AuditProcess.begin("cpu"):
        assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["MKL_NUM_THREADS"] == "1"


def test_only_a_worker_of_the_controller_joins_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    with AuditProcess.begin("auto") as first:
        assert first.device == "cuda" and first.gpus == ("0", "1")
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw4")
        # A process that a worker started has the variables, but another parent.
        assert AuditProcess.join() is None
        monkeypatch.setattr("os.getppid", os.getpid)
        # From here on torch sees no GPU, so a worker must not ask again.
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        joined = AuditProcess.join()
        assert joined is not None and joined.lease is not None
        assert (joined.worker, joined.device, joined.folder) == ("gw4", "cuda", first.folder)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == joined.lease.gpu == "0"
        assert "TRITON_INTERPRET" not in os.environ
        joined.lease.release()
        joined.end()
        assert first.folder.is_dir(), "a worker's end is not the run's"


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("cuda", 0, "no CUDA device found; use device cpu, or run `ktonum doctor`"),
        ("cuda:2", 2, "torch sees 2 CUDA devices; use cuda:0 to cuda:1"),
        ("cuda:x", 2, "unknown device 'cuda:x': use auto, cpu, cuda or cuda:N"),
        ("tpu", 2, "unknown device 'tpu': use auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, words: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UsageError, match=words):
        resolve_device(device)
    assert resolve_device("auto") == ("cuda" if gpus else "cpu")


def test_the_device_is_chosen_without_initialising_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [resolve_device(d) for d in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda", "cuda", "cuda", "cpu"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match="unset the variable"):
        resolve_device("cuda")
