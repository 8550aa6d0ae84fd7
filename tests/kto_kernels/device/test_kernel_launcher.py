"""Launches go through the compiled kernel from the second like it on, and only then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ktonum.kernels.device import kernel_launcher as launcher
from ktonum.kernels.device.kernel_launcher import Launcher, cdiv


@dataclass
class Recorder:
    """Stands in for a jitted kernel's parameters, its compilation and its compiled form."""

    compiled: list[tuple[Any, ...]] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def jit(self, *tensors: Any, **named: Any) -> Any:
        self.compiled.append((*tensors, named))
        return _Compiled(self.launched)


@dataclass
class _Compiled:
    launched: list[tuple[Any, ...]]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, *arguments))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[Launcher, Recorder]:
    @triton.jit(do_not_specialize=["count"])
    def kernel(x_ptr, count, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        pass

    class Jitted(triton.JITFunction):  # type: ignore[misc]
        def __getitem__(self, grid: Any) -> Any:
            return recorder.jit

    recorder = Recorder()
    monkeypatch.setattr(launcher.torch.cuda, "current_device", lambda: 0)
    return Launcher(Jitted(kernel.fn, do_not_specialize=["count"])), recorder


def test_the_second_launch_goes_to_the_compiled_kernel(recorded: tuple[Launcher, Recorder]) -> None:
    launch, recorder = recorded
    x = torch.zeros(64)
    for count in (3, 16, 17):
        launch[(2,)](x, count=count, stride=48, BLOCK=8, num_warps=4)
    assert len(recorder.compiled) == 1, "counts are not specialised, so no value of theirs compiles anything"
    # Constants are passed, options are not, and a grid has three dimensions.
    assert recorder.launched == [((2, 1, 1), x, 16, 48, 8), ((2, 1, 1), x, 17, 48, 8)]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(64, dtype=torch.float64)},
        {"x": torch.zeros(65)[1:]},
        {"count": 2**31},
        {"stride": 1},
        {"stride": 50},
        {"BLOCK": 16},
        {"num_warps": 8},
        {"device": 1},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_triton_compiles_apart_is_told_apart(
    recorded: tuple[Launcher, Recorder], monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    launch, recorder = recorded
    given = {"x": torch.zeros(64), "count": 3, "stride": 48, "BLOCK": 8, "num_warps": 4}
    for named in (given, given | changed):
        monkeypatch.setattr(launcher.torch.cuda, "current_device", lambda named=named: named.get("device", 0))
        options = {name: value for name, value in named.items() if name not in ("x", "device")}
        launch[(1,)](named["x"], **options)
    assert len(recorder.compiled) == 2
    assert not recorder.launched


def test_names_out_of_order_are_refused(recorded: tuple[Launcher, Recorder]) -> None:
    launch, _ = recorded
    with pytest.raises(TypeError, match="in this order, count, stride, BLOCK"):
        launch[(1,)](torch.zeros(64), stride=48, count=3, BLOCK=8)


def test_cdiv_rounds_up() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
