"""Every method on the same base, the same tasks and the same steps: `python -m minilora.compare`.

Three distances from what the base can do, two new tasks at each. The learning rate of each setting
is chosen on a validation set: from four rates a factor of two apart, and from more if the best
stands at an edge; the best and its neighbours are tried with a second seed. Then five other seeds
are trained and scored on the test set. Each finished run is written at once, so that Ctrl-C loses
only the runs that are under way and the next call goes on from there.
"""

import hashlib
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
from .command import Parser, table, whole
from .train import evaluate, fit, task_batches

try:
    from concurrent.futures import ProcessPoolExecutor, as_completed
except ImportError:  # a browser has one process; notebooks only read the results
    ProcessPoolExecutor = as_completed = None

STEPS, LONG, BATCH = 300, 900, 64
BUDGETS = {"small": 2_304, "medium": 9_216, "large": 36_864}  # LoRA on every layer, r = 1, 4, 16
SEEDS, TUNING_SEEDS, VALIDATION_SEED = (1, 2, 3, 4, 5), (0, 6), 4096
FIRST = [names[0] for names in tasks.DISTANCES.values()]  # one task of each distance
MOST_JOBS = 61  # so many processes a pool on Windows can wait for

# ------------------------------------------------------------------ the methods


class Method(NamedTuple):
    """How to prepare a model, and what to try.

    `recipe` takes (model, size, rng=…). `sizes` are the rank, width or length at each of BUDGETS;
    or there is one, for a method that has no budget but its own: if it is None, the recipe takes
    the model alone. `lr` is the lowest of the four learning rates that are tried at first.
    """

    recipe: object
    sizes: tuple
    lr: float
    optimizer: object = None
    room: bool = False  # whether it puts as many positions as its size before the tokens

    @property
    def lrs(self):
        """The rates to begin with."""
        return [self.lr * 2**i for i in range(4)]


LORA, PLUS = partial(peft.lora, targets="blocks.*"), partial(peft.lora_plus, ratio=8)
ADAPTER = partial(peft.adapter, norms=True)
ROW = partial(peft.token_rows, tokens=[tasks.UNNAMED])
OWN, RANKS, WIDTHS = (None,), (1, 4, 16), (3, 16, 70)
METHODS = {
    "full": Method(peft.full, OWN, 2e-3),
    "lora": Method(LORA, RANKS, 5e-3),
    "lora q,v": Method(peft.lora, (4, 16, 64), 1e-2),
    "rslora": Method(partial(LORA, rslora=True), RANKS, 5e-3),
    "lora+": Method(LORA, RANKS, 2e-3, PLUS),
    "dora": Method(partial(LORA, variant=peft.DoRA), RANKS, 5e-3),
    "pissa": Method(partial(LORA, variant=peft.PiSSA), RANKS, 2.5e-3),
    "adapter": Method(ADAPTER, WIDTHS, 1e-2),
    "pfeiffer": Method(partial(ADAPTER, where="pfeiffer"), (6, 33, 140), 1e-2),
    "parallel": Method(partial(ADAPTER, parallel=True), WIDTHS, 1e-2),
    "prefix": Method(partial(peft.prefix, hidden=64), (9, 36, 144), 5e-3, room=True),
    "prompt": Method(peft.prompt, (9,), 5e-2, room=True),
    "ia3": Method(peft.ia3, OWN, 5e-2),
    "bitfit": Method(peft.bitfit, OWN, 2.5e-2),
    "token row": Method(ROW, OWN, 5e-2),
}


def prepared(method, size, seed, dtype=np.float32):
    """The base, made ready by a method, with room for what it puts before the tokens."""
    chosen = METHODS[method]
    model = io.load_base(dtype, n_positions=tasks.N_POSITIONS + size if chosen.room else None)
    if size is None:
        return chosen.recipe(model)
    return chosen.recipe(model, size, rng=np.random.default_rng(seed))


def points(method):
    """(budget, size) for each size that a method is tried at."""
    sizes = METHODS[method].sizes
    return [("its own", *sizes)] if len(sizes) == 1 else list(zip(BUDGETS, sizes, strict=True))


# ------------------------------------------------------------------ one run

# what is compared; `examples` is the size of the training set, 0 if each step draws new ones
Setting = namedtuple("Setting", "task method budget examples steps", defaults=(0, STEPS))
# the arguments of `run`, which tell one run from another
Run = namedtuple("Run", (*Setting._fields, "lr", "seed"))


def key(row):
    """What tells the run of a row from another."""
    return Run(*(row[name] for name in Run._fields))


def run(task, method, budget, examples, steps, lr, seed):
    """Train once and score: on the validation set for a tuning seed, else on the test set.

    Returns the arguments, the size, how many numbers train and how many are kept (of a prefix,
    what its MLP computes), the score, and the loss at the end of training.
    """
    size, special = dict(points(method))[budget], METHODS[method].optimizer
    model = prepared(method, size, seed)
    adam = special and special(model, lr)
    row = Run(task, method, budget, examples, steps, lr, seed)._asdict()
    row |= {"size": size, "trainable": surgery.count(model, quiet=True).trainable}
    row["kept"] = surgery.count(peft.fold(prepared(method, size, seed)), quiet=True).trainable
    draw = a_few(task, examples, seed) if examples else task_batches(task, BATCH)
    try:
        history = fit(model, draw, steps=steps, lr=lr, seed=seed, optimizer=adam, progress=False)
    except FloatingPointError:
        return row | {"exact": 0.0, "letters": 0.0, "loss": None, "train_loss": None}
    if history.interrupted:
        raise KeyboardInterrupt
    ids = validation_set(task) if seed in TUNING_SEEDS else io.load_eval(task)
    score = evaluate(peft.fold(model), ids)
    return row | {
        "exact": score.exact_match,
        "letters": round(score.token_accuracy, 5),
        "loss": round(score.loss, 6),
        "train_loss": round(float(np.mean(history.loss[-20:])), 6),
    }


def a_few(task, n, seed):
    """A `draw` for `fit` that has seen no more than `n` examples, which depend on the seed."""
    own = tasks.sample(task, n, np.random.default_rng(10_000 + seed))
    return lambda rng: tasks.inputs_and_targets(own[rng.permutation(n)[:BATCH]])


def validation_set(task):
    """500 examples for choosing learning rates; not those of the test set."""
    return tasks.sample(task, 500, np.random.default_rng(VALIDATION_SEED))


# ------------------------------------------------------------------ the plan

FEW = [("full", "its own"), ("lora", "small"), ("lora", "medium"), ("adapter", "medium")]
FEW += [("bitfit", "its own"), ("token row", "its own")]
EXAMPLES = (8, 32, 128, 512)
SIZED = "lora", "adapter"  # beside and in series


def middle(rows):
    """Every method on every task, at the middle budget or its own."""
    usual = [(m, budget) for m in METHODS for budget, _ in points(m) if budget in MIDDLE]
    return [Setting(task, *at, 0, STEPS) for task in tasks.NEW_SKILLS for at in usual]


def few(rows):
    """A few examples, on a task that the base knows and on one that it must build."""
    ends = FIRST[0], FIRST[-1]
    return [Setting(task, *at, n, STEPS) for task in ends for n in EXAMPLES for at in FEW]


def longer(rows):
    """Three times as long, on a task of each distance, where 300 steps were not enough."""
    short = [at for at in middle(rows) if at.task in FIRST and scores(rows, at)]
    return [at._replace(steps=LONG) for at in short if np.mean(scores(rows, at)) < 0.95]


def others(rows):
    """The small and the large budget, for two methods, on a task of each distance."""
    usual = [m for m in METHODS if m in SIZED]
    ends = [(m, budget) for m in usual for budget, _ in points(m) if budget not in MIDDLE]
    return [Setting(task, *at, 0, STEPS) for task in FIRST for at in ends]


MIDDLE = "medium", "its own"
# what each takes into account of the rows so far comes from those above it
PLAN = {"distances": middle, "few examples": few, "three times as long": longer, "budgets": others}

# ------------------------------------------------------------------ what the rows say


def choose(lrs, seen):
    """The best of some learning rates, or None, and the (rate, seed) to run before it can be named.

    `lrs` rise by factors of two; `seen` maps (rate, seed) to (exact match, -loss). The best is
    never at an edge.
    """
    lrs, (first, second) = list(lrs), TUNING_SEEDS
    while True:
        if todo := [(lr, first) for lr in lrs if (lr, first) not in seen]:
            return None, todo
        best = max(lrs, key=lambda lr: seen[lr, first])
        if lrs[0] < best < lrs[-1]:
            break
        lrs = [lrs[0] / 2, *lrs] if best == lrs[0] else [*lrs, 2 * best]
    while True:
        around = (best / 2, best, 2 * best)
        if todo := [(lr, s) for lr in around for s in TUNING_SEEDS if (lr, s) not in seen]:
            return None, todo
        mean = {lr: np.add(seen[lr, first], seen[lr, s]) for lr, s in seen if s == second}
        top = max(mean, key=lambda lr: tuple(mean[lr]))
        if top == best:
            return best, []
        best = top


def tuned(rows):
    """For each setting that was tuned, what `choose` says of it."""
    seen = {}
    for row in rows:
        if row["seed"] in TUNING_SEEDS:
            rank = float(row["exact"]), -np.inf if row["loss"] is None else -row["loss"]
            seen.setdefault(Setting(*key(row)[:5]), {})[row["lr"], row["seed"]] = rank
    return {at: choose(METHODS[at.method].lrs, found) for at, found in seen.items()}


def missing(settings, rows):
    """The runs that can be made now: for choosing rates first, then five seeds at the best."""
    known, done = tuned(rows), {key(row) for row in rows}
    todo = []
    for at in settings:
        lr, more = known.get(at, choose(METHODS[at.method].lrs, {}))
        todo += [Run(*at, *one) for one in more or [(lr, seed) for seed in SEEDS]]
    return [one for one in todo if one not in done]


def settled(rows):
    """The tuning runs, and of the others those at the best rate: a later choice may change it."""
    best = {at: lr for at, (lr, _) in tuned(rows).items()}
    return [r for r in rows if r["seed"] in TUNING_SEEDS or r["lr"] == best.get(key(r)[:5])]


def scores(rows, setting, name="exact"):
    """What the measured runs of one setting scored, one number for each seed, in their order."""
    found = {row["seed"]: row[name] for row in rows if key(row)[:5] == setting}
    return [found[seed] for seed in SEEDS if seed in found]


def plateau(rows, setting):
    """The best rate, and what half of it, itself and twice it scored, the mean of two seeds."""
    seen, lr = {}, tuned(rows)[setting][0]
    for row in rows:
        if key(row)[:5] == setting and row["seed"] in TUNING_SEEDS:
            seen.setdefault(row["lr"], []).append(row["exact"])
    return lr, [float(np.mean(seen[lr * factor])) for factor in (0.5, 1, 2)]


def by_distance(rows):
    """Scores at the middle budget: method to {distance: five means over its tasks, by seed}."""
    found = {}
    for at in middle(rows):
        if len(got := scores(rows, at)) == len(SEEDS):
            found.setdefault(at.method, {})[at.task] = got
    return {
        method: {d: np.mean([of[t] for t in names], axis=0) for d, names in tasks.DISTANCES.items()}
        for method, of in found.items()
        if len(of) == len(tasks.NEW_SKILLS)
    }


# ------------------------------------------------------------------ the file and the work


def story():
    """What decides the numbers: runs that differ in it do not stand in one file."""
    found = {"command": "python -m minilora.compare", "minilora": version("minilora")}
    found |= {"numpy": np.__version__, "batch_size": BATCH}
    for name in ("base", "eval"):
        data = (io.DATA / f"{name}.safetensors").read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def load(path, made_by=None):
    """The finished runs in a file, none if there is no file; `made_by` must be what made them."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        runs = found.pop("runs")
        rows = {key(row): row for row in runs}
        tuned(runs)
    except (KeyError, RecursionError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged, or holds no runs") from None
    if made_by is not None and found != made_by:
        name = next(n for n in {**made_by, **found} if made_by.get(n) != found.get(n))
        both = f"{name} {found.get(name)}; here is {made_by.get(name)}"
        raise ValueError(f"the runs in {path} were made with {both}, and they do not mix")
    return list(rows.values())


def save(path, rows):
    """Write the runs, in a fixed order, with what made them. Atomic."""
    rows = sorted(rows, key=lambda row: list(map(str, key(row))))
    lines = ",\n".join(map(json.dumps, rows))
    head = json.dumps(story())
    safetensors.write_whole(path, [f'{head[:-1]}, "runs": [\n{lines}\n]}}\n'.encode()])


def work(todo, rows, path, jobs, label):
    """Do some runs, `jobs` at a time, and write each when it is finished."""
    import multiprocessing  # here, since a browser has none

    fresh = multiprocessing.get_context("spawn")  # a forked process keeps the threads of this one
    with ProcessPoolExecutor(jobs, fresh) as pool, tqdm(total=len(todo), desc=label) as bar:
        try:
            for future in as_completed([pool.submit(run, *at) for at in todo]):
                rows.append(future.result())
                save(path, rows)
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for the rest


def spread(values):
    """Shares as text: their mean, and the lowest and the highest."""
    return "{:.0f} ({:.0f}-{:.0f})".format(*(100 * f(values) for f in (np.mean, np.min, np.max)))


def told(rows):
    """The tables of what the rows say, as text."""
    parts = ["Exact match in %, the mean over tasks: mean (lowest-highest) of five seeds.\n"]
    columns = {"method": "{method}", "numbers": "{numbers:,}"}
    columns |= {d: f"{{{d}}}" for d in tasks.DISTANCES}
    numbers = {(r["method"], r["budget"]): r["kept"] for r in rows}
    lines = [
        {"method": m, "numbers": next(numbers[m, b] for b in MIDDLE if (m, b) in numbers)}
        | {d: spread(values) for d, values in found.items()}
        for m, found in by_distance(rows).items()
    ]
    parts.append(table(columns, lines) if lines else "No method is complete yet.")
    for label, stage in PLAN.items():
        lines = []
        for at in stage(rows):
            if len(got := scores(rows, at)) == len(SEEDS):
                lr, flat = plateau(rows, at)
                lines.append(at._asdict() | {"exact": spread(got), "lr": f"{lr:g}"})
                lines[-1]["flat"] = " ".join(f"{100 * x:.0f}" for x in flat)
        columns = {"task": "{task}", "method": "{method}", "budget": "{budget}"}
        columns |= {"examples": "{examples}", "steps": "{steps}", "exact %": "{exact}"}
        columns |= {"rate": "{lr}", "at half, itself, twice": "{flat}"}
        if lines:
            parts.append(f"\n{label}\n\n{table(columns, lines)}")
    return "\n".join(parts)


def main(argv=None):
    """Do all runs that are missing; returns the exit code."""
    parser = Parser(prog="python -m minilora.compare", description=__doc__)
    option, cores = parser.add_argument, min(os.cpu_count() or 1, MOST_JOBS)
    option("--out", type=Path, default=io.DATA / "compare.json", help="the file of the runs")
    parser.several("--tasks", tasks.NEW_SKILLS, list(tasks.NEW_SKILLS))
    parser.several("--methods", METHODS, list(METHODS))
    option("--jobs", type=whole(1, MOST_JOBS), default=cores, help=f"runs at a time ({cores})")
    option("--table", action="store_true", help="print what the file says, and run nothing")
    args = parser.parse_args(argv)
    try:
        if args.table:
            print(told(load(args.out)))
            return 0
        parser.writable(args.out)
        rows = load(args.out, story())
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}; it stays as it is")
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one thread a run; the runs share the cores
    code = 0
    try:
        for label, stage in PLAN.items():
            rows = settled(rows)
            asked = [s for s in stage(rows) if s.task in args.tasks and s.method in args.methods]
            while todo := missing(asked, rows):
                work(todo, rows, args.out, args.jobs, label)
        if (args.out.parent / "SHA256SUMS").exists():
            io.write_sums(args.out.parent)
    except (KeyboardInterrupt, OSError) as error:
        print(f"\nstopped ({str(error) or 'Ctrl-C'}); the same command goes on from there")
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    print(f"{len(load(args.out))} runs are in {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
