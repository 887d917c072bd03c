"""The plan that a model's chains follow, where some of its layers are there whole."""

from torch import nn

import tdecomp
from tdecomp.checkpoint.standing import plan_of, without_whole


class Heads(nn.Module):
    """A table and two heads with one weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.first.weight = self.second.weight = self.table.weight

    def forward(self, x):
        return self.first(self.table(x)), self.second(self.table(x))


def test_those_that_shared_factors_with_a_whole_layer_go_on_sharing_theirs():
    result = tdecomp.decompose(Heads(), "svd", rank=4, progress=False)
    assert [row.tied_to for row in result.plan] == [None, "table", "table"]
    stored = {"table.weight", "first.0.weight", "first.1.weight"}
    plan = without_whole(result.plan, stored)
    rows = [(row.name, row.method, row.tied_to) for row in plan]
    assert rows == [("table", None, None), ("first", "svd", None), ("second", "svd", "first")]
    assert plan["table"].reason == "it is a layer again"
    assert without_whole(result.plan, result.model.state_dict()) is result.plan
    ordinary = without_whole(result.plan, {"table.weight"})  # which stores the one weight once
    assert {row.method for row in ordinary} == {None}


def test_so_they_do_where_one_was_put_back_by_hand():
    result = tdecomp.decompose(Heads(), "svd", rank=4, progress=False)
    result.model.table = result.model.table.to_layer()
    plan = tdecomp.Plan.from_json(plan_of(result.model, result.plan).to_json())
    rows = [(row.name, row.method, row.tied_to) for row in plan]
    assert rows == [("table", None, None), ("first", "svd", None), ("second", "svd", "first")]
