"""``ktonum calibrate`` on the command line: tables, refusals, exit statuses, and a killed run that is continued."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from ktonum.calibrate.calibration_settings import CalibrationSettings
from ktonum.calibrate.samples_file import read_samples
from ktonum.cli.calibrate_command import CalibrationRequest
from ktonum.errors import UsageError
from ktonum.tolerances.table_files import load_table, write_table
from ktonum.tolerances.tables import Row, Table
from support.command_line import run, start
from support.throwaway_ops import write_ops

QUICK = ("--device", "cpu", "--dtype", "fp32", "-n", "0", "--table", ".")


def calibrate(folder: Path, op: str, *arguments: str) -> tuple[int, str, str]:
    write_ops(folder)
    return run(folder, "calibrate", f"throwaway.py:{op}", *QUICK, *arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a table of the op `right` and its samples, and the output of the command."""
    folder = tmp_path_factory.mktemp("calibrated")
    status, out, err = calibrate(folder, "right", "--seeds", "50")
    assert (status, err) == (0, ""), out
    return folder, out


def copied(measured: tuple[Path, str], folder: Path) -> Path:
    for name in ("right.toml", "samples.jsonl"):
        (folder / name).write_bytes((measured[0] / name).read_bytes())
    return folder / "right.toml"


def test_a_table_is_written_with_rows_and_provenance(measured: tuple[Path, str]) -> None:
    folder, out = measured
    table = load_table(folder / "right.toml")
    assert (
        "9 blocks" in out and "9 of 9 blocks measured" in out and "Written: right.toml: 6 rows for interpreter" in out
    )
    assert {row.name for row in table.rows} == {
        f"{output}/{measure}/fp32/interpreter"
        for output in ("output", "grad_x")
        for measure in ("element", "relative_norm", "signed_bias")
    }
    for row in table.rows:
        assert row.samples == 50 * row.strata and row.accumulator == "fp32"
        assert row.errors.maximum <= row.tolerance <= row.bound
    assert any(not row.errors.decided_by.startswith("bound") for row in table.rows)
    made = table.provenance["interpreter"]
    assert made.command == "ktonum calibrate throwaway.py:right --dtype fp32 --device cpu --seeds 50"
    assert made.candidates == "right_ in fp32" and made.seeds == 50 and made.dims == {"N": 6, "M": 64}
    assert made.torch and made.date and made.false_alarm == 1e-6 and made.multiprocessors == 0


def test_workers_change_nothing(measured: tuple[Path, str], tmp_path: Path) -> None:
    status, out, err = calibrate(tmp_path, "right", "--seeds", "50", "-n", "2")
    assert (status, err) == (0, ""), out
    assert load_table(tmp_path / "right.toml").rows == load_table(measured[0] / "right.toml").rows


def test_a_second_run_measures_nothing_and_changes_nothing(measured: tuple[Path, str], tmp_path: Path) -> None:
    before = copied(measured, tmp_path).read_bytes()
    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50")
    assert status == 0 and (tmp_path / "samples.jsonl").read_bytes() == (measured[0] / "samples.jsonl").read_bytes()
    assert load_table(tmp_path / "right.toml").rows == load_table(measured[0] / "right.toml").rows
    assert len(before.splitlines()) == len((tmp_path / "right.toml").read_bytes().splitlines())


def test_a_killed_run_continues_where_it_stopped(tmp_path: Path) -> None:
    write_ops(tmp_path)
    arguments = ("calibrate", "throwaway.py:slow", *QUICK, "--seeds", "21")
    samples = tmp_path / "samples.jsonl"
    process = start(tmp_path, *arguments)
    give_up = time.monotonic() + 90
    while not (samples.exists() and samples.read_bytes().count(b"\n")) and time.monotonic() < give_up:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    kept = read_samples(samples)
    assert 1 <= len(kept) < 6 and not (tmp_path / "slow.toml").exists()
    first = samples.read_bytes()
    status, out, _ = run(tmp_path, *arguments)
    assert status == 0, out
    assert samples.read_bytes().startswith(first), "what had been measured was kept"
    blocks = [json.loads(line)["block"] for line in samples.read_text().splitlines()]
    assert len(blocks) == len(set(blocks)) == 6, "nothing was measured twice"
    assert (tmp_path / "slow.toml").exists()


def edited(file: Path, factor: float) -> Table:
    """The table with other tolerances. Rows that the bound decides stay the same."""
    table = load_table(file)

    def change(row: Row) -> Row:
        if row.errors.decided_by.startswith("bound"):
            return row
        # At least the measured error and at most the bound, as in every table.
        tolerance = min(max(factor * row.tolerance, row.errors.maximum), row.bound)
        return replace(row, errors=replace(row.errors, tolerance=tolerance))

    changed = replace(table, rows=tuple(map(change, table.rows)))
    write_table(changed, file)
    return changed


def test_tolerances_do_not_grow_without_a_reason(measured: tuple[Path, str], tmp_path: Path) -> None:
    table = edited(copied(measured, tmp_path), 0.5)
    before = (tmp_path / "right.toml").read_bytes()
    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50")
    assert status == 1 and "tolerances would grow; give a --reason" in out
    assert (tmp_path / "right.toml").read_bytes() == before
    fresh = {row.key: row for row in load_table(measured[0] / "right.toml").rows}
    grown = [row for row in table.rows if row.tolerance < fresh[row.key].tolerance]
    assert grown
    for row in grown:
        assert f"{row.name}: {row.tolerance:g} before, {fresh[row.key].tolerance:g} now" in out

    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50", "--reason", "a test of mine")
    assert status == 0 and "loosened: " in out
    rows = {row.key: row for row in load_table(tmp_path / "right.toml").rows}
    made = load_table(tmp_path / "right.toml").provenance["interpreter"]
    for row in grown:
        now = rows[row.key]
        assert (now.tolerance, now.tolerance_before, now.reason) == (
            fresh[row.key].tolerance,
            row.tolerance,
            "a test of mine",
        )
        assert now.reason_date == made.date
    assert "a test of mine" in made.command


def test_rows_looser_than_the_data_need_are_named_and_tightened(measured: tuple[Path, str], tmp_path: Path) -> None:
    table = edited(copied(measured, tmp_path), 1.5)
    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50")
    fresh = {row.key: row for row in load_table(measured[0] / "right.toml").rows}
    looser = [row for row in table.rows if row.tolerance > fresh[row.key].tolerance]
    assert status == 0 and looser
    for row in looser:
        words = f"{row.name}: {row.tolerance:g} before, {fresh[row.key].tolerance:g} now"
        assert f"looser than the data need: {words}" in out
    assert load_table(tmp_path / "right.toml").rows == load_table(measured[0] / "right.toml").rows


def test_rows_of_other_device_classes_stay_and_those_not_measured_do_not_go_silently(
    measured: tuple[Path, str], tmp_path: Path
) -> None:
    table = load_table(copied(measured, tmp_path))
    other = tuple(replace(row, device_class="sm_90") for row in table.rows)
    gone = replace(table.rows[0], dtype="bf16")
    made = table.provenance["interpreter"]
    both = replace(table, rows=(*table.rows, *other, gone), provenance={"interpreter": made, "sm_90": made})
    write_table(both, tmp_path / "right.toml")
    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50")
    assert status == 1 and f"{gone.name}: {gone.tolerance:g} before, not measured now" in out
    write_table(replace(both, rows=(*table.rows, *other)), tmp_path / "right.toml")
    assert calibrate(tmp_path, "right", "--seeds", "50")[0] == 0
    assert set(other) <= set(load_table(tmp_path / "right.toml").rows)


def test_check_compares_new_errors_with_the_rows_and_writes_nothing(measured: tuple[Path, str], tmp_path: Path) -> None:
    file = copied(measured, tmp_path)
    table = load_table(file)
    elsewhere = replace(table.provenance["interpreter"], device="another CPU")
    write_table(replace(table, provenance={"interpreter": elsewhere}), file)
    before = file.read_bytes()
    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50", "--check")
    assert status == 0 and file.read_bytes() == before
    assert "right: 6 compared with a row, 0 with the derived bound; 0 beyond" in out
    assert "all rows carried over: measured on another CPU, another device of the class interpreter" in out
    # These rows are from an op with errors ten times smaller, so this op exceeds them.
    shrunk = []
    for row in table.rows:
        names = ("median", "quantile_90", "quantile_99", "maximum", "tolerance")
        errors = replace(row.errors, decided_by="tail", **{n: getattr(row.errors, n) / 10 for n in names})
        errors = replace(errors, tail=replace(errors.tail, exceeding=30))
        shrunk.append(replace(row, errors=errors))
    write_table(replace(table, rows=tuple(shrunk)), file)
    status, out, _ = calibrate(tmp_path, "right", "--seeds", "50", "--check")
    assert status == 1 and "grad_x/relative_norm/fp32/interpreter: BEYOND" in out


def test_a_candidate_that_is_not_right_gets_no_table(tmp_path: Path) -> None:
    status, out, _ = calibrate(tmp_path, "wrong", "throwaway.py:right", "--seeds", "2")
    assert status == 1 and "wrong: errors beyond the derived bound, which are no basis for a tolerance" in out, out
    assert (tmp_path / "right.toml").exists() and not (tmp_path / "wrong.toml").exists()


def test_a_candidate_that_raises_gets_no_table(tmp_path: Path) -> None:
    status, out, _ = calibrate(tmp_path, "raises", "throwaway.py:structure", "--seeds", "2")
    assert status == 1 and "no such luck" in out and "returned no" in out and "no table was written" in out, out
    assert not list(tmp_path.glob("*.toml"))


def test_a_candidate_that_ends_its_process_gets_no_table(tmp_path: Path) -> None:
    status, out, _ = calibrate(tmp_path, "exits", "--seeds", "2", "-n", "1", "--only", "N=5")
    assert status == 1 and "the process died while the candidate ran" in out and "no table was written" in out
    assert not (tmp_path / "exits.toml").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": -1}, "invalid --seeds -1: use 1 or more"),
        ({"dtypes": "int8"}, "unknown dtype 'int8'"),
        ({"profile": "slow"}, "unknown profile 'slow'"),
        ({"samples": "nowhere/s.jsonl"}, "there is no folder"),
        ({"tables": "nowhere"}, "--table nowhere is not a directory: create it"),
        ({"false_alarm": 0.5}, "invalid --false-alarm 0.5: use a probability below 0.1"),
        ({"workers": "many"}, "invalid -n 'many': use auto, 0, 1"),
    ],
)
def test_ops_that_cannot_be_measured_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    settings = CalibrationSettings(targets=("throwaway.py:right",), samples=str(tmp_path / "samples.jsonl"))
    for name in {f.name for f in fields(settings)} & set(changed):
        settings = replace(settings, **{name: changed.pop(name)})
    with pytest.raises(UsageError, match=said):
        CalibrationRequest(("right",), settings, **{"tables": str(tmp_path), **changed}).check_options()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--candidate", "nobody"), "unknown candidate 'nobody'"),
        (("--only", "N=99"), "no item of right contains 'N=99'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    status, _, err = calibrate(tmp_path, "right", *arguments)
    assert status == 2 and said in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "right.toml").exists()


def test_damaged_files_are_named_before_anything_is_measured(measured: tuple[Path, str], tmp_path: Path) -> None:
    file = copied(measured, tmp_path)
    file.write_text(file.read_text().replace("samples = ", "samples = -", 1))
    (tmp_path / "samples.jsonl").unlink()
    status, _, err = calibrate(tmp_path, "right", "--seeds", "50")
    assert status == 2 and "right.toml, row 1.samples: -" in err.replace(": row", ", row")
    assert len(err.splitlines()) == 1 and not (tmp_path / "samples.jsonl").exists()
    file.unlink()
    (tmp_path / "samples.jsonl").write_text("[1]\n")
    status, _, err = calibrate(tmp_path, "right")
    assert status == 2 and "holds no samples of ktonum calibrate" in err
