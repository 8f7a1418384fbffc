"""The command line: the table, the picture, and wrong values answered in one line."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import __main__ as program
from minilora import lora, save_adapter, tasks
from minilora.io import load_base, load_eval
from minilora.train import History

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """One run of the main job, three steps long: its exit code, its words and its picture."""
    picture = tmp_path_factory.mktemp("main") / "picture.png"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.main(["--steps", "3", "--out", str(picture)])
    return code, out.getvalue(), err.getvalue(), picture


def rows(text):
    """The lines of the table by method, as words."""
    lines = [line.split() for line in text.splitlines()]
    return {words[0]: words for words in lines if words and words[0] in program.METHODS}


def test_it_says_what_will_be_learnt_and_where_to_go_on(told):
    code, out, err, picture = told
    assert code == 0
    assert "knows copy, reverse, sort, shift, swap. The skill to learn: sort_descending." in out
    assert re.search(r"For example: sort_descending [a-p]{8} > [a-p]{8}\n", out)
    assert f"The picture is in {picture}." in out
    assert (ROOT / "notebooks").is_dir() and "Now open notebooks/00_tour.ipynb." in out
    assert all(f"{name:7}: 100%" in err for name in program.METHODS) and "3/3 steps" in err


def test_the_table_has_a_row_a_method(told, tmp_path):
    found = rows(told[1])
    assert list(found) == list(program.METHODS)
    full, low = found["full"], found["lora"]
    assert full[1:3] == ["104,256", "100.0%"]
    # r (d_in + d_out) over four square and two oblong layers, in two blocks
    trainable = 2 * 4 * (4 * (64 + 64) + 2 * (64 + 256))
    assert low[1:3] == [f"{trainable:,}", f"{trainable / (104256 + trainable):.1%}"]
    save_adapter(
        lora(load_base(np.float32), targets="blocks.*", rng=np.random.default_rng(0)),
        tmp_path / "a",
    )
    assert low[3] == f"{(tmp_path / 'a').stat().st_size:,}"
    for row in found.values():
        assert row[4] == "0.0%" and row[5] == row[8] == "->"  # exact match, then letters right
        assert re.fullmatch(r"\d+\.\d%", row[6]) and re.fullmatch(r"\d+\.\d%", row[9])
        assert float(row[10]) > 0  # milliseconds
    assert full[11:] == ["0", "->", "0"]
    assert low[11:] == ["24", "->", "0"]  # two a wrapped layer, and none once merged
    assert re.search(
        r"\nlora: merged into plain layers, .* \d+\.\d% right with 0 extra GEMMs", told[1]
    )


def test_each_method_is_near_its_budget_and_says_whether_it_merges(told):
    found = rows(told[1])
    extra = {name: (row[11], row[13]) for name, row in found.items()}
    assert extra["dora"] == ("24", "0") and extra["adapter"] == ("8", "8")
    assert all(extra[name] == ("0", "0") for name in ("ia3", "bitfit", "prefix", "prompt"))
    for name in ("lora", "dora", "adapter", "prefix"):
        assert 9_000 < int(found[name][1].replace(",", "")) < 10_400
    stay = re.findall(r"^(\w+): cannot be merged: \w+", told[1], re.MULTILINE)
    assert stay == ["adapter", "prefix", "prompt"]


def test_the_columns_stand_under_their_heads(told):
    lines = told[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    table = lines[start : start + 2 + len(program.METHODS)]
    heads = "method", "trainable", "share", "bytes/task", "exact match", "letters right", "ms/step"
    assert all(head in table[0] for head in heads) and "extra GEMMs" in table[0]
    assert max(map(len, table)) <= 100
    for head, column in [("trainable", 1), ("share", 2), ("bytes/task", 3)]:
        end = table[0].index(head) + len(head)
        for row in table[2:]:
            assert row[:end].split()[-1] == row.split()[column]


def test_the_picture_is_saved(told):
    assert told[3].read_bytes().startswith(b"\x89PNG")


def test_one_method_of_another_rank_on_another_task(tmp_path, capsys):
    picture = tmp_path / "picture.svg"
    args = ["--task", "reverse_shift", "--methods", "lora", "--rank", "2", "--steps", "1"]
    assert program.main([*args, "--seed", "7", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "The skill to learn: reverse_shift." in out
    found = rows(out)
    assert list(found) == ["lora"] and found["lora"][1] == "4,608"
    svg = picture.read_text("utf-8")
    assert "<svg" in svg and "reverse_shift after 1 steps" in svg


@pytest.mark.parametrize("method", program.METHODS)
def test_runs_are_seeded(method, monkeypatch, capsys):
    ids = load_eval("copy")[:20]
    monkeypatch.setattr(program.io, "load_eval", lambda task: ids)

    def outcome(seed):
        return program.run(method, "copy", rank=1, steps=2, seed=seed)["after"]

    assert outcome(3) == outcome(3) != outcome(4)


def test_after_ctrl_c_the_table_shows_what_was_learnt_and_the_rest_is_left_out(
    tmp_path, monkeypatch, capsys
):
    real, calls = tasks.sample, []

    def sample(*args):
        calls.append(0)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tasks, "sample", sample)
    assert program.main(["--steps", "9", "--out", str(tmp_path / "p.png")]) == 130
    out = capsys.readouterr().out
    assert "stopped at step 1 of 9; what was learnt is kept" in out
    assert list(rows(out)) == ["full"]


# ------------------------------------------------------------------ compression


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    """The compression rows, two steps long: the table's rows as words, its words, its picture."""
    picture = tmp_path_factory.mktemp("main") / "picture.png"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        args = ["--methods", "compression", "--steps", "2", "--out", str(picture)]
        assert program.main(args) == 0
    found = {}
    for line in out.getvalue().splitlines():
        for name in program.COMPRESSION:
            if line.startswith(f"{name} "):
                found[name] = line.removeprefix(name).split()
    return found, out.getvalue(), picture


def test_compression_has_a_row_a_method_and_a_picture(squeezed):
    found, text, picture = squeezed
    assert list(found) == list(program.COMPRESSION)
    assert "99.6% of its answers are exact" in text and "has 420,288 bytes" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(len(row) == 9 for row in found.values())


def test_compression_saves_bytes_or_flops_or_both(squeezed):
    size = {name: int(row[0].replace(",", "")) for name, row in squeezed[0].items()}
    flops = {name: float(row[2].rstrip("%")) for name, row in squeezed[0].items()}
    assert all(n < 420_288 for n in size.values())
    assert size["8-bit"] > size["4-bit"] > size["nf4"] > size["3-bit gptq"] > size["2-bit"]
    for name in ("8-bit", "4-bit", "nf4", "3-bit gptq", "2-bit", "zeros"):
        assert flops[name] == 100
    for name in ("low rank", "neurons", "heads", "blocks"):
        assert flops[name] < 95
    assert 45 < flops["blocks"] < 55  # one of two blocks, and the head


def test_what_is_quantised_afterwards_does_not_train_and_the_rest_does(squeezed):
    trained = {name for name, row in squeezed[0].items() if row[5] != "-"}
    assert trained == {"2-bit", "low rank", "zeros", "neurons", "heads", "blocks"}
    assert float(squeezed[0]["8-bit"][3].rstrip("%")) > 99


def test_zeros_stay_zeros_through_training():
    row = program.squeeze("zeros", 2, 0)
    # 70% of 98,304 weights in the blocks are gone: a bit for each, and 4 bytes for those left
    assert row["bytes"] < 420_288 - 0.65 * 98_304 * 4 + 98_304 / 8


def test_after_ctrl_c_the_rows_so_far_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        program, "COMPRESSION", {n: program.COMPRESSION[n] for n in ("zeros", "nf4")}
    )

    def fit(*args, **kwargs):
        return History(interrupted=True)

    monkeypatch.setattr(program, "fit", fit)
    args = ["--methods", "compression", "--out", str(tmp_path / "p.png")]
    assert program.main(args) == 130
    out = capsys.readouterr().out
    assert "\nzeros " in out and "\nnf4 " not in out


# ------------------------------------------------------------------ help and wrong values


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for option in ("--task", "--methods", "--rank", "--steps", "--seed", "--out"):
        assert re.search(rf"{option} [A-Z]+ \w+", out)  # an argument and a text
    assert all(name in out for name in [*tasks.TASKS, *program.METHODS])


ALL_TASKS = ", ".join(tasks.TASKS)
ALL_METHODS = ", ".join([*program.METHODS, "compression"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--task", "srot"], f"argument --task: 'srot' is not known; expected one of {ALL_TASKS}"),
        (["--task", ""], f"argument --task: '' is not known; expected one of {ALL_TASKS}"),
        (["--task", "sort,copy"], "argument --task: 2 tasks; expected one"),
        (
            ["--methods", "rola"],
            f"argument --methods: 'rola' is not known; expected one of {ALL_METHODS}",
        ),
        (
            ["--methods", "lora,"],
            f"argument --methods: '' is not known; expected one of {ALL_METHODS}",
        ),
        (
            ["--methods", "lora,compression"],
            "argument --methods: compression stands alone, as it has another table",
        ),
        (["--rank", "0"], "argument --rank: '0'; expected a whole number from 1 to 64"),
        (["--rank", "65"], "argument --rank: '65'; expected a whole number from 1 to 64"),
        (["--rank", "2.5"], "argument --rank: '2.5'; expected a whole number from 1 to 64"),
        (["--rank", "-1"], "argument --rank: '-1'; expected a whole number from 1 to 64"),
        (["--steps", "0"], "argument --steps: '0'; expected a whole number from 1 to 100000"),
        (["--steps", "many"], "argument --steps: 'many'; expected a whole number from 1 to 100000"),
        (["--seed", "-1"], "argument --seed: '-1'; expected a whole number from 0 to 4294967295"),
        (["--out", "p.txt"], "argument --out: 'p.txt'; expected a name in .png, .svg or .pdf"),
        (["--out", "picture"], "argument --out: 'picture'; expected a name in .png, .svg or .pdf"),
        (["--out", "nowhere/p.png"], "argument --out: there is no folder 'nowhere'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["lora"], "unrecognized arguments: lora"),
    ],
)
def test_a_wrong_value_gets_one_line_that_lists_the_right_ones(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(args)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"minilora: {message}\n")


def test_a_folder_in_place_of_a_picture_is_refused_before_the_training(tmp_path, capsys):
    folder = tmp_path / "picture.png"
    folder.mkdir()
    with pytest.raises(SystemExit) as end:
        program.main(["--steps", "1", "--methods", "lora", "--out", str(folder)])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------ the real thing, once


def test_python_m_minilora(tmp_path):
    command = [sys.executable, "-m", "minilora", "--steps", "2", "--out", str(tmp_path / "p.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert list(rows(done.stdout)) == list(program.METHODS)
    assert (tmp_path / "p.png").stat().st_size > 5000
    for line in done.stderr.splitlines():  # the bars, in a log: whole lines, no clock, no warning
        assert re.fullmatch(r"\w+ *: +\d+% \|[# ]{20}\| \d/2 steps", line)
