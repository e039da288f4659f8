"""Starting from another run: what both models have keeps its weights and its answers, on any plan; everything else is listed."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.command import refused, triptych
from tests.ranks import run_on_ranks
from tests.runs import local_values, stopped_copy
from tests.small import write_log
from tests.starts import (
    ONE_RANK,
    PLACES,
    SIZES,
    TASKS,
    TWO_RANKS,
    WIDTHS,
    State,
    add_task,
    start_at,
    started,
    strangers,
    table,
    table_of,
    train_bases,
    whole,
    with_features,
    write_recipe,
)
from triptych.datasets.fitted import Fitted
from triptych.datasets.ids import mix
from triptych.datasets.schema import InputError
from triptych.launch.build import model_state, optimizer_state
from triptych.launch.checkpoints.start_from import LISTING, checkpoint_to_start_from
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.run_folder import chosen_checkpoint
from triptych.launch.trainer import Trainer


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_log(tmp_path_factory.mktemp("log"))
    (path.parent / "key").write_text("a secret of many bytes\n")
    return path


@pytest.fixture(scope="module")
def bases(log: Path) -> dict[str, dict[str, Any]]:
    found = run_on_ranks(1, train_bases, log)[0]
    return {name: base | {"state": whole([base["parts"]])} for name, base in found.items()}


@pytest.fixture(scope="module")
def one_rank(log: Path, bases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return started(log, ONE_RANK, 1)


@pytest.fixture(scope="module")
def two_ranks(log: Path, bases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return started(log, TWO_RANKS, 2)


def assert_answers_alike(found: dict[str, Any], expected: dict[str, Any], tasks: Sequence[str] = TASKS, rtol: float = 1e-6) -> None:
    for task in tasks:
        np.testing.assert_allclose(found["predictions"][task], expected["predictions"][task], rtol=rtol, atol=rtol / 10, err_msg=task)


def assert_loaded_whole(found: dict[str, Any], base: dict[str, Any]) -> None:
    assert found["state"].keys() == base["state"].keys()
    for name, value in base["state"].items():
        assert torch.equal(found["state"][name], value), name
    listing = found["listing"]
    assert listing["remarks"] == [] and listing["dense"]["partly"] == []
    assert len(listing["tables"]["loaded"]) == listing["tables"]["of"] == 3
    assert len(listing["dense"]["loaded"]) == listing["dense"]["of"] > 15


def test_the_same_recipe_loads_everything(log: Path, bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]]) -> None:
    for name, base in bases.items():
        found = one_rank[f"same_{name}"]
        assert_loaded_whole(found, base)
        assert_answers_alike(found, base, rtol=0)
        assert Path(found["listing"]["checkpoint"]) == chosen_checkpoint(log.parent / "runs" / name)


@pytest.mark.parametrize("plan", ["row_wise", "column_wise"])
def test_two_ranks_start_from_a_run_of_one(bases: dict[str, dict[str, Any]], two_ranks: dict[str, dict[str, Any]], plan: str) -> None:
    for base in ("ple", "attention"):
        assert_loaded_whole(two_ranks[f"{plan}_{base}"], bases[base])
        assert_answers_alike(two_ranks[f"{plan}_{base}"], bases[base])


def test_new_features_change_no_answer_at_first(bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]]) -> None:
    for place, base in itertools.product(PLACES, ("ple", "mmoe", "dynamic")):
        found = one_rank[f"{place}_{base}"]
        assert_answers_alike(found, bases[base])
        remarks = found["listing"]["remarks"]
        for name in PLACES[place]:
            assert f"feature {name}: new; its weights start at 0" in remarks
        assert ("table more: new" in remarks) == (place != "front")
        assert len(found["listing"]["tables"]["loaded"]) == 3
        assert ("lookup.sequence_pooling.attention.list_looked" in " ".join(remarks)) == (place != "middle")
        level = ".levels.0" if base == "ple" or base == "dynamic" else ""
        weight_GIO = found["state"][f"model/model.tower.sharing{level}.experts.linears.0.weight_GIO"]
        assert int((weight_GIO == 0).all(dim=2).all(dim=0).sum()) == sum(WIDTHS[name] for name in PLACES[place])


def test_a_new_task_changes_no_answer_of_the_others(bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]]) -> None:
    for base in ("ple", "cgc", "mmoe", "shared_bottom"):
        found, state = one_rank[f"task_{base}"], bases[base]["state"]
        # PLE's shared gate sees the new task's experts: each has a share of 4.5e-5 at most of a trained one's.
        assert_answers_alike(found, bases[base], rtol=1e-5 if base == "ple" else 1e-6)
        assert found["listing"]["remarks"] == ["task long: new; its weights start as in a new run"]
        bias_T1 = found["state"]["model/model.tower.task_outputs.bias_GO"]
        assert torch.equal(bias_T1[[0, 2, 3]], state["model/model.tower.task_outputs.bias_GO"])
        assert bias_T1[1] > 0.5, "the mean of log(1 + seconds)"
        assert torch.equal(found["state"]["model/objective.heads.3.smearing_2"], state["model/objective.heads.2.smearing_2"])
        assert not found["state"]["model/objective.heads.1.smearing_2"].any()


def test_what_is_gone_or_changed_is_listed(bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]]) -> None:
    remarks = {name: found["listing"]["remarks"] for name, found in one_rank.items()}
    gone = [f"feature {name}: no longer there" for name in ("queries", "page", "length")]
    assert remarks["fewer_features"] == ["table words: no longer there", *gone]
    assert remarks["fewer_tasks"] == ["task cvr: no longer there"]
    assert_answers_alike(one_rank["fewer_tasks"], bases["mmoe"], ["ctr", "dwell"])
    assert remarks["reordered"] == []
    assert_answers_alike(one_rank["reordered"], bases["ple"])
    assert remarks["other_kind"] == ["task cvr: binary then, duration now; its weights start as in a new run"]
    assert_answers_alike(one_rank["other_kind"], bases["mmoe"], ["ctr", "dwell"])
    assert remarks["other_shapes"] == [
        "table words: not loaded, dim 4 then, 8 now",
        *(f"feature {name}: 4 wide then, 8 wide now; its weights start at 0" for name in ("queries", "page")),
        "[model]: tower_layers = [8] then, [12] now",
        "model.tower.task_towers.linears.0: weight_GIO: not loaded, shape [3, 8, 8] then, [3, 8, 12] now",
        "model.tower.task_towers.linears.0: bias_GO: not loaded, shape [3, 8] then, [3, 12] now",
        "model.tower.task_outputs: weight_GIO: not loaded, shape [3, 8, 1] then, [3, 12, 1] now",
    ]
    assert remarks["other_sharing"][0] == "[model]: sharing = ple then, mmoe now"
    assert "model.tower.sharing.gates.linear: weight_GIO, bias_GO: not loaded, not in the checkpoint" in remarks["other_sharing"]
    assert remarks["no_retrieval"] == ["[retrieval]: no longer there"]
    assert_answers_alike(one_rank["no_retrieval"], bases["ple"])
    assert remarks["other_meaning"] == ["feature length: loaded, but changed: transform = log1p then, none now, scale = 1.0 then, 0.01 now"]
    assert remarks["more_experts"] == ["[model]: experts = 2 then, 5 now"]
    assert_answers_alike(one_rank["more_experts"], bases["mmoe"], rtol=1e-4)


def test_tables_whose_rows_change(bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]]) -> None:
    remarks = {name: found["listing"]["remarks"] for name, found in one_rank.items()}
    item, wide_item = (table_of(bases[base]["state"], "item") for base in ("ple", "cgc"))
    assert remarks["index_grown"] == ["table item: 60 rows then, 80 now; the others are initialised"]
    grown = table_of(one_rank["index_grown"]["state"], "item")
    assert torch.equal(grown[:60], item)
    assert grown[60:].std() == pytest.approx(0.01, rel=0.2)
    assert_answers_alike(one_rank["index_grown"], bases["ple"])
    assert remarks["index_shrunk"] == ["table item: 80 rows then, 60 now; the first of them are loaded"]
    assert torch.equal(table_of(one_rank["index_shrunk"]["state"], "item"), wide_item[:60])
    assert_answers_alike(one_rank["index_shrunk"], bases["cgc"])
    assert remarks["hash_rows"] == ["table user: not loaded, 97 rows then, 98 now; a hashed id has another row"]
    assert table_of(one_rank["hash_rows"]["state"], "user").std() == pytest.approx(0.01, rel=0.1), "initial vectors"
    assert remarks["other_ids"] == ['table user: not loaded, ids = "hash" then, "dynamic" now']
    assert remarks["keyless"] == ["table user: not loaded, its key_file is another; ids have other rows"]
    assert remarks["halved"] == ["table item: fp32 then, fp16 now; converted"]
    assert torch.equal(table_of(one_rank["halved"]["state"], "item"), item.half())


def by_value(run: Path, state: State, name: str) -> dict[int, torch.Tensor]:
    """{value: vector}; -1 stands for unseen ones."""
    vocabulary = Fitted.load(run, load_recipe(run / "recipe.toml").data_schema).vocabularies[name]
    vectors = table_of(state, name)
    return {-1: vectors[0], **{int(code): vectors[row] for row, code in enumerate(vocabulary.code_V, 1)}}


@pytest.mark.parametrize("plan", ["data_parallel", "row_wise", "column_wise"])
def test_a_vocabulary_is_mapped_by_value(
    log: Path, bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]], two_ranks: dict[str, dict[str, Any]], plan: str
) -> None:
    name, runs = f"vocabulary_{plan}", log.parent / "runs"
    found = (one_rank | two_ranks)[name]
    old, new = by_value(runs / "vocabulary", bases["vocabulary"]["state"], "user"), by_value(runs / name, found["state"], "user")
    both, added = new.keys() & old.keys(), new.keys() - old.keys()
    assert len(both) > 50 and len(added) > 20 and old.keys() - new.keys()
    assert all(torch.equal(new[value], old[value]) for value in both)
    assert all(torch.equal(new[value], old[-1]) for value in added)
    tables, features = found["listing"]["remarks"]
    assert tables == f"table user: {len(old) - 1} values then, {len(new) - 1} now; {len(both) - 1} are in both; new ones begin with row 0"
    assert features.startswith("feature length: loaded, but scaled otherwise: mean ")


Id = tuple[int, int, tuple[float, ...]]


def by_id(state: State, name: str) -> dict[int, Id]:
    """{id: (count, step last seen, vector)}; -1 stands for ids without a row."""
    code, count, last = (state[f"ids/{name}/{array}"].tolist() for array in ("id", "count", "last"))
    vectors = [tuple(vector) for vector in table_of(state, name).tolist()]
    taken = {code[slot]: (count[slot], last[slot], vectors[slot + 1]) for slot in range(len(code)) if count[slot]}
    return {-1: (0, 0, vectors[0]), **taken}


def waiting(state: State, name: str) -> dict[int, tuple[int, int]]:
    """{id: (count, step last seen)} of those that wait for a row."""
    code, count, last = (state[f"ids/{name}/waiting_{array}"].tolist() for array in ("id", "count", "last"))
    return {code[slot]: (count[slot], last[slot]) for slot in range(len(code)) if count[slot]}


def kept(ids: Mapping[int, tuple[Any, ...]], num_sets: int, ways: int) -> dict[int, tuple[Any, ...]]:
    """The most frequent ids of each set, then the lowest: one by one."""
    sets = defaultdict(list)
    for code in ids.keys() - {-1}:
        sets[int(mix(np.array([code]))[0]) % num_sets].append(code)
    best = [code for codes in sets.values() for code in sorted(codes, key=lambda code: (-ids[code][0], code))[:ways]]
    return {code: ids[code] for code in (*(ids.keys() & {-1}), *best)}


@pytest.mark.parametrize("plan", ["data_parallel", "row_wise", "table_wise"])
def test_dynamic_ids_keep_their_vectors_in_tables_of_other_sizes(
    bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]], two_ranks: dict[str, dict[str, Any]], plan: str
) -> None:
    before = bases["dynamic"]["state"]
    for size, (rows, num_sets, ways) in SIZES.items():
        found = (one_rank | two_ranks)[f"dynamic_{size}_{plan}"]
        state = found["state"]
        for name in ("user", "words"):
            moves = (size, name) not in (("same", "user"), ("smaller", "words"))
            old, new = by_id(before, name), by_id(state, name)
            assert len(old) > 20
            assert new == (kept(old, num_sets, ways) if moves else old), (size, name)
        assert waiting(state, "words") == kept(waiting(before, "words"), num_sets, ways)
        assert torch.equal(state["ids/step"], before["ids/step"]) and state["ids/step"] > 0
        num_old, num_new = (len(by_id(s, "user")) - 1 for s in (before, state))
        if size != "same":
            assert f"table user: 193 rows then, {rows} now; {num_new} of {num_old} ids have a row" in found["listing"]["remarks"]
        if size == "grown":
            assert num_new == num_old > 150
            assert_answers_alike(found, bases["dynamic"])


def test_a_table_may_move_to_where_single_ids_are_looked_up(bases: dict[str, dict[str, Any]], one_rank: dict[str, dict[str, Any]]) -> None:
    """Attention takes a table from the bags to the sequences, where its weight has another name."""
    for name, base in (("to_sequence", "ple"), ("to_bags", "attention")):
        assert torch.equal(table_of(one_rank[name]["state"], "item"), table_of(bases[base]["state"], "item"))
        assert "feature seen: loaded, but changed: pooling = " in one_rank[name]["listing"]["remarks"][0]


def fit_and_resume(ranks: Ranks, recipe: Path, run: Path, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """States at the end of a run, and of one that was stopped when the run it began with was gone."""
    states = []
    for resume in (False, True):
        if resume:
            run = stopped_copy(run, 6)
            shutil.rmtree(base)
            (run / LISTING).unlink()
        trainer = Trainer(load_recipe(recipe), run, ranks, resume=resume)
        trainer.fit()
        states.append(local_values(model_state(trainer.built) | optimizer_state(trainer.built)))
    assert not (run / LISTING).exists()
    return states[0], states[1]


def test_training_goes_on_from_there_and_resumes_its_own(log: Path, bases: dict[str, dict[str, Any]]) -> None:
    base = log.parent / "runs" / "gone"
    shutil.copytree(log.parent / "runs" / "dynamic", base)

    def edit(values: dict[str, Any]) -> None:
        values["checkpoint"] |= {"every_steps": 3, "keep": 1000}
        with_features(PLACES["middle"])(values)
        table("user", rows=300)(values)
        add_task(values)

    recipe = write_recipe(log, "onward", "gone", edit)
    undisturbed, resumed = run_on_ranks(1, fit_and_resume, recipe, log.parent / "onward", base)[0]
    assert undisturbed.keys() == resumed.keys()
    for name, parts in undisturbed.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(parts, resumed[name], strict=True)), name
    result = json.loads((log.parent / "onward" / "result.json").read_text())
    assert result["tasks"].keys() == {*TASKS, "long"} and result["step"] == 11


def refuse_all(ranks: Ranks, recipes: dict[str, Path]) -> dict[str, str]:
    """What is said to each recipe."""
    messages = {}
    for name, recipe in recipes.items():
        try:
            Trainer(load_recipe(recipe), recipe.parent / "runs" / f"refused_{name}", ranks, resume=False)
            messages[name] = "accepted"
        except InputError as error:
            messages[name] = str(error)
    return messages


def test_what_cannot_be_started_from_is_refused(log: Path, bases: dict[str, dict[str, Any]]) -> None:
    runs = log.parent / "runs"
    for name in ("damaged", "retold", "unfitted", "bare", "empty"):
        shutil.copytree(runs / "vocabulary", runs / name)
    folder = chosen_checkpoint(runs / "damaged")
    content = bytearray((folder / "rank_0.0.safetensors").read_bytes())
    content[-9] ^= 1
    (folder / "rank_0.0.safetensors").write_bytes(content)
    retold = runs / "retold" / "recipe.toml"
    retold.write_text(retold.read_text().replace("rows = 120", "rows = 121"))
    statistics = runs / "unfitted" / "fitted" / "statistics.json"
    content = json.loads(statistics.read_text())
    content["standard"]["length"]["mean"][0] += 1
    statistics.write_text(json.dumps(content))
    (runs / "bare" / "recipe.toml").unlink()
    shutil.rmtree(runs / "empty" / "checkpoints")
    starts = {name: runs / name for name in ("damaged", "retold", "unfitted", "bare", "empty", "nowhere")}
    starts["bare_step"] = chosen_checkpoint(runs / "bare")
    recipes = {name: write_recipe(log, f"refused_{name}", "vocabulary", start_at(start)) for name, start in starts.items()}
    recipes["strangers"] = write_recipe(log, "refused_strangers", "ple", strangers)
    messages = run_on_ranks(1, refuse_all, recipes)[0]
    assert messages["damaged"] == f"{folder / 'rank_0.0.safetensors'}: damaged (size or SHA-256 differs from the manifest)"
    assert "recipe.toml is not what step_11 was trained with ('tables.user.rows' differs); restore it" in messages["retold"]
    assert "fitted is not what step_11 was trained with" in messages["unfitted"]
    for name in ("bare", "nowhere"):
        assert f"checkpoint.start_from = '{runs / name}': no checkpoint there; give a run folder" in messages[name]
    assert messages["bare_step"].startswith(f"{runs / 'bare' / 'recipe.toml'}: not there; to start from step_11")
    assert messages["empty"] == f"{runs / 'empty'}: the run has no checkpoint yet"
    assert "has no table, feature or task of this recipe; nothing of it can be loaded" in messages["strangers"]


def test_a_run_or_one_of_its_checkpoints_is_named(log: Path, bases: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chosen_checkpoint(log.parent / "runs" / "ple")
    monkeypatch.chdir(log.parent)
    for given in ("runs/ple", f"runs/ple/checkpoints/{folder.name}"):
        recipe = load_recipe(log, [f"checkpoint.start_from={given}"])
        assert recipe.checkpoint.start_from == str(log.parent / given)
        assert checkpoint_to_start_from(recipe) == folder
    assert checkpoint_to_start_from(load_recipe(log)) is None


def test_the_command_line_refuses_in_one_line(log: Path, tmp_path: Path) -> None:
    done = triptych("train", "--recipe", log, "--run", tmp_path / "run", "--set", f"checkpoint.start_from={tmp_path / 'nothing'}")
    assert f"checkpoint.start_from = '{tmp_path / 'nothing'}': no checkpoint there" in refused(done)
