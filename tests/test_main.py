"""The command line: the tables, the picture, and wrong words answered in one line."""

import contextlib
import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from minilora import __main__ as program
from minilora import compare, lora, save_adapter, tasks
from minilora.io import load_base, load_eval
from minilora.train import History
from surroundings import ROOT

PLACES = "elicit", "build"


def words_of(args):
    """The exit code, the words and the bars of one run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.main(args)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def few():
    """Twenty examples of each task for the scores, in all that follows here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.io, "load_eval", lambda task: load_eval(task)[:20])
        yield


@pytest.fixture(scope="module")
def told(few, tmp_path_factory):
    """One run of the main job, one step long: its exit code, its words and its picture."""
    picture = tmp_path_factory.mktemp("main") / "picture.png"
    return *words_of(["--steps", "1", "--out", str(picture)]), picture


def rows(text, names):
    """The lines of a table by method, as the words behind the name."""
    lines = text.splitlines()
    found = {name: line for line in lines for name in names if line.startswith(f"{name} ")}
    return {name: line.removeprefix(name).split() for name, line in found.items()}


# ------------------------------------------------------------------ fine-tuning


def test_it_says_what_will_be_learnt_and_where_to_go_on(told):
    code, out, err, picture = told
    assert code == 0
    assert "knows copy, reverse, sort, shift, swap. To learn, each in 1 steps:" in out
    assert re.search(r"\n  elicit: unnamed_sort, such as \? [a-p]{8} > [a-p]{8}\n", out)
    assert re.search(r"\n  build: sort_descending, such as \? [a-p]{8} > [a-p]{8}\n", out)
    assert picture.read_bytes().startswith(b"\x89PNG") and f"The picture is in {picture}." in out
    assert (ROOT / "notebooks").is_dir() and "Now open notebooks/00_tour.ipynb." in out
    assert all(f"{name:9} {task}: 100%" in err for name in program.RATES for task in PLACES)
    assert "1/1 steps" in err


def test_the_table_has_a_row_a_method(told, tmp_path):
    found = rows(told[1], program.RATES)
    assert list(found) == list(program.RATES)
    full, low = found["full"], found["lora"]
    assert full[6:8] == ["104,256", "100.0%"]
    # r (d_in + d_out) over four square and two oblong layers, in two blocks
    trainable = 2 * 4 * (4 * (64 + 64) + 2 * (64 + 256))
    assert low[6:8] == [f"{trainable:,}", f"{trainable / (104256 + trainable):.1%}"]
    save_adapter(
        lora(load_base(np.float32), targets="blocks.*", rng=np.random.default_rng(0)),
        tmp_path / "a",
    )
    assert low[8] == f"{(tmp_path / 'a').stat().st_size:,}"
    for row in found.values():
        assert row[1] == row[4] == "->"
        assert all(re.fullmatch(r"\d+\.\d%", row[i]) for i in (0, 2, 3, 5))
        assert float(row[9]) > 0  # milliseconds
    assert full[10:] == ["0", "->", "0"]
    assert low[10:] == ["24", "->", "0"]  # two a wrapped layer, and none once merged
    assert re.search(
        r"\nlora: merged into plain layers, .* \d+\.\d% and \d+\.\d% right with 0 extra GEMMs",
        told[1],
    )


def test_the_recording_in_the_readme_is_of_this_program(told):
    """But for scores and times, which one step cannot have."""
    recorded, found = (
        rows(text, program.RATES) for text in ((ROOT / "README.md").read_text("utf-8"), told[1])
    )
    assert recorded.keys() == found.keys()
    for name, row in found.items():
        assert recorded[name][6:] == [*row[6:9], *row[10:]]


def test_what_it_says_of_the_distances_is_true_of_its_table(told):
    found = rows(told[1], program.RATES)
    for i, task in enumerate(PLACES):
        after = {name: float(row[2 + 3 * i].rstrip("%")) for name, row in found.items()}
        line = rf"^{task}: from (\S+)% \(([\w ]+)\) to (\S+)% \(([\w ]+)\)\.$"
        low, worst, high, best = re.search(line, told[1], re.MULTILINE).groups()
        assert (float(low), float(high)) == (min(after.values()), max(after.values()))
        assert (after[worst], after[best]) == (float(low), float(high))


def test_each_method_is_near_its_budget_and_says_whether_it_merges(told):
    found = rows(told[1], program.RATES)
    extra = {name: (row[10], row[12]) for name, row in found.items()}
    assert extra["adapter"] == ("8", "8")
    assert all(extra[name] == ("0", "0") for name in ("ia3", "bitfit", "token row"))
    for name in ("lora", "adapter"):
        assert 9_000 < int(found[name][6].replace(",", "")) < 9_300
    stay = re.findall(r"^([\w ]+): cannot be merged: \w+", told[1], re.MULTILINE)
    assert stay == ["adapter"]


def test_the_columns_stand_under_their_heads(told):
    lines = told[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    table = lines[start : start + 2 + len(program.RATES)]
    assert len({len(line) for line in table}) == 1 and len(table[0]) <= 100
    for head in (*PLACES, "trainable", "share", "bytes/task", "ms/step"):
        end = table[0].index(head) + len(head)
        assert all(line[end : end + 2] == "  " and line[end - 1] != " " for line in table[2:])


def test_the_sizes_follow_the_rank():
    small = {name: program.size(name, 1) for name in program.RATES | program.MORE}
    assert small == dict.fromkeys(("full", "ia3", "bitfit", "token row"), None) | {
        "lora": 1,
        "dora": 1,
        "pissa": 1,
        "adapter": 4,
        "parallel": 4,
        "pfeiffer": 8,
        "prefix": 9,
        "prompt": 9,  # a budget of its own
    }
    for name in ("lora", "dora", "prefix"):  # the recipes and the sizes are those of `compare`
        assert [program.size(name, r) for r in (1, 4, 16)] == list(compare.METHODS[name].sizes)
    assert set(program.RATES | program.MORE) < set(compare.METHODS)


def test_one_method_of_another_rank_on_another_task(few, tmp_path, capsys):
    picture = tmp_path / "picture.svg"
    args = ["--task", "reverse_shift", "--methods", "lora", "--rank", "2", "--steps", "1"]
    assert program.main([*args, "--seed", "7", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "\n  reverse_shift, such as ?" in out
    found = rows(out, program.RATES)
    assert list(found) == ["lora"] and found["lora"][3] == "4,608"
    svg = picture.read_text("utf-8")
    assert "<svg" in svg and "reverse_shift, exact match after 1 steps" in svg


@pytest.mark.parametrize("method", program.MORE)
def test_the_other_methods_have_a_row_too(method, few, tmp_path, capsys):
    args = ["--task", "compose", "--methods", method, "--steps", "1"]
    assert program.main([*args, "--out", str(tmp_path / "p.png")]) == 0
    assert list(rows(capsys.readouterr().out, program.MORE)) == [method]


def test_runs_are_seeded(few, monkeypatch):
    losses = []
    fit = program.fit
    monkeypatch.setattr(program, "fit", lambda *a, **k: losses.append(fit(*a, **k)) or losses[-1])
    for seed in (3, 3, 4):
        program.run("prompt", {"copy": "copy"}, rank=1, steps=1, seed=seed)
    first, again, other = (history.loss for history in losses)
    assert first == again != other


def test_after_ctrl_c_the_table_shows_what_was_learnt_and_the_rest_is_left_out(
    few, tmp_path, monkeypatch, capsys
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
    (row,) = rows(out, program.RATES).values()
    assert row[1] == "->" and row[3] == "-"  # the second task was not begun


# ------------------------------------------------------------------ compression


@pytest.fixture(scope="module")
def squeezed(few, tmp_path_factory):
    """The compression rows, one step long: the table's rows as words, its words, its picture."""
    picture = tmp_path_factory.mktemp("main") / "picture.png"
    code, out, _ = words_of(["--methods", "compression", "--steps", "1", "--out", str(picture)])
    assert code == 0
    return rows(out, program.COMPRESSION), out, picture


def test_compression_has_a_row_a_method_and_a_picture(squeezed):
    found, text, picture = squeezed
    assert list(found) == list(program.COMPRESSION)
    assert "of its answers are exact" in text and "has 420,288 bytes" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(len(row) == 9 for row in found.values())


def test_the_skills_are_those_of_the_data_card(monkeypatch):
    monkeypatch.setattr(program.io, "load_eval", load_eval)
    assert program.skills(load_base(np.float32)).exact_match == pytest.approx(0.9948, abs=0.001)


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
    # 70% of 98,304 weights in the blocks are gone, and stay so: a bit for each, 4 bytes if left
    assert size["zeros"] < 420_288 - 0.65 * 98_304 * 4 + 98_304 / 8


def test_what_is_quantised_afterwards_does_not_train_and_the_rest_does(squeezed):
    trained = {name for name, row in squeezed[0].items() if row[5] != "-"}
    assert trained == {"2-bit", "low rank", "zeros", "neurons", "heads", "blocks"}
    assert float(squeezed[0]["8-bit"][3].rstrip("%")) > 99


def test_after_ctrl_c_the_rows_so_far_are_shown(few, tmp_path, monkeypatch, capsys):
    two = {name: program.COMPRESSION[name] for name in ("zeros", "nf4")}
    monkeypatch.setattr(program, "COMPRESSION", two)
    monkeypatch.setattr(program, "fit", lambda *args, **kwargs: History(interrupted=True))
    monkeypatch.setattr(program.compress, "observe", lambda *args: None)
    args = ["--methods", "compression", "--out", str(tmp_path / "p.png")]
    assert program.main(args) == 130
    assert list(rows(capsys.readouterr().out, two)) == ["zeros"]


# ------------------------------------------------------------------ help and wrong words


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("--task", "--methods", "--rank", "--steps", "--seed", "--out"):
        assert re.search(rf"^  {option} \S+.*\s+\w+", out, re.MULTILINE)  # an argument and a text
    assert all(name in out for name in [*tasks.TASKS, *program.RATES, "compression"])


@pytest.mark.parametrize(
    "args, word",
    [
        ("--task srot", "reverse_shift"),  # what is possible is listed
        ("--task sort rope", "rope"),
        ("--methods rola", "compression"),
        ("--methods lora,dora", "'lora,dora'"),
        ("--methods lora compression", "alone"),
        ("--methods", "--methods"),
        ("--rank 0", "1 to 64"),
        ("--rank 65", "1 to 64"),
        ("--rank 2.5", "1 to 64"),
        ("--rank -1", "1 to 64"),
        ("--steps many", "1 to 100000"),
        ("--seed 4294967296", "0 to 4294967295"),
        ("--out p.txt", ".svg"),
        ("--out picture", ".svg"),
        ("--out nowhere/p.png", "nowhere"),
        ("--colour red", "--colour"),
        ("lo\nra", "lo ra"),
    ],
)
def test_a_wrong_word_gets_one_line(args, word, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(args.split(" "))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("python -m minilora: ") and len(err.splitlines()) == 1
    assert word in err


# ------------------------------------------------------------------ what cannot be written


def test_a_folder_in_place_of_the_picture_is_refused_before_the_training(tmp_path, capsys):
    (tmp_path / "p.png").mkdir()
    with pytest.raises(SystemExit) as end:
        program.main(["--out", str(tmp_path / "p.png")])
    assert end.value.code == 2
    assert "p.png" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_a_file_that_may_not_grow_is_refused_before_the_training(tmp_path):
    resource = pytest.importorskip("resource")  # Windows has none
    old = tmp_path / "old.png"
    old.write_bytes(b"kept")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(SystemExit) as end:
            program.main(["--out", str(old)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert end.value.code == 2
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"kept"]


def test_a_picture_that_fails_leaves_the_table(few, tmp_path, monkeypatch, capsys):
    from minilora import plots

    def accuracy(*args):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(plots, "accuracy", accuracy)
    args = ["--task", "build", "--methods", "bitfit", "--steps", "1"]
    assert program.main([*args, "--out", str(tmp_path / "p.png")]) == 1
    out = capsys.readouterr().out
    assert list(rows(out, program.RATES)) == ["bitfit"]
    assert out.endswith("\nThe picture failed: no font\n")


# ------------------------------------------------------------------ the real thing, once


def test_python_m_minilora_whatever_backend_is_set(tmp_path):
    command = [sys.executable, "-m", "minilora", "--methods", "bitfit", "--steps", "1"]
    env = os.environ | {"MPLBACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert list(rows(done.stdout, program.RATES)) == ["bitfit"]
    assert (tmp_path / "minilora.png").stat().st_size > 5000
    for line in done.stderr.splitlines():  # the bars, in a log: whole lines, no clock, no warning
        assert re.fullmatch(r"[\w ]+ *: +\d+% \|[# ]{20}\| \d/1 steps", line)
