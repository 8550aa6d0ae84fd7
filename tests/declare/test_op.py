"""Ops, points and draws: valid declarations of an author, and invalid ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.declare.cases import Case, Point, dtype_name, parse_dtypes, torch_dtype
from ktonum.declare.drawing import Draw
from ktonum.declare.op import Op, load_object
from ktonum.errors import UsageError
from subjects.planted import ALL
from subjects.small_ops import SOFTMAX_LOSS, softmax_loss_with

_DIMS: dict[str, Any] = {"candidate": abs, "reference": abs, "sample": lambda draw: {}}


def _draw(dtype: str, *, dims: dict[str, int] | None = None, seed: int = 0) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return Draw(dims or {"N": 3}, {}, "normal", torch_dtype(dtype), torch.device("cpu"), generator)


@pytest.mark.parametrize(
    ("target", "fragments"),
    [
        ("", ("does not name an object", "module:attr")),
        ("ktonum.declare.op", ("does not name an object",)),
        (":Op", ("does not name an object",)),
        ("ktonum.declare.op:", ("does not name an object",)),
        ("no_such_module:thing", ("cannot import 'no_such_module'", "ModuleNotFoundError")),
        ("no/such/file.py:thing", ("cannot import", "no such file")),
        ("ktonum.declare.op:NoSuch", ("'ktonum.declare.op' has no 'NoSuch'",)),
        ("ktonum.declare.op:Op.no_such", ("Op.no_such",)),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(target: str, fragments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        load_object(target)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_load_from_modules_and_their_attributes() -> None:
    assert load_object("ktonum.declare.op:Op") is Op
    assert load_object("ktonum.declare.op:Op.points") is Op.points


def test_objects_load_from_files_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Thing:\n    pass\n", encoding="utf-8")
    first = load_object(f"{file}:Thing")
    assert load_object(f"{file}:Thing") is first
    # Two files with the same name are two modules.
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.py").write_text("Thing = 7\n", encoding="utf-8")
    assert load_object(f"{other / 'mine.py'}:Thing") == 7


def test_a_file_that_raises_says_what_it_raised_and_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('no GPU, no fun')\n", encoding="utf-8")
    with pytest.raises(UsageError, match="RuntimeError: no GPU, no fun"):
        load_object(f"{file}:thing")
    file.write_text("thing = 3\n", encoding="utf-8")
    assert load_object(f"{file}:thing") == 3


def test_candidates_go_by_name_or_target() -> None:
    op = Op(name="op", dims=[{"N": 1}], candidates={"absolute": "builtins:abs"}, **{**_DIMS, "candidate": max})
    assert op.with_candidate("absolute").candidate is abs
    assert op.with_candidate("builtins:min").candidate is min
    assert op.candidate is max
    with pytest.raises(UsageError) as caught:
        op.with_candidate("absolut")
    assert "absolut" in str(caught.value) and "use one of absolute" in str(caught.value)
    with pytest.raises(UsageError, match="cannot import"):
        op.with_candidate("no_such_module:f")


def test_a_candidate_by_target_is_loaded_when_it_is_needed() -> None:
    op = Op(name="op", dims=[{"N": 1}], **{**_DIMS, "candidate": "builtins:dict"})
    assert op.bound_candidate({"beta": 2})(x=1) == {"x": 1, "beta": 2}
    missing = Op(name="op", dims=[{"N": 1}], **{**_DIMS, "candidate": "no_such_module:f"})
    with pytest.raises(UsageError, match="no_such_module"):
        missing.bound_candidate({})


def test_adapt_is_given_the_implementation_and_the_parameters() -> None:
    seen: list[Any] = []

    def adapt(candidate: Any, parameters: Any) -> Callable[..., Any]:
        seen.append((candidate, dict(parameters)))
        return lambda **inputs: "adapted"

    op = Op(name="op", dims=[{"N": 1}], adapt=adapt, **_DIMS)
    assert op.bound_candidate({"beta": 2})(x=1) == "adapted" and seen == [(abs, {"beta": 2})]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a[b]", "a:b", "-"])
def test_names_are_words(name: str) -> None:
    with pytest.raises(UsageError, match="word"):
        Op(name=name, dims=[{"N": 1}], **_DIMS)


def test_points_by_profile() -> None:
    both = Op(name="op", dims=[{"N": 1}, Point({"N": 2})], **_DIMS)
    assert both.points("quick") == both.points("full") == (Point({"N": 1}), Point({"N": 2}))
    apart = Op(name="op", dims={"quick": [{"N": 1}], "full": [{"N": 1}, {"N": 9}]}, **_DIMS)
    assert len(apart.points("quick")) == 1 and len(apart.points("full")) == 2
    with pytest.raises(UsageError, match="quick or full"):
        apart.points("fast")


@pytest.mark.parametrize("dims", [[], {"quick": [], "full": [{"N": 1}]}, {"full": [{"N": 1}]}, {"fast": [{"N": 1}]}])
def test_ops_without_quick_dims_are_refused(dims: Any) -> None:
    with pytest.raises(UsageError, match="dims"):
        Op(name="op", dims=dims, **_DIMS)


@pytest.mark.parametrize("size", [-1, 1.5, True, "3"])
def test_sizes_are_natural_numbers(size: Any) -> None:
    with pytest.raises(UsageError, match="N = "):
        Point({"N": size})


def test_parameters_are_plain_values() -> None:
    with pytest.raises(UsageError, match="beta"):
        Point({"N": 1}, {"beta": [1.0]})
    with pytest.raises(UsageError, match="mask"):
        Point({"N": 1}, {"mask": None})


def test_cases_keep_to_the_points_dtypes_and_devices() -> None:
    points = [
        {"N": 1},
        Point({"N": 2}, dtypes=("fp32",)),
        Point({"N": 3}, devices=("cuda",)),
    ]
    op = Op(name="op", dims=points, **_DIMS)
    found = [(c.dtype, c.point.dims["N"]) for c in op.cases(profile="quick", dtypes=["bf16", "fp32"], device="cpu")]
    assert found == [("bf16", 1), ("fp32", 1), ("fp32", 2)]


def test_a_name_tells_everything_that_shapes_the_case() -> None:
    case = Case("op", Point({"B": 2}, {"beta": 0.3}), "bf16", "cpu")
    assert case.name == "op[B=2,beta=0.3]-bf16-cpu"
    assert Case("op", Point({"B": 2}, distribution="uniform"), "bf16", "cpu").name == "op[B=2]-bf16-cpu-uniform"


def test_dtypes_parse() -> None:
    assert parse_dtypes(None) == ALL == parse_dtypes("bf16, fp16,fp32,fp64")
    assert parse_dtypes(["fp32", "fp32"]) == ("fp32",)
    for wrong in ("", "float32", "bf16,,fp32", []):
        with pytest.raises(UsageError, match="use bf16"):
            parse_dtypes(wrong)
    for name in ALL:
        assert dtype_name(torch_dtype(name)) == name
    assert dtype_name(torch.int64) == "int64"


DRAWS: dict[str, Callable[[Draw], Tensor]] = {
    "normal": lambda d: d.normal(5, 7, scale=1.5),
    "uniform": lambda d: d.uniform(5, 7, low=-1.0, high=2.0),
    "signs": lambda d: d.signs(5, 7),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_of_all_dtypes_are_the_same_values_rounded_once(kind: str) -> None:
    single = DRAWS[kind](_draw("fp32"))
    for dtype in ALL:
        drawn = DRAWS[kind](_draw(dtype))
        assert drawn.dtype is torch_dtype(dtype)
        assert torch.equal(drawn, single.to(drawn.dtype))


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_follow_the_generator_alone(kind: str) -> None:
    first, same, other = (DRAWS[kind](_draw("fp64", seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    draw = _draw("fp64", seed=1)
    assert torch.equal(DRAWS[kind](draw), first) and not torch.equal(DRAWS[kind](draw), first)


def test_draws_have_the_distribution_they_say() -> None:
    draw = _draw("fp32")
    normal, uniform = draw.normal(20_000, scale=3.0), draw.uniform(20_000, low=-1.0, high=2.0)
    assert abs(float(normal.mean())) < 0.1 and abs(float(normal.std()) - 3.0) < 0.1
    assert -1.0 <= float(uniform.min()) < -0.99 and 1.99 < float(uniform.max()) < 2.0
    assert set(draw.signs(100).tolist()) == {-1.0, 1.0}
    assert set(draw.integers(1000, low=3, high=6).tolist()) == {3, 4, 5}
    booleans = draw.booleans(20_000, probability=0.2)
    assert booleans.dtype is torch.bool and abs(float(booleans.float().mean()) - 0.2) < 0.02


def test_integers_and_booleans_do_not_depend_on_the_dtype() -> None:
    for dtype in ALL:
        assert torch.equal(_draw(dtype).integers(50, high=9), _draw("fp32").integers(50, high=9))
        assert torch.equal(_draw(dtype).booleans(50), _draw("fp32").booleans(50))


def test_a_cases_draw_is_its_own_and_each_purpose_has_one() -> None:
    first, second = SOFTMAX_LOSS.cases(profile="quick", dtypes=["fp32", "fp64"], device="cpu")
    values = Draw.of(first).normal(9)
    assert torch.equal(values, Draw.of(first).normal(9))
    assert not torch.equal(values, Draw.of(first, purpose="upstream").normal(9))
    assert not torch.equal(values.double(), Draw.of(second).normal(9))
    state = torch.get_rng_state()
    Draw.of(first).normal(9)
    assert torch.equal(state, torch.get_rng_state())  # torch's global generator does not change


def test_upstream_gradients_are_signed_and_never_one_by_rule() -> None:
    from ktonum.case.context import CaseContext

    op = Op(
        name="many",
        candidate=softmax_loss_with(),
        reference=lambda *, x: x * 2,
        sample=lambda draw: {"x": draw.normal(400)},
        dims=[{"N": 400}],
    )
    for case in op.cases(profile="quick", dtypes=ALL, device="cpu"):
        (upstream,) = CaseContext(op, case).upstream.values()
        eighths = upstream.double() * 8
        assert torch.equal(eighths, eighths.round()) and bool((eighths.abs() >= 4).all())
        assert bool((upstream > 0).any()) and bool((upstream < 0).any())
