"""What names of columns say: words, ids, durations, outcomes."""

import pytest

from triptych.datasets.profile import names
from triptych.datasets.profile.features import safe_name


class TestNames:
    @pytest.mark.parametrize(
        "name, expected",
        [
            ("isClick_30d", ["is", "click", "30d"]),
            ("onehot_feat12", ["onehot", "feat", "12"]),
            ("userID", ["user", "id"]),
            ("userid", ["user", "id"]),
            ("paid", ["paid"]),
            ("", []),
        ],
    )
    def test_words(self, name, expected):
        assert names.words(name) == expected

    def test_entities_durations_and_units(self):
        assert names.entity_score("userId", "user") < names.entity_score("device_id", "user")
        assert names.entity_score("user_age", "user") is None and names.entity_score("video_duration", "item") is None
        assert names.is_duration("play_time_ms") and names.is_duration("dwell") and not names.is_duration("duration_ms")
        assert not names.is_duration("true_dwell") and not names.is_duration("avg_watch_time")
        assert [names.seconds_in_unit(n) for n in ("a_ms", "a_seconds", "minutes", "a")] == [0.001, 1.0, 60.0, None]

    @pytest.mark.parametrize("name", ["author_id", "onehot_feat7", "C12", "101", "feature_3", "f3", "categorical_5", "movieid"])
    def test_codes(self, name):
        assert names.is_id(name)

    @pytest.mark.parametrize("name", ["price", "I5", "numerical_3", "paid", "age", "field", "duration_ms"])
    def test_amounts(self, name):
        assert not names.is_id(name)

    def test_outcomes_but_not_histories(self):
        assert names.outcome_words("hs_college", ["label_college"]) == {"college"}
        assert names.outcome_words("clicks_last_week", ["click"]) == set()
        assert names.outcome_words("view_angle", ["long_view"]) == set()

    def test_safe_names_are_unique(self):
        taken: set[str] = set()
        assert [safe_name(name, taken) for name in ("a.b", "a/b", "a_b", "@")] == ["a_b", "a_b_", "a_b__", "column"]
