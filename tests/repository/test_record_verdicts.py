"""A record made under schema 1 is compared field by field with one of today."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from ktonum.results import Report
from support.repository import ROOT

FILE = ROOT / "tests" / "results" / "report_schema_1.json"


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("record_verdicts")


def test_an_older_record_is_upgraded_and_a_change_is_found(records: ModuleType, tmp_path: Path) -> None:
    old, now = {}, {}
    for result in json.loads(FILE.read_text(encoding="utf-8"))["results"]:
        old.update(records.of_result(result, f"op --option/{result['case']}::{result['check']}"))
    Report.from_json(FILE).to_json(tmp_path / "now.json")
    for result in json.loads((tmp_path / "now.json").read_text(encoding="utf-8"))["results"]:
        now.update(records.of_result(result, f"op --option/{result['case']}::{result['check']}"))
    assert len(now) > 500 and list(records.differences(records.upgraded(old), now)) == []
    assert records.upgraded(now) == now
    place = next(name for name in now if name.endswith("/measurements/0/value"))
    (found,) = records.differences(records.upgraded(old), now | {place: 7.0})
    assert found.startswith(place) and found.endswith("7.0 now")
    assert not records.in_words(found)
    words = next(name for name in now if name.endswith("/bound_source/text"))
    (found,) = records.differences(now, now | {words: "other: words"})
    assert records.in_words(found)
