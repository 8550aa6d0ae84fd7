"""`ktonum bench` as far as it goes without a GPU: cases, limit, contenders, report."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ktonum.errors import UsageError
from ktonum.kernels.bench.bench_command import BenchmarkRequest, benchmark_command
from ktonum.kernels.bench.contenders import LIMIT, contenders, limit
from ktonum.kernels.bench.problem_sizes import CASES, GOALS, BenchmarkCase, chosen_cases, draw_inputs
from ktonum.kernels.bench.results_report import CaseResult, draw_plot, goal_lines, print_case, read_json, write_json
from ktonum.kernels.bench.timing import Errors, Measured, errors_against, float64_oracle, timed

SMALL = BenchmarkCase("test", "goals", 3, 7, H=24, V=304, dtype=torch.float32, masked=0.3, kl_sequences=True)
CPU = torch.device("cpu")


def test_names_are_unique_and_every_goal_has_its_case_and_contender() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    known = {c.name for c in contenders()}
    for goal in GOALS:
        (case,) = chosen_cases((goal.case,))
        assert goal.contender in known
        # A goal for an error is nothing where no error is measured.
        assert case.errors or (goal.loss, goal.gradient, goal.bias) == (None, None, None), goal


def test_cases_by_name_and_by_group() -> None:
    assert chosen_cases(()) == CASES
    assert [c.name for c in chosen_cases(("small", "fp16"))] == ["fp16", "small"]
    assert {c.group for c in chosen_cases(("tokens",))} == {"tokens"}
    with pytest.raises(UsageError, match="unknown case 'smal': use .*small"):
        chosen_cases(("smal",))


def test_inputs_follow_from_the_case_alone() -> None:
    one, two = draw_inputs(SMALL, CPU), draw_inputs(SMALL, CPU)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))
    other = draw_inputs(dataclasses.replace(SMALL, name="tset"), CPU)
    assert not torch.equal(one.input, other.input)
    assert int((one.target == -100).sum()) == SMALL.B * int(0.3 * SMALL.T)
    assert one.input.requires_grad and one.weight.requires_grad and not one.ref_weight.requires_grad  # type: ignore[union-attr]
    assert 1.2 < float((one.input @ one.weight.T).detach().std()) < 1.8
    assert {"kl_input", "kl_target", "kl_ref_input"} <= set(one.tensors())


# cut-cross-entropy needs a GPU.
@pytest.mark.parametrize("name", [c.name for c in contenders() if c.name != "cut-cross-entropy"])
def test_every_contender_computes_the_loss(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the float64 oracle, in float32: what is timed is the same problem."""
    # Compiling takes most of a minute on a CPU, and changes nothing of which problem it is.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (contender,) = (c for c in contenders() if c.name == name)
    if contender.version is None and device.type == "cuda":
        pytest.skip(f"{contender.package} is not installed here; where there is no GPU it has to be")
    assert contender.version is not None, f"{contender.package} is not installed"
    case = SMALL if contender.kl_sequences else dataclasses.replace(SMALL, kl_sequences=False)
    inputs = draw_inputs(case, device)
    errors = errors_against(float64_oracle(inputs), contender.make(), inputs)
    assert errors.loss < 1e-5 and errors.gradient < 1e-5 and abs(errors.bias) < 1e-5


def test_errors_are_noticed() -> None:
    inputs = draw_inputs(SMALL, CPU)
    (plain,) = (c for c in contenders() if c.name == "plain PyTorch")
    loss = plain.make()
    errors = errors_against(float64_oracle(inputs), lambda i: loss(i) * 1.001, inputs)
    assert errors.loss == pytest.approx(1e-3, rel=0.01)
    assert errors.gradient == pytest.approx(1e-3, rel=0.01)
    assert errors.bias == pytest.approx(1e-3, rel=0.01)


def test_the_limit_is_four_products_over_unmasked_tokens_and_six_with_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    genuine = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, **named: object) -> torch.Tensor:
        shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        return genuine(a, b, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "mm", counted)
    rows = SMALL.B * (SMALL.T - int(0.3 * SMALL.T))
    H, V = SMALL.H, SMALL.V
    for kl, logits in ((False, 2), (True, 4)):
        shapes.clear()
        limit(draw_inputs(dataclasses.replace(SMALL, kl_sequences=kl), CPU))()
        assert shapes == [(rows, H, V)] * logits + [(rows, V, H), (V, rows, H)]


def test_contenders_take_turns_with_the_limit() -> None:
    """A device that grows warm slows both alike; the first pair is not counted; running out of memory is a line."""
    turns: list[str] = []

    def clock(run: object) -> float:
        turns.append(str(run))
        if run == "greedy":
            raise torch.cuda.OutOfMemoryError
        # Every run is slower than the one before, the very first absurdly so.
        return {"limit": 10.0, "mine": 15.0}[str(run)] * (
            1000.0 if len(turns) < 3 else 1.0 + 0.01 * ((len(turns) - 1) // 2)
        )

    names = (LIMIT, "mine", "greedy", "absent")
    found = {n: Measured(n, problem="not installed" if n == "absent" else "") for n in names}
    runs: dict[str, object] = {n: n for n in names[:3]}
    got = {m.contender: m for m in timed(found, runs, 3, clock=clock)}  # type: ignore[arg-type]
    assert turns == ["limit", "mine"] * 4 + ["limit", "greedy"]
    assert got["mine"].ratio == pytest.approx(1.5) and got["mine"].spread == pytest.approx(0.0)
    assert got[LIMIT].ratio == 1.0 and got[LIMIT].milliseconds == pytest.approx(10.2)
    assert "out of memory" in got["greedy"].problem and got["greedy"].milliseconds is None
    assert got["absent"].problem == "not installed"


def results() -> list[CaseResult]:
    goals, tokens = chosen_cases(("8 x 1024",))[0], chosen_cases(("tokens",))
    errors = Errors(2e-7, 2.5e-3, -1e-6)
    measured = (
        Measured(LIMIT, 55.0, 1.0, 0.0),
        Measured("ktonum", 57.2, 1.04, 0.01, 3 * 2**30, errors),
        Measured("TRL", problem="trl is not installed"),
    )
    return [CaseResult(goals, measured), *(CaseResult(c, measured[:2]) for c in tokens)]


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    console = Console(file=io.StringIO(), width=160)
    print_case(results()[0], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "8 x 1024: B x T x H x V = 8 x 1024 x 4096 x 151936, bfloat16" in text
    assert re.search(
        r"ktonum +│ +57\.20 +│ +1\.040 +│ +0\.010 +│ +3\.00 +│ +2\.0e-07 +│ +2\.5e-03 +│ +-1\.0e-06", text
    ), text
    assert "trl is not installed" in text


def test_goals_are_met_or_missed() -> None:
    lines = dict((line, met) for met, line in goal_lines(results()))
    assert lines == {
        "met    8 x 1024, ktonum: time / limit 1.04, goal 1.06": True,
        "met    8 x 1024, ktonum: GiB 3, goal 3.8": True,
        "met    8 x 1024, ktonum: loss error 2e-07, goal 3e-07": True,
        "MISSED 8 x 1024, ktonum: gradient error 0.0025, goal 0.0019": False,
    }


def test_json_keeps_everything_with_its_provenance(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    write_json(results(), {"commit": "abc"}, file)
    document = json.loads(file.read_text())
    assert document["environment"] == {"commit": "abc"}
    assert read_json(file) == (results(), {"commit": "abc"})
    first = document["results"][0]
    assert first["case"]["dtype"] == "bfloat16" and first["case"]["V"] == 151_936
    assert first["measured"][1]["errors"]["gradient"] == 2.5e-3
    assert first["measured"][2]["problem"] == "trl is not installed"
    for wrong in ("{}", "[]", '{"schema": 2, "results": []}', '{"schema": 1, "environment": {}, "results": [{}]}'):
        file.write_text(wrong)
        with pytest.raises(UsageError, match="bench.json holds no results of ktonum bench"):
            read_json(file)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_plot(results(), "a device", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    with pytest.raises(UsageError, match="needs a CUDA device and there is none here.*ktonum doctor"):
        benchmark_command(BenchmarkRequest(), {})
    with pytest.raises(UsageError, match="unknown contender 'ligr': use ktonum.*Liger-Kernel"):
        benchmark_command(BenchmarkRequest(contenders=("ligr",)), {})
    with pytest.raises(UsageError, match="--rounds 0"):
        benchmark_command(BenchmarkRequest(rounds=0), {})
    with pytest.raises(UsageError, match="--show shows what is in its files: drop --case"):
        benchmark_command(BenchmarkRequest(cases=("small",), files=("some.json",)), {})


def test_results_are_shown_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"device": {"name": "a GPU"}, "packages": {"torch": "2"}, "date": "today", "commit": "abc"}
    write_json(results(), environment, tmp_path / "bench.json")
    request = BenchmarkRequest(files=(str(tmp_path / "bench.json"),), plot=str(tmp_path / "bench.png"))
    assert benchmark_command(request, {}) == 0
    printed = capsys.readouterr().out
    assert "a GPU, torch 2, today, commit abc" in printed and "8 x 1024" in printed and "MISSED" in printed
    assert (tmp_path / "bench.png").is_file()


def test_a_case_that_no_contender_ran_still_has_its_limit() -> None:
    found = {LIMIT: Measured(LIMIT), "absent": Measured("absent", problem="not installed")}
    got = {m.contender: m for m in timed(found, {LIMIT: lambda: None}, 2, clock=lambda run: 10.0)}
    assert got[LIMIT].milliseconds == 10.0 and got["absent"].problem == "not installed"
    print_case(CaseResult(CASES[0], tuple(got.values())), Console(file=io.StringIO()))
