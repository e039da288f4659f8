"""The synthetic world: the same bytes from the same parameters, labels that agree with their truth, tables that agree with each other."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.world import World, write_world

ROOT = Path(__file__).parents[2]
LOG = ("train.parquet", "valid.parquet", "test.parquet")
SMALL = World(rows=2_000, users=300, items=100)
MIDDLE = World(rows=100_000, users=5_000, items=1_500, seed=3)


def read_log(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(folder / name) for name in LOG)


def numbers(table: pa.Table, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; scores of the truth have no ties to speak of."""
    rank = np.empty(len(score))
    rank[score.argsort()] = np.arange(1, len(score) + 1)
    positives = label.sum()
    return (rank[label == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))


def logit(chance: np.ndarray) -> np.ndarray:
    return np.log(chance / (1 - chance))


def deviation(drawn: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """Standard errors between what was drawn and what its truth says."""
    return abs((drawn - mean).sum()) / np.sqrt(variance.sum())


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("middle")
    write_world(MIDDLE, folder)
    return folder


@pytest.fixture(scope="module")
def log(middle: Path) -> pa.Table:
    return read_log(middle)


def test_the_same_world_has_the_same_bytes_in_another_folder_process_and_thread_count(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "here")
    write_world(SMALL, tmp_path / "there" / "deeper")
    code = "import sys, pathlib; from triptych.datasets.world import *; write_world(World(2_000, 300, 100), pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "process")], check=True, env=environment, cwd=tmp_path)
    assert contents(tmp_path / "here") == contents(tmp_path / "there" / "deeper") == contents(tmp_path / "process")


def test_another_seed_gives_another_log_and_another_catalogue(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "0")
    write_world(replace(SMALL, seed=1), tmp_path / "1")
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert all(first[name] != second[name] for name in first)


def test_rows_do_not_depend_on_the_length_of_the_log(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "short")
    write_world(replace(SMALL, rows=50_001), tmp_path / "long")
    assert read_log(tmp_path / "long").slice(0, SMALL.rows).equals(read_log(tmp_path / "short"))


@pytest.mark.parametrize("rows", [10, 99, 50_001])
def test_the_split_is_80_10_10_in_order_of_time(tmp_path: Path, rows: int) -> None:
    written = write_world(replace(SMALL, rows=rows), tmp_path)
    assert written == {path.name: pq.read_metadata(path).num_rows for path in tmp_path.iterdir()}
    assert sum(written[name] for name in LOG) == rows
    assert [written[name] for name in LOG] == pytest.approx([0.8 * rows, 0.1 * rows, 0.1 * rows], abs=1)
    assert written["items.parquet"] == SMALL.items
    time = read_log(tmp_path)["time_ms"].to_numpy()
    assert (np.diff(time) > 0).all()
    assert np.ptp(time) == pytest.approx(6_000 * rows, rel=1.0 if rows < 100 else 0.01)


def test_columns_and_types(middle: Path, log: pa.Table) -> None:
    item_columns = "item_id category brand past_views price length_s tags"
    assert " ".join(log.column_names) == (
        "time_ms scenario position user_id age_band active_days days_registered minutes_per_day history "
        f"{item_columns} click conversion dwell_ms true_ctr true_cvr true_dwell"
    )
    strings, lists = {"scenario", "age_band", "category"}, {"history", "tags"}
    doubles = {"minutes_per_day", "price", "length_s", "true_ctr", "true_cvr", "true_dwell"}
    for field in log.schema:
        kind = pa.string() if field.name in strings else pa.list_(pa.int64()) if field.name in lists else pa.int64()
        assert field.type.equals(pa.float64() if field.name in doubles else kind), field
    assert all(column.null_count == 0 for column in log.columns)
    assert " ".join(pq.read_schema(middle / "items.parquet").names) == item_columns


def test_row_groups_are_several_small_and_compressed(middle: Path) -> None:
    for path in middle.iterdir():
        metadata = pq.read_metadata(path)
        assert metadata.num_row_groups >= 8
        for number in range(metadata.num_row_groups):
            assert metadata.row_group(number).num_rows <= 20_000
            assert metadata.row_group(number).column(0).compression == "ZSTD"


def test_a_flipped_bit_is_caught_by_the_page_checksums(middle: Path, tmp_path: Path) -> None:
    path, damaged = middle / "train.parquet", tmp_path / "damaged.parquet"
    group = pq.read_metadata(path).row_group(0)
    for name in ("time_ms", "history.list.element", "true_dwell"):
        column = next(group.column(number) for number in range(group.num_columns) if group.column(number).path_in_schema == name)
        content = bytearray(path.read_bytes())
        content[column.dictionary_page_offset + column.total_compressed_size // 3] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(OSError, match="CRC"):
            pq.read_table(damaged, columns=[name.split(".")[0]], page_checksum_verification=True)


@pytest.mark.parametrize(
    "world",
    [World(rows=40_000, users=5_000, seed=seed) for seed in (0, 1, 2)]
    + [World(rows=40_000, users=10, items=10, seed=4), World(rows=40_000, users=100, items=2_000, seed=5, correlation=-1)]
    + [World(rows=40_000, users=5_000, items=500, seed=seed, tastes=tastes) for seed, tastes in ((7, 2), (8, 4), (9, 16))]
    + [World(rows=40_000, users=500, items=100, seed=6, click_rate=0.06, click_auc=0.72, conversion_rate=0.08, conversion_auc=0.7)],
    ids=lambda world: f"seed{world.seed}",
)
def test_rates_and_the_auc_of_the_truth_are_as_asked(tmp_path: Path, world: World) -> None:
    write_world(world, tmp_path)
    click, conversion, dwell_ms, ctr, cvr = numbers(read_log(tmp_path), "click", "conversion", "dwell_ms", "true_ctr", "true_cvr")
    clicked = click == 1
    assert click.mean() == pytest.approx(world.click_rate, rel=0.06)
    assert conversion[clicked].mean() == pytest.approx(world.conversion_rate, rel=0.15)
    assert dwell_ms[clicked].mean() / 1000 == pytest.approx(world.dwell_seconds, rel=0.1)
    assert auc(click, ctr) == pytest.approx(world.click_auc, abs=0.02)
    assert auc(conversion[clicked], cvr[clicked]) == pytest.approx(world.conversion_auc, abs=0.05)
    assert 0.05 < click.mean() < 0.25 and 0.05 < conversion[clicked].mean() < 0.30 and 0.70 < auc(click, ctr) < 0.85


def test_labels_agree_with_the_truth_everywhere(log: pa.Table) -> None:
    click, conversion, dwell_ms, ctr, cvr, dwell = numbers(log, "click", "conversion", "dwell_ms", "true_ctr", "true_cvr", "true_dwell")
    scenario, clicked = log["scenario"].to_numpy(zero_copy_only=False), click == 1
    groups = [np.digitize(ctr, np.quantile(ctr, np.arange(0.1, 1, 0.1))) == tenth for tenth in range(10)]
    groups += [scenario == name for name in np.unique(scenario)]
    spread = np.exp(MIDDLE.dwell_noise**2) - 1
    for rows in groups:
        taken = rows & clicked
        assert deviation(click[rows], ctr[rows], (ctr * (1 - ctr))[rows]) < 4
        assert deviation(conversion[taken], cvr[taken], (cvr * (1 - cvr))[taken]) < 4
        assert deviation(dwell_ms[taken] / 1000, dwell[taken], spread * dwell[taken] ** 2) < 4


def test_dwell_is_lognormal_around_its_mean(log: pa.Table) -> None:
    click, dwell_ms, dwell = numbers(log, "click", "dwell_ms", "true_dwell")
    noise = np.log(dwell_ms[click == 1] / 1000 / dwell[click == 1])
    assert noise.std() == pytest.approx(MIDDLE.dwell_noise, abs=0.02)
    assert noise.mean() == pytest.approx(-(MIDDLE.dwell_noise**2) / 2, abs=0.02)


def test_conversion_and_dwell_need_a_click(log: pa.Table) -> None:
    click, conversion, dwell_ms = numbers(log, "click", "conversion", "dwell_ms")
    assert set(click) == set(conversion) == {0, 1}
    assert (conversion <= click).all()
    assert ((dwell_ms > 0) == (click == 1)).all()


def test_correlation_sets_how_far_conversion_follows_click(tmp_path: Path) -> None:
    measured = []
    for correlation in (-1.0, 0.0, 0.6, 1.0):
        write_world(replace(MIDDLE, rows=20_000, users=2_000, correlation=correlation), tmp_path)
        rows = read_log(tmp_path)
        ctr, cvr, position = numbers(rows, "true_ctr", "true_cvr", "position")
        # One place on one page: nothing but user, item and taste is left.
        here = (rows["scenario"].to_numpy(zero_copy_only=False) == "home") & (position == 1)
        measured.append(np.corrcoef(logit(ctr[here]), logit(cvr[here]))[0, 1])
    assert measured == pytest.approx([-1, 0, 0.6, 1], abs=0.15)
    assert measured[3] > 0.98 and measured[0] < -0.98


def test_position_page_popularity_and_length_matter(log: pa.Table) -> None:
    position, ctr, cvr, dwell, views, length = numbers(log, "position", "true_ctr", "true_cvr", "true_dwell", "past_views", "length_s")
    scenario = log["scenario"].to_numpy(zero_copy_only=False)
    shares = {name: (scenario == name).mean() for name in np.unique(scenario)}
    assert max(shares.values()) > 4 * min(shares.values()) > 0.2
    for name in shares:
        first, later = (scenario == name) & (position == 1), (scenario == name) & (position >= 5)
        assert ctr[first].mean() > 1.3 * ctr[later].mean()
        assert cvr[first].mean() == pytest.approx(cvr[later].mean(), rel=0.1)
    assert np.ptp([ctr[(scenario == name) & (position == 1)].mean() for name in shares]) > 0.03
    assert np.corrcoef(np.log1p(views), logit(ctr))[0, 1] > 0.2
    assert np.corrcoef(np.log(length), np.log(dwell))[0, 1] > 0.3


def test_age_bands_prefer_different_categories(log: pa.Table) -> None:
    score = logit(log["true_ctr"].to_numpy())
    age, category = (np.unique(log[name].to_numpy(zero_copy_only=False), return_inverse=True)[1] for name in ("age_band", "category"))
    shape = (age.max() + 1, category.max() + 1)
    cell = np.ravel_multi_index((age, category), shape)
    counts = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    means = np.bincount(cell, score, minlength=np.prod(shape)).reshape(shape) / np.maximum(counts, 1)
    main = means.mean(axis=1, keepdims=True) + means.mean(axis=0, keepdims=True) - means.mean()
    assert np.sqrt(np.average((means - main) ** 2, weights=counts)) > 0.15 * score.std()


def test_users_and_items_are_popular_by_zipf(log: pa.Table) -> None:
    for name, count in (("user_id", MIDDLE.users), ("item_id", MIDDLE.items)):
        rows = np.sort(np.bincount(log[name].to_numpy(), minlength=count))[::-1]
        assert rows[: count // 10].sum() > 3 * count // 10 * rows.mean()
        assert rows[0] < 0.05 * len(log)
        assert (rows > 0).mean() > 0.95


def test_history_is_the_users_own_of_known_items_and_taste(log: pa.Table) -> None:
    users = log.select(["user_id", "history"]).take(np.unique(log["user_id"].to_numpy(), return_index=True)[1])
    history = users["history"].combine_chunks()
    lengths, items = history.value_lengths().to_numpy(), history.flatten().to_numpy()
    assert (lengths == 0).any() and lengths.max() == 20
    assert items.min() >= 0 and items.max() < MIDDLE.items

    # A row whose category is in the user's history is liked more; in some other user's history, it is not.
    item, category = numbers(log, "item_id")[0], log["category"].to_numpy(zero_copy_only=False)
    number_of = np.unique(category, return_inverse=True)[1]
    category_of = np.zeros(MIDDLE.items, int)
    category_of[item] = number_of
    seen = np.zeros((MIDDLE.users, number_of.max() + 1), bool)
    seen[np.repeat(users["user_id"].to_numpy(), lengths), category_of[items]] = True
    user, score = log["user_id"].to_numpy(), logit(log["true_ctr"].to_numpy())
    score = score - (np.bincount(item, score) / np.maximum(np.bincount(item), 1))[item]
    own, other = seen[user, number_of], seen[(user + 1) % MIDDLE.users, number_of]
    gain_own, gain_other = (score[known].mean() - score[~known].mean() for known in (own, other))
    assert gain_own > 0.1 and abs(gain_other) < 0.5 * gain_own


def test_a_user_has_the_same_attributes_in_every_row(log: pa.Table) -> None:
    _, first, row_of = np.unique(log["user_id"].to_numpy(), return_index=True, return_inverse=True)
    for name in ("age_band", "active_days", "days_registered", "minutes_per_day", "history"):
        column = log[name].combine_chunks()
        assert column.equals(column.take(pa.array(first)).take(pa.array(row_of))), name


def test_the_catalogue_has_every_item_and_agrees_with_the_rows(middle: Path, log: pa.Table) -> None:
    items = pq.read_table(middle / "items.parquet")
    assert items["item_id"].to_pylist() == list(range(MIDDLE.items))
    for name in items.column_names:
        assert items[name].combine_chunks().take(log["item_id"].combine_chunks()).equals(log[name].combine_chunks()), name
    tags = items["tags"].to_pylist()
    assert {len(listed) for listed in tags} == {1, 2, 3, 4, 5}
    assert all(len(set(listed)) == len(listed) for listed in tags)


def test_progress_counts_the_rows_of_the_log(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_world(replace(SMALL, rows=50_000), tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(20_000, 50_000), (40_000, 50_000), (45_000, 50_000), (50_000, 50_000)]


def test_an_interrupted_write_leaves_no_half_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path)
    before = contents(tmp_path)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(replace(SMALL, rows=30_000, seed=9), tmp_path, interrupt)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rows", 9, "a whole number from 10 to"),
        ("rows", 100.0, "a whole number"),
        ("items", True, "a whole number"),
        ("seed", -1, "from 0 to 4294967295"),
        ("correlation", 1.1, "from -1.0 to 1.0"),
        ("correlation", "0.5", "a number"),
        ("click_rate", 0.0, "from 0.01 to 0.5"),
        ("click_auc", 1.0, "from 0.6 to 0.9"),
        ("conversion_rate", float("nan"), "from 0.01 to 0.5"),
        ("item_zipf", 3, "from 0.0 to 2.0"),
        ("tastes", 0, "a whole number from 1 to 16"),
        ("history", 101, "a whole number from 1 to 100"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} = .*{allowed}") as refusal:
        World(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
