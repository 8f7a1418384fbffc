"""The capstone's judge: what it pays for, and how people would try to be paid for less."""

import csv
import io
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

import minilora as ml
from helpers import rng, small
from minilora import compress, grade, safetensors, tasks

SEED = 11
SIZES = {"vocab_size": tasks.VOCAB_SIZE, "n_positions": tasks.N_POSITIONS}
BASE = ml.io.DATA / "base.safetensors"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer strings, for speed; a process of its own draws all."""
    monkeypatch.setattr(grade, "STRINGS", 60)


@pytest.fixture
def folder(tmp_path):
    """An empty submission."""
    path = tmp_path / "ada"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def base():
    return ml.load_base(np.float32)


def handed_in(folder, brief="card", limit=None):
    """What the judge says of a folder: points and reason."""
    name, of, points, reason = grade.grade(folder, brief, SEED, limit)
    assert (name, of) == (folder.name, brief)
    return points, reason


def edited(path, change, source=BASE):
    """Write a copy of a file whose arrays and metadata `change` may change in place."""
    arrays, metadata = safetensors.read(source)
    change(arrays, metadata)
    safetensors.write(path, arrays, metadata)


def raw(path, header, data=b""):
    """Write a file with this header, a dictionary or bytes, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def four_bits(model):
    """The base in 4 bits, what is left of it in float16 once it is written by `edited`."""
    return compress.quantise_model(model, 4, block="row")


def halved(arrays, metadata):
    arrays |= {n: a.astype(np.float16) for n, a in arrays.items() if a.dtype == np.float64}


def recipe(folder, plans):
    (folder / "recipe.json").write_text(
        plans if isinstance(plans, str) else json.dumps(plans), "utf-8"
    )


PLAN = {"method": "lora", "size": 1, "lr": 0.01, "steps": 2, "seed": 0}

# ------------------------------------------------------------------ what is paid for


def test_the_untouched_base_earns_nothing_in_any_brief(folder):
    shutil.copy(BASE, folder / "model.safetensors")
    for name, brief in grade.BRIEFS.items():
        if "steps" not in brief.at_most:
            points, reason = handed_in(folder, name)
            assert points == 0 and "refused" not in reason and reason, name


def test_a_solution_earns_all_points(folder, tmp_path):
    ml.save_model(four_bits(ml.load_base()), tmp_path / "whole")
    edited(folder / "model.safetensors", halved, tmp_path / "whole")
    (folder / "defence.md").write_text("4 bits, because bytes bind.", "utf-8")
    assert handed_in(folder) == (40, "")


def test_points_are_for_what_the_base_fails():
    def line(passes, base_passes):
        return grade.Line("bytes", 1, 1, passes, base_passes)

    new, kept, lost = line(True, False), line(True, True), line(False, True)
    failed = line(False, False)
    assert grade.points([new, kept, kept]) == 40
    assert grade.points([new, failed, kept]) == 20
    assert grade.points([new, new, failed, kept]) == 27
    assert grade.points([new, lost]) == 30
    assert grade.points([new, failed, lost, lost, lost]) == 0
    assert grade.points([kept, kept]) == grade.points([failed, kept]) == 0


def test_a_line_says_what_it_measured():
    assert str(grade.Line("sort", 0.762, 0.9, False, True)) == "sort 76.2% (at least 90.0%)"
    assert str(grade.Line("bytes", 83776, 75000, False, False)) == "bytes 83,776 (at most 75,000)"
    assert str(grade.Line("FLOPs / base", 0.71, 0.6, False, False)).endswith(
        "0.710 (at most 0.600)"
    )


def test_the_lines_of_the_base_are_what_other_ways_give(folder, base):
    shutil.copy(BASE, folder / "model.safetensors")
    lines = {line.name: line for line in grade.measure(folder, "card", SEED)}
    assert lines["bytes"].value == BASE.stat().st_size
    tokens, d = tasks.N_POSITIONS, 64
    flops = 2 * tokens * (2 * 12 * d**2 + d * tasks.VOCAB_SIZE) + 2 * 2 * 2 * tokens**2 * d
    assert grade.work(base) == (flops, 17) and lines["GEMMs"].value == 17
    ids = grade.strings("sort", SEED, 60)
    written = ml.generate(base, ids[:, : tasks.PROMPT], tasks.LENGTH)  # letter by letter
    assert lines["sort"].value == (written == ids).all(axis=1).mean()


# ------------------------------------------------------------------ the strings


def test_a_seed_says_which_strings():
    one, again, other = (grade.strings("swap", seed, 500) for seed in (1, 1, 2))
    assert one.shape == (500, 18) and np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[:, 1:9], grade.strings("copy", 1, 500)[:, 1:9])


def test_cheat_learn_the_public_set_by_heart(monkeypatch):
    drawn = grade.strings("copy", SEED, 20)
    monkeypatch.setattr(ml.io, "load_eval", lambda task: drawn)  # had these been public
    fresh = grade.strings("copy", SEED, 20)
    assert len(fresh) == 20
    assert not {tuple(row) for row in drawn} & {tuple(row) for row in fresh}


# ------------------------------------------------------------------ cheats: the files


def test_cheat_one_byte(folder):
    (folder / "model.safetensors").write_bytes(b"x")
    points, reason = handed_in(folder)
    assert points == 0 and reason.startswith("refused: model.safetensors: the header claims")


def test_cheat_no_model(folder, base):
    assert handed_in(folder) == (0, "refused: model.safetensors is missing")
    tuned = ml.lora(ml.load_base(np.float32), 1, rng=rng())
    ml.save_adapter(tuned, folder / "reverse_shift.safetensors")
    assert handed_in(folder, "school") == (0, "refused: model.safetensors is missing")


def test_cheat_a_small_model_that_can_do_nothing(folder):
    sizes = SIZES | {"n_embd": 4, "n_head": 1, "n_layer": 1}
    ml.save_model(ml.Transformer(**sizes, rng=rng()), folder / "model.safetensors")
    points, reason = handed_in(folder)
    assert points == 0 and "bytes" not in reason and reason.count("at least") == 5


def test_cheat_a_class_of_ones_own(folder):
    def named(arrays, metadata):
        metadata["layers"] = json.dumps({"blocks.0.attn.q": {"kind": "Cheat"}})

    edited(folder / "model.safetensors", named)
    points, reason = handed_in(folder)
    assert points == 0 and reason == "refused: model.safetensors: KeyError: 'Cheat'"


@pytest.mark.parametrize("name", ["minilora.py", "sitecustomize.py", "notes.json", "eval.npz"])
def test_cheat_code_or_data_beside_the_model(folder, name):
    shutil.copy(BASE, folder / "model.safetensors")
    (folder / name).write_text("raise SystemExit('I run')", "utf-8")
    points, reason = handed_in(folder)
    assert points == 0 and reason.startswith(f"refused: {name} is a file of")


class Boom:
    """Says so if it is ever unpickled."""

    def __reduce__(self):
        return exec, ("import os; os.environ['MINILORA_BOOM'] = 'yes'",)


def test_cheat_a_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Boom()))
    points, reason = handed_in(folder)
    assert points == 0 and reason.startswith("refused: model.safetensors: the header")
    assert "MINILORA_BOOM" not in os.environ


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_cheat_links_and_pipes(folder, tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(10**10)
    for target in (tmp_path / "huge", BASE, "/dev/zero", folder / "model.safetensors"):
        (folder / "model.safetensors").symlink_to(target)
        points, reason = handed_in(folder)
        assert points == 0 and "model.safetensors is a link" in reason
        (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")  # whoever reads it waits for ever
    assert handed_in(folder)[1].startswith("refused: model.safetensors is a link or a folder")
    (tmp_path / "bob").symlink_to(folder)
    assert handed_in(tmp_path / "bob") == (0, "refused: this is no folder")


def test_cheat_a_file_too_large_to_read(folder):
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(10**10)
    points, reason = handed_in(folder)
    assert points == 0 and "a file of 10,000,000,000 bytes" in reason


def test_cheat_a_folder_for_a_file(folder):
    (folder / "model.safetensors").mkdir()
    assert handed_in(folder)[1].startswith("refused: model.safetensors is a link or a folder")


def test_cheat_data_in_the_metadata_or_in_the_adapters_is_counted(folder, tmp_path):
    def stuffed(arrays, metadata):
        halved(arrays, metadata)
        metadata["essay"] = "x" * 5000

    ml.save_model(four_bits(ml.load_base()), tmp_path / "whole")
    edited(folder / "model.safetensors", stuffed, tmp_path / "whole")
    points, reason = handed_in(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert (points, reason) == (0, f"bytes {size:,} (at most 75,000)")
    edited(folder / "model.safetensors", halved, tmp_path / "whole")
    model = ml.load_model(folder / "model.safetensors")
    ml.save_adapter(ml.lora(model, 4, rng=rng()), folder / "sort.safetensors")
    points, reason = handed_in(folder)
    assert points == 0 and f"bytes {sum(p.stat().st_size for p in folder.iterdir()):,}" in reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_cheat_numbers_that_are_not_finite(folder, value):
    def spoilt(arrays, metadata):
        arrays["head.weight"][0, 0] = value

    edited(folder / "model.safetensors", spoilt)
    points, reason = handed_in(folder)
    assert points == 0
    assert reason == "refused: model.safetensors holds a number that is not finite"


def test_numbers_that_overflow_are_wrong_answers(folder):
    def enormous(arrays, metadata):
        arrays["head.weight"] = np.full_like(arrays["head.weight"], 1e308, dtype=float)

    edited(folder / "model.safetensors", enormous)
    points, reason = handed_in(folder)
    assert points == 0 and reason.count(" 0.0%") == 5


def test_cheat_a_wrong_base(folder):
    ml.save_model(four_bits(ml.load_base()), folder / "model.safetensors")
    tuned = ml.lora(ml.load_base(np.float32), 1, rng=rng())
    ml.save_adapter(tuned, folder / "reverse_shift.safetensors")
    points, reason = handed_in(folder, "school")
    assert points == 0
    assert reason.startswith("refused: reverse_shift.safetensors: made for another model: blocks.0")


def test_cheat_a_base_moved_a_little(folder):
    def moved(arrays, metadata):
        arrays["norm.bias"][0] = np.nextafter(arrays["norm.bias"][0], np.float32(9))

    edited(folder / "model.safetensors", moved)
    lines = {line.name: line for line in grade.measure(folder, "school", SEED)}
    assert lines["tensors changed"].value == 1 and not lines["tensors changed"].passes


def test_cheat_a_model_of_another_world(folder):
    ml.save_model(small(), folder / "model.safetensors")
    points, reason = handed_in(folder)
    assert points == 0 and reason.startswith("refused: ")


# ------------------------------------------------------------------ cheats: bombs


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2**32, 2**32, 0], "data_offsets": [0, 0]}},
        b'{"a":' * 9999,
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        {"../../base": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
    ],
    ids=["huge", "huge and empty", "deep", "a name twice", "a path"],
)
def test_cheat_a_header_that_lies(folder, header):
    raw(folder / "model.safetensors", header, b"1234")
    points, reason = handed_in(folder)
    assert points == 0 and reason.startswith("refused: model.safetensors: ")


def test_cheat_a_sparse_matrix_of_a_huge_shape(folder):
    def bomb(arrays, metadata):
        arrays["head.weight.bits"] = np.zeros(1, np.uint8)
        arrays["head.weight.values"] = np.zeros(0, np.float32)
        del arrays["head.weight"]
        metadata["sparse"] = json.dumps({"head.weight": [10**6, 10**6]})

    edited(folder / "model.safetensors", bomb)
    points, reason = handed_in(folder)
    assert points == 0 and reason.startswith("refused: model.safetensors: ")


def wide(folder, d_ff):
    """A model whose file is small and whose arithmetic is not: factors of rank 0."""
    sizes = SIZES | {"n_embd": 8, "n_head": 1, "n_layer": 1}
    model = compress.low_rank(ml.Transformer(**sizes, rng=rng()), 1, targets="blocks.0.mlp.*")
    ml.save_model(model, folder / "model.safetensors")

    def widened(arrays, metadata):
        for name, shape in {"up.U": (d_ff, 0), "up.V": (0, 8), "down.U": (8, 0)}.items():
            arrays[f"blocks.0.mlp.{name}"] = np.zeros(shape, np.float32)
        arrays["blocks.0.mlp.down.V"] = np.zeros((0, d_ff), np.float32)
        arrays.pop("blocks.0.mlp.up.bias", None)
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"d_ff": d_ff})

    edited(folder / "model.safetensors", widened, folder / "model.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by the system")
def test_cheat_a_model_that_takes_all_the_memory(folder):
    wide(folder, 2**31)
    points, reason = handed_in(folder, limit=60)
    assert points == 0 and "MemoryError" in reason


def test_cheat_a_slow_model(folder):
    sizes = SIZES | {"n_embd": 8, "n_head": 8, "n_layer": 400}
    ml.save_model(ml.Transformer(**sizes, rng=rng()), folder / "model.safetensors")
    assert handed_in(folder, limit=1) == (0, "refused: it takes over 1 seconds")


# ------------------------------------------------------------------ cheats: steps


def test_a_recipe_is_followed_and_its_steps_are_counted(folder):
    recipe(folder, {"interleave": PLAN, "sort_descending": PLAN | {"method": "ia3", "size": None}})
    lines = {line.name: line for line in grade.measure(folder, "evening", SEED)}
    assert (lines["steps"].value, lines["steps"].passes) == (4, True)
    tuned = ml.lora(ml.load_base(np.float32), 1, targets="blocks.*", rng=rng())
    ml.fit(tuned, "interleave", steps=2, lr=0.01, progress=False)
    ml.save_adapter(tuned, folder / "mine")
    assert lines["largest adapter"].value == (folder / "mine").stat().st_size


def test_cheat_training_outside(folder):
    shutil.copy(BASE, folder / "model.safetensors")
    recipe(folder, {})
    points, reason = handed_in(folder, "evening")
    assert points == 0 and reason.endswith("called recipe.json")


@pytest.mark.parametrize(
    "plans, reason",
    [
        ({"interleave": PLAN | {"steps": 301}}, "interleave, 301 steps; 300 are left"),
        ({"interleave": PLAN | {"steps": -999}}, "interleave, -999 steps"),
        ({"interleave": PLAN | {"steps": True}}, "interleave, True steps"),
        ({"interleave": PLAN | {"steps": 1.5}}, "interleave, 1.5 steps"),
        ({"interleave": PLAN, "sort_descending": PLAN | {"steps": 299}}, "298 are left"),
        ({"../../model": PLAN}, "../../model, 2 steps"),
        ({"copy": PLAN}, "copy, 2 steps"),
        ({"interleave": PLAN | {"lr": float("nan")}}, "lr nan"),
        ({"interleave": PLAN | {"method": "__import__('os')"}}, "KeyError"),
        ({"interleave": {}}, "KeyError: 'steps'"),
        ([1, 2], "AttributeError"),
        ("{", "refused: "),
    ],
)
def test_cheat_a_recipe_that_lies(folder, plans, reason):
    recipe(folder, plans)
    points, found = handed_in(folder, "evening")
    assert points == 0 and found.startswith("refused: ") and reason in found


# ------------------------------------------------------------------ the sheet


def test_cheat_a_name_that_writes_into_the_sheet(tmp_path):
    for name in ("=cmd()", "eve\nada,card,40", "| 40 |", "-2+3", "x" * 301):
        row = grade.grade(tmp_path / name, "card", SEED)
        assert row[2] == 0 and "name" in row[3]
        assert not set("\n|=") & set(row[0]) and row[0][0] not in "=+-@" and len(row[0]) <= 300


def test_cheat_an_error_that_writes_into_the_sheet(folder):
    raw(folder / "model.safetensors", {"x\n| 40 |\u202e": 1})
    points, reason = handed_in(folder)
    assert points == 0 and reason.isprintable() and "|" not in reason


def test_the_command_writes_a_row_for_each(folder, tmp_path, capfd):
    shutil.copy(BASE, folder / "model.safetensors")
    (tmp_path / "bob.zip").write_bytes(b"PK")
    (tmp_path / ".DS_Store").write_bytes(b"")
    numpy = tmp_path / "numpy"  # a submission that would like to be imported
    numpy.mkdir()
    (numpy / "__init__.py").write_text("raise SystemExit('I run')", "utf-8")
    assert grade.main([str(tmp_path), "--seed", "7", "--brief", "school"]) == 0
    out, err = capfd.readouterr()
    head, ada, bob, eve = csv.reader(io.StringIO(out))
    assert tuple(head) == grade.COLUMNS
    assert ada[:3] == ["ada", "school", "0"] and ada[3].startswith("sort_descending 0.0% (at least")
    assert bob == ["bob.zip", "school", "0", "refused: this is no folder"]
    assert eve[:3] == ["numpy", "school", "0"] and eve[3].startswith("refused: __init__.py is a")
    assert err == "the same strings come from --seed 7\n"


@pytest.mark.parametrize("argv", [["nowhere"], [".", "--seed", "-1"], [".", "--brief", "coin"]])
def test_a_wrong_command_is_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        grade.main(argv)
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_it_is_not_started_inside_of_the_submissions(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for where in (".", ".."):
        with pytest.raises(SystemExit):
            grade.main([where])
        assert "from outside" in capsys.readouterr().err
