"""Each kind of leak is found, with its reason, and harmless columns are not; measures against naive computations."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.profile.measures import Key, categories, correlation, out_of_fold_auc, quantile_bins, rank_auc, rank_correlation
from triptych.datasets.profile.profile import profile_files
from triptych.datasets.profile.roles import Sample, find_roles
from triptych.datasets.profile.suspects import find_suspects

some_examples = settings(deadline=None, max_examples=60)
ROWS, START_MS = 6_000, 1_700_000_000_000


def naive_auc(score, label):
    positive, negative = score[label == 1][:, None], score[label == 0][None, :]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


class TestAuc:
    @some_examples
    @given(st.lists(st.tuples(st.sampled_from([-2.5, -1.0, 0.0, 1.0, np.nan, 3.0]), st.integers(0, 1)), min_size=2, max_size=40))
    def test_of_a_rank_is_the_share_of_pairs_in_order(self, rows):
        score, label = np.array(rows, float).T
        if label.min() == label.max():
            return
        exact = naive_auc(np.where(np.isnan(score), 9.0, score), label)
        assert rank_auc(categories(score), label) == pytest.approx(max(exact, 1 - exact))

    @some_examples
    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=40))
    def test_out_of_fold_is_that_of_the_other_folds_means(self, rows):
        value, label = np.array(rows).T
        if label.min() == label.max():
            return
        fold, score = np.arange(len(label)) % 5, np.zeros(len(label))
        for i in range(len(label)):
            others = label[(value == value[i]) & (fold != fold[i])]
            score[i] = (others.sum() + 10 * label.mean()) / (len(others) + 10)
        assert out_of_fold_auc(categories(value), label.astype(float)) == pytest.approx(naive_auc(score.round(12), label))

    def test_a_unique_id_predicts_nothing(self):
        rng = np.random.default_rng(0)
        label = (rng.random(2_000) < 0.3).astype(float)
        assert out_of_fold_auc(np.arange(2_000), label) == 0.5

    def test_bins_are_about_equally_full_and_keep_nan_apart(self):
        numbers = np.append(np.random.default_rng(0).lognormal(size=10_000), [np.nan] * 50)
        bins = quantile_bins(numbers)
        assert len(set(bins[-50:])) == 1 and bins[-1] not in bins[:-50]
        counts = np.bincount(bins[:-50])
        assert len(counts) == 100 and counts.min() >= 95 and counts.max() <= 105


class TestKey:
    def test_disagreement_of_attributes_noise_and_a_mixture(self):
        rng = np.random.default_rng(0)
        user = rng.integers(0, 500, ROWS)
        attribute, noise = rng.integers(0, 4, 500)[user], rng.integers(0, 4, ROWS)
        half = np.where(rng.random(ROWS) < 0.5, attribute, noise)
        key = Key(user)
        assert key.disagreement(attribute) == 0.0
        assert key.disagreement(noise) == pytest.approx(1.0, abs=0.05)
        assert 0.6 < key.disagreement(half) < 0.9

    def test_a_rare_value_is_no_attribute_just_because_most_rows_agree(self):
        rng = np.random.default_rng(0)
        user, rare = rng.integers(0, 500, 20_000), (rng.random(20_000) < 0.01).astype(int)
        assert Key(user).disagreement(rare) == pytest.approx(1.0, abs=0.25)

    def test_too_few_pairs_tell_nothing(self):
        assert Key(np.arange(1_000)).disagreement(np.arange(1_000) % 3) is None
        assert Key(np.zeros(1_000, int)).disagreement(np.zeros(1_000, int)) is None


class TestCorrelation:
    def test_of_ranks_is_that_of_any_rising_function(self):
        x = np.random.default_rng(0).normal(size=500)
        assert rank_correlation(x, np.exp(3 * x)) == pytest.approx(1.0)
        assert rank_correlation(np.append(x, np.nan), np.append(-x, 0.0)) == pytest.approx(-1.0)

    def test_of_numbers_is_pearsons(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 500))
        assert correlation(a, a + b) == pytest.approx(np.corrcoef(a, a + b)[0, 1])
        assert correlation(a, np.ones(500)) == 0.0


def log(seed=0):
    """A log without leaks: users, items, a click that follows both, a purchase among the clicks, a dwell."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 300, ROWS), rng.integers(0, 80, ROWS)
    taste, appeal = rng.normal(size=300), rng.normal(size=80)
    click = (rng.random(ROWS) < 1 / (1 + np.exp(1 - taste[user] - appeal[item]))).astype(np.int64)
    return {
        "user_id": user,
        "item_id": item,
        "time_ms": START_MS + np.arange(ROWS) * 1_000,
        "age": rng.integers(18, 80, 300)[user],
        "taste": taste[user].round(3),
        "category": pa.array([f"c{c}" for c in (appeal[item] * 3).astype(int)]),
        "clicks_last_week": rng.poisson(3, ROWS),
        "page": pa.array(["home", "feed", "search"]).take(pa.array(rng.integers(0, 3, ROWS))),
        "click": click,
        "purchase": click * (rng.random(ROWS) < 0.2),
        "dwell_ms": (click * rng.lognormal(9, 1, ROWS)).astype(np.int64),
    }


def suspects(tmp_path, **columns):
    pq.write_table(pa.table({**log(), **columns}), tmp_path / "log.parquet", row_group_size=1_000)
    profile = profile_files([str(tmp_path / "log.parquet")])
    sample = Sample.of(profile)
    return {s.column: s for s in find_suspects(profile, find_roles(profile, sample), sample)}


class TestSuspects:
    def test_a_harmless_log_has_none(self, tmp_path):
        assert suspects(tmp_path) == {}

    @pytest.mark.parametrize("name", ["q1", "q2", "q3", "q4", "q5"])
    def test_a_column_that_alone_predicts_a_label(self, tmp_path, name):
        """By its rank, rising or falling; as a category; as text; by how far it is from the middle."""
        rng, click = np.random.default_rng(1), log()["click"]
        noise = rng.normal(size=ROWS)
        leak = {
            "q1": click * 4 + noise,
            "q2": -click * 4 + noise,
            "q3": np.array([[3, 9, 4], [7, 1, 5]])[click, rng.integers(0, 3, ROWS)],
            "q4": pa.array(np.array([["u", "v"], ["w", "x"]])[click, rng.integers(0, 2, ROWS)]),
            "q5": (click * 5 + np.abs(noise)) * rng.choice([-1, 1], ROWS),
        }[name]
        found = suspects(tmp_path, **{name: leak})
        assert list(found) == [name] and found[name].kind == "leak"
        assert found[name].reason.startswith("alone predicts click with AUC ")
        assert float(found[name].reason.split()[-1]) > 0.95

    def test_a_column_that_predicts_well_but_not_too_well(self, tmp_path):
        noise = np.random.default_rng(1).normal(size=ROWS)
        assert suspects(tmp_path, q=log()["click"] * 1.5 + noise) == {}

    def test_a_leak_of_a_rare_label_alone(self, tmp_path):
        rng = np.random.default_rng(1)
        rare = (rng.random(ROWS) < 0.01).astype(int)
        found = suspects(tmp_path, follow=rare, q=rare * 4 + rng.normal(size=ROWS))
        assert found["q"].reason.startswith("alone predicts follow with AUC")

    @pytest.mark.parametrize("mapping", [[0, 1], [1, 0], [5, 9]])
    def test_a_copy_of_a_label_whatever_its_values(self, tmp_path, mapping):
        assert suspects(tmp_path, q=np.array(mapping)[log()["click"]])["q"].reason == "is a copy of the label click"

    def test_a_leak_and_a_copy_of_a_label_with_nulls(self, tmp_path):
        rng = np.random.default_rng(1)
        follow, hole = rng.integers(0, 2, ROWS), np.arange(ROWS) % 3 > 0
        found = suspects(
            tmp_path,
            follow=pa.array(follow, mask=hole),
            q=follow * 4 + rng.normal(size=ROWS),
            r=pa.array(np.array([5, 9])[follow], mask=hole),
            basket=follow * ~hole * (rng.random(ROWS) < 0.2) * rng.integers(5, 90, ROWS),
        )
        assert list(found) == ["q", "r", "basket"]
        assert found["q"].reason.startswith("alone predicts follow with AUC 0.99")
        assert found["r"].reason == "is a copy of the label follow"
        assert found["basket"].reason.startswith("is set only where follow is 1")

    def test_a_label_twice(self, tmp_path):
        found = suspects(tmp_path, label_click=log()["click"])
        assert found["label_click"].reason == "is a copy of the label click"
        assert "click" not in found

    def test_a_second_duration(self, tmp_path):
        found = suspects(tmp_path, seconds_there=log()["dwell_ms"] / 1000 + 0.25)
        assert found["seconds_there"].kind == "leak"

    def test_what_is_set_only_after_the_fact(self, tmp_path):
        """Its AUC alone is near chance: few purchases have one."""
        bought = log()["purchase"] * (np.random.default_rng(1).random(ROWS) < 0.2)
        amount = bought * np.random.default_rng(1).integers(5, 90, ROWS)
        found = suspects(tmp_path, basket=amount)["basket"]
        assert found.kind == "outcome" and found.reason.startswith("is set only where click is 1")

    @pytest.mark.parametrize("name", ["true_ctr", "predicted_value", "isPurchased", "watch_ratio", "dwell_rank"])
    def test_what_sounds_like_an_outcome_and_changes_from_row_to_row(self, tmp_path, name):
        assert suspects(tmp_path, **{name: np.random.default_rng(1).random(ROWS)})[name].kind == "outcome"

    def test_the_same_name_is_harmless_for_an_attribute(self, tmp_path):
        rate = np.random.default_rng(1).random(80).round(4)
        assert suspects(tmp_path, video_completion=rate[log()["item_id"]], purchase_total=np.arange(300)[log()["user_id"]] % 70) == {}

    def test_constant_unique_and_moving_columns(self, tmp_path):
        rng = np.random.default_rng(1)
        found = suspects(
            tmp_path,
            version=np.ones(ROWS, int),
            nothing=pa.nulls(ROWS),
            empty=pa.array([[]] * ROWS, pa.list_(pa.int64())),
            request=rng.permutation(ROWS),
            session_id=pa.array([f"s{s}" for s in np.arange(ROWS) * 2 // 3]),
            day=20240101 + np.arange(ROWS) * 9 // ROWS,
            logged_at=START_MS + np.arange(ROWS) * 1_000 + 7,
        )
        kinds = {name: suspect.kind for name, suspect in found.items()}
        assert kinds == {
            **dict.fromkeys(["version", "nothing", "empty"], "constant"),
            **dict.fromkeys(["request", "session_id"], "unique"),
            **dict.fromkeys(["day", "logged_at"], "time"),
        }

    def test_what_no_feature_can_read(self, tmp_path):
        ragged = [[1.5] * (1 + i % 2) for i in range(ROWS)]
        found = suspects(
            tmp_path,
            holed=np.where(np.arange(ROWS) % 7, 1.5, np.nan),
            ragged=ragged,
            gaps=[[1, None]] * ROWS,
            bag=[{"a": 1}] * ROWS,
            huge=np.array([2**63 + i % 5 for i in range(ROWS)], np.uint64),
        )
        assert {name: suspect.kind for name, suspect in found.items()} == dict.fromkeys(
            ["holed", "ragged", "gaps", "bag", "huge"], "unreadable"
        )
        assert found["holed"].reason == "holds 858 NaN and 0 infinite values: make them nulls"
        assert "lists of 1 to 2 numbers" in found["ragged"].reason
