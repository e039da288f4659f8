"""Labels: durations are scaled and cut, nulls are masked where a task says so, and what is not known teaches nothing."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_decode import SCHEMA, decoded, read, write
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

DURATIONS = Schema(
    DataSection(root="."),
    tables=(TableIds(name="t", rows=9),),
    features=(Feature(name="u", kind="id", table="t"),),
    labels=(
        Label(name="dwell", kind="duration", label="ms", scale=0.001, cap=60, given="ctr"),
        Label(name="ctr", kind="binary", label="click"),
        Label(name="ticks", kind="duration", label="ms"),
    ),
)


class TestDurations:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.integers(-2000, 200_000), st.integers(0, 1)), min_size=1, max_size=8))
    def test_they_are_scaled_cut_to_0_and_the_cap_counted_and_kept_where_given(self, tmp_path_factory, rows):
        path = str(tmp_path_factory.mktemp("log") / "f.parquet")
        pq.write_table(pa.table({"u": [0] * len(rows), "ms": [ms for ms, _ in rows], "click": [click for _, click in rows]}), path)
        (part,), (capped,) = decoded(path, DURATIONS)
        seconds = [float(np.float32(min(max(ms * 0.001, 0), 60))) for ms, _ in rows]
        assert part.labels_NT.tolist() == [[s if click else 0, click, max(ms, 0)] for s, (ms, click) in zip(seconds, rows, strict=True)]
        assert part.known_NT.tolist() == [[click == 1, True, True] for _, click in rows]
        negative, above = sum(ms < 0 for ms, click in rows if click), sum(ms > 60_000 for ms, click in rows if click)
        all_negative = sum(ms < 0 for ms, _ in rows)
        assert capped == {name: counts for name, counts in (("dwell", (negative, above)), ("ticks", (all_negative, 0))) if any(counts)}

    def test_the_cap_itself_is_not_above_it(self, tmp_path):
        path = write(tmp_path / "f.parquet", dwell_ms=[60_000, -1, 60_001, 0])
        assert [labels[2] for labels in read(path)["labels_NT"]] == [60, 0, 60, 0]
        assert decoded(path, SCHEMA)[1] == [{"dwell": (1, 0)}, {"dwell": (0, 1)}]


class TestMaskedNulls:
    """A null label of a task that masks nulls is not known, and so are those labels that are given it."""

    def labels(self, tmp_path, masked, click, buy, dwell):
        """Labels and whether they are known of one row, when the tasks in `masked` mask nulls."""
        given = (
            Label(name="cvr", kind="binary", label="buy", given="ctr", nulls="mask" if "cvr" in masked else "fail"),
            Label(name="ctr", kind="binary", label="click", nulls="mask" if "ctr" in masked else "fail"),
            Label(name="dwell", kind="duration", label="dwell_ms", given="cvr", nulls="mask" if "dwell" in masked else "fail"),
        )
        columns = {"click": click, "buy": buy, "dwell_ms": dwell}
        changes = {name: pa.array([value] * 4, pa.float64()) for name, value in columns.items()}
        (first, _), _ = decoded(write(tmp_path / "f.parquet", **changes), replace(SCHEMA, labels=given))
        return first.labels_NT[0].tolist(), first.known_NT[0].tolist()

    @pytest.mark.parametrize(
        ("click", "buy", "dwell", "labels", "known"),
        [
            (1, 1, 7, [1, 1, 7], [True, True, True]),
            (1, None, 7, [0, 1, 0], [False, True, False]),
            (None, 1, 7, [0, 0, 0], [False, False, False]),
            (1, 1, None, [1, 1, 0], [True, True, False]),
            (0, None, None, [0, 0, 0], [False, True, False]),
            (None, None, None, [0, 0, 0], [False, False, False]),
        ],
    )
    def test_what_is_known(self, tmp_path, click, buy, dwell, labels, known):
        assert self.labels(tmp_path, {"ctr", "cvr", "dwell"}, click, buy, dwell) == (labels, known)

    def test_a_file_in_which_a_label_is_always_null(self, tmp_path):
        path = write(tmp_path / "f.parquet", click=pa.nulls(4))
        with pytest.raises(InputError, match=r"column 'click' is null, but task 'ctr' needs numbers"):
            read(path)
        ctr, *others = SCHEMA.labels
        rows = read(path, replace(SCHEMA, labels=(ctr.model_copy(update={"nulls": "mask"}), *others)))
        assert rows["known_NT"] == [[False, False, True]] * 4

    @pytest.mark.parametrize(("masked", "click"), [({"dwell"}, 1), ({"ctr", "dwell"}, 1)])
    def test_a_task_that_does_not_mask_still_refuses_nulls_that_it_needs(self, tmp_path, masked, click):
        with pytest.raises(InputError, match="label 'buy' of task 'cvr' has 2 nulls; drop those rows"):
            self.labels(tmp_path, masked, click, None, 7)

    def test_a_null_that_a_masked_condition_makes_meaningless_is_no_error(self, tmp_path):
        assert self.labels(tmp_path, {"ctr"}, None, None, None)[1] == [False] * 3
