"""Every method on the same base, the same tasks and the same steps: `python -m minilora.compare`.

For each method and budget the learning rate is chosen on a validation set, with a seed of its
own; then five other seeds are trained and scored on the test set. On the harder task the middle
budget is trained three times as long as well, since 300 steps measure speed more than ability.
Each finished run is written at once, so that Ctrl-C loses only the run that is under way and the
next call goes on from there.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import io, peft, surgery, tasks
from .train import evaluate, fit, task_batches

STEPS, LONG, BATCH = 300, 900, 64
LONG_TASK, LONG_BUDGETS = "sort_descending", ("medium", "its own")
BUDGETS = {"small": 2_304, "medium": 9_216, "large": 36_864}  # LoRA on every layer, r = 1, 4, 16
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED, VALIDATION_SEED = 0, 4096  # neither is one of SEEDS or that of the test set
N_POSITIONS = 192  # room for the longest prefix


class Method(NamedTuple):
    """How to prepare a model, and what to try.

    `recipe` takes (model, size, rng). `sizes` are the rank, width or length at each of BUDGETS,
    or one `None` if the method has no such knob. `lrs` are the learning rates to choose from.
    """

    recipe: object
    sizes: tuple
    lrs: tuple
    optimizer: object = None
    room: bool = False  # whether it needs more positions than the task has tokens


def _lora(model, r, rng, **kwargs):
    return peft.lora(model, r, targets="blocks.*", rng=rng, **kwargs)


RATES, SOFT = (3e-3, 1e-2, 2e-2, 4e-2), (1e-2, 3e-2, 1e-1, 3e-1)
METHODS = {
    "full": Method(lambda m, _, rng: peft.full(m), (None,), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "lora": Method(_lora, (1, 4, 16), RATES),
    "lora q,v": Method(lambda m, r, rng: peft.lora(m, r, rng=rng), (4, 16, 64), RATES),
    "rslora": Method(lambda m, r, rng: _lora(m, r, rng, rslora=True), (1, 4, 16), RATES),
    "lora+": Method(
        _lora, (1, 4, 16), (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), lambda m, lr: peft.lora_plus(m, lr, 8)
    ),
    "dora": Method(
        lambda m, r, rng: _lora(m, r, rng, variant=peft.DoRA), (1, 4, 16), (*RATES, 8e-2)
    ),
    "pissa": Method(
        lambda m, r, rng: _lora(m, r, rng, variant=peft.PiSSA), (1, 4, 16), (1e-3, *RATES)
    ),
    "adapter": Method(lambda m, r, rng: peft.adapter(m, r, rng=rng), (4, 17, 70), RATES),
    "adapter, 1 a block": Method(
        lambda m, r, rng: peft.adapter(m, r, "pfeiffer", rng=rng), (8, 35, 142), RATES
    ),
    "prefix": Method(lambda m, n, rng: peft.prefix(m, n, rng=rng), (9, 36, 144), SOFT, room=True),
    "prompt": Method(
        lambda m, n, rng: peft.prompt(m, n, rng=rng), (36, 144, None), SOFT, room=True
    ),
    "ia3": Method(lambda m, _, rng: peft.ia3(m), (None,), SOFT),
    "bitfit": Method(lambda m, _, rng: peft.bitfit(m), (None,), RATES),
}


def prepared(method, size, seed, dtype=np.float32):
    """The base, made ready by a method, with room for the longest prefix if it needs room."""
    chosen = METHODS[method]
    model = io.load_base(dtype, n_positions=N_POSITIONS if chosen.room else None)
    return chosen.recipe(model, size, np.random.default_rng(seed))


def points(method):
    """(budget, size) for each size that a method is tried at."""
    sizes = METHODS[method].sizes
    if sizes == (None,):
        return [("its own", None)]
    return [(b, s) for b, s in zip(BUDGETS, sizes, strict=True) if s is not None]


def run(task, method, budget, lr, seed, steps=STEPS):
    """Train once and score.

    Returns:
        A dictionary: the arguments, the size, what trains, the loss at the end of training, and
        the score: on the validation set for the tuning seed, on the test set for the others.
    """
    size = dict(points(method))[budget]
    model = prepared(method, size, seed)
    chosen = METHODS[method]
    optimizer = chosen.optimizer and chosen.optimizer(model, lr)
    draw = task_batches(task, BATCH)
    row = {"task": task, "method": method, "budget": budget, "lr": lr, "seed": seed}
    row |= {"steps": steps}
    row |= {"size": size, "trainable": surgery.count(model, quiet=True).trainable}
    try:
        history = fit(
            model, draw, steps=steps, lr=lr, seed=seed, optimizer=optimizer, progress=False
        )
    except FloatingPointError:
        return row | {"exact": 0.0, "letters": 0.0, "loss": None, "train_loss": None}
    if history.interrupted:
        raise KeyboardInterrupt
    score = evaluate(model, validation_set(task) if seed == TUNING_SEED else io.load_eval(task))
    return row | {
        "exact": score.exact_match,
        "letters": round(score.token_accuracy, 5),
        "loss": round(score.loss, 6),
        "train_loss": round(float(np.mean(history.loss[-20:])), 6),
    }


def validation_set(task):
    """500 examples for choosing learning rates; not those of the test set."""
    return tasks.sample(task, 500, np.random.default_rng(VALIDATION_SEED))


def key(row):
    """What tells one run from another."""
    return tuple(row[name] for name in ("task", "method", "budget", "lr", "seed", "steps"))


def tuning(names, methods):
    """The runs that choose the learning rates, as arguments of `run`."""
    return [
        (task, method, budget, lr, TUNING_SEED, STEPS)
        for task in names
        for method in methods
        for budget, _ in points(method)
        for lr in METHODS[method].lrs
    ]


def best_rates(rows):
    """The learning rate of the best tuning run for each (task, method, budget)."""
    best = {}
    for row in rows:
        if row["seed"] != TUNING_SEED:
            continue
        at = (row["task"], row["method"], row["budget"])
        rank = (row["exact"], -(row["loss"] if row["loss"] is not None else np.inf))
        if at not in best or rank > best[at][0]:
            best[at] = (rank, row["lr"])
    return {at: lr for at, (_, lr) in best.items()}


def settled(rows):
    """The tuning runs, and of the others those at the best rate: a wider choice may change it."""
    best = best_rates(rows)
    return [
        row
        for row in rows
        if row["seed"] == TUNING_SEED
        or row["lr"] == best[row["task"], row["method"], row["budget"]]
    ]


def measured(best):
    """The runs that count, as arguments of `run`: five seeds at the best rate."""
    return [(*at, lr, seed, STEPS) for at, lr in best.items() for seed in SEEDS]


def longer(best):
    """The same at the middle budget of the harder task, three times as long, at the same rates."""
    return [
        (task, method, budget, lr, seed, LONG)
        for (task, method, budget), lr in best.items()
        if task == LONG_TASK and budget in LONG_BUDGETS
        for seed in SEEDS
    ]


def scores(rows, task, method, budget, name="exact", steps=STEPS):
    """What the measured runs of one setting scored, one number for each seed, in their order."""
    setting = {"task": task, "method": method, "budget": budget, "steps": steps}
    found = {row["seed"]: row[name] for row in rows if setting.items() <= row.items()}
    return [found[seed] for seed in SEEDS if seed in found]


def load(path):
    """The finished runs in a file, or none if there is no file."""
    return json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []


def save(path, rows):
    """Write the runs, in a fixed order, with what made them. Atomic."""
    story = {
        "command": "python -m minilora.compare",
        "version": version("minilora"),
        "steps": STEPS,
        "batch_size": BATCH,
    }
    lines = ",\n".join(
        json.dumps(row) for row in sorted(rows, key=lambda r: list(map(str, key(r))))
    )
    spare = path.with_suffix(".tmp")
    spare.write_text(json.dumps(story)[:-1] + ', "runs": [\n' + lines + "\n]}\n", "utf-8")
    os.replace(spare, path)


def work(todo, rows, path, jobs, label):
    """Do the runs that are not in `rows`, `jobs` at a time, and write each when it is finished."""
    done = {key(row) for row in rows}
    todo = [args for args in todo if args not in done]
    fresh = multiprocessing.get_context("spawn")  # a forked process keeps the threads of this one
    with ProcessPoolExecutor(jobs, fresh) as pool, tqdm(total=len(todo), desc=label) as bar:
        try:
            for future in as_completed([pool.submit(run, *args) for args in todo]):
                rows.append(future.result())
                save(path, rows)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return rows


def main(argv=None):
    """Do all runs that are missing; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m minilora.compare", description=__doc__)
    parser.add_argument("--out", type=Path, default=io.DATA / "compare.json", help="results file")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks.NEW_SKILLS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs}; expected 1 or more")
    if sys.platform == "win32":
        args.jobs = min(args.jobs, 61)  # a pool takes no more there
    names, methods = args.tasks or list(tasks.NEW_SKILLS), args.methods or list(METHODS)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one thread a run; the runs share the cores
    rows = load(args.out)
    try:
        work(tuning(names, methods), rows, args.out, args.jobs, "choosing rates")
        rows = settled(rows)
        best = {
            at: lr for at, lr in best_rates(rows).items() if at[0] in names and at[1] in methods
        }
        work(measured(best), rows, args.out, args.jobs, "five seeds")
        work(longer(best), rows, args.out, args.jobs, "three times as long")
    except KeyboardInterrupt:
        print(f"\nstopped; {len(rows)} runs are in {args.out}: the same command goes on from there")
        return 130
    if (args.out.parent / "SHA256SUMS").exists():
        io.write_sums(args.out.parent)
    print(f"{len(rows)} runs are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
