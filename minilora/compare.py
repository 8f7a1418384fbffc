"""Every method on the same base, the same tasks and the same steps: `python -m minilora.compare`.

For each method and budget the learning rate is chosen on a validation set, with a seed of its
own; then five other seeds are trained and scored on the test set. On the harder task the middle
budget is trained three times as long as well, since 300 steps measure speed more than ability.
Each finished run is written at once, so that Ctrl-C loses only the run that is under way and the
next call goes on from there.
"""

import json
import os
import sys
from collections import namedtuple
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import io, peft, safetensors, surgery, tasks
from .command import Parser, whole
from .train import evaluate, fit, task_batches

try:
    from concurrent.futures import ProcessPoolExecutor, as_completed
except ImportError:  # a browser has one process; notebooks only read the results
    ProcessPoolExecutor = as_completed = None

STEPS, LONG, BATCH = 300, 900, 64
LONG_TASK, LONG_BUDGETS = "sort_descending", ("medium", "its own")
BUDGETS = {"small": 2_304, "medium": 9_216, "large": 36_864}  # LoRA on every layer, r = 1, 4, 16
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED, VALIDATION_SEED = 0, 4096  # neither is one of SEEDS or that of the test set
MOST_JOBS = 61  # so many processes a pool on Windows can wait for

# ------------------------------------------------------------------ the methods


class Method(NamedTuple):
    """How to prepare a model, and what to try.

    `recipe` takes (model, size, rng=…). `sizes` are the rank, width or length at each of BUDGETS,
    or OWN if the method has no such knob; its recipe then takes the model alone. `lrs` are the
    learning rates to choose from.
    """

    recipe: object
    sizes: tuple
    lrs: tuple
    optimizer: object = None
    room: bool = False  # whether it puts as many positions as its size before the tokens


LORA, PLUS = partial(peft.lora, targets="blocks.*"), partial(peft.lora_plus, ratio=8)
ADAPTER = partial(peft.adapter, norms=False)
OWN, RANKS = (None,), (1, 4, 16)
RATES, SOFT = (3e-3, 1e-2, 2e-2, 4e-2), (1e-2, 3e-2, 1e-1, 3e-1)
METHODS = {
    "full": Method(peft.full, OWN, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "lora": Method(LORA, RANKS, RATES),
    "lora q,v": Method(peft.lora, (4, 16, 64), RATES),
    "rslora": Method(partial(LORA, rslora=True), RANKS, RATES),
    "lora+": Method(LORA, RANKS, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), PLUS),
    "dora": Method(partial(LORA, variant=peft.DoRA), RANKS, (*RATES, 8e-2)),
    "pissa": Method(partial(LORA, variant=peft.PiSSA), RANKS, (1e-3, *RATES)),
    "adapter": Method(ADAPTER, (4, 17, 70), RATES),
    "adapter, 1 a block": Method(partial(ADAPTER, where="pfeiffer"), (8, 35, 142), RATES),
    "prefix": Method(peft.prefix, (9, 36, 144), SOFT, room=True),
    "prompt": Method(peft.prompt, (36, 144, None), SOFT, room=True),
    "ia3": Method(peft.ia3, OWN, SOFT),
    "bitfit": Method(peft.bitfit, OWN, RATES),
}


def prepared(method, size, seed, dtype=np.float32):
    """The base, made ready by a method, with room for what it puts before the tokens."""
    chosen = METHODS[method]
    model = io.load_base(dtype, n_positions=tasks.N_POSITIONS + size if chosen.room else None)
    if chosen.sizes == OWN:
        return chosen.recipe(model)
    return chosen.recipe(model, size, rng=np.random.default_rng(seed))


def points(method):
    """(budget, size) for each size that a method is tried at."""
    sizes = METHODS[method].sizes
    if sizes == OWN:
        return [("its own", None)]
    return [(b, s) for b, s in zip(BUDGETS, sizes, strict=True) if s is not None]


# ------------------------------------------------------------------ one run

# the arguments of `run`, which tell one run from another
Run = namedtuple("Run", "task method budget lr seed steps")


def key(row):
    """What tells the run of a row from another."""
    return Run(*(row[name] for name in Run._fields))


def run(task, method, budget, lr, seed, steps=STEPS):
    """Train once and score.

    Returns:
        A dictionary: the arguments, the size, what trains, the loss at the end of training, and
        the score: on the validation set for the tuning seed, on the test set for the others.
    """
    size, draw = dict(points(method))[budget], task_batches(task, BATCH)
    model, special = prepared(method, size, seed), METHODS[method].optimizer
    adam = special and special(model, lr)
    row = Run(task, method, budget, lr, seed, steps)._asdict()
    row |= {"size": size, "trainable": surgery.count(model, quiet=True).trainable}
    try:
        history = fit(model, draw, steps=steps, lr=lr, seed=seed, optimizer=adam, progress=False)
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


# ------------------------------------------------------------------ the plan

# A setting is (task, method, budget). Each stage takes the settings and their best rates so far.


def tuning(settings, best):
    """The runs that choose the learning rates."""
    return [Run(*at, lr, TUNING_SEED, STEPS) for at in settings for lr in METHODS[at[1]].lrs]


def measured(settings, best):
    """The runs that count: five seeds at the best rate."""
    return [Run(*at, best[at], seed, STEPS) for at in settings for seed in SEEDS]


def longer(settings, best):
    """The same at the middle budget of the harder task, three times as long, at the same rates."""
    some = [at for at in settings if at[0] == LONG_TASK and at[2] in LONG_BUDGETS]
    return [Run(*at, best[at], seed, LONG) for at in some for seed in SEEDS]


PLAN = {"choosing rates": tuning, "five seeds": measured, "three times as long": longer}

# ------------------------------------------------------------------ what the rows say


def best_rates(rows):
    """The learning rate of the best tuning run for each (task, method, budget)."""
    best = {}
    for row in rows:
        at, rank = key(row)[:3], (row["exact"], -np.inf if row["loss"] is None else -row["loss"])
        if row["seed"] == TUNING_SEED and (at not in best or rank > best[at][0]):
            best[at] = (rank, row["lr"])
    return {at: lr for at, (_, lr) in best.items()}


def settled(rows):
    """The tuning runs, and of the others those at the best rate: a wider choice may change it."""
    best = best_rates(rows)
    return [r for r in rows if r["seed"] == TUNING_SEED or r["lr"] == best.get(key(r)[:3])]


def scores(rows, task, method, budget, name="exact", steps=STEPS):
    """What the measured runs of one setting scored, one number for each seed, in their order."""
    setting = {"task": task, "method": method, "budget": budget, "steps": steps}
    found = {row["seed"]: row[name] for row in rows if setting.items() <= row.items()}
    return [found[seed] for seed in SEEDS if seed in found]


# ------------------------------------------------------------------ the file and the work


def load(path):
    """The finished runs in a file, or none if there is no file.

    Raises:
        ValueError: if the file is damaged, or holds something else.
    """
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        rows = {key(row): row for row in runs}
        best_rates(runs)
    except (KeyError, RecursionError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged, or holds no runs") from None
    return list(rows.values())


def save(path, rows):
    """Write the runs, in a fixed order, with what made them. Atomic."""
    story = {"command": "python -m minilora.compare", "version": version("minilora")}
    head = json.dumps(story | {"steps": STEPS, "batch_size": BATCH})
    rows = sorted(rows, key=lambda row: list(map(str, key(row))))
    lines = ",\n".join(map(json.dumps, rows))
    safetensors.write_whole(path, [f'{head[:-1]}, "runs": [\n{lines}\n]}}\n'.encode()])


def work(todo, rows, path, jobs, label):
    """Do the runs that are not in `rows`, `jobs` at a time, and write each when it is finished."""
    import multiprocessing  # here, since a browser has none

    done = {key(row) for row in rows}
    todo = [at for at in todo if at not in done]
    fresh = multiprocessing.get_context("spawn")  # a forked process keeps the threads of this one
    with ProcessPoolExecutor(jobs, fresh) as pool, tqdm(total=len(todo), desc=label) as bar:
        try:
            for future in as_completed([pool.submit(run, *at) for at in todo]):
                rows.append(future.result())
                save(path, rows)
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for the rest


def main(argv=None):
    """Do all runs that are missing; returns the exit code."""
    parser = Parser(prog="python -m minilora.compare", description=__doc__)
    option, cores = parser.add_argument, min(os.cpu_count() or 1, MOST_JOBS)
    option("--out", type=Path, default=io.DATA / "compare.json", help="the file of the runs")
    parser.several("--tasks", tasks.NEW_SKILLS, list(tasks.NEW_SKILLS))
    parser.several("--methods", METHODS, list(METHODS))
    option("--jobs", type=whole(1, MOST_JOBS), default=cores, help=f"runs at a time ({cores})")
    args = parser.parse_args(argv)
    parser.writable(args.out)
    try:
        rows = load(args.out)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}; it stays as it is")
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one thread a run; the runs share the cores
    settings = [(t, m, budget) for t in args.tasks for m in args.methods for budget, _ in points(m)]
    code = 0
    try:
        for label, stage in PLAN.items():
            rows = settled(rows)
            work(stage(settings, best_rates(rows)), rows, args.out, args.jobs, label)
        if (args.out.parent / "SHA256SUMS").exists():
            io.write_sums(args.out.parent)
    except (KeyboardInterrupt, OSError) as error:
        print(f"\nstopped ({str(error) or 'Ctrl-C'}); the same command goes on from there")
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    print(f"{len(load(args.out))} runs are in {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
