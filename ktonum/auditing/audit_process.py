"""What each process of a run sets up before it imports Triton, NumPy or an op, in one place.

The first process of a run is the command, or pytest with ``--ktonum``. It resolves the device's name. Its workers find
the result in the environment, because they need a GPU before a conftest.py imports torch. pytest-xdist hands them
everything else only after that, see `session_hooks`.

Two things need more than the environment and are set up later: `item_runner` sets torch's threads, and `worker_crashes`
writes traces of crashes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ktonum.auditing.devices import resolve_device
from ktonum.auditing.gpu_slots import GpuLease, lease_gpu, use_gpu, visible_gpus

__all__ = ["AuditProcess", "prepare_environment"]

_VARIABLE = "KTONUM_AUDIT_RUN"

# Read by the BLAS libraries of NumPy and torch when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def prepare_environment(device: str) -> None:
    """Set the variables that Triton and NumPy read when they are imported.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if device == "cpu":
        # Triton decides when a kernel is defined whether its interpreter runs it.
        os.environ["TRITON_INTERPRET"] = "1"
        # The interpreter's products are NumPy's, whose threads wait for one another where workers share the cores: the
        # KTO audit took 48 s with them and 19 s without, on two cores.
        for name in _THREADS:
            os.environ.setdefault(name, "1")


@dataclass
class AuditProcess:
    """This process's part in a run. A context manager: the run ends with it.

    Attributes:
        folder: Shared by the processes of the run; its first process removes it at the end.
        gpus: The GPUs of the run; none on the CPU.
        worker: xdist's name of this worker, e.g. ``gw0``; empty in the first process.
        lease: The GPU of this worker; None in the first process and on the CPU.
    """

    folder: Path
    gpus: tuple[str, ...]
    worker: str = ""
    lease: GpuLease | None = None

    @classmethod
    def begin(cls, device: str, *, import_from: str | None = None) -> AuditProcess:
        """Begin a run, whose first process this one is.

        Args:
            device: See `ktonum.auditing.devices.resolve_device`.
            import_from: A folder whose modules can be imported from now on, here and in workers.

        Raises:
            UsageError: The device cannot be used.
        """
        if import_from is not None and import_from not in sys.path:
            # Now, because xdist copies sys.path for its workers when it is imported.
            sys.path.insert(0, import_from)
        gpus = visible_gpus() if resolve_device(device) == "cuda" else ()
        process = cls(Path(tempfile.mkdtemp(prefix="ktonum-run-")), gpus)
        run = {"controller": os.getpid(), "folder": str(process.folder), "gpus": gpus}
        os.environ[_VARIABLE] = json.dumps(run)
        prepare_environment(process.device)
        return process

    @classmethod
    def join(cls) -> AuditProcess | None:
        """Join the run of this xdist worker's controller; None where this process is not such a worker."""
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        run = json.loads(os.environ.get(_VARIABLE, "{}"))
        # A process that an audited test starts inherits a worker's variables, but its parent is not the controller.
        if not worker or run.get("controller") != os.getppid():
            return None
        process = cls(Path(run["folder"]), tuple(run["gpus"]), worker)
        if process.gpus:
            process.lease = lease_gpu(process.folder, process.gpus)
            use_gpu(process.lease, process.gpus)
        prepare_environment(process.device)
        return process

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.gpus else "cpu"

    def end(self) -> None:
        """Remove the run's folder, unless this process is a worker."""
        if not self.worker:
            os.environ.pop(_VARIABLE, None)
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> AuditProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
