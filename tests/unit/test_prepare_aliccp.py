"""`prepare aliccp`: every impression with the features of its own and of its user, as a plain loop reads them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.ids import string_codes
from triptych.datasets.prepare import aliccp, text
from triptych.datasets.prepare.catalogue import prepare
from triptych.datasets.schema import InputError

ONE = {
    "101": "user_id", "121": "profile", "122": "profile_group", "124": "gender", "125": "age", "126": "consumption_1",
    "127": "consumption_2", "128": "occupation", "129": "geography", "205": "item_id", "206": "category_id", "207": "shop_id",
    "216": "brand_id", "301": "position", "508": "category_match", "509": "shop_match", "702": "brand_match", "853": "intention_match",
}  # fmt: skip
MANY = {
    "109_14": "category_history", "110_14": "shop_history", "127_14": "brand_history", "150_14": "intention_history",
    "210": "intention_ids",
}  # fmt: skip
MATCHES = ("508", "509", "702", "853")
USER_FIELDS = [*list(ONE)[:9], *list(MANY)[:4]]
ITEM_FIELDS = [*list(ONE)[9:], "210"]


def features(rng, fields):
    """Some of the fields, shuffled, lists with ties among their values."""
    tokens = []
    for field in fields:
        count = int(rng.integers(0, 9)) if field in MANY else int(rng.random() < 0.7)
        values = rng.choice(["0.69315", "1.0", "1.38629", "2.0"], count)
        tokens += [f"{field}\x02{rng.integers(1, 10**7)}\x03{value}" for value in values]
    rng.shuffle(tokens)
    return f"{len(tokens)}," + "\x01".join(tokens)


def write(folder, num_users, num_rows, seed=0):
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        (folder / f"sample_{split}").mkdir(parents=True)
        users = [f"{split[1]}{user:015x}" for user in range(num_users)]
        common = [f"{user},{features(rng, USER_FIELDS)}\n" for user in users]
        (folder / f"sample_{split}" / f"common_features_{split}.csv").write_text("".join(common))
        labels = [((0, 0), (1, 0), (1, 1), (0, 1))[int(k)] for k in rng.choice(4, num_rows, p=[0.6, 0.2, 0.1, 0.1])]
        rows = [
            f"{i + 1},{click},{buy},{users[i * num_users // num_rows]},{features(rng, ITEM_FIELDS)}\n"
            for i, (click, buy) in enumerate(labels)
        ]
        (folder / f"sample_{split}" / f"sample_skeleton_{split}.csv").write_text("".join(rows))
    return folder


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "raw", 40, 300)


def naive_features(listed, fields):
    tokens = [token.replace("\x03", "\x02").split("\x02") for token in listed.split("\x01")] if listed else []
    row = {}
    for field in fields:
        mine = [(int(id_), float(value)) for name, id_, value in tokens if name == field]
        if field in MANY:
            row[MANY[field]] = [id_ for id_, _ in sorted(mine, key=lambda pair: pair[1])][-aliccp.HISTORY :]
        else:
            row[ONE[field]] = mine[-1][0] if mine else None
        if field in MATCHES:
            row[f"{ONE[field]}_strength"] = float(np.float32(mine[-1][1])) if mine else 0.0
    return row


def naive(source):
    files = {"train": [], "valid": [], "test": []}
    for split in ("train", "test"):
        folder, users = source / f"sample_{split}", {}
        for line in (folder / f"common_features_{split}.csv").read_text().splitlines():
            index, _, listed = line.split(",")
            users[index] = naive_features(listed, USER_FIELDS)
        held_out = {user for user in users if split == "train" and int(string_codes(pa.array([user]))[0]) % 20 == 0}
        for line in (folder / f"sample_skeleton_{split}.csv").read_text().splitlines():
            sample, click, buy, index, _, listed = line.split(",")
            if (click, buy) != ("0", "1"):
                row = {"sample_id": int(sample), "click": int(click), "conversion": int(buy)}
                files["valid" if index in held_out else split].append(row | users[index] | naive_features(listed, ITEM_FIELDS))
    return files


def silent(done, total):
    pass


class TestRows:
    @pytest.mark.parametrize("block_bytes", [3_000, 16 << 20])
    @pytest.mark.parametrize("history", [3, 50])
    def test_every_row_is_what_a_loop_makes_of_the_files(self, source, tmp_path, monkeypatch, block_bytes, history):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(aliccp, "HISTORY", history)
        seen = []
        counts = prepare("aliccp", source, tmp_path / "out", lambda done, total: seen.append((done, total)))
        for name, rows in naive(source).items():
            assert pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() == rows
            assert counts[f"{name}.parquet"] == len(rows) > 0
        assert seen[-1] == (sum(path.stat().st_size for path in source.rglob("*.csv")),) * 2

    def test_a_user_is_either_trained_on_or_held_out(self, source, tmp_path):
        for split in ("train", "test"):
            for path in (source / f"sample_{split}").iterdir():
                path.rename(source / path.name)
        prepare("aliccp", source, tmp_path / "out", silent)
        samples = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet")["sample_id"].to_pylist() for name in ("train", "valid")}
        groups = {name: {(sample - 1) * 40 // 300 for sample in ids} for name, ids in samples.items()}
        assert groups["train"] and groups["valid"] and not groups["train"] & groups["valid"]

    def test_memory_does_not_grow_with_the_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 13)
        monkeypatch.setattr(text, "ROW_GROUP_ROWS", 100)
        most = {}
        for num_rows in (400, 3_200):
            source = write(tmp_path / str(num_rows), 40, num_rows)
            before, held = pa.total_allocated_bytes(), []
            prepare("aliccp", source, tmp_path / f"out-{num_rows}", lambda *_, b=before, h=held: h.append(pa.total_allocated_bytes() - b))
            most[num_rows] = max(held)
        assert most[3_200] < 1.5 * most[400]

    def test_common_features_take_less_than_a_kilobyte_a_user(self, tmp_path):
        """However long the official lists are."""
        tokens = "\x01".join(f"{field}\x02{i}\x03{i / 7}" for field in aliccp.USER_LISTS for i in range(300))
        (tmp_path / "common.csv").write_text("".join(f"{user:016x},1200,{tokens}\n" for user in range(500)))
        before = pa.total_allocated_bytes()
        common = aliccp._read_common(tmp_path / "common.csv", text.Meter([tmp_path / "common.csv"], silent))
        assert pa.total_allocated_bytes() - before < 1_000 * len(common)


class TestRefusals:
    def refused(self, source, tmp_path):
        with pytest.raises(InputError) as error:
            prepare("aliccp", source, tmp_path / "out", silent)
        assert list((tmp_path / "out").iterdir()) == [] if (tmp_path / "out").exists() else True
        return str(error.value)

    def test_a_missing_file(self, source, tmp_path):
        (source / "sample_test" / "common_features_test.csv").unlink()
        assert "raw: no common_features_test.csv; the official layout is Tianchi's: " in self.refused(source, tmp_path)

    @pytest.mark.parametrize("name", ["common_features_test", "sample_skeleton_train"])
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda line: line.replace("\x03", " ", 1), "features are 'field \\x02 id \\x03 value': Expected 3 columns, got 2"),
            (lambda line: line.rpartition("\x01")[0], "features are announced, "),
            (lambda line: line.replace("\x01", "\x01999\x021\x031.0\x01", 1), "features are announced, "),
            (lambda line: line + ",1", "Expected "),
            (lambda line: line.replace("\x03", "\x03x", 1), "features are 'field \\x02 id \\x03 value': column 'value': CSV conversion"),
        ],
    )
    def test_a_broken_line(self, source, tmp_path, name, change, reason):
        path = source / f"sample_{name.rpartition('_')[2]}" / f"{name}.csv"
        lines = path.read_text().splitlines()
        number = next(i for i, line in enumerate(lines, 1) if i > 20 and line.count("\x01") > 3)
        lines[number - 1] = change(lines[number - 1])
        path.write_text("\n".join(lines))
        message = self.refused(source, tmp_path)
        assert message.startswith(f"{path}: line {number}: ") and reason in message

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("7,0,0,ffff,0,", "index ffff is not in the file of common features"),
            ("7,0,0,{user},1,999\x025\x031.0", "field 999 is none of 205, 206, 207, 216, 210, 508"),
            ("7,0,0,{user},1,101\x025\x031.0", "field 101 is none of 205, 206, 207, 216, 210, 508"),
            ("7,0,2,{user},0,", "column 'conversion' must be 0 or 1, but holds 2"),
            ("7,0,0,{user},2,205\x025\x031.0\x01", "an empty feature"),
            ("7,0,0,{user},1,205\x025\x03nan", "column 'value' holds NaN or infinity"),
        ],
    )
    def test_a_line_that_cannot_be(self, source, tmp_path, line, reason):
        path = source / "sample_train" / "sample_skeleton_train.csv"
        lines = path.read_text().splitlines()
        lines.insert(150, line.format(user=lines[150].split(",")[3]))
        path.write_text("\n".join(lines))
        message = self.refused(source, tmp_path)
        assert message.startswith(f"{path}: line 151: ") and reason in message


def test_a_line_without_features(source, tmp_path):
    path = source / "sample_test" / "sample_skeleton_test.csv"
    path.write_text(path.read_text() + f"999,1,0,{path.read_text().split(',')[3]},0,\n")
    prepare("aliccp", source, tmp_path / "out", silent)
    last = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()[-1]
    assert last["sample_id"] == 999 and last["item_id"] is None and last["intention_ids"] == [] and last["shop_match_strength"] == 0.0
