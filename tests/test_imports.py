"""The house: each module imports only from those above it, and says what it offers."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ORDER = [
    "tensor",
    "ops",
    "gradcheck",
    "nn",
    "transformer",
    "optim",
    "surgery",
    "peft",
    "compress",
    "safetensors",
    "tasks",
    "train",
    "io",
    "accounting",
    "compare",
    "lecture",
    "plots",
    "pretrain",
    "__main__",
]
OUTSIDE = {"numpy", "tqdm"}  # beside the standard library
OUTSIDE_IN = {"plots": {"matplotlib"}, "lecture": {"matplotlib", "IPython"}}

HOUSE = Path(minilora.__file__).parent
FILES = {  # "ops", "peft/lora"; a folder is one room
    path.relative_to(HOUSE).with_suffix("").as_posix(): path for path in sorted(HOUSE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}
modules = pytest.mark.parametrize("name", [name for name in TREES if name != "__init__"])


def room(name):
    """The file or folder that a module belongs to."""
    return name.split("/")[0]


def imports(name):
    """What a module imports, inside functions too: other rooms of minilora, and what is outside."""
    inside, outside = [], []
    up = 2 if "/" in name else 1  # dots that lead to the top of minilora
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and 0 < node.level < up:
            continue  # within its own room
        if isinstance(node, ast.Import):
            outside += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.append(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside.append(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            inside += [alias.name for alias in node.names]
    return inside, outside


def test_every_module_has_its_place_in_the_order():
    assert {room(name) for name in TREES} - {"__init__"} <= set(ORDER)
    assert len(TREES) > 15  # the files were found


@modules
def test_a_module_imports_only_from_those_above_it(name):
    inside, _ = imports(name)
    above = ORDER[: ORDER.index(room(name))]
    assert [m for m in inside if m not in above] == []


@modules
def test_a_module_needs_nothing_else_to_be_installed(name):
    _, outside = imports(name)
    allowed = OUTSIDE | OUTSIDE_IN.get(name, set()) | sys.stdlib_module_names
    assert set(outside) <= allowed  # "minilora" itself is none of them: imports are relative


def test_the_table_of_contents_is_in_reading_order():
    rooms = [n.module for n in TREES["__init__"].body if isinstance(n, ast.ImportFrom) and n.module]
    assert rooms == sorted(rooms, key=ORDER.index)


def test_every_public_name_exists_and_comes_from_its_room():
    listed = 0
    for node in TREES["__init__"].body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            found = getattr(minilora, alias.name)
            assert not alias.name.startswith("_")
            home = found.__module__ if node.module else found.__name__
            assert home.startswith(f"minilora.{node.module or alias.name}")
            listed += 1
    assert listed > 40


@modules
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(f"minilora.{name.removesuffix('/__init__').replace('/', '.')}")
    bare = [] if module.__doc__ else ["the module"]

    def look(body, owner, prefix=""):
        for node in body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if not public or node.name == "forward":  # the class says what `forward` computes
                continue
            found = inspect.getattr_static(owner, node.name)
            if not inspect.getdoc(found) and not inspect.getdoc(getattr(owner, node.name)):
                bare.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, found, f"{node.name}.")

    look(TREES[name].body, module)
    assert bare == []


def test_importing_minilora_imports_no_heavy_package():
    heavy = "matplotlib", "IPython", "safetensors", "torch", "scipy"
    code = f"import sys, minilora; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=HOUSE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
