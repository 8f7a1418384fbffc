"""The judge of the capstone: `python -m minilora.grade FOLDER > grades.csv`.

FOLDER holds one folder for each submission, and that holds files, no code: `model.safetensors` from
`save_model`, always, and an adapter from `save_adapter` as `SKILL.safetensors` where one is needed.
What is measured is what comes out of these files, on strings drawn here from the lecturer's seed.

How many steps a file took to train cannot be read off it, so where files are handed in no line is
about steps. A brief that limits them takes `recipe.json` instead, and the judge itself trains, from
the base, by the methods of `compare`:

    {"interleave": {"method": "lora", "size": 4, "lr": 0.01, "steps": 100, "seed": 0}}

Points are for lines that the untouched base fails, in equal parts; a line that it meets and the
submission breaks costs some. Start it outside of FOLDER: Python imports what lies where it starts.
"""

import csv
import functools
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import compare, io, ops, safetensors, tasks
from .command import Parser, whole
from .tensor import no_grad
from .train import evaluate, fit

POINTS, BROKEN, STRINGS = 40, 10, 500  # for all lines; off for a line broken; for each skill
LARGEST, MEMORY = 2**22, 2**32  # bytes of a file; of the process that reads it
COLUMNS = "submission", "brief", "points", "where points are lost"


class Brief(NamedTuple):
    """Exact match of at least so much in each skill, and a limit for each other line."""

    skills: tuple
    at_least: float
    at_most: dict


class Line(NamedTuple):
    """A line of a brief, measured, and whether the untouched base meets it."""

    name: str
    value: float
    limit: float
    passes: bool
    base_passes: bool

    def __str__(self):
        if self.name in tasks.TASKS:
            return f"{self.name} {self.value:.1%} (at least {self.limit:.1%})"
        form = ".3f" if type(self.limit) is float else ",d"
        return f"{self.name} {self.value:{form}} (at most {self.limit:{form}})"


KNOWN, NEW = tuple(tasks.SKILLS), ("sort_descending", "interleave")
BRIEFS = {
    # a greeting card's chip: the base's skills in few bytes, and no slower
    "card": Brief(KNOWN, 0.90, {"bytes": 75_000, "FLOPs / base": 1.0, "GEMMs": 17}),
    # one base on a server, which stays as it is to the bit, and a small file for each new skill
    "school": Brief(
        ("sort_descending", "reverse_shift"),
        *(0.50, {"largest adapter": 20_000, "tensors changed": 0, "FLOPs / base": 1.1}),
    ),
    # a slow chip with room enough: less arithmetic, in no more products
    "clock": Brief(KNOWN, 0.90, {"FLOPs / base": 0.60, "GEMMs": 17}),
    # the card at two thirds of its bytes
    "stamp": Brief(KNOWN, 0.90, {"bytes": 50_000, "GEMMs": 17}),
    # a telephone: the base's skills and two that it lacks, in one small download
    "phrasebook": Brief(KNOWN + NEW, 0.85, {"bytes": 110_000, "GEMMs": 45}),
    # two skills by tomorrow, in few steps
    "evening": Brief(NEW, 0.50, {"steps": 300, "largest adapter": 100_000}),
}

# ------------------------------------------------------------------ what is handed in


def strings(skill, seed, n):
    """`n` examples (n, 18) of a skill by the lecturer's seed, none of them in the public set."""
    ids = tasks.sample(skill, 2 * n, np.random.default_rng([seed, [*tasks.TASKS].index(skill)]))
    public = {tuple(row) for row in io.load_eval(skill).tolist()}
    return np.array([row for row in ids.tolist() if tuple(row) not in public][:n])  # (n, 18)


def collect(folder, brief, to):
    """Copy what a submission hands in to the folder `to`, or train it there by its recipe.

    Returns:
        Names ("model", and skills) to paths, and the steps that the judge has trained.

    Raises:
        ValueError: if a file is missing, is a link or no file, is too large or not asked for.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError("this is no folder")
    recipe = "steps" in brief.at_most
    wanted = ["recipe.json"] if recipe else [f"{n}.safetensors" for n in ("model", *brief.skills)]
    found = {path.name: path for path in folder.glob("[!.]*") if path.suffix != ".md"}
    for name, path in found.items():
        at = path.lstat()
        if name not in wanted or not stat.S_ISREG(at.st_mode) or at.st_size > LARGEST:
            kind = "a file" if stat.S_ISREG(at.st_mode) else "a link or a folder"
            raise ValueError(
                f"{name} is {kind} of {at.st_size:,} bytes; expected files of up to {LARGEST:,} "
                f"bytes, called {' or '.join(wanted)}"
            )
    if wanted[0] not in found:
        raise ValueError(f"{wanted[0]} is missing")
    if recipe:
        return train(json.loads(found["recipe.json"].read_text("utf-8")), brief, to)
    return {path.stem: Path(shutil.copyfile(path, to / name)) for name, path in found.items()}, 0


def train(recipe, brief, to):
    """Make the files of a submission from its recipe; returns what `collect` does."""
    paths, left = {"model": io.DATA / "base.safetensors"}, brief.at_most["steps"]
    for skill, plan in recipe.items():
        steps = plan["steps"]
        if skill not in brief.skills or type(steps) is not int or not 1 <= steps <= left:
            raise ValueError(f"recipe.json: {skill}, {steps!r} steps; {left} are left of the brief")
        model = compare.prepared(plan["method"], plan["size"], plan["seed"])
        make = compare.METHODS[plan["method"]].optimizer
        settings = {"lr": plan["lr"], "seed": plan["seed"], "progress": False}
        left -= steps
        fit(model, skill, steps=steps, optimizer=make and make(model, plan["lr"]), **settings)
        paths[skill] = to / f"{skill}.safetensors"
        io.save_adapter(model, paths[skill])
    return paths, brief.at_most["steps"] - left


# ------------------------------------------------------------------ what it does


def read(paths, skill="model"):
    """The model that answers for a skill, in float64, from the files alone.

    Raises:
        ValueError: if a file is damaged, does not fit, or holds a number that is not finite.
    """
    for name in {"model", skill} & paths.keys():
        arrays, _ = safetensors.read(paths[name])
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise ValueError(f"{paths[name].name} holds a number that is not finite")
    model = io.load_model(paths["model"], np.float64)
    return io.load_adapter(model, paths[skill]) if skill in paths and skill != "model" else model


def work(model):
    """FLOPs and number of the matrix products of one pass over 17 tokens."""
    with ops.count_gemms() as log, no_grad():
        model(np.zeros((1, tasks.N_POSITIONS), int))
    return ops.flops(log), len(log)


@np.errstate(all="ignore")  # an answer that overflows is a wrong one
def values(paths, brief, seed, steps=0):
    """What the files reach, by line, for every line that a brief may have."""
    base, models = io.load_base(), {skill: read(paths, skill) for skill in brief.skills}
    mine = {name: p.data for name, p in read(paths).named_parameters()}
    flops, gemms = np.max([work(model) for model in models.values()], axis=0).tolist()
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    pairs = [(mine.get(name), p.data) for name, p in base.named_parameters()]
    found = {skill: evaluate(m, strings(skill, seed, STRINGS))[2] for skill, m in models.items()}
    return found | {
        "bytes": sum(sizes.values()),
        "largest adapter": max([n for name, n in sizes.items() if name != "model"], default=0),
        "tensors changed": sum(not np.array_equal(a, b) for a, b in pairs),
        "FLOPs / base": flops / work(base)[0],
        "GEMMs": gemms,
        "steps": steps,
    }


@functools.cache
def _untouched(name, seed):
    return values({"model": io.DATA / "base.safetensors"}, BRIEFS[name], seed)


def measure(folder, name, seed):
    """Measure a submission by the brief of this name.

    Returns:
        A list of `Line`.

    Raises:
        ValueError: says what is wrong with the files.
    """
    brief = BRIEFS[name]
    with tempfile.TemporaryDirectory() as to:
        paths, steps = collect(Path(folder), brief, Path(to))
        found, base = values(paths, brief, seed, steps), _untouched(name, seed)

    def line(key, limit):
        sign = -1 if key in brief.skills else 1
        return Line(key, found[key], limit, *(sign * v[key] <= sign * limit for v in (found, base)))

    limits = dict.fromkeys(brief.skills, brief.at_least) | brief.at_most
    return [line(*item) for item in limits.items()]


def points(lines):
    """40 in equal parts for the lines that the base fails; less 10 for each other that fails."""
    earned = [line.passes for line in lines if not line.base_passes]
    broken = sum(line.base_passes and not line.passes for line in lines)
    return max(0, round(POINTS * sum(earned) / max(1, len(earned))) - BROKEN * broken)


# ------------------------------------------------------------------ a row of the grade sheet


def grade(folder, name, seed, limit=None):
    """Grade a submission, in a process of its own if `limit` gives it so many seconds.

    Whatever is wrong with it costs this submission its points, and no other. A name or a text in
    a file cannot break the sheet.

    Returns:
        A row: the submission, the brief, its points, and where the others are lost.
    """
    verdict = (_limited if limit else _judged)(Path(folder), name, seed, limit)
    return [_plain(Path(folder).name), name, *verdict]


def _judged(folder, name, seed, limit):
    try:
        if _plain(folder.name) != folder.name:
            raise ValueError(f"a name of {len(folder.name)} characters that no sheet should hold")
        lines = measure(folder, name, seed)
    except Exception as error:  # what a hostile file makes fail may be anything
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return 0, _plain(re.sub(r"\S*[/\\](?=\w+\.safetensors)", "", f"refused: {what}"))
    return points(lines), "; ".join(str(line) for line in lines if not line.passes)


def _limited(folder, name, seed, limit):
    import multiprocessing  # here, since a browser has none

    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_child, args=(theirs, folder, name, seed, limit), daemon=True)
    process.start()
    theirs.close()  # so that the pipe ends with the process
    try:
        return ours.recv() if ours.poll(limit) else (0, f"refused: it takes over {limit} seconds")
    except EOFError:
        return 0, "refused: its process died, as if out of memory"
    finally:
        process.kill()
        process.join()


def _child(pipe, *args):
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # not on Windows; there the time limit has to do
    pipe.send(_judged(*args))


def _plain(text):
    """One short line, without what a terminal, a spreadsheet or Markdown would obey."""
    text = "".join(c if c.isprintable() and c not in "|`<>" else " " for c in text)
    return " ".join(text.split()).lstrip("=+-@")[:300]


def main(argv=None):
    """Grade a folder of submissions, a row of CSV for each; returns the exit code."""
    parser = Parser(prog="python -m minilora.grade", description=__doc__)
    option = parser.add_argument
    option("folder", type=Path, help="in it a folder for each submission")
    option("--brief", choices=BRIEFS, default="card", help="what was asked for (card)")
    option("--seed", type=whole(0, 2**63), help="of the strings; drawn, and told, if not given")
    option("--limit", type=whole(1, 3600), default=120, help="seconds for each submission (120)")
    args = parser.parse_args(argv)
    if not args.folder.is_dir() or Path.cwd().is_relative_to(args.folder.resolve()):
        parser.error(f"folder is {str(args.folder)!r}; expected a folder, seen from outside of it")
    for library in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    seed = secrets.randbits(62) if args.seed is None else args.seed
    sheet = csv.writer(sys.stdout, lineterminator="\n")
    sheet.writerow(COLUMNS)
    for path in sorted(args.folder.glob("[!.]*")):
        sheet.writerow(grade(path, args.brief, seed, args.limit))
        sys.stdout.flush()  # a row is safe when it is known
    print(f"the same strings come from --seed {seed}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
