"""A wrong recipe ends in one line that names the file, the key and what is allowed; a right one survives being saved and read back."""

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.schema import InputError
from triptych.launch import config
from triptych.launch.config import apply_override, load_recipe

RECIPE = """
name = "rich"
tables = [
  {name = "user", rows = 97, dim = 8, init = 0.02, sharding = "row_wise", key_file = "/secret"},
  {name = "item", rows = 60, dim = 16, ids = "index"},
  {name = "words", rows = 50, dim = 4, ids = "vocabulary", min_count = 2},
]
features = [
  {name = "user", kind = "id", table = "user", side = "user"},
  {name = "item", kind = "id", table = "item", side = "item", default = 0},
  {name = "seen", kind = "ids", table = "item", side = "user", pooling = "sum", max_length = 5},
  {name = "age", column = "age_years", kind = "id", table = "words", side = "user", buckets = [18, 30.5]},
  {name = "page", kind = "id", table = "words", default = "none"},
  {name = "length", kind = "dense", transform = "log1p", scale = 0.5, default = 1.5, side = "item"},
  {name = "pixels", kind = "vector", size = 3, side = "item", transform = "standard"},
]
tasks = [
  {name = "ctr", kind = "binary", label = "click", nulls = "mask"},
  {name = "cvr", kind = "binary", label = "buy", given = "ctr", estimator = "esmm", weight = 2},
  {name = "dwell", kind = "duration", label = "ms", given = "ctr", scale = 0.001, cap = 60, delta = 0.5, predict = "median"},
]
model = {sharing = "ple", experts = 3, task_experts = 1, levels = 3, expert_layers = [16, 8], tower_layers = [], dropout = 0.1}
retrieval = {user = "user", item = "item", dim = 8, layers = [8], task = "cvr", weight = 0.3}
balance = {method = "fixed"}
checkpoint = {every_steps = 10, keep = 1}
[data]
root = "/logs"
train = "train.parquet"
valid = "valid"
test = "test-*.parquet"
items = "items.parquet"
scenario = "page"
group = "user"
time = "time_ms"
weight = "w"
batch_size = 64
shuffle = false
shuffle_row_groups = 3
memory_mb = 64
workers = 3
prefetch = 2
on_bad_file = "skip"
[train]
epochs = 2
lr = 0.01
weight_decay = 0.1
embedding_lr = 0.3
embedding_optimizer = "adagrad"
precision = "bf16"
seed = 7
log_every = 5
evaluate_every = 100
patience = 2
monitor = "dwell.mae"
"""
MINIMAL = """
tables = [{name = "item", rows = 60, dim = 16}]
features = [{name = "item", kind = "id", table = "item"}]
tasks = [{name = "ctr", kind = "binary", label = "click"}]
[data]
root = "/logs"
"""
TOP_KEYS = "name, data, tables, features, tasks, model, retrieval, balance, train, checkpoint"
FEATURE_KEYS = "name, column, kind, table, side, pooling, max_length, target, positions, transform, scale, buckets, default, size"
TABLE_KEYS = "name, rows, ids, min_count, eviction, key_file, dim, init, dtype, lr, weight_decay, sharding, memory, cache"
TASK_KEYS = "name, kind, label, given, scale, cap, nulls, weight, estimator, loss, delta, predict"

OVERRIDE_ERRORS = {
    "modle.experts=2": f"unknown key 'modle' (did you mean 'model'?); allowed: {TOP_KEYS}",
    "balance.xyz=2": "unknown key 'balance.xyz'; allowed: method",
    "retrieval.dims=2": "unknown key 'retrieval.dims' (did you mean 'dim'?); allowed: user, item, dim, layers, task, weight",
    "features.seen.max_len=2": f"unknown key 'features.seen.max_len' (did you mean 'max_length'?); allowed: {FEATURE_KEYS}",
    "tasks.cvr.wieght=2": f"unknown key 'tasks.cvr.wieght' (did you mean 'weight'?); allowed: {TASK_KEYS}",
    "tables.user.row=2": f"unknown key 'tables.user.row' (did you mean 'rows'?); allowed: {TABLE_KEYS}",
    "train.lr=fast": "train.lr = 'fast': input should be a valid number, unable to parse string as a number",
    "train.epochs=1.5": "train.epochs = 1.5: input should be a valid integer, got a number with a fractional part",
    "data.group=7": "data.group = 7: input should be a valid string",
    "train=7": "train = 7: input should be a valid dictionary or instance of TrainSection",
    "model.expert_layers=[8, 0.5]": "model.expert_layers.1 = 0.5: input should be a valid integer, got a number with a fractional part",
    "features.page.default=[1]": "features.page.default = [1]: input should be a valid integer",
    "features.age.buckets=[1, 'x']": "features.age.buckets.1 = 'x': input should be a valid number, unable to parse string as a number",
    "train.precision=fp16": "train.precision = 'fp16': input should be 'fp32' or 'bf16'",
    "tasks.ctr.kind=clicks": "tasks.ctr.kind = 'clicks': input should be 'binary' or 'duration'",
    "model.sharing=moe": "model.sharing = 'moe': input should be 'shared_bottom', 'mmoe', 'cgc' or 'ple'",
    "data.on_bad_file=ignore": "data.on_bad_file = 'ignore': input should be 'fail' or 'skip'",
    "data.workers=-1": "data.workers = -1: input should be greater than or equal to 0",
    "data.memory_mb=0": "data.memory_mb = 0: input should be greater than 0",
    "tasks.ctr.nulls=drop": "tasks.ctr.nulls = 'drop': input should be 'fail' or 'mask'",
    "tables.item.ids=dynamo": "tables.item.ids = 'dynamo': input should be 'hash', 'index', 'vocabulary' or 'dynamic'",
    "tables.item.min_count=2": "table 'item': min_count goes with ids = 'vocabulary' or 'dynamic'",
    "tables.item.eviction=lru": "table 'item': eviction goes with ids = 'dynamic'",
    "tables.item.weight_decay=0.1": "table 'item': weight decay goes with train.embedding_optimizer = 'rowwise_adagrad' or 'adam'",
    "tables.user.cache=0.5": "table 'user': cache goes with memory = \"uvm_caching\"",
    "train.final_lr=0.5": "train: final_lr goes with schedule = 'linear' or 'cosine'",
    "features.seen.positions=true": "feature 'seen': positions goes with pooling = 'attention'",
    "features.seen.target=item": "feature 'seen': target goes with pooling = 'attention'",
    "tables.words.key_file=secret": "table 'words': key_file goes with ids = 'hash'",
    "features.item.transform=standard": "feature 'item' of kind 'id': key 'transform' goes with kind 'dense' or 'vector'",
    "data.batch_size=0": "data.batch_size = 0: input should be greater than 0",
    "model.dropout=1.0": "model.dropout = 1.0: input should be less than 1",
    "tables.user.dim=30": "tables.user.dim: must be a multiple of 4",
    "tasks.cvr.given=ctrr": "task 'cvr': given = 'ctrr' is no task (did you mean 'ctr'?)",
    "tasks.cvr.given=cvr": "task 'cvr': given goes in a circle",
    "tasks.ctr.given=cvr": "task 'ctr': given goes in a circle",
    "tasks.cvr.given=dwell": "task 'cvr': given = 'dwell' must be a binary task",
    "tasks.ctr.estimator=esmm": "task 'ctr': estimator 'esmm' needs kind 'binary' and a 'given' task",
    "tasks.dwell.estimator=esmm": "task 'dwell': estimator 'esmm' needs kind 'binary' and a 'given' task",
    "tasks.ctr.delta=2": "task 'ctr' of kind 'binary': key 'delta' goes with kind 'duration'",
    "tasks.ctr.scale=2": "task 'ctr' of kind 'binary': key 'scale' goes with kind 'duration'",
    "tasks.ctr.name=cvr": "two tasks are named 'cvr'",
    "tasks=[]": "the recipe has no [[tasks]]",
    "features.page.table=word": "feature 'page': no table 'word' (did you mean 'words'?)",
    "features.age.column=click": "feature 'age' reads 'click', which is a task's label: it would leak",
    "tables.words.name=unused": "feature 'age': no table 'words'",
    "features.age.name=page": "two features are named 'page'",
    "tables.user.name=item": "two tables are named 'item'",
    "features.user.pooling=sum": "feature 'user' of kind 'id': key 'pooling' goes with kind 'ids'",
    "features.length.buckets=[1.0]": "feature 'length' of kind 'dense': key 'buckets' goes with kind 'id'",
    "features.length.table=words": "feature 'length' of kind 'dense': key 'table' goes with kind 'id' or 'ids'",
    "features.item.scale=2": "feature 'item' of kind 'id': key 'scale' goes with kind 'dense' or 'vector'",
    "train.lr=inf": "train.lr = inf: input should be a finite number",
    "features.age.buckets=[2, 1]": "feature 'age': buckets must ascend",
    "features.age.default=young": "feature 'age': default must be a number",
    "features=[]": "the recipe has no feature of kind 'id' or 'ids'; without tables there is nothing to shard",
    "train.monitor=dwel.mae": "train.monitor = 'dwel.mae': no task 'dwel' (did you mean 'dwell'?)",
    "train.monitor=dwell.auc": "train.monitor = 'dwell.auc': metric must be one of mae, rmse, xauc",
    "train.monitor=ctr": "train.monitor = 'ctr': no task ''",
    "retrieval.user=usr": "retrieval.user = 'usr' is no feature (did you mean 'user'?)",
    "retrieval.item=user": "retrieval.item = 'user' must be a feature of kind 'id' and side 'item'",
    "retrieval.user=seen": "retrieval.user = 'seen' must be a feature of kind 'id' and side 'user'",
    "retrieval.user=age": "retrieval.user = 'age' must be a feature of kind 'id' and side 'user'",
    "retrieval.task=dwell": "retrieval.task must be one of the binary tasks: ctr, cvr",
}
MONITOR = {'monitor = "dwell.mae"': 'monitor = "ctr.gauc"'}
TEXT_ERRORS = [
    ({RECIPE: ""}, "missing key 'data'"),
    ({"rows = 97, ": ""}, "missing key 'tables.user.rows'"),
    ({'root = "/logs"': ""}, "missing key 'data.root'"),
    ({'{name = "user", kind': "{kind"}, "missing key 'features.0.name'"),
    ({'{user = "user", item': "{item"}, "missing key 'retrieval.user'"),
    ({', table = "user"': ""}, "feature 'user' of kind 'id' needs a table"),
    (
        {'pooling = "sum"': 'pooling = "attention", target = "user"'},
        "feature 'seen': target = 'user' is no feature of kind 'id' of table 'item'",
    ),
    (
        {'"item", side = "user", pooling = "sum"': '"words", side = "user", pooling = "attention"'},
        "feature 'seen': pooling = 'attention' needs a target: table 'words' has no feature of kind 'id' and side 'item'",
    ),
    ({'pooling = "sum", max_length = 5': 'pooling = "attention", positions = true'}, "feature 'seen': positions needs max_length"),
    (
        {'"row_wise"': '"data_parallel", memory = "uvm"'},
        "table 'user': memory = \"uvm\" goes with tables that are sharded, not with data_parallel",
    ),
    ({", size = 3": ""}, "feature 'pixels' of kind 'vector' needs a size"),
    ({', given = "ctr", estimator': ", estimator"}, "task 'cvr': estimator 'esmm' needs kind 'binary' and a 'given' task"),
    ({"]\nfeatures": '{name = "spare", rows = 5, dim = 4}]\nfeatures'}, "table 'spare' is used by no feature"),
    ({"model =": "modle ="}, f"unknown key 'modle' (did you mean 'model'?); allowed: {TOP_KEYS}"),
    (MONITOR | {'group = "user"': ""}, "train.monitor = 'ctr.gauc' needs data.group"),
]


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(source, overrides=()):
    with pytest.raises(InputError) as caught:
        load_recipe(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWrongRecipes:
    @pytest.mark.parametrize("override, message", OVERRIDE_ERRORS.items(), ids=str)
    def test_wrong_value(self, tmp_path, override, message):
        path = write(tmp_path, RECIPE)
        assert error_of(path, [override]) == f"{path}: {message}"

    @pytest.mark.parametrize("edits, message", TEXT_ERRORS)
    def test_wrong_text(self, tmp_path, edits, message):
        text = RECIPE
        for old, new in edits.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = write(tmp_path, text)
        assert error_of(path) == f"{path}: {message}"

    def test_no_binary_task_to_retrieve_by(self, tmp_path):
        text = MINIMAL.replace("features = [{", 'features = [{name = "user", kind = "id", table = "item", side = "user"}, {side = "item", ')
        path = write(tmp_path, text.replace("binary", "duration") + '[retrieval]\nuser = "user"\nitem = "item"')
        assert error_of(path) == f"{path}: retrieval.task must be one of the binary tasks: there is none"

    @pytest.mark.parametrize("content", [b"[data\n", b"a = 1\na = 2\n", b"\xff"])
    def test_no_toml(self, tmp_path, content):
        path = tmp_path / "bad.toml"
        path.write_bytes(content)
        assert error_of(path).startswith(f"{path}: not valid TOML: ")

    def test_a_bundled_name_holds_even_beside_a_folder_of_that_name_but_not_a_file(self, tmp_path, monkeypatch):
        bundled, here = tmp_path / "bundled", tmp_path / "here"
        bundled.mkdir()
        (bundled / "demo.toml").write_text(MINIMAL + "batch_size = 11\n")
        (here / "demo").mkdir(parents=True)
        monkeypatch.setattr(config, "BUNDLED", bundled)
        monkeypatch.chdir(here)
        assert load_recipe("demo").data.batch_size == 11
        (here / "demo").rmdir()
        (here / "demo").write_text(MINIMAL + "batch_size = 22\n")
        assert load_recipe("demo").data.batch_size == 22

    def test_no_such_recipe(self, tmp_path, monkeypatch):
        monkeypatch.setattr(config, "BUNDLED", tmp_path)
        for name in ("kuairand", "aliccp"):
            (tmp_path / f"{name}.toml").write_text(MINIMAL)
        offer = "; give a file, or one of aliccp, kuairand"
        assert error_of("kuairnd") == f"no such recipe: kuairnd (did you mean 'kuairand'?){offer}"
        assert error_of("other/recipe.toml") == f"no such recipe: other/recipe.toml{offer}"
        assert error_of(tmp_path) == f"no such recipe: {tmp_path}{offer}"


texts = st.text(st.characters(codec="utf-8"), max_size=9)
numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
toml_values = st.recursive(st.one_of(st.booleans(), numbers, texts), lambda inner: st.lists(inner, max_size=3), max_leaves=5)


def toml(value):
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip("\n")


class TestOverrides:
    @settings(deadline=None, max_examples=150)
    @given(toml_values)
    def test_any_toml_value_arrives_and_all_else_stays(self, value):
        values = {"a": {"b": 0, "c": 1}, "d": [{"name": "x", "e": 2}, {"name": "y"}]}
        for key in ("a.b", "d.y.f", "new.section.key", "top"):
            apply_override(values, f"{key}={toml(value)}")
        expected = {"a": {"b": value, "c": 1}, "d": [{"name": "x", "e": 2}, {"name": "y", "f": value}]}
        assert repr(values) == repr(expected | {"new": {"section": {"key": value}}, "top": value})

    @pytest.mark.parametrize("text", ["fp32", "a/b.parquet", "long_view", "", "x=y", "~/logs", "1.2.3", "two words", "[half"])
    def test_what_is_no_toml_value_is_a_string(self, text):
        values = {}
        apply_override(values, f" a.b ={text}")
        assert values == {"a": {"b": text}}

    def test_they_reach_the_recipe(self, tmp_path):
        overrides = ["tasks.cvr.weight=5", "train.lr=1e-4", "data.shuffle=true", "data.group=page", "model.tower_layers=[4,2]"]
        recipe = load_recipe(write(tmp_path, RECIPE), [*overrides, "features.seen.max_length=9", "train.lr=0.5"])
        assert (recipe.tasks[1].weight, recipe.train.lr, recipe.data.shuffle, recipe.data.group) == (5, 0.5, True, "page")
        assert (recipe.model.tower_layers, recipe.features[2].max_length) == ((4, 2), 9)
        minimal = load_recipe(write(tmp_path, MINIMAL), ["train.epochs=3", "checkpoint.keep=2", "balance.method=fixed"])
        assert (minimal.train.epochs, minimal.checkpoint.keep) == (3, 2)

    @pytest.mark.parametrize(
        "override, message",
        [
            *((wrong, "write key=value, as in train.lr=0.001") for wrong in ("train.lr", "=3", " =3")),
            ("tasks.ctrr.weight=2", "nothing is named 'ctrr' (did you mean 'ctr'?)"),
            ("features.0.side=user", "nothing is named '0'"),
            ("tasks.ctr=2", "'tasks' is a list; name one of its parts, as in tasks.NAME.ctr"),
            ("name.x=2", "'name' is a value, not a section"),
            ("train.lr.x.y=2", "'lr' is a value, not a section"),
        ],
    )
    def test_errors(self, tmp_path, override, message):
        assert error_of(write(tmp_path, RECIPE), [override]) == f"--set {override}: {message}"
