"""The main job, `python -m minilora`: teach a frozen model a new skill, and count what it cost.

With `--methods compression` it makes the base small instead, and counts what is left of its skills.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import compare, compress, io, ops, surgery, tasks
from .command import Parser, table, whole
from .tensor import no_grad
from .train import Score, evaluate, fit

# The rows of the table, and a learning rate that serves each; the recipes are those of `compare`.
RATES = {"full": 4e-3, "lora": 1e-2, "adapter": 2e-2}
RATES |= {"ia3": 1e-1, "bitfit": 1e-1, "token row": 1e-1}
MORE = {"dora": 1e-2, "pissa": 5e-3, "pfeiffer": 2e-2}
MORE |= {"parallel": 2e-2, "prefix": 2e-2, "prompt": 1e-1}

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


# head of a column, of one line or two -> template of its cells
FINE_TUNED = {
    "method": "{method}",
    "trainable": "{trainable:,}",
    "share": "{share:.1%}",
    "bytes/task": "{bytes:,}",
    "ms/step": "{ms:.1f}",
    "extra GEMMs\nmerged": "{extra[0]} -> {extra[1]}",
}
COMPRESSED = {
    "method": "{method}",
    "bytes": "{bytes:,}",
    "share": "{share:.1%}",
    "FLOPs": "{flops:.1%}",
    "exact match\nat once -> trained": "{before.exact_match:.1%} -> {trained[2]:>6}",
    "letters right\nat once -> trained": "{before.token_accuracy:.1%} -> {trained[1]:>6}",
}


def products(model):
    """Each matrix product of one forward pass, as (batch, m, k, n)."""
    with ops.count_gemms() as log, no_grad():
        model(np.zeros((1, tasks.N_POSITIONS), int))
    return log


def file_size(save, model):
    """The bytes of the file that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved")
        save(model, path)
        return path.stat().st_size


def until_stopped(names, work):
    """The rows that `work(name)` returns, up to one that Ctrl-C has cut short."""
    rows = []
    for name in names:
        rows.append(work(name))
        if rows[-1]["interrupted"]:
            break
    return rows


# ------------------------------------------------------------------ fine-tuning


def size(method, rank):
    """The rank, width or length at which a method trains as many numbers as LoRA of this rank."""
    sizes = dict(compare.points(method))
    return sizes["medium"] * rank // 4 or 1 if "medium" in sizes else sizes["its own"]


def run(method, places, rank, steps, seed):
    """Fine-tune the base by one method, once for each task; what its row of the table says."""
    base, row = io.load_base(np.float32), {"method": method, **dict.fromkeys(places, "-")}
    row |= {"before": {}, "after": {}, "merged": {}}
    for name, task in places.items():
        model, ids = compare.prepared(method, size(method, rank), seed), io.load_eval(task)
        count, wrapped = surgery.count(model, quiet=True), surgery.wrappers(model).values()
        start, label = time.perf_counter(), f"{method:9} {name}"
        history = fit(model, task, steps=steps, lr=(RATES | MORE)[method], seed=seed, label=label)
        ms = 1e3 * (time.perf_counter() - start) / max(1, len(history.loss))
        row["before"][name] = evaluate(base, ids).exact_match
        row["after"][name] = evaluate(model, ids).exact_match
        row[name] = f"{row['before'][name]:.1%} -> {row['after'][name]:6.1%}"
        row["stays"] = next((w.why_not_merged for w in wrapped if w.why_not_merged), None)
        row |= {"trainable": count.trainable, "share": count.share, "ms": ms}
        row |= {"bytes": file_size(io.save_adapter, model), "interrupted": history.interrupted}
        bypassed = products(model)
        if wrapped and not row["stays"]:
            surgery.merge(model)
            row["merged"][name] = evaluate(model, ids).exact_match
        row["extra"] = [len(log) - len(products(base)) for log in (bypassed, products(model))]
        if history.interrupted:
            break
    return row


def fine_tuning(args):
    """Run the methods and print their table; returns the rows and the picture."""
    places = {name: tasks.DISTANCES.get(name, [name])[0] for name in args.task}
    print(f"The base knows {', '.join(tasks.SKILLS)}. To learn, each in {args.steps} steps:")
    for name, task in places.items():
        what = "" if name == task else f"{name}: "
        print(f"  {what}{task}, such as {tasks.decode(io.load_eval(task)[0])}")
    print()
    settings = places, args.rank, args.steps, args.seed
    rows = until_stopped(args.methods, lambda method: run(method, *settings))
    heads = {f"{name}\nbefore -> after": f"{{{name}}}" for name in places}
    first, *rest = FINE_TUNED.items()
    print(f"\n{table(dict([first]) | heads | dict(rest), rows)}\n")
    for row in rows:
        if row["stays"]:
            print(f"{row['method']}: cannot be merged: {row['stays']}.")
        elif row["extra"][0]:
            exact = " and ".join(f"{x:.1%}" for x in row["merged"].values())
            print(f"{row['method']}: merged into plain layers, it answers", end=" ")
            print(f"{exact} right with {row['extra'][1]} extra GEMMs.")
    reached = [name for name in places if all(name in row["after"] for row in rows)]
    for name in reached if len(rows) > 1 else ():
        worst, *_, best = sorted(rows, key=lambda row: row["after"][name])
        print(f"{name}: from {worst['after'][name]:.1%} ({worst['method']})", end=" ")
        print(f"to {best['after'][name]:.1%} ({best['method']}).")

    def picture(plots):
        title = f"exact match after {args.steps} steps"
        if len(reached) > 1:
            return plots.fan({row["method"]: row["after"] for row in rows}, title)
        (name,) = reached
        points = [(row["method"], row["trainable"], row["after"][name]) for row in rows]
        return plots.accuracy(points, f"{name}, {title}")

    return rows, picture


# ------------------------------------------------------------------ compression


def skills(model):
    """The mean `Score` over the base's skills."""
    return Score(*np.mean([evaluate(model, io.load_eval(task)) for task in tasks.SKILLS], axis=0))


def squeeze(method, base, grams, steps, seed):
    """Compress the base by one method, train what is left on its skills; its row of the table."""
    model, known = io.load_base(np.float32), list(tasks.SKILLS)
    COMPRESSION[method](model, grams)
    before, history = skills(model), None
    if model.trainable():
        history = fit(model, known, steps=steps, lr=1e-3, seed=seed, label=f"{method:10}")
    after = skills(model) if history else before
    if surgery.wrappers(model):
        surgery.merge(model)
    left = file_size(io.save_model, model)
    row = {"method": method, "bytes": left, "share": left / file_size(io.save_model, base)}
    row |= {"flops": ops.flops(products(model)) / ops.flops(products(base)), "before": before}
    row |= {"after": after, "interrupted": bool(history and history.interrupted)}
    return row | {"trained": [f"{x:.1%}" if history else "-" for x in after]}


def compression(args):
    """Run all of COMPRESSION and print its table; returns the rows and the picture."""
    base, names = io.load_base(np.float32), ", ".join(tasks.SKILLS)
    print(f"The base knows {names}: {skills(base).exact_match:.1%} of its answers are exact.")
    print(f"Its file has {file_size(io.save_model, base):,} bytes. How small can it be?\n")
    seen = tasks.sample(list(tasks.SKILLS), 500, np.random.default_rng(args.seed))
    settings = base, compress.observe(base, seen[:, :-1]), args.steps, args.seed
    rows = until_stopped(COMPRESSION, lambda method: squeeze(method, *settings))
    print(f"\n{table(COMPRESSED, rows)}\n")
    print(f"Trained: {args.steps} steps on these skills, where there are weights that can train.")
    print("Fewer bits and zeros save bytes and no FLOPs; what is cut out saves both.")
    points = [(row["method"], row["bytes"], row["after"].exact_match) for row in rows]
    title = "the base's five skills, compressed"
    return rows, lambda plots: plots.accuracy(points, title, "bytes of the file")


# ------------------------------------------------------------------ the command


def main(argv=None):
    """Run the main job; returns the exit code."""
    parser = Parser(prog="python -m minilora", description=__doc__)
    option = parser.add_argument
    parser.several("--task", [*tasks.DISTANCES, *tasks.TASKS], ["elicit", "build"])
    parser.several("--methods", [*RATES, *MORE, "compression"], list(RATES))
    option("--rank", type=whole(1, 64), default=4, help="r of LoRA, 1 to 64 (4)")
    option("--steps", type=whole(1, 100000), default=150, help="training steps (150)")
    option("--seed", type=whole(0, 2**32 - 1), default=0, help="of the run (0)")
    option("--out", type=Path, default=Path("minilora.png"), help="the picture (minilora.png)")
    args = parser.parse_args(argv)
    alone = "compression" in args.methods
    if alone and len(args.methods) > 1:
        parser.error("argument --methods: compression stands alone, as it has another table")
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --out: {str(args.out)!r}; expected a name in .png, .svg or .pdf")
    parser.writable(args.out)

    rows, picture = compression(args) if alone else fine_tuning(args)
    try:
        from . import plots  # slow to import; a wrong argument should not wait for it

        picture(plots).savefig(args.out, dpi=100)
    except Exception as error:  # whatever it is, the table stands
        print(f"The picture failed: {' '.join(str(error).split())}")
        return 1
    notebook = "20_lora_or_compression" if alone else "00_tour"
    print(f"The picture is in {args.out}. Now open notebooks/{notebook}.ipynb.")
    return 130 if rows[-1]["interrupted"] else 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the picture goes into a file: no window, whatever is set
    sys.exit(main())
