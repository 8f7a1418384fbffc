"""The comparison: fair points, rates chosen on other data, and runs that survive Ctrl-C."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import Future

import pytest

from minilora import compare, io
from minilora.compare import BUDGETS, METHODS, SEEDS, TUNING_SEED
from minilora.surgery import count
from minilora.train import History
from surroundings import ROOT

TASK = "reverse_shift"
ROW = {"task": "t", "method": "m", "budget": "b", "lr": 1, "seed": 0, "steps": 1}
ROW |= {"exact": 0.5, "loss": 1.0}


@pytest.fixture
def few(monkeypatch):
    """Ten examples for the scores."""
    load_eval, validation_set = io.load_eval, compare.validation_set
    monkeypatch.setattr(io, "load_eval", lambda task: load_eval(task)[:10])
    monkeypatch.setattr(compare, "validation_set", lambda task: validation_set(task)[:10])


@pytest.fixture
def brief(few, monkeypatch):
    """Two methods with two rates each, two seeds, and runs of a single step in this process."""
    names = "lora+", "bitfit"
    settings = {name: METHODS[name]._replace(lrs=METHODS[name].lrs[:2]) for name in names}
    monkeypatch.setattr(compare, "METHODS", settings)
    monkeypatch.setattr(compare, "STEPS", 1)
    monkeypatch.setattr(compare, "SEEDS", SEEDS[:2])

    def run_briefly(*args):
        return run(*args[:-1], steps=1) | {"steps": args[-1]}

    run = compare.run
    monkeypatch.setattr(compare, "run", run_briefly)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)


class Here:
    """Stands in for a pool of processes: does the work at once."""

    def __init__(self, jobs, context):
        assert jobs >= 1 and context.get_start_method() == "spawn"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except KeyboardInterrupt as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how):
        assert how == {"wait": False, "cancel_futures": True}


@pytest.mark.parametrize("name", METHODS)
def test_every_point_keeps_its_budget(name):
    for budget, size in compare.points(name):
        trainable = count(compare.prepared(name, size, 0), quiet=True).trainable
        if budget == "its own":
            assert size is None
        elif name == "dora":  # LoRA's A and B at that budget, and one length for each row
            assert trainable == BUDGETS[budget] + 1152
        else:
            assert 0.88 * BUDGETS[budget] < trainable <= 1.01 * BUDGETS[budget]


def test_the_seeds_and_the_sets_are_apart():
    assert len(set(SEEDS)) >= 5 and TUNING_SEED not in SEEDS
    for task in ("reverse_shift", "sort_descending"):
        test_set = {row.tobytes() for row in io.load_eval(task)}
        assert not test_set & {row.tobytes() for row in compare.validation_set(task)}


def test_the_best_rate_is_the_best_by_score_then_by_loss():
    rows = [
        ROW | {"lr": lr, "seed": seed, "exact": e, "loss": x}
        for lr, seed, e, x in [
            (1, 0, 0.5, 1.0),
            (2, 0, 0.7, 0.9),
            (3, 0, 0.7, 0.8),
            (4, 0, 0.0, None),  # diverged
            (5, 1, 1.0, 0.0),  # not a tuning run
        ]
    ]
    assert compare.best_rates(rows) == {("t", "m", "b"): 3}
    assert compare.settled(rows) == rows[:4]  # the run at rate 1 no longer counts


def test_scores_are_those_of_one_setting_seed_by_seed():
    setting = {"task": "t", "method": "m", "budget": "b", "steps": compare.STEPS}
    rows = [setting | {"seed": seed, "exact": seed / 10, "loss": -seed} for seed in (0, 2, 1)]
    rows += [rows[1] | other for other in ({"steps": 900}, {"task": "u"}, {"budget": "c"})]
    assert compare.scores(rows, "t", "m", "b") == [0.1, 0.2]
    assert compare.scores(rows, "t", "m", "b", "loss") == [-1, -2]
    assert compare.scores(rows, "t", "m", "b", steps=900) == [0.2]


def test_a_run_is_repeatable_and_scored_on_the_set_of_its_seed(few):
    args = (TASK, "lora", "small", 1e-2)
    first, again = (compare.run(*args, seed=1, steps=2) for _ in range(2))
    assert first == again
    assert (first["size"], first["trainable"]) == (1, 2304)
    assert compare.key(first) == (*args, 1, 2)
    tuned = compare.run(*args, seed=TUNING_SEED, steps=2)
    assert tuned["loss"] != first["loss"]


def test_a_run_that_diverges_counts_as_zero():
    row = compare.run(TASK, "full", "its own", 1e30, 1, steps=5)
    assert (row["exact"], row["loss"], row["train_loss"]) == (0.0, None, None)


def test_an_interrupted_run_is_no_result(monkeypatch):
    stopped = History(loss=[1.0], interrupted=True)
    monkeypatch.setattr(compare, "fit", lambda *args, **kwargs: stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.run(TASK, "lora", "small", 1e-2, 1)


# ------------------------------------------------------------------ the command


def test_all_runs_are_made_once_and_the_file_says_what_made_them(brief, tmp_path, capsys):
    path = tmp_path / "runs.json"
    (tmp_path / "SHA256SUMS").write_text("of an older file", encoding="utf-8")
    argv = ["--out", str(path), "--tasks", TASK, "--jobs", "1"]
    assert compare.main(argv) == 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text(encoding="utf-8") == f"{digest}  runs.json\n"
    story = json.loads(path.read_text(encoding="utf-8"))
    points = 3 + 1  # three budgets of LoRA+, and BitFit's own
    assert len(story["runs"]) == points * (2 + 2)
    assert story["command"] == "python -m minilora.compare" and story["version"]
    for at in {(r["method"], r["budget"]) for r in story["runs"]}:
        counted = [r for r in story["runs"] if (r["method"], r["budget"]) == at and r["seed"]]
        assert [r["seed"] for r in counted] == [1, 2]
        assert len({r["lr"] for r in counted}) == 1

    before = path.read_bytes()
    assert compare.main(argv) == 0  # nothing is left to do
    assert path.read_bytes() == before
    assert f"{points * 4} runs are in" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished_and_the_next_call_goes_on(
    brief, tmp_path, capsys, monkeypatch
):
    path, done, run = tmp_path / "runs.json", [], compare.run

    def third_time_unlucky(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return run(*args)

    monkeypatch.setattr(compare, "run", third_time_unlucky)
    argv = ["--out", str(path), "--tasks", TASK, "--methods", "bitfit", "--jobs", "1"]
    assert compare.main(argv) == 130
    kept = compare.load(path)
    assert 0 < len(kept) <= 3
    assert "goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(compare, "run", run)
    assert compare.main(argv) == 0
    assert len(compare.load(path)) == 2 + 2
    assert all(row in compare.load(path) for row in kept)


def test_a_disk_that_fills_up_keeps_what_is_finished(brief, tmp_path, capsys, monkeypatch):
    path, save = tmp_path / "runs.json", compare.save

    def save_two(path, rows):
        if len(rows) > 2:
            raise OSError(28, "No space left on device")
        save(path, rows)

    monkeypatch.setattr(compare, "save", save_two)
    assert compare.main(["--out", str(path), "--tasks", TASK, "--jobs", "1"]) == 1
    assert "No space left" in capsys.readouterr().out
    assert len(compare.load(path)) == 2


DAMAGED = {
    "empty": b"",
    "cut": b'{"runs": [{"task": "reverse_shift", ',
    "no text": b"\xff\xfe",
    "another": b"[1, 2]",
    "nothing in it": b"{}",
    "no rows": b'{"runs": 3}',
    "rows of another kind": b'{"runs": ["one"]}',
    "deep": b"[" * 100_000,
    "a row without a score": json.dumps({"runs": [{**ROW, "exact": []}, ROW]}).encode(),
    "a row without a rate": json.dumps({"runs": [{"task": "t", "exact": 0}]}).encode(),
    "a list for a task": json.dumps({"runs": [ROW | {"task": []}]}).encode(),
}


def test_a_row_is_read_once(tmp_path):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"runs": [ROW, ROW]}), encoding="utf-8")
    assert compare.load(path) == [ROW]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_kept(name, tmp_path, capsys, monkeypatch):
    path = tmp_path / "runs.json"
    path.write_bytes(DAMAGED[name])
    monkeypatch.setattr(compare, "work", None)
    with pytest.raises(SystemExit) as end:
        compare.main(["--out", str(path)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and len(err.splitlines()) == 1
    assert "runs.json is damaged" in err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [DAMAGED[name]]


@pytest.mark.parametrize(
    "args, word",
    [
        ("--jobs 0", "1 to 61"),
        ("--jobs 1000", "1 to 61"),
        ("--jobs two", "1 to 61"),
        ("--tasks sort", TASK),
        ("--methods rola", "bitfit"),
        ("--out nowhere/runs.json", "nowhere"),
        ("--out .", "no file"),
        (f"--out {os.devnull}", "no file"),
        ("--steps 3", "--steps"),
    ],
)
def test_a_wrong_word_gets_one_line(args, word, capsys, monkeypatch):
    monkeypatch.setattr(compare, "work", None)
    with pytest.raises(SystemExit) as end:
        compare.main(args.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and len(err.splitlines()) == 1
    assert word in err


def test_a_pool_is_never_larger_than_windows_allows(few, tmp_path, capsys, monkeypatch):
    asked = []

    def pool(jobs, context):
        asked.append(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "ProcessPoolExecutor", pool)
    for cores in (1, 64, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert compare.main(["--out", str(tmp_path / "runs.json"), "--methods", "bitfit"]) == 130
    assert asked == [1, 61, 1]


def test_a_browser_can_read_the_results():
    code = """if True:
        import sys
        sys.modules["_multiprocessing"] = None  # as a browser lacks it
        from minilora import compare, io
        assert compare.ProcessPoolExecutor is None
        print(len(compare.load(io.DATA / "compare.json")) > 0)
    """
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("True\n", "")


# ------------------------------------------------------------------ what is stored


def test_the_stored_comparison_is_whole():
    text = (io.DATA / "compare.json").read_text(encoding="utf-8")
    story, rows = json.loads(text), compare.load(io.DATA / "compare.json")
    assert rows == story["runs"] == compare.settled(rows)
    names = list(compare.tasks.NEW_SKILLS)
    settings = [(t, m, budget) for t in names for m in METHODS for budget, _ in compare.points(m)]
    best = compare.best_rates(rows)
    wanted = {args for stage in compare.PLAN.values() for args in stage(settings, best)}
    assert {compare.key(row) for row in rows} == wanted
    assert {row["method"] for row in rows if row["steps"] == compare.LONG} == set(METHODS)
    assert (story["steps"], story["batch_size"]) == (compare.STEPS, compare.BATCH)
    for row in rows:
        assert row["size"] == dict(compare.points(row["method"]))[row["budget"]]
        assert 0 <= row["exact"] <= row["letters"] <= 1 or row["loss"] is None
