"""The repository keeps its shape: folders are packages of `triptych`, imports point one way, nothing loads pickles, recipes load."""

import ast
import sys
from pathlib import Path

import pytest

from triptych.launch.config import BUNDLED, load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = ["datasets", "embeddings", "mmoe", "launch"]
"""Each may import those before it."""
COMPONENT = "launch/component.py"
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EXECUTORS = {"eval", "exec", "__import__"}
SOURCES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def read(source):
    return (ROOT / source).read_text(encoding="utf-8")


def dotted(node):
    """`a.b.c` of an attribute chain, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(source, text):
    """What a file of the four folders imports: dotted names, relative ones resolved, and whether each was relative."""
    package = ["triptych", *Path(source).parent.parts]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            kept = package[: len(package) - node.level + 1] if node.level else []
            yield from ((".".join([*kept, *filter(None, [node.module]), alias.name]), node.level > 0) for alias in node.names)


def wrong_imports(source, text):
    """Imports that point to a folder further right, out of the package, or to ours by an absolute name."""
    own = FOLDERS.index(Path(source).parts[0])
    wrong = []
    for name, relative in imported(source, text):
        parts = name.split(".")
        if not relative:
            wrong += [name] if parts[0] in ("triptych", *FOLDERS) else []
        elif parts[0] != "triptych" or parts[1] not in FOLDERS[: own + 1]:
            wrong.append(name)
    return wrong


def unsafe_calls(text):
    """Uses of pickles, and of text or files as code."""
    found = [name for name, _ in imported("launch/any.py", text) if name.split(".")[0] in PICKLES or name == "torch.load"]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (
            dotted(node.func) in EXECUTORS or dotted(node.func).endswith(("torch.load", "importlib.import_module"))
        ):
            found.append(dotted(node.func))
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            found.append("allow_pickle")
    return found


class TestFolders:
    def test_there_is_no_init_file(self):
        inits = [path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("__init__.py*")]
        assert not inits, "an __init__.py makes `datasets` or `launch` a top-level package, which shadows other people's"

    def test_every_folder_with_python_files_is_a_listed_package(self):
        setuptools = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
        folders = {str(Path(source).parent) for source in SOURCES}
        assert {folder.split("/")[0] for folder in folders} == set(FOLDERS)
        assert sorted(setuptools["packages"]) == sorted("triptych." + folder.replace("/", ".") for folder in folders)
        assert {f"triptych.{folder}": folder for folder in FOLDERS}.items() <= setuptools["package-dir"].items()
        assert setuptools["py-modules"] == []

    @pytest.mark.parametrize("source", SOURCES)
    def test_a_file_says_what_it_is_for_in_its_first_line(self, source):
        assert read(source).startswith('"""') and ast.get_docstring(ast.parse(read(source)))


class TestImports:
    @pytest.mark.parametrize("source", SOURCES)
    def test_point_left_and_are_relative(self, source):
        assert wrong_imports(source, read(source)) == []

    @pytest.mark.parametrize(
        "source, text, expected",
        [
            ("datasets/a.py", "from ..embeddings.tables import T", ["triptych.embeddings.tables.T"]),
            ("mmoe/a.py", "def f():\n    from ..launch import config", ["triptych.launch.config"]),
            ("mmoe/a.py", "from .. import launch, datasets", ["triptych.launch"]),
            ("datasets/prepare/a.py", "from ...mmoe import heads", ["triptych.mmoe.heads"]),
            ("datasets/prepare/a.py", "from ..schema import Schema\nfrom . import b\nfrom ...datasets import ids", []),
            ("datasets/prepare/a.py", "from ....other import x", ["other.x"]),
            ("launch/a.py", "from ..mmoe.heads import Task\nfrom .config import Recipe\nimport torch.launch", []),
            ("launch/a.py", "import triptych.mmoe", ["triptych.mmoe"]),
            ("launch/a.py", "import datasets as d\nfrom mmoe.heads import Task", ["datasets", "mmoe.heads.Task"]),
        ],
    )
    def test_of_which_the_check_finds_the_wrong_ones(self, source, text, expected):
        assert wrong_imports(source, text) == expected

    def test_component_imports_nothing_of_ours_and_keeps_real_annotations(self):
        """TorchX executes it outside the package, and reads its annotations as objects."""
        assert COMPONENT in SOURCES
        names = list(imported(COMPONENT, read(COMPONENT)))
        assert not [name for name, relative in names if relative or name.split(".")[0] in ("triptych", "__future__", *FOLDERS)]
        functions = [node for node in ast.parse(read(COMPONENT)).body if isinstance(node, ast.FunctionDef)]
        assert {"train", "evaluate", "predict", "export"} <= {function.name for function in functions}
        for function in functions:
            assert all(argument.annotation is not None for argument in function.args.args)


class TestSafety:
    @pytest.mark.parametrize("source", SOURCES)
    def test_nothing_loads_pickles_or_runs_text(self, source):
        assert unsafe_calls(read(source)) == []

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("import pickle", ["pickle"]),
            ("from pickle import loads", ["pickle.loads"]),
            ("import torch\ntorch.load('x')", ["torch.load"]),
            ("from torch import load", ["torch.load"]),
            ("exec('x'); eval('x'); __import__('x')", ["exec", "eval", "__import__"]),
            ("importlib.import_module('x')", ["importlib.import_module"]),
            ("np.load('x', allow_pickle=True)", ["allow_pickle"]),
            ("model.eval(); safetensors.torch.load_file('x'); np.load('x', allow_pickle=False)", []),
        ],
    )
    def test_of_which_the_check_finds_the_unsafe(self, text, expected):
        assert unsafe_calls(text) == expected


class TestRecipes:
    @pytest.mark.parametrize("name", sorted(path.stem for path in BUNDLED.glob("*.toml")))
    def test_every_bundled_recipe_loads_by_name(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load_recipe(name).tasks

    def test_bundled_recipes_are_package_data(self):
        assert BUNDLED == ROOT / "launch/recipes"
        assert tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["package-data"] == {"triptych.launch": ["recipes/*.toml"]}
