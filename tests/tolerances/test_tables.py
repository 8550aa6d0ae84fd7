"""Tolerance tables: messages about damaged ones, look-up, the bytes that are written, and the tables of ktonum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ktonum.calibrate.tails import four_digits, tail_tolerance
from ktonum.errors import InputError, TableError
from ktonum.tolerances.table_files import find_table, load_table, write_table
from ktonum.tolerances.tables import MEASURES, ErrorSample, Row, Table, Tail
from support.repository import ROOT
from support.toy_tables import PROVENANCE

TAIL = Tail(exceeding=3, threshold=8e-06, shape=-0.25, scale=1e-06, fit=0.5)
ERRORS = ErrorSample(
    median=0.0,
    quantile_90=9e-06,
    quantile_99=1e-05,
    maximum=1e-05,
    tolerance=2e-05,
    decided_by="tail",
    typical=1.0,
    tail=TAIL,
)
ROW = Row(
    output="grad_weight",
    measure="element",
    dtype="bf16",
    device_class="sm_90",
    stored="bf16",
    accumulator="fp32",
    unit="half_ulp",
    bound=3.0,
    samples=15,
    strata=5,
    elements_min=64,
    elements_max=4096,
    errors=ERRORS,
    shares=replace(ERRORS, tolerance=1.0, decided_by="bound: too few samples"),
)
TABLE = Table("toy", "by hand", (ROW, replace(ROW, dtype="fp32", stored="fp32")), {"sm_90": PROVENANCE})


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_table(TABLE, tmp_path / "toy.toml")
    return tmp_path / "toy.toml"


def test_a_table_comes_back_as_it_was_written(written: Path) -> None:
    table = load_table(written)
    assert table == TABLE
    first = written.read_bytes()
    write_table(table, written)
    assert written.read_bytes() == first


def test_the_order_of_rows_does_not_change_the_bytes(written: Path, tmp_path: Path) -> None:
    first = written.read_bytes()
    write_table(replace(TABLE, rows=TABLE.rows[::-1]), written)
    assert written.read_bytes() == first


def test_a_changed_row_is_a_changed_line(written: Path) -> None:
    before = written.read_text().splitlines()
    write_table(replace(TABLE, rows=(replace(ROW, samples=16), TABLE.rows[1])), written)
    changed = [(b, a) for b, a in zip(before, written.read_text().splitlines(), strict=True) if b != a]
    assert changed == [("samples = 15", "samples = 16")]


def test_an_invalid_table_is_not_written(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(TableError, match=r"errors\.bound: 3, less than tolerance = 4"):
        write_table(replace(TABLE, rows=(replace(ROW, errors=replace(ERRORS, tolerance=4.0)),)), written)
    assert written.read_bytes() == before


def once(old: str, new: str) -> Callable[[str], str]:
    """Replaces the first occurrence."""

    def damage(text: str) -> str:
        assert old in text, f"nothing to damage: {old!r}"
        return text.replace(old, new, 1)

    return damage


ROW_1 = r"row 1 \(grad_weight/element/bf16/sm_90\)"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (once("schema = ", "schema ="), None),
        (once("ktonum-tolerances/2", "ktonum-tolerances/1"), r"schema: 'ktonum-tolerances/1'; .*'ktonum-tolerances/2'"),
        (once('schema = "ktonum-tolerances/2"\n', ""), r"schema: missing; accepted: 'ktonum-tolerances/2'"),
        (once('op = "toy"', 'op = "other"'), r"op: 'other'; accepted: 'toy'"),
        (once("rule = ", "ruel = "), r"rule: missing"),
        (once('rule = "by hand"', 'rule = "by hand"\nnote = 1'), r"note: unknown; accepted: .*rule.*newer ktonum"),
        (once('op = "toy"', "op = toy"), r"not valid TOML: .*line 2"),
        (once("samples = 15\n", ""), r"row 1\.samples: missing; accepted: the keys output"),
        (once("samples = 15", "samples = 15\nmode = 0.0"), r"row 1\.mode: unknown"),
        (once("median = 0.0, ", ""), r"row 1\.errors\.median: missing; accepted: the keys median"),
        (once("median = 0.0", "mode = 0.0, median = 0.0"), r"row 1\.errors\.mode: unknown"),
        (once("median = 0.0", 'median = "0"'), r"row 1\.errors\.median: '0', text; accepted: a number"),
        (once("median = 0.0", "median = true"), r"row 1\.errors\.median: True, a boolean; accepted: a number"),
        (once("median = 0.0", "median = -1.0"), r"row 1\.errors\.median: -1\.0; accepted: .* zero or more"),
        (once("shape = -0.25", "shape = nan"), r"row 1\.errors\.tail\.shape: nan; accepted: a finite number"),
        (once("scale = 1e-06", "scale = -1e-06"), r"row 1\.errors\.tail\.scale: -1e-06; accepted: .* zero or more"),
        (once("errors = {", "errors = 1 #"), r"row 1\.errors: 1, an integer; accepted: a table"),
        (
            once('decided_by = "tail"', 'decided_by = "luck"'),
            rf"{ROW_1}\.errors\.decided_by: 'luck'; accepted: tail, strata, rounding, or",
        ),
        (once('decided_by = "tail"', 'decided_by = "bound: x"'), rf"{ROW_1}\.errors\.tolerance: 2e-05, decided by the"),
        (once("exceeding = 3", "exceeding = 0"), rf"{ROW_1}\.errors\.tail\.exceeding: 0; accepted: 1 or more"),
        (once("strata = 5", 'strata = 5\nreason = "no"'), rf"{ROW_1}\.reason_date: ''; accepted: a date"),
        (once('accumulator = "fp32"', 'accumulator = "tf32"'), r"\.accumulator: 'tf32'; accepted: bf16, fp16, fp32"),
        (once("samples = 15", "samples = 15.0"), r"row 1\.samples: 15\.0, a number; accepted: an integer"),
        (once("samples = 15", "samples = 0"), rf"{ROW_1}\.samples: 0; accepted: 1 or more"),
        (once('dtype = "bf16"', "dtype = 16"), r"row 1\.dtype: 16, an integer; accepted: text"),
        (once("tolerance = 2e-05", "tolerance = nan"), r"row 1\.errors\.tolerance: nan; accepted: a finite number"),
        (once("tolerance = 2e-05", "tolerance = inf"), r"row 1\.errors\.tolerance: inf; accepted: a finite number"),
        (
            once("tolerance = 2e-05", "tolerance = -2e-05"),
            r"row 1\.errors\.tolerance: -2e-05; accepted: .* zero or more",
        ),
        (once("tolerance = 2e-05", "tolerance = 3.5"), rf"{ROW_1}\.errors\.bound: 3, less than tolerance = 3\.5"),
        (
            once("tolerance = 2e-05", "tolerance = 1e-06"),
            rf"{ROW_1}\.errors\.tolerance: 1e-06, less than maximum = 1e-05",
        ),
        (once("elements_min = 64", "elements_min = 5000"), rf"{ROW_1}\.elements_max: 4096, less than elements_min"),
        (once('dtype = "bf16"', 'dtype = "tf32"'), r"\.dtype: 'tf32'; accepted: bf16, fp16, fp32, fp64"),
        (once('stored = "bf16"', 'stored = "half"'), r"\.stored: 'half'; accepted: bf16"),
        (once('measure = "element"', 'measure = "mse"'), r"\.measure: 'mse'; accepted: element, relative_norm"),
        (once('unit = "half_ulp"', 'unit = "%"'), rf"{ROW_1}\.unit: '%'; accepted: half_ulp"),
        (
            once('device_class = "sm_90"', 'device_class = "H100"'),
            r"\.device_class: 'H100'; accepted: cpu, interpreter",
        ),
        (once('device_class = "sm_90"', 'device_class = "cpu"'), r"\.device_class: 'cpu'; accepted: sm_90: those with"),
        (once("provenance.sm_90", "provenance.H100"), r"provenance\.H100: 'H100'; accepted: cpu"),
        (once('date = "2026-01-31"', 'date = "yesterday"'), r"provenance\.sm_90\.date: 'yesterday'; accepted: a date"),
        (once('torch = "2.13.0"\n', ""), r"provenance\.sm_90\.torch: missing"),
        (once("B = 4", "B = -4"), r"provenance\.sm_90\.dims\.B: -4; accepted"),
        (once("B = 4", "B = 4.5"), r"provenance\.sm_90\.dims\.B: 4\.5, a number; accepted: an integer"),
        (lambda text: text + text[text.index("[[row]]") :], r"row 3 \(grad_weight/element/bf16/sm_90\): a duplicate"),
        (lambda text: text[: text.index("[[row]]")], r"row: missing"),
        (lambda text: text[: text.index("[[row]]")].replace("rule", "row = [1]\nrule"), r"row 1: 1, an integer"),
    ],
)
def test_a_damaged_table_is_named_with_its_key(written: Path, damage: Callable[[str], str], said: str | None) -> None:
    written.write_text(damage(written.read_text()))
    if said is None:  # white space does no damage
        assert load_table(written) == TABLE
        return
    with pytest.raises(TableError, match=said) as caught:
        load_table(written)
    assert str(written) in str(caught.value)


def test_a_file_that_is_no_text_or_not_there_is_a_table_error(tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match=r"toy\.toml: not valid TOML"):
        load_table(tmp_path / "toy.toml")
    with pytest.raises(TableError, match=r"gone\.toml: cannot be read"):
        load_table(tmp_path / "gone.toml")


def look_up(**changed: object) -> tuple[Row | None, str]:
    wanted: dict[str, object] = {"output": ROW.output, "measure": "element", "dtype": "bf16", "device_class": "sm_90"}
    found = replace(TABLE, source="toy.toml").look_up(**{**wanted, **changed})  # type: ignore[arg-type]
    return found.row, found.why


def test_a_look_up_names_its_row_and_where_that_comes_from() -> None:
    row, why = look_up()
    assert row is ROW
    for part in (
        "grad_weight/element/bf16/sm_90",
        "toy.toml",
        "15 measured errors 1e-05",
        "2026-01-31",
        "2.13.0",
        "0123abc",
    ):
        assert part in why
    assert "tolerance 2e-05 by the fitted tail" in why and "carried over" not in why and "loosened" not in why


def test_a_look_up_says_when_the_row_was_measured_on_another_device_of_the_class() -> None:
    assert "carried over" not in look_up(device=PROVENANCE.device)[1]
    row, why = look_up(device="NVIDIA H200")
    assert row is ROW
    assert (
        f"carried over: measured on {PROVENANCE.device}, another device of the class sm_90 than this NVIDIA H200" in why
    )


def test_a_look_up_says_why_a_row_was_loosened() -> None:
    loosened = replace(ROW, tolerance_before=1.5e-05, reason="a longer sample", reason_date="2026-02-01")
    found = replace(TABLE, rows=(loosened,), source="toy.toml").look_up(
        output=ROW.output, measure="element", dtype="bf16", device_class="sm_90"
    )
    assert "loosened from 1.5e-05 on 2026-02-01: a longer sample" in found.why


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"output": "grad_bias"}, "no row for output 'grad_bias': it has grad_weight"),
        ({"measure": "signed_bias"}, "no row for measure 'signed_bias' with grad_weight: it has element"),
        ({"dtype": "fp16"}, "no row for dtype 'fp16' with grad_weight element: it has bf16, fp32"),
        ({"device_class": "sm_100"}, "no row for device class 'sm_100' with grad_weight element bf16: it has sm_90"),
        ({"dims": {"B": 5, "T": 1}}, "measured at sizes up to B=4, T=33, and B=5 is larger"),
        ({"dims": {"H": 1}}, "measured at sizes up to B=4, T=33, and H=1 is larger"),
    ],
)
def test_a_look_up_without_a_row_says_what_there_is(changed: dict[str, object], said: str) -> None:
    row, why = look_up(**changed)
    assert row is None
    assert said in why


def test_sizes_that_were_measured_have_the_row() -> None:
    assert look_up(dims={"B": 4, "T": 2})[0] is ROW


def test_ones_own_directory_comes_before_the_shipped_tables(tmp_path: Path) -> None:
    assert find_table("kto", tmp_path) == find_table("kto")
    write_table(replace(TABLE, op="kto"), tmp_path / "kto.toml")
    found = find_table("kto", tmp_path)
    assert found is not None and found.rule == "by hand"
    assert find_table("toy") is None
    with pytest.raises(InputError, match="no directory"):
        find_table("kto", tmp_path / "gone")
    with pytest.raises(InputError, match="is a word"):
        find_table("../toy", tmp_path)


SHIPPED = sorted((ROOT / "tolerance_tables").glob("*.toml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_a_shipped_table_is_valid_and_no_looser_than_its_derivation(file: Path, tmp_path: Path) -> None:
    table = load_table(file)
    assert table == find_table(file.stem), "the package has another table than the repository"
    write_table(table, tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes(), "write it with table_files.write_table"
    for row in table.rows:
        assert row.unit == MEASURES[row.measure]
        made = table.provenance[row.device_class]
        assert made.commit and not made.commit.endswith("+"), "calibrate at a commit"
        for sample, bound in ((row.errors, row.bound), (row.shares, 1.0)):
            # The tolerance must follow from the numbers in the row alone.
            budget = {"samples": row.samples, "strata": row.strata, "false_alarm": made.false_alarm}
            if sample.decided_by.startswith("bound"):
                assert sample.tolerance == bound, row.name
                continue
            reached = four_digits(sample.typical * tail_tolerance(sample.tail, **budget))
            least = (
                (0.5 if row.elements_max == 1 else 1.0) if row.measure == "element" and sample is row.errors else 0.0
            )
            assert sample.tolerance == max(sample.maximum, reached, least) < bound, row.name
            assert (sample.decided_by == "rounding") is (least > max(sample.maximum, reached)), row.name


def test_kto_has_rows_in_every_dtype_for_the_interpreter() -> None:
    table = find_table("kto")
    assert table is not None
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        for output in ("grad_input", "grad_weight", "grad_bias"):
            for measure in MEASURES:
                found = table.look_up(output=output, measure=measure, dtype=dtype, device_class="interpreter")
                assert found.row is not None and found.row.stored == dtype, found.why
                assert found.row.samples >= 100
        for output in ("loss", "chosen_logps_sum", "rejected_logps_sum"):
            found = table.look_up(output=output, measure="element", dtype=dtype, device_class="interpreter")
            assert found.row is not None and found.row.stored == ("fp64" if dtype == "fp64" else "fp32"), found.why
