"""First vectors of dynamic ids: normal, a function of seed, table and id alone, written to exactly the rows that begin anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triptych.datasets.ids import mix
from triptych.embeddings.dynamic.fresh import FreshRows, Held, Part, _mix, first_vectors
from triptych.embeddings.tables import EmbeddingTable

TABLE = EmbeddingTable(name="user", rows=50, dim=8, ids="dynamic", init=0.5)
CODES = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20)


@given(CODES)
def test_mixes_as_numpy_does(codes: list[int]) -> None:
    ours = _mix(torch.tensor(codes))
    assert np.array_equal(ours.numpy(), mix(np.array(codes, np.int64)).view(np.int64))


def test_vectors_are_normal_and_independent() -> None:
    vector_AD = first_vectors(TABLE, 3, torch.arange(50_000)).double() / TABLE.init
    assert abs(float(vector_AD.mean())) < 0.01 and abs(float(vector_AD.std()) - 1) < 0.01
    # The fourth moment of a normal number is 3.
    assert abs(float((vector_AD**4).mean()) - 3) < 0.1
    correlation_DD = torch.corrcoef(vector_AD.t())
    assert float((correlation_DD - torch.eye(TABLE.dim)).abs().max()) < 0.02


@given(CODES)
def test_depend_on_seed_table_and_id_alone(codes: list[int]) -> None:
    code_A = torch.tensor(codes)
    vector_AD = first_vectors(TABLE, 3, code_A)
    assert torch.equal(first_vectors(TABLE, 3, code_A.flip(0)).flip(0), vector_AD)
    other_table = TABLE.model_copy(update={"name": "item"})
    for other in (first_vectors(TABLE, 4, code_A), first_vectors(other_table, 3, code_A)):
        assert not torch.isclose(other, vector_AD).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(data=st.data())
def test_writes_the_rows_that_begin_anew_and_no_others(dtype: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(1, TABLE.rows - 1), unique=True, min_size=1, max_size=20))
    first, stop = sorted(data.draw(st.lists(st.integers(0, TABLE.rows), min_size=2, max_size=2)))
    left = data.draw(st.sampled_from([0, 4]))
    weight, state = torch.full((stop - first, TABLE.dim - left), 7.0, dtype=dtype), torch.full((stop - first,), 7.0)
    held = Held(TABLE, [Part(weight, first, left)], [Part(state, first, None)])
    fresh = FreshRows(3)
    fresh.bind({1: held})
    other_table = torch.tensor([[0, row, 5] for row in range(1, TABLE.rows)])
    fresh(torch.cat([other_table, torch.tensor([[1, row, 1000 + row] for row in rows])]))
    for row in range(first, stop):
        if row in rows:
            expected = first_vectors(TABLE, 3, torch.tensor([1000 + row]))[0, left:].to(dtype)
            assert torch.equal(weight[row - first], expected) and state[row - first] == 0
        else:
            assert (weight[row - first] == 7).all() and state[row - first] == 7
