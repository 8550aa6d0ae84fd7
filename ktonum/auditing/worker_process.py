"""What each process of an audit run sets up: the interpreter or a GPU, crash traces, a limit on time.

The first process of a run (pytest's own, or xdist's controller) decides and passes its decisions on in the environment,
which its workers inherit; they must not ask CUDA before they have a GPU.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ktonum.auditing.gpu_slots import GpuLease, lease_gpu, use_gpu, visible_gpus
from ktonum.errors import UsageError

__all__ = ["AuditProcess", "context_lost", "resolve_device_kind"]

_VARIABLE = "KTONUM_AUDIT_RUN"

# Read by the BLAS libraries of NumPy and torch when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# After these a process's CUDA context answers every call with an error.
_FATAL = (
    "an illegal memory access",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
    "an illegal instruction",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "uncorrectable ECC error",
    "the launch timed out",
    "cudaErrorIllegalAddress",
)


def resolve_device_kind(device: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``, without initialising CUDA.

    Raises:
        UsageError: CUDA was asked for and cannot be used.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device == "cpu" or (device == "auto" and interpreted):
        return "cpu"
    if device == "cuda" and interpreted:
        raise UsageError("device 'cuda' was asked for while TRITON_INTERPRET=1 is set: unset it, or use device cpu")
    gpus = visible_gpus()
    if device == "cuda" and not gpus:
        raise UsageError("device 'cuda' is not here: torch sees no CUDA devices; use cpu, and see ktonum doctor")
    return "cuda" if gpus else "cpu"


def context_lost(text: str) -> bool:
    """Whether an error with this text leaves the process's CUDA context unusable.

    Where CUDA is in use, a synchronisation tells; an error may also arrive there that nothing else has reported.
    """
    if any(sign in text for sign in _FATAL):
        return True
    import torch

    initialized: Any = torch.cuda.is_initialized
    if not initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@dataclass
class AuditProcess:
    """This process's part in an audit run.

    Attributes:
        folder: Shared by the processes of the run, removed at its end.
        device: ``cpu`` or ``cuda``.
        gpus: The GPUs of the run; none on the CPU.
        worker: xdist's name of this worker, e.g. ``gw0``; empty in the first process.
    """

    folder: Path
    device: str
    gpus: tuple[str, ...]
    worker: str = ""
    lease: GpuLease | None = None
    _traces: IO[str] | None = None

    @classmethod
    def start(cls, device: str) -> AuditProcess:
        """In a worker join its controller's run, else begin one on ``device`` (see `resolve_device_kind`).

        Raises:
            UsageError: The device cannot be used.
        """
        inherited = json.loads(os.environ.get(_VARIABLE, "{}"))
        # By the parent: a process that an audited test starts inherits the variables of a worker, but is none.
        if inherited.get("controller") == os.getppid() and "PYTEST_XDIST_WORKER" in os.environ:
            folder, gpus = Path(inherited["folder"]), tuple(inherited["gpus"])
            process = cls(folder, inherited["device"], gpus, os.environ["PYTEST_XDIST_WORKER"])
            if gpus:
                process.lease = lease_gpu(folder, gpus)
                use_gpu(process.lease, gpus)
        else:
            kind = resolve_device_kind(device)
            gpus = visible_gpus() if kind == "cuda" else ()
            process = cls(Path(tempfile.mkdtemp(prefix="ktonum-run-")), kind, gpus)
            run = {"controller": os.getpid(), "folder": str(process.folder), "device": kind, "gpus": gpus}
            os.environ[_VARIABLE] = json.dumps(run)
        if process.device == "cpu":
            # Triton decides when a kernel is defined whether its interpreter runs it.
            os.environ["TRITON_INTERPRET"] = "1"
            # The interpreter's products are NumPy's, whose threads wait for one another where workers share the cores:
            # the KTO audit took 48 s with them and 19 s without, on two cores.
            for name in _THREADS:
                os.environ.setdefault(name, "1")
        return process

    def finish(self) -> None:
        """Remove the run's folder, where this process made it."""
        if not self.worker:
            os.environ.pop(_VARIABLE, None)
            shutil.rmtree(self.folder, ignore_errors=True)

    def trace_crashes(self) -> None:
        """Have a crash of this worker leave its Python stack for `crash_trace`, instead of on the terminal."""
        faulthandler.enable(self._trace_file())

    def limit_time(self, seconds: float) -> None:
        """End this worker, with a trace, unless `lift_limit` is called within ``seconds``; 0 for no limit.

        By a thread of the interpreter's own, for a hung kernel may never return to Python.
        """
        if seconds > 0 and self.worker:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._trace_file())

    def lift_limit(self) -> None:
        """The work of `limit_time` was done."""
        if self.worker:
            faulthandler.cancel_dump_traceback_later()

    def crash_trace(self, worker: str) -> str:
        """What `trace_crashes` or `limit_time` left of ``worker``: the cause and the stack of the main thread."""
        file = self.folder / f"{worker}.trace"
        text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        if not text:
            return ""
        # Its last block; those before it are xdist's and the watchdog's, the list behind it is of extension modules.
        cause, stack = text.splitlines()[0], text.partition("\n\nExtension modules")[0].rpartition("hread 0x")[2]
        return "\n".join([cause, *stack.splitlines()[1:]])

    def _trace_file(self) -> IO[str]:
        if self._traces is None:
            self._traces = (self.folder / f"{self.worker}.trace").open("w", encoding="utf-8")
        return self._traces
