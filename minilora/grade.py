"""The judge of the capstone: `python -m minilora.grade FOLDER` grades a folder of submissions.

FOLDER holds one folder for each submission, and that holds files, no code: `model.safetensors` from
`save_model`, always, and where the brief has new skills `SKILL.safetensors` from `save_adapter`.
What is measured is what these files do, on strings drawn here from the lecturer's seed.

How many steps a file took to train cannot be read off it, so for files there is no such line. A
brief that limits steps takes `recipe.json` in place of files, and the judge trains itself, from the
base, by `compare`'s methods: `{"sort_descending": {"method": "lora", "size": 4, "lr": 0.01, "steps":
100, "seed": 0}}`.

Points are earned by lines that the untouched base fails, in equal parts; each line that it meets
and the submission breaks costs a quarter of them. Run it from outside of FOLDER: Python imports
what lies where it is started.
"""

import csv
import functools
import io as texts
import json
import math
import os
import re
import secrets
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


class Brief(NamedTuple):
    """What is asked for: exact match of at least `at_least` in each skill, and lines to limits."""

    about: str
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
            return f"{self.name} {self.value:.1%}, expected at least {self.limit:.1%}"
        form = ".3f" if type(self.limit) is float else ",d"
        return f"{self.name} {self.value:{form}}, expected at most {self.limit:{form}}"


KNOWN, HARD = tuple(tasks.SKILLS), ("sort_descending", "interleave")
BRIEFS = {
    "card": Brief(
        "A greeting card's chip: the five skills of the base, in few bytes, and no slower.",
        *(KNOWN, 0.90, {"bytes": 75_000, "FLOPs / base": 1.0, "GEMMs": 17}),
    ),
    "school": Brief(
        "One base on a server, which stays as it is to the bit, and a small file a new skill.",
        ("sort_descending", "reverse_shift"),
        *(0.50, {"largest adapter": 20_000, "tensors changed": 0, "FLOPs / base": 1.1}),
    ),
    "clock": Brief(
        "A slow chip with room enough: less arithmetic, and no more products.",
        *(KNOWN, 0.80, {"FLOPs / base": 0.60, "GEMMs": 17}),
    ),
    "stamp": Brief(
        "The card again, at two thirds of its bytes.",
        *(KNOWN, 0.90, {"bytes": 50_000, "GEMMs": 17}),
    ),
    "phrasebook": Brief(
        "A telephone: the five skills, and two that are built, all in one small download.",
        *((*KNOWN, *HARD), 0.85, {"bytes": 110_000, "GEMMs": 45}),
    ),
    "evening": Brief(
        "Two skills to build by tomorrow: few steps, counted by the judge, which trains.",
        *(HARD, 0.50, {"steps": 300, "largest adapter": 100_000}),
    ),
}

# ------------------------------------------------------------------ what is handed in


def strings(skill, seed, n=STRINGS):
    """`n` examples (n, 18) of a skill by the lecturer's seed, none from the public set."""
    ids = tasks.sample(skill, 2 * n, np.random.default_rng([seed, [*tasks.TASKS].index(skill)]))
    public = {tuple(row) for row in io.load_eval(skill).tolist()}
    return np.array([row for row in ids.tolist() if tuple(row) not in public][:n])  # (n, 18)


def files(folder, brief):
    """Name to path of what a submission hands in; all that lies there is looked at first.

    Raises:
        ValueError: if something is missing, is a link or no file, is too large, or if a model or
            an adapter has a name that the brief does not ask for.
    """
    folder = Path(folder)
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError("it is not a folder")
    wanted = [f"{name}.safetensors" for name in ("model", *brief.skills)]
    wanted = ["recipe.json"] if "steps" in brief.at_most else wanted
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name not in wanted:
            if path.suffix.lower() == ".safetensors":
                raise ValueError(f"{path.name} is there; expected {', '.join(wanted)}")
            continue  # an essay, say: inference does not read it
        at = path.lstat()
        if not stat.S_ISREG(at.st_mode):
            raise ValueError(f"{path.name} is a link or a folder; expected a file")
        if at.st_size > LARGEST:
            raise ValueError(f"{path.name} has {at.st_size:,} bytes; expected up to {LARGEST:,}")
        found[path.stem] = path
    if wanted[0] not in {path.name for path in found.values()}:
        raise ValueError(f"there is no {wanted[0]}")
    return found


def train(path, brief, folder):
    """Follow the recipe in a file, an adapter for each skill; returns paths and steps.

    Raises:
        ValueError: names what in the recipe cannot be followed.
    """
    plans, limit = json.loads(path.read_text("utf-8")), brief.at_most["steps"]
    if type(plans) is not dict or not plans or not plans.keys() <= set(brief.skills):
        raise ValueError(f"recipe.json: expected an object by skill: {', '.join(brief.skills)}")
    paths, steps = {"model": io.DATA / "base.safetensors"}, 0
    methods = [name for name, method in compare.METHODS.items() if not method.room]
    for skill, plan in plans.items():
        if type(plan) is not dict or plan.keys() != {"method", "size", "lr", "steps", "seed"}:
            raise ValueError(f"recipe.json: {skill}: expected method, size, lr, steps and seed")
        method, size, lr, n, seed = (plan[k] for k in ("method", "size", "lr", "steps", "seed"))
        if method not in methods:
            raise ValueError(f"recipe.json: method {method!r}; expected one of {methods}")
        sized = compare.METHODS[method].sizes != compare.OWN
        if (size is None) is sized or (sized and not _is_whole(size, 1, 64)):
            raise ValueError(f"recipe.json: size {size!r}; expected 1 to 64, or null if it has one")
        if type(lr) is not float or not 0 < lr < 10 or not _is_whole(seed, 0, 2**32):
            raise ValueError(f"recipe.json: lr {lr!r}, seed {seed!r}; expected 0.01, 7, say")
        if not _is_whole(n, 1, limit - steps):
            raise ValueError(f"recipe.json: steps {n!r}; expected 1 to {limit} in all")
        model = compare.prepared(method, size, seed)
        adam = compare.METHODS[method].optimizer
        settings = {"lr": lr, "seed": seed, "optimizer": adam and adam(model, lr)}
        steps += len(fit(model, skill, steps=n, progress=False, **settings).loss)
        paths[skill] = Path(folder, f"{skill}.safetensors")
        io.save_adapter(model, paths[skill])
    return paths, steps


def _is_whole(n, low, high):
    return type(n) is int and low <= n <= high  # True is no number here


# ------------------------------------------------------------------ what it does


def read(paths, skill="model"):
    """The model that answers for a skill, in float64, from the files alone.

    Raises:
        ValueError: if a file is damaged, does not fit, or holds a number that is not finite.
    """
    for name in {"model", skill} & paths.keys():
        for key, a in safetensors.read(paths[name])[0].items():
            if not np.isfinite(a).all():
                raise ValueError(f"{paths[name].name}: {key} holds a number that is not finite")
    model = io.load_model(paths["model"], np.float64)
    return io.load_adapter(model, paths[skill]) if skill in paths and skill != "model" else model


def work(model):
    """FLOPs and number of the matrix products of one pass over 17 tokens."""
    with ops.count_gemms() as log, no_grad():
        model(np.zeros((1, tasks.N_POSITIONS), int))
    return ops.flops(log), len(log)


def values(paths, brief, seed, steps=0):
    """Line to what the files reach, for every line that a brief may have."""
    base, sizes = io.load_base(), {name: path.stat().st_size for name, path in paths.items()}
    mine = {name: p.data for name, p in read(paths).named_parameters()}
    same = [np.array_equal(mine.get(name), p.data) for name, p in base.named_parameters()]
    found, costs = {}, []
    for skill in brief.skills:
        model = read(paths, skill)
        costs.append(work(model))
        with np.errstate(all="ignore"):  # a loss that is not finite says so
            score = evaluate(model, strings(skill, seed))
        found[skill] = score.exact_match if math.isfinite(score.loss) else 0.0
    flops, gemms = (max(each) for each in zip(*costs, strict=True))
    found |= {"bytes": sum(sizes.values()), "FLOPs / base": flops / work(base)[0], "GEMMs": gemms}
    found |= {"tensors changed": len(same) - sum(same), "steps": steps}
    return found | {"largest adapter": max([n for k, n in sizes.items() if k != "model"], default=0)}


@functools.cache
def _untouched(name, seed):
    return values({"model": io.DATA / "base.safetensors"}, BRIEFS[name], seed)


def measure(folder, name, seed):
    """The lines of the brief of this name, measured on a submission: a list of `Line`.

    Raises:
        ValueError: says what is wrong with the submission.
    """
    brief = BRIEFS[name]
    with tempfile.TemporaryDirectory() as temporary:
        paths, steps = files(folder, brief), 0
        if "steps" in brief.at_most:
            paths, steps = train(paths["recipe"], brief, temporary)
        found, base = values(paths, brief, seed, steps), _untouched(name, seed)
    limits = dict.fromkeys(brief.skills, brief.at_least) | brief.at_most
    lines = []
    for line, limit in limits.items():
        sign = -1 if line in brief.skills else 1
        passes = (bool(sign * each[line] <= sign * limit) for each in (found, base))
        lines.append(Line(line, found[line], limit, *passes))
    return lines


def points(lines):
    """Of 40: in equal parts for lines that the base fails, less 10 for each other line broken."""
    earned = [line.passes for line in lines if not line.base_passes]
    broken = sum(line.base_passes and not line.passes for line in lines)
    return max(0, round(POINTS * sum(earned) / max(1, len(earned))) - BROKEN * broken)


# ------------------------------------------------------------------ a row of the grade sheet


class Row(NamedTuple):
    """One submission: its points, and where the others were lost."""

    submission: str
    brief: str
    points: int
    reason: str


def grade(folder, name, seed, limit=None):
    """Grade one submission, in a process of its own if it gets a limit, in seconds.

    Whatever is wrong with it, it costs this submission its points, and no other. A file's text
    that comes into the reason cannot break the sheet.
    """
    folder = Path(folder)
    if re.fullmatch(r"\w[\w .-]*", folder.name):
        found, reason = (_guarded if limit else _judged)(folder, name, seed, limit)
    else:
        found, reason = 0, "the folder's name; expected letters, digits, space, dot, - and _"
    return Row(_plain(folder.name)[:60], name, found, _plain(reason)[:300])


def _judged(folder, name, seed, limit):
    try:
        lines = measure(folder, name, seed)
    except Exception as error:  # a hostile file may make anything fail
        return 0, f"not read: {error or type(error).__name__}".replace(f"{folder}{os.sep}", "")
    return points(lines), "; ".join(str(line) for line in lines if not line.passes)


def _guarded(folder, name, seed, limit):
    import multiprocessing  # here, since a browser has none

    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_child, args=(theirs, folder, name, seed, limit), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        return ours.recv() if ours.poll(limit) else (0, f"it took more than {limit} s")
    except EOFError:
        return 0, "its process ended early; it may have run out of memory"
    finally:
        process.kill()
        process.join()


def _child(pipe, *args):
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # Windows has no such limit, and time is limited there too
    pipe.send(_judged(*args))


def _plain(text):
    """Text for a cell of a table: one line, no bars, nothing that a terminal or sheet obeys."""
    text = "".join(c if c.isprintable() and c not in "|`<>" else " " for c in str(text))
    return " ".join(text.split()).lstrip("=+-@")


def report(rows, form="md"):
    """The rows as a table in Markdown, or as CSV for a spreadsheet."""
    lines = [Row._fields, *rows]
    if form == "csv":
        out = texts.StringIO()
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue()
    lines.insert(1, ["---"] * len(Row._fields))
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main(argv=None):
    """Grade a folder of submissions; returns the exit code."""
    parser = Parser(prog="python -m minilora.grade", description=__doc__)
    option = parser.add_argument
    option("folder", type=Path, help="one folder in it for each submission")
    option("--brief", choices=BRIEFS, default="card", help="what was asked for (card)")
    option("--seed", type=whole(0, 2**63), help="of the strings; drawn, and told, if not given")
    option("--limit", type=whole(1, 3600), default=60, help="seconds for a submission (60)")
    option("--out", type=Path, help="a .csv or .md to write; printed if not given")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"argument folder: {str(args.folder)!r}; expected a folder")
    if Path.cwd().resolve().is_relative_to(args.folder.resolve()):
        parser.error("argument folder: you are inside it, where its files can pass for modules")
    if args.out and args.out.suffix not in (".csv", ".md"):
        parser.error(f"argument --out: {str(args.out)!r}; expected a name in .csv or .md")
    if args.out:
        parser.writable(args.out)
    found = sorted(path for path in args.folder.iterdir() if path.name[0] != ".")
    if not found:
        parser.error(f"argument folder: {str(args.folder)!r} is empty; expected submissions")
    for library in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    seed = secrets.randbits(62) if args.seed is None else args.seed
    rows = [grade(path, args.brief, seed, args.limit) for path in found]
    text = report(rows, args.out.suffix[1:] if args.out else "md")
    if args.out:
        safetensors.write_whole(args.out, [text.encode()])
    else:
        print(text)
    print(f"{len(rows)} submissions, brief {args.brief}, seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
