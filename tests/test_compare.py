"""The comparison: fair points, rates chosen on other data, and runs that survive Ctrl-C."""

import hashlib
import json
from concurrent.futures import Future

import pytest

from minilora import compare, io
from minilora.compare import BUDGETS, METHODS, SEEDS, TUNING_SEED
from minilora.surgery import count
from minilora.train import History

TASK = "reverse_shift"


@pytest.fixture
def brief(monkeypatch):
    """Two methods with two rates each, and runs of a single step in this process."""
    few = {name: METHODS[name]._replace(lrs=METHODS[name].lrs[:2]) for name in ("lora+", "bitfit")}
    monkeypatch.setattr(compare, "METHODS", few)
    monkeypatch.setattr(compare, "STEPS", 1)

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
        {"task": "t", "method": "m", "budget": "b", "lr": lr, "seed": seed, "exact": e, "loss": x}
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


def test_a_run_is_repeatable_and_scored_on_the_set_of_its_seed():
    args = (TASK, "lora", "small", 1e-2)
    first, again = (compare.run(*args, seed=1, steps=2) for _ in range(2))
    assert first == again
    assert (first["size"], first["trainable"]) == (1, 2304)
    tuned = compare.run(*args, seed=TUNING_SEED, steps=2)
    assert tuned["loss"] != first["loss"]


def test_a_run_that_diverges_counts_as_zero():
    row = compare.run(TASK, "full", "its own", 1e30, 1, steps=5)
    assert (row["exact"], row["loss"], row["train_loss"]) == (0.0, None, None)


def test_an_interrupted_run_is_no_result(monkeypatch):
    monkeypatch.setattr(compare, "fit", lambda *args, **kwargs: compare_history())
    with pytest.raises(KeyboardInterrupt):
        compare.run(TASK, "lora", "small", 1e-2, 1)


def compare_history():
    """What `fit` returns after Ctrl-C."""
    return History(loss=[1.0], interrupted=True)


def test_all_runs_are_made_once_and_the_file_says_what_made_them(brief, tmp_path, capsys):
    path = tmp_path / "runs.json"
    (tmp_path / "SHA256SUMS").write_text("of an older file", "utf-8")
    argv = ["--out", str(path), "--tasks", TASK, "--jobs", "1"]
    assert compare.main(argv) == 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text("utf-8") == f"{digest}  runs.json\n"
    story = json.loads(path.read_text("utf-8"))
    points = 3 + 1  # three budgets of LoRA+, and BitFit's own
    assert len(story["runs"]) == points * (2 + len(SEEDS))
    assert story["command"] == "python -m minilora.compare" and story["version"]
    for at in {(r["method"], r["budget"]) for r in story["runs"]}:
        counted = [r for r in story["runs"] if (r["method"], r["budget"]) == at and r["seed"]]
        assert [r["seed"] for r in counted] == list(SEEDS)
        assert len({r["lr"] for r in counted}) == 1

    before = path.read_bytes()
    assert compare.main(argv) == 0  # nothing is left to do
    assert path.read_bytes() == before
    assert f"{points * 7} runs are in" in capsys.readouterr().out


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
    assert len(compare.load(path)) == 2 + len(SEEDS)
    assert all(row in compare.load(path) for row in kept)


def test_the_stored_comparison_is_whole():
    rows = compare.load(io.DATA / "compare.json")
    assert rows == compare.settled(rows) and len({compare.key(row) for row in rows}) == len(rows)
    wanted = {tuple(args) for args in compare.tuning(list(compare.tasks.NEW_SKILLS), METHODS)}
    assert {compare.key(row) for row in rows if row["seed"] == TUNING_SEED} == wanted
    best = compare.best_rates(rows)
    counted = {tuple(args) for args in compare.measured(best) + compare.longer(best)}
    assert {compare.key(row) for row in rows if row["seed"] != TUNING_SEED} == counted
    assert {row["method"] for row in rows if row["steps"] == compare.LONG} == set(METHODS)
    story = json.loads((io.DATA / "compare.json").read_text("utf-8"))
    assert (story["steps"], story["batch_size"]) == (compare.STEPS, compare.BATCH)
    for row in rows:
        assert row["size"] == dict(compare.points(row["method"]))[row["budget"]]
        assert 0 <= row["exact"] <= row["letters"] <= 1 or row["loss"] is None
