"""What a candidate gets to write on: copies of the case's tensors and of views of them."""

from __future__ import annotations

import torch

from ktonum.case.lending import lent
from ktonum.declare.evaluation import Run


def test_the_owners_tensors_and_their_views_are_copied_with_their_strides() -> None:
    owner = Run({"x": torch.arange(12.0).view(3, 4), "n": 3}, {}, {"y": torch.ones(2)})
    foreign = torch.zeros(3)
    given = {
        "x": owner.inputs["x"].t(),
        "row": owner.inputs["x"][1],
        "y": owner.upstream["y"],
        "foreign": foreign,
        "n": 3,
    }
    copies = lent(given, owner=owner)
    assert copies["foreign"] is foreign and copies["n"] == 3
    for name in ("x", "row", "y"):
        assert torch.equal(copies[name], given[name]) and copies[name].stride() == given[name].stride()
        copies[name].fill_(-1.0)
    assert float(owner.inputs["x"].min()) == 0.0 and float(owner.upstream["y"].min()) == 1.0
