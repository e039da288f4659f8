"""What a run fitted survives being saved, is told apart by its digest, and holds neither a key nor an id that a key hides."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.fitted import Fitted, Moments, Quantiles, Vocabulary, read_key, read_keys
from triptych.datasets.fitting import gather, joined
from triptych.datasets.ids import keyed_codes, table_rows
from triptych.datasets.parquet.layout import ColumnTypes
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

SECRET, OTHER = b"a secret of many bytes\n", b"another secret of many bytes"
FEATURE = Feature(name="user", column="user_id", kind="id", table="user")
floats = st.floats(-1e300, 1e300)


def schema_of(key_file=None):
    tables = (TableIds(name="user", rows=2**40, key_file=key_file), TableIds(name="word", rows=9, ids="vocabulary"))
    features = (FEATURE, Feature(name="word", kind="id", table="word"))
    return Schema(DataSection(root="."), tables, features, (Label(name="ctr", kind="binary", label="click"),))


def fitted_with(key=None):
    return Fitted(
        {"price": Moments(np.array([1 / 3, 2.0]), np.array([0.1, 0.0]))},
        {"age": Quantiles([np.array([1.0, 1.5, 9.0]), np.array([2.0])], [np.array([0.0, 0.5, 1.0]), np.array([0.5])])},
        {"word": Vocabulary(np.array([7, -3, 2**62]), np.array([9, 4, 4]))},
        ColumnTypes({"user_id": ("strings", "a.parquet"), "word": ("integers", "b.parquet")}),
        {} if key is None else {"user": key},
    )


def refusal(function, *args):
    with pytest.raises(InputError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def key_file(tmp_path):
    (tmp_path / "key").write_bytes(SECRET)
    return str(tmp_path / "key")


class TestSaving:
    def test_it_reads_back_equal(self, tmp_path):
        fitted = fitted_with()
        fitted.save(tmp_path)
        again = Fitted.load(tmp_path, schema_of())
        assert again.digest() == fitted.digest() and again.types == fitted.types and again.keys == {}
        assert again.moments["price"].mean_D.tolist() == [1 / 3, 2.0] and again.moments["price"].deviation_D.tolist() == [0.1, 0.0]
        assert [values.tolist() for values in again.quantiles["age"].values_D] == [[1.0, 1.5, 9.0], [2.0]]
        assert again.vocabularies["word"].code_V.tolist() == [7, -3, 2**62]
        assert again.vocabularies["word"].rows_of(np.array([2**62, 7, 8, -3])).tolist() == [3, 1, 0, 2]
        assert sorted(path.name for path in (tmp_path / "fitted").iterdir()) == ["statistics.json", "vocabulary_word.parquet"]

    @settings(deadline=None, max_examples=40)
    @given(st.lists(floats, min_size=1, max_size=4), st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=6))
    def test_to_the_bit(self, tmp_path_factory, numbers, codes):
        folder = tmp_path_factory.mktemp("run")
        fitted = Fitted(
            {"x": Moments(np.array(numbers), np.abs(numbers))},
            vocabularies={"word": Vocabulary(np.array(codes, np.int64), np.ones(len(codes), np.int64))},
        )
        fitted.save(folder)
        again = Fitted.load(folder, schema_of())
        assert again.moments["x"].mean_D.tobytes() == np.array(numbers).tobytes()
        assert again.vocabularies["word"].code_V.tolist() == codes and again.digest() == fitted.digest()

    def test_a_save_that_fails_leaves_the_old_statistics(self, tmp_path):
        fitted_with().save(tmp_path)
        with pytest.raises(TypeError):
            replace(fitted_with(), moments={}, types=ColumnTypes({"a": (object(), "b")})).save(tmp_path)
        assert Fitted.load(tmp_path, schema_of()).digest() == fitted_with().digest()

    @pytest.mark.parametrize("damage", ["no folder", "no statistics", "cut statistics", "a key less", "no vocabulary", "cut vocabulary"])
    def test_damage_is_one_line(self, tmp_path, damage):
        if damage != "no folder":
            fitted_with().save(tmp_path)
        statistics, vocabulary = tmp_path / "fitted/statistics.json", tmp_path / "fitted/vocabulary_word.parquet"
        if damage == "no statistics":
            statistics.unlink()
        elif damage == "cut statistics":
            statistics.write_text(statistics.read_text()[:-20])
        elif damage == "a key less":
            statistics.write_text(json.dumps({key: value for key, value in json.loads(statistics.read_text()).items() if key != "keys"}))
        elif damage == "no vocabulary":
            vocabulary.unlink()
        elif damage == "cut vocabulary":
            vocabulary.write_bytes(vocabulary.read_bytes()[:-9])
        assert refusal(Fitted.load, tmp_path, schema_of()).startswith(
            f"{tmp_path}/fitted: cannot read what the run fitted to its training files ("
        )


class TestDigest:
    def test_it_stays_when_what_a_model_reads_stays(self):
        other = fitted_with()
        other.types.add("c.parquet", {"new": "floats"})
        assert fitted_with().digest() == other.digest()

    @pytest.mark.parametrize(
        "change",
        [
            {"moments": {"price": Moments(np.array([1 / 3, 2.0]), np.array([0.1, 1e-300]))}},
            {"moments": {"price": Moments(np.array([np.nextafter(1 / 3, 1), 2.0]), np.array([0.1, 0.0]))}},
            {"moments": {"cost": fitted_with().moments["price"]}},
            {"moments": {}},
            {"quantiles": {"age": Quantiles([np.array([1.0, 1.5, 9.5]), np.array([2.0])], fitted_with().quantiles["age"].shares_D)}},
            {"quantiles": {"age": Quantiles(fitted_with().quantiles["age"].values_D, [np.array([0.0, 0.4, 1.0]), np.array([0.5])])}},
            {"vocabularies": {"word": Vocabulary(np.array([-3, 7, 2**62]), np.array([9, 4, 4]))}},
            {"vocabularies": {"word": Vocabulary(np.array([7, -3]), np.array([9, 4]))}},
            {"vocabularies": {"item": fitted_with().vocabularies["word"]}},
            {"keys": {"user": b"k" * 32}},
        ],
    )
    def test_it_changes_with_any_content(self, change):
        assert replace(fitted_with(), **change).digest() != fitted_with().digest()

    def test_it_tells_keys_apart(self):
        assert fitted_with(b"k" * 32).digest() == fitted_with(b"k" * 32).digest() != fitted_with(b"l" * 32).digest()


def rows(values, key=None):
    keys = {} if key is None else {"user": key}
    return table_rows(values, FEATURE, schema_of().tables[0], Fitted(keys=keys), "f.parquet: row group 0").tolist()


class TestKeys:
    IDS = (17, 18, -1, 0)

    def test_rows_differ_by_key_and_from_those_without_one(self, tmp_path):
        found = []
        for number, secret in enumerate((None, SECRET, OTHER)):
            (tmp_path / "key").write_bytes(secret or b"")
            found.append(rows(pa.array(self.IDS), read_key(str(tmp_path / "key")) if number else None))
        assert len({row for its_rows in found for row in its_rows}) == 3 * len(self.IDS)

    @pytest.mark.parametrize("kind", [pa.int8(), pa.float64(), pa.string(), pa.large_string(), pa.string_view()], ids=str)
    def test_a_number_and_its_text_agree_in_every_type(self, kind):
        values = [17, 0, 17, 100]
        typed = pa.array([str(value) for value in values], kind) if "str" in str(kind) else pa.array(values, kind)
        assert rows(typed, b"k" * 32) == rows(pa.array(values), b"k" * 32)
        assert rows(pa.array([2**63 + 1], pa.uint64()), b"k" * 32) == rows(pa.array([str(2**63 + 1)]), b"k" * 32)

    def test_codes_of_a_column_are_those_of_its_values_one_by_one(self):
        values = ["a", "b", "a", "é", ""]
        codes = keyed_codes(pa.array(values), b"k" * 32).tolist()
        assert codes == [int(keyed_codes(pa.array([value]), b"k" * 32)[0]) for value in values] and len(set(codes)) == 4

    def test_white_space_around_a_key_is_not_part_of_it(self, tmp_path, key_file):
        (tmp_path / "other").write_bytes(b"  " + SECRET.strip() + b"\r\n")
        assert read_key(key_file) == read_key(str(tmp_path / "other")) and len(read_key(key_file)) == 32

    def test_a_missing_or_short_key_is_one_line(self, tmp_path):
        missing, short = str(tmp_path / "missing"), tmp_path / "short"
        assert refusal(read_keys, schema_of(missing)) == f"{missing}: cannot read the key_file (No such file or directory)"
        short.write_bytes(b"x" * 15 + b"\n" * 9)
        message = refusal(read_keys, schema_of(str(short)))
        assert message.startswith(f"{short}: a key of 15 bytes; it needs 16; make one with: head -c 32 /dev/urandom")
        assert refusal(read_key, str(tmp_path)) == f"{tmp_path}: cannot read the key_file (Is a directory)"

    def test_another_key_is_refused_when_the_run_is_read(self, tmp_path, key_file):
        schema = schema_of(key_file)
        fitted_with(read_key(key_file)).save(tmp_path)
        assert Fitted.load(tmp_path, schema).digest() == fitted_with(read_key(key_file)).digest()
        (tmp_path / "key").write_bytes(OTHER)
        another = "table 'user' was trained with another key than its key_file holds; restore the file"
        assert refusal(Fitted.load, tmp_path, schema) == f"{tmp_path}/fitted/statistics.json: {another}"
        fitted_with().save(tmp_path)
        assert refusal(Fitted.load, tmp_path, schema) == f"{tmp_path}/fitted/statistics.json: {another}"

    def test_neither_a_key_nor_an_id_is_written(self, tmp_path, key_file):
        ids = ["user-4711-of-the-log", "user-4712-of-the-log"]
        pq.write_table(pa.table({"user_id": ids, "word": [1, 1], "click": [0, 1]}), tmp_path / "log.parquet")
        schema = schema_of(key_file)
        listing = list_slices(schema, [f"{tmp_path}/log.parquet"], labels=True)
        joined(schema, listing, [gather(schema, listing)]).save(tmp_path / "run")
        key = read_key(key_file)
        hidden = [SECRET.strip(), key, key.hex().encode(), *(id_.encode() for id_ in ids)]
        codes = keyed_codes(pa.array(ids), key)
        hidden += [code.tobytes() for code in codes] + [f"{code:016x}".encode() for code in codes.tolist()]
        written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert len(written) == 2 and not [secret for secret in hidden for content in written if secret in content]
