"""The comparison: fair points, rates chosen on other data, and runs that survive Ctrl-C."""

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future

import numpy as np
import pytest

from minilora import compare, io
from minilora.compare import BUDGETS, METHODS, SEEDS, TUNING_SEEDS, Run, Setting
from minilora.surgery import count
from minilora.train import History
from surroundings import ROOT

TASK = "reverse_shift"
AT = Setting(TASK, "lora", "medium")
ROW = Run(*AT, lr=1.0, seed=0)._asdict() | {"exact": 0.5, "loss": 1.0}


@pytest.fixture
def few(monkeypatch):
    """Ten examples for the scores."""
    load_eval, validation_set = io.load_eval, compare.validation_set
    monkeypatch.setattr(io, "load_eval", lambda task: load_eval(task)[:10])
    monkeypatch.setattr(compare, "validation_set", lambda task: validation_set(task)[:10])


@pytest.fixture
def brief(few, monkeypatch):
    """Two methods, two test seeds, and made-up runs in this process: the best rate is 4e-3."""
    names = "lora", "bitfit"
    settings = {name: METHODS[name]._replace(lr=1e-3) for name in names}
    monkeypatch.setattr(compare, "METHODS", settings)
    monkeypatch.setattr(compare, "SEEDS", SEEDS[:2])
    monkeypatch.setattr(compare, "FEW", [("bitfit", "its own")])

    def run_briefly(*args):
        off = abs(np.log(args[-2] / 4e-3))
        scores = {"exact": 0.9 - off / 10, "letters": 0.95, "loss": off, "train_loss": off}
        return Run(*args)._asdict() | {"size": 1, "trainable": 1, "kept": 1} | scores

    monkeypatch.setattr(compare, "run", run_briefly)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(compare, "as_completed", list)  # all are done: in their order


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
        kept = count(compare.peft.fold(compare.prepared(name, size, 0)), quiet=True).trainable
        if budget == "its own":
            assert kept < BUDGETS["small"] or name == "full"
        elif name == "dora":  # LoRA's A and B at that budget, and one length for each row
            assert kept == BUDGETS[budget] + 1152
        else:
            assert 0.88 * BUDGETS[budget] < kept <= 1.07 * BUDGETS[budget]


def test_the_seeds_and_the_sets_are_apart():
    assert len(set(SEEDS)) >= 5 and not set(TUNING_SEEDS) & set(SEEDS)
    for task in compare.tasks.NEW_SKILLS:
        test_set = {row.tobytes() for row in io.load_eval(task)}
        assert not test_set & {row.tobytes() for row in compare.validation_set(task)}


def searched(score, lrs=(1, 2, 4, 8)):
    """What `choose` ends on, and the (rate, seed) that it asked for on the way."""
    seen = {}
    while True:
        best, todo = compare.choose(list(lrs), seen)
        if best is not None:
            assert not todo
            return best, set(seen)
        assert todo and not set(todo) & set(seen)
        seen |= {(lr, seed): (score(lr, seed), 0.0) for lr, seed in todo}


@pytest.mark.parametrize("peak", [0.25, 1, 2, 4, 8, 64])
def test_the_best_rate_is_never_at_the_edge_of_what_was_tried(peak):
    best, tried = searched(lambda lr, seed: -abs(np.log(lr / peak)))
    assert best == peak
    for seed in TUNING_SEEDS:
        assert {(peak / 2, seed), (peak, seed), (peak * 2, seed)} <= tried
    assert {(lr, TUNING_SEEDS[0]) for lr in (1, 2, 4, 8)} <= tried  # all begin with as many


def test_a_second_seed_may_move_the_choice():
    first, second = TUNING_SEEDS
    bonus = {(4, second): 5, (4, first): -1}
    score = lambda lr, seed: -abs(np.log(lr / 2)) + bonus.get((lr, seed), 0)  # noqa: E731
    best, tried = searched(score)
    assert best == 4 and (8, second) in tried


def test_equal_scores_are_told_apart_by_the_loss_and_divergence_is_last():
    seen = {(lr, s): (1.0, -loss) for lr, loss in [(1, 3), (2, 1), (4, 2)] for s in TUNING_SEEDS}
    seen |= {(8, s): (0.0, -np.inf) for s in TUNING_SEEDS}
    assert compare.choose([1, 2, 4, 8], seen) == (2, [])


def tuning_rows(at=AT, peak=1e-2):
    """Rows of a finished search whose best rate is `peak`."""
    score = lambda lr, seed: 0.9 - abs(np.log(lr / peak)) / 10  # noqa: E731
    _, tried = searched(score, METHODS[at.method].lrs)
    return [
        Run(*at, lr, seed)._asdict() | {"exact": score(lr, seed), "loss": 1.0} for lr, seed in tried
    ]


def test_what_is_missing_is_the_search_first_and_then_five_seeds():
    assert set(compare.missing([AT], [])) == {
        Run(*AT, lr, TUNING_SEEDS[0]) for lr in METHODS["lora"].lrs
    }
    rows = tuning_rows()
    todo = compare.missing([AT], rows)
    assert todo == [Run(*AT, 1e-2, seed) for seed in SEEDS]
    measured = [ROW | {"lr": 1e-2, "seed": seed, "exact": seed / 10} for seed in (2, 1)]
    assert compare.missing([AT], rows + measured) == todo[2:]
    assert compare.scores(rows + measured, AT) == [0.1, 0.2]
    assert compare.scores(rows + measured, AT._replace(steps=900)) == []
    lr, flat = compare.plateau(rows, AT)
    assert lr == 1e-2 and flat == pytest.approx([0.9 - np.log(2) / 10, 0.9, 0.9 - np.log(2) / 10])
    old = ROW | {"lr": 2e-2, "seed": 1}
    assert compare.settled([*rows, *measured, old]) == rows + measured


def test_scores_by_distance_are_means_over_its_tasks_for_each_seed():
    rows = [
        ROW | Setting(task, "lora", "medium")._asdict() | {"seed": seed, "exact": seed * (i % 2)}
        for i, task in enumerate(compare.tasks.NEW_SKILLS)
        for seed in SEEDS
    ]
    (found,) = compare.by_distance(rows).items()
    assert found[0] == "lora" and list(found[1]) == list(compare.tasks.DISTANCES)
    assert all((values == np.array(SEEDS) / 2).all() for values in found[1].values())
    assert compare.by_distance(rows[:-1]) == {}  # no mean of fewer than five


def test_a_run_is_repeatable_and_scored_on_the_set_of_its_seed(few):
    args = Run(TASK, "lora", "small", 0, 2, 1e-2, 1)
    first, again = (compare.run(*args) for _ in range(2))
    assert first == again
    assert (first["size"], first["trainable"], first["kept"]) == (1, 2304, 2304)
    assert compare.key(first) == args
    tuned = compare.run(*args._replace(seed=TUNING_SEEDS[0]))
    assert tuned["loss"] != first["loss"]


def test_of_a_prefix_what_its_mlp_computes_is_kept(few):
    row = compare.run(TASK, "prefix", "small", 0, 1, 1e-2, 1)
    assert (row["size"], row["kept"]) == (9, 2304) and row["trainable"] > 2304


@pytest.mark.parametrize("n", [8, 512])
def test_a_few_examples_are_all_that_a_run_sees(n):
    draw, rng, seen = compare.a_few(TASK, n, 1), np.random.default_rng(0), set()
    for _ in range(60):
        inputs, _ = draw(rng)
        assert len(inputs) == min(n, compare.BATCH)
        seen |= {row.tobytes() for row in inputs}
    assert len(seen) == n
    other = compare.a_few(TASK, n, 2)(rng)[0]
    assert not seen & {row.tobytes() for row in other}


def test_a_run_that_diverges_counts_as_zero():
    row = compare.run(TASK, "full", "its own", 0, 5, 1e30, 1)
    assert (row["exact"], row["loss"], row["train_loss"]) == (0.0, None, None)


def test_an_interrupted_run_is_no_result(monkeypatch):
    stopped = History(loss=[1.0], interrupted=True)
    monkeypatch.setattr(compare, "fit", lambda *args, **kwargs: stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.run(TASK, "lora", "small", 0, 1, 1e-2, 1)


# ------------------------------------------------------------------ the command


def test_all_runs_are_made_once_and_the_file_says_what_made_them(brief, tmp_path, capsys):
    path = tmp_path / "runs.json"
    (tmp_path / "SHA256SUMS").write_text("of an older file", encoding="utf-8")
    argv = ["--out", str(path), "--tasks", "unnamed_sort", "--jobs", "1"]
    assert compare.main(argv) == 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text(encoding="utf-8") == f"{digest}  runs.json\n"
    story = json.loads(path.read_text(encoding="utf-8"))
    rows = story.pop("runs")
    # the middle for both, the same three times as long, four training sets, two other budgets
    assert len({compare.key(r)[:5] for r in rows}) == 2 + 2 + 4 + 2
    assert len(rows) == 10 * (4 + 3 + 2)
    assert {r["lr"] for r in rows if r["seed"] in SEEDS} == {4e-3}
    assert story == compare.story() and story["numpy"] == np.__version__

    before = path.read_bytes()
    assert compare.main(argv) == 0  # nothing is left to do
    assert path.read_bytes() == before
    assert "90 runs are in" in capsys.readouterr().out
    assert compare.main(["--table", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "No method is complete yet." in out and "three times as long" in out
    assert re.search(r"unnamed_sort +bitfit +its own +8 +300 +90 \(90-90\) +0.004 +83 90 83", out)


def test_runs_that_something_else_made_do_not_mix(tmp_path, capsys, monkeypatch):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(compare.story() | {"numpy": "0.1", "runs": [ROW]}), encoding="utf-8")
    monkeypatch.setattr(compare, "work", None)
    with pytest.raises(SystemExit) as end:
        compare.main(["--out", str(path)])
    err = capsys.readouterr().err
    assert (
        end.value.code == 2 and "made with numpy 0.1; here is" in err and len(err.splitlines()) == 1
    )
    assert compare.load(path) == [ROW]  # to be read, it is good enough


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
    argv = ["--out", str(path), "--tasks", "swap_shift", "--methods", "bitfit", "--jobs", "1"]
    assert compare.main(argv) == 130
    kept = compare.load(path)
    assert len(kept) == 3
    assert "goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(compare, "run", run)
    assert compare.main(argv) == 0
    assert len(compare.load(path)) == 4 + 3 + 2
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
    "an unknown method": json.dumps({"runs": [ROW | {"method": "rola"}]}).encode(),
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


def test_the_stored_comparison_holds_what_the_plan_asks_for():
    text = (io.DATA / "compare.json").read_text(encoding="utf-8")
    story, rows = json.loads(text), compare.load(io.DATA / "compare.json")
    assert rows == story.pop("runs") == compare.settled(rows)
    assert {n: story[n] for n in ("base", "eval", "batch_size")} == {
        n: compare.story()[n] for n in ("base", "eval", "batch_size")
    }
    planned = {at for stage in compare.PLAN.values() for at in stage(rows)}
    assert compare.missing(planned, rows) == []
    assert planned <= {Setting(*compare.key(row)[:5]) for row in rows}
    for row in rows:
        assert row["size"] == dict(compare.points(row["method"]))[row["budget"]]
        assert row["loss"] is None or 0 <= row["exact"] <= row["letters"] <= 1
    tuned = compare.tuned(rows)
    for at in planned:
        best, tried = tuned[at][0], {r["lr"] for r in rows if compare.key(r)[:5] == at}
        assert min(tried) < best < max(tried)
