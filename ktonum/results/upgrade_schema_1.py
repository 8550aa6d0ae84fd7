"""Schema 1 of an audit's file, upgraded to today's. Only this file takes names and sentences apart.

Schema 1 had a measurement's tensor, context, measure and draws in one name, a bound's source and a result's reason in
sentences, a planted defect and a case in names. The sentences were made by one version of ktonum, so that their forms
are known; one of another form is kept as the check's own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["SCHEMA", "upgraded", "upgraded_result"]

#: What this file reads.
SCHEMA = "ktonum-report/1"

_CASE = re.compile(
    r"(?P<op>[^\[]+)\[(?P<sizes>.*)\]-(?P<dtype>[a-z0-9]+)-(?P<device>cpu|cuda)(-(?P<distribution>.*?))?(\+(?P<offset>\d+))?"
)
_NUMBER = re.compile(r"-?\d+")
_DRAWS = re.compile(r"(bias|error) (?:of|over) (\d+) draws")
_MEASURED = re.compile(r"([\d.e+-]+) × the error of the reference (in|under autocast to) (\w+)")
_ANALYSIS = re.compile(r"rounding-error analysis, (\w+)")
# Of `nonfinite`: the name in words, and the measure that asks the same.
_NONFINITE = (
    (re.compile(r"places where (\w+) is not finite (with .*)"), "nonfinite_places"),
    (re.compile(r"refusal of (\S+) in (\w+)(.*)"), "refusal_missing"),
    (re.compile(r"any trace of (\S+) in (\w+)(.*)"), "trace_missing"),
)
# How reasons began, by verdict, with the cause that said so; the rest is the candidate's or the system's own words.
_REASONS = {
    "INCONCLUSIVE": (
        ("the candidate cannot run this case: ", "cannot_run"),
        ("out of device memory while checking: ", "out_of_memory"),
        ("the candidate has nothing to measure here", "nothing_measured"),
        ("", "cannot_tell"),
    ),
    "ERROR": (
        ("the candidate refused the case: ", "candidate_refused"),
        ("the candidate ", "candidate_wrong"),
        ("hung: ", "hung"),
        ("the process died while the candidate ran: ", "died"),
        ("the process died while the candidate ran", "died"),
        ("the CUDA context was lost while the candidate ran, after results had been read", "cuda_lost"),
        ("not run: ", "not_run"),
        ("", "check_raised"),
    ),
    "FAIL": (("", "beyond_bound"),),
}

Record = dict[str, Any]


def upgraded(document: Mapping[str, Any]) -> Record:
    """A document of schema 1 as one of schema 2; what is neither name nor sentence stays as it is."""
    results = document.get("results")
    return {**document, "results": [upgraded_result(r) for r in results] if isinstance(results, list) else results}


def upgraded_result(result: Mapping[str, Any]) -> Record:
    """One result of schema 1, likewise."""
    lists = {name: found for name in ("measurements", "power", "localisations") if (found := result.get(name))}
    new = {"measurements": _measurement, "power": _power, "localisations": _localisation}
    listed = {name: [new[name](entry) for entry in found] for name, found in lists.items()}
    cause, reason = _cause(result)
    return {**result, **listed, "cause": cause, "reason": reason, "parts": _case_parts(result.get("case"))}


def _cause(result: Mapping[str, Any]) -> tuple[str | None, Any]:
    reason, verdict = result.get("reason", ""), result.get("verdict")
    if not isinstance(reason, str):
        return None, reason
    if verdict == "PASS":
        return None, "" if reason.startswith("vacuous: ") else reason  # the power says that
    if verdict == "FAIL" and " exceeds " in reason and result.get("localisations"):
        return "beyond_bound", ""  # of the worst measurement
    for beginning, cause in _REASONS.get(str(verdict), ()):
        if reason.startswith(beginning):
            return cause, reason.removeprefix(beginning)
    return None, reason


def _measurement(old: Mapping[str, Any]) -> Record:
    rest = {k: v for k, v in old.items() if k not in ("name", "bound_source", "where")}
    where = old.get("where", "")
    index = [int(i) for i in _NUMBER.findall(where)] if where else None
    return {**_name_parts(old["name"]), **rest, "bound_source": _source(old.get("bound_source", "")), "where": index}


def _name_parts(name: str) -> Record:
    subject, _, measure = name.rpartition("/")
    draws = _DRAWS.fullmatch(measure)
    if draws is not None:
        return {**_subject(subject), "measure": draws[1], "draws": int(draws[2])}
    if measure.startswith("relative error, "):  # of `growth`
        return {**_subject(subject), "measure": "relative_error", "remark": measure.removeprefix("relative error, ")}
    if subject == "structure":
        return {"tensor": "", "measure": f"structure_{measure}"}
    return {**_subject(subject), "measure": _nonfinite_measure(subject) or measure}


def _subject(words: str) -> Record:
    """Tensor and context. A tensor's name is one word; a comma follows the names that `growth` made."""
    for form, measure in _NONFINITE:
        found = form.fullmatch(words)
        if found is not None and measure == "nonfinite_places":
            return {"tensor": found[1], "context": found[2]}
        if found is not None:
            return {"tensor": found[2], "context": f"with {found[1]} in {found[2]}{found[3]}"}
    tensor, separator, context = re.fullmatch(r"([^ ,]*)(,? ?)(.*)", words, re.DOTALL).groups()  # type: ignore[union-attr]
    return {"tensor": tensor, "context": f"at {context}" if separator == ", " else context}


def _nonfinite_measure(subject: str) -> str | None:
    return next((measure for form, measure in _NONFINITE if form.fullmatch(subject)), None)


def _source(text: str) -> Record:
    analysis, measured = _ANALYSIS.match(text), _MEASURED.search(text)
    if measured is not None:
        dtype = "fp32" if measured[3] == "float32" else measured[3]
        source = {"scale": float(measured[1]), "dtype": dtype, "autocast": measured[2] != "in"}
        if analysis is None:
            return {"kind": "measured", **source}
        return {"kind": "larger", "standard": analysis[1], **source}
    if analysis is not None:
        return {"kind": "derived", "standard": analysis[1]}
    overflown = re.fullmatch(r"the reference in (\w+) overflows", text)
    if overflown is not None:
        return {"kind": "measured", "scale": 4.0, "dtype": overflown[1]}
    if text.startswith("error bar of the extrapolated central difference"):
        return {"kind": "error_bar", "scale": 2.0}
    if text == "declared by the op":
        return {"kind": "declared"}
    return {"kind": "none"} if text in ("", "told, not decided") else {"kind": "exact", "text": text}


def _power(old: Mapping[str, Any]) -> Record:
    subject, _, words = old["defect"].rpartition(": ")
    kind, _, unit = words.partition(", ")
    return {**_subject(subject), "kind": kind, "unit": unit, "size": old["size"]}


def _localisation(old: Mapping[str, Any]) -> Record:
    return {**old, **_subject(old["tensor"])}


def _case_parts(name: object) -> Record:
    """All empty for a name of another form. Integers are taken for dims, everything else for parameters."""
    match = _CASE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return {}
    dims: dict[str, int] = {}
    parameters: dict[str, str] = {}
    for part in filter(None, match["sizes"].split(",")):
        key, _, value = part.partition("=")
        if _NUMBER.fullmatch(value) and not parameters:  # dims come first
            dims[key] = int(value)
        else:
            parameters[key] = value
    return {
        "op": match["op"],
        "dims": dims,
        "parameters": parameters,
        "distribution": match["distribution"] or "normal",
        "dtype": match["dtype"],
        "device": match["device"],
        "offset": int(match["offset"] or 0),
    }
