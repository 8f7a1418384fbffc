"""The main job, `python -m minilora`: teach a frozen model a new skill, and count what it cost.

With `--methods compression` it makes the base small instead, and counts what is left of its skills.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import compress, io, ops, peft, surgery, tasks
from .tensor import no_grad
from .train import evaluate, fit

# method -> (recipe, learning rate, added tokens for each unit of rank). A recipe takes
# (model, rank, rng). Widths and lengths are such that adapter and prefix train as many numbers
# as LoRA does; so many prompt tokens would be slow, so that there are fewer.
METHODS = {
    "full": (lambda model, r, rng: peft.full(model), 2e-3, 0),
    "lora": (lambda model, r, rng: peft.lora(model, r, targets="blocks.*", rng=rng), 1e-2, 0),
    "dora": (
        lambda model, r, rng: peft.lora(model, r, targets="blocks.*", variant=peft.DoRA, rng=rng),
        1e-2,
        0,
    ),
    "ia3": (lambda model, r, rng: peft.ia3(model), 1e-1, 0),
    "bitfit": (lambda model, r, rng: peft.bitfit(model), 1e-2, 0),
    "adapter": (lambda model, r, rng: peft.adapter(model, 17 * r // 4, rng=rng), 1e-2, 0),
    "prefix": (lambda model, r, rng: peft.prefix(model, 9 * r, rng=rng), 1e-1, 9),
    "prompt": (lambda model, r, rng: peft.prompt(model, 4 * r, rng=rng), 1e-1, 4),
}


# method -> recipe, which takes (model, grams): what `observe` saw of the inputs of each layer
COMPRESSION = {
    "8-bit": lambda model, grams: compress.quantise_model(model, 8),
    "4-bit": lambda model, grams: compress.quantise_model(model, 4),
    "nf4": lambda model, grams: compress.quantise_model(model, 4, kind="nf4", double=True),
    "3-bit gptq": lambda model, grams: compress.quantise_model(model, 3, grams=grams),
    "2-bit": lambda model, grams: compress.quantise_aware(model, 2),
    "low rank": lambda model, grams: compress.low_rank(model, 16, grams=grams),
    "zeros": lambda model, grams: compress.sparsify(model, 0.7, scope="global"),
    "neurons": lambda model, grams: compress.prune_neurons(model, 0.5, grams=grams),
    "heads": lambda model, grams: compress.prune_heads(model, 3),
    "blocks": lambda model, grams: compress.drop_blocks(model, 1),
}


def gemms(model):
    """Matrix products in one forward pass."""
    with ops.count_gemms() as log, no_grad():
        model(np.zeros((1, tasks.N_POSITIONS), int))
    return len(log)


def run(method, task, rank, steps, seed):
    """Fine-tune the base by one method.

    Returns:
        A dictionary: the row of the table.
    """
    recipe, lr, tokens = METHODS[method]
    ids = io.load_eval(task)
    room = tasks.N_POSITIONS + tokens * rank if tokens else None
    model = io.load_base(np.float32, n_positions=room)
    before, plain = evaluate(model, ids), gemms(model)
    recipe(model, rank, np.random.default_rng(seed))
    counted = surgery.count(model, quiet=True)
    start = time.perf_counter()
    history = fit(model, task, steps=steps, lr=lr, seed=seed, label=f"{method:7}")
    seconds = (time.perf_counter() - start) / max(1, len(history.loss))
    after = evaluate(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        io.save_adapter(model, path)
        size = path.stat().st_size
    bypassed = gemms(model)
    stays = ""  # why it cannot be merged
    if surgery.wrappers(model):
        try:
            surgery.merge(model)
        except TypeError as error:
            stays = str(error).split(": ")[-1]
    return {
        "method": method,
        "trainable": counted.trainable,
        "share": counted.share,
        "bytes": size,
        "before": before,
        "after": after,
        "merged": evaluate(model, ids),
        "seconds": seconds,
        "gemms": (bypassed - plain, gemms(model) - plain),  # extra: before, after merging
        "stays": stays,
        "interrupted": history.interrupted,
    }


def skills(model):
    """The mean over the base's skills of the share of exact answers, and of letters."""
    scores = [evaluate(model, io.load_eval(task)) for task in tasks.SKILLS]
    exact = np.mean([score.exact_match for score in scores])
    return float(exact), float(np.mean([score.token_accuracy for score in scores]))


def flops(model):
    """Multiplications in the matrix products of one forward pass."""
    with ops.count_gemms() as log, no_grad():
        model(np.zeros((1, tasks.N_POSITIONS), int))
    return sum(batch * m * k * n for batch, m, k, n in log)


def file_size(model):
    """The bytes of a model's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        io.save_model(model, path)
        return path.stat().st_size


def squeeze(method, steps, seed):
    """Compress the base by one method, then train what is left on the base's own skills.

    Returns:
        A dictionary: the row of the table.
    """
    base, model = io.load_base(np.float32), io.load_base(np.float32)
    seen = tasks.sample(list(tasks.SKILLS), 500, np.random.default_rng(seed))
    COMPRESSION[method](model, compress.observe(base, seen[:, :-1]))
    before, history = skills(model), None
    if model.trainable():
        history = fit(
            model, list(tasks.SKILLS), steps=steps, lr=1e-3, seed=seed, label=f"{method:10}"
        )
    if surgery.wrappers(model):
        surgery.merge(model)
    size, whole = file_size(model), file_size(base)
    return {
        "method": method,
        "bytes": size,
        "share": size / whole,
        "flops": flops(model) / flops(base),
        "before": before,
        "after": skills(model) if history else None,
        "interrupted": bool(history and history.interrupted),
    }


def small_table(rows):
    """The rows of `squeeze` as text, one line a method."""
    head = (
        f"{'method':12}{'bytes':>9}{'share':>8}{'FLOPs':>8}{'exact match':>21}{'letters right':>21}"
    )
    lines = [head, f"{'':37}" + f"{'at once -> trained':>21}" * 2]
    for row in rows:
        line = f"{row['method']:12}{row['bytes']:9,}{row['share']:8.1%}{row['flops']:8.1%}"
        for i in (0, 1):
            after = f"{row['after'][i]:6.1%}" if row["after"] else "     -"
            line += f"{row['before'][i]:11.1%} -> {after}"
        lines.append(line)
    return "\n".join(lines)


def compression(steps, seed, out):
    """Run all of COMPRESSION, print the table and save the picture; returns the exit code."""
    exact, _ = skills(io.load_base(np.float32))
    print(f"The base knows {', '.join(tasks.SKILLS)}: {exact:.1%} of its answers are exact.")
    print(f"Its file has {file_size(io.load_base(np.float32)):,} bytes. How small can it be?\n")
    rows = []
    for method in COMPRESSION:
        rows.append(squeeze(method, steps, seed))
        if rows[-1]["interrupted"]:
            break
    print(f"\n{small_table(rows)}\n")
    print(f"Trained: {steps} steps on the same skills, where there are weights that can train.")
    print("Fewer bits and zeros save bytes and no FLOPs; what is cut out saves both.")
    from . import plots

    fig = plots.accuracy(
        [(r["method"], r["bytes"], (r["after"] or r["before"])[0]) for r in rows],
        "the base's five skills, compressed",
        unit="bytes of the file",
    )
    fig.savefig(out, dpi=100)
    print(f"The picture is in {out}. Now open notebooks/18_lora_or_compression.ipynb.")
    return 130 if rows[-1]["interrupted"] else 0


def table(rows):
    """The rows as text, one line a method."""
    head = (
        f"{'method':8}{'trainable':>11}{'share':>8}{'bytes/task':>12}{'exact match':>18}"
        f"{'letters right':>18}{'ms/step':>9}{'extra GEMMs':>14}"
    )
    lines = [head, f"{'':39}{'before -> after':>18}{'before -> after':>18}{'':9}{'merged':>14}"]
    for row in rows:
        b, a = row["before"], row["after"]
        lines.append(
            f"{row['method']:8}{row['trainable']:11,}{row['share']:8.1%}{row['bytes']:12,}"
            f"{b.exact_match:9.1%} -> {a.exact_match:5.1%}"
            f"{b.token_accuracy:9.1%} -> {a.token_accuracy:5.1%}"
            f"{1e3 * row['seconds']:9.1f}{row['gemms'][0]:8} -> {row['gemms'][1]}"
        )
    return "\n".join(lines)


def one_of(choices):
    """A type for argparse: a comma-separated list of names out of `choices`."""

    def parse(text):
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is not known; expected one of {', '.join(choices)}"
                )
        return names

    return parse


def whole(low, high):
    """A type for argparse: a whole number from `low` to `high`."""

    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r}; expected a whole number from {low} to {high}"
            )
        return int(text)

    return parse


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def error(self, message):
        self.exit(2, f"minilora: {message}\n")


def main(argv=None):
    """Run the main job; returns the exit code."""
    parser = Parser(prog="python -m minilora", description=__doc__)
    parser.add_argument(
        "--task",
        type=one_of(tasks.TASKS),
        default=["sort_descending"],
        help=f"the skill to learn: {', '.join(tasks.TASKS)} (sort_descending)",
    )
    parser.add_argument(
        "--methods",
        type=one_of([*METHODS, "compression"]),
        default=list(METHODS),
        help=f"which methods, with commas between: {','.join(METHODS)} (all); or compression: make "
        "the base small instead, and score its own skills",
    )
    parser.add_argument("--rank", type=whole(1, 64), default=4, help="r of LoRA, 1 to 64 (4)")
    parser.add_argument("--steps", type=whole(1, 100000), default=300, help="training steps (300)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the run (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("minilora.png"), help="the picture to save (minilora.png)"
    )
    args = parser.parse_args(argv)
    if len(args.task) != 1:
        parser.error(f"argument --task: {len(args.task)} tasks; expected one")
    (task,) = args.task
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --out: {str(args.out)!r}; expected a name in .png, .svg or .pdf")
    if args.out.is_dir():
        parser.error(f"argument --out: {str(args.out)!r} is a folder; expected a file's name")
    if not args.out.absolute().parent.is_dir():
        parser.error(f"argument --out: there is no folder {str(args.out.parent)!r}")
    try:  # before anything is trained
        new = not args.out.exists()
        args.out.open("ab").close()
        if new:
            args.out.unlink()
    except OSError as error:
        parser.error(f"argument --out: {error}")
    os.environ["MPLBACKEND"] = "Agg"  # the picture goes to a file, whatever the screen

    if "compression" in args.methods:
        if len(args.methods) > 1:
            parser.error("argument --methods: compression stands alone, as it has another table")
        return compression(args.steps, args.seed, args.out)

    example = tasks.decode(io.load_eval(task)[0])
    print(f"The base knows {', '.join(tasks.SKILLS)}. The skill to learn: {task}.")
    print(f"For example: {example}\n")
    rows = []
    for method in args.methods:
        rows.append(run(method, task, args.rank, args.steps, args.seed))
        if rows[-1]["interrupted"]:
            break
    print(f"\n{table(rows)}\n")
    for row in rows:
        if row["stays"]:
            print(f"{row['method']}: cannot be merged: {row['stays']}.")
        elif row["gemms"][0]:
            print(
                f"{row['method']}: merged into plain layers, it answers "
                f"{row['merged'].exact_match:.1%} right with {row['gemms'][1]} extra GEMMs."
            )
    from . import plots  # matplotlib is slow to import; a wrong argument should not wait for it

    fig = plots.accuracy(
        [(r["method"], r["trainable"], r["after"].exact_match) for r in rows],
        f"{task} after {args.steps} steps",
    )
    fig.savefig(args.out, dpi=100)
    print(f"The picture is in {args.out}. Now open notebooks/00_tour.ipynb.")
    return 130 if rows[-1]["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
