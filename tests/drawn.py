"""What property tests draw: sections of a recipe, small enough to be compared with loops."""

from __future__ import annotations

from hypothesis import strategies as st

from triptych.mmoe.model import ModelSection

small = st.integers(1, 4)
sections = st.builds(
    ModelSection,
    sharing=st.sampled_from(["shared_bottom", "mmoe", "cgc", "ple"]),
    experts=small,
    task_experts=st.integers(1, 3),
    levels=st.integers(1, 3),
    expert_layers=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    tower_layers=st.lists(st.integers(1, 6), max_size=2).map(tuple),
)
