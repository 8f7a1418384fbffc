"""What calibration gives on the base: SparseGPT beside Wanda, and GPTQ with each of its options.

    python tests/benchmarks/by_data.py [--choose]

Exact match, in %, over three sets of calibration strings, each drawn afresh as are the strings
that score. Fails if SparseGPT is below Wanda anywhere, or if GPTQ with clipping is not 18 points
above rounding to nearest at 3 bits.
With --choose it scores SparseGPT by its step, on strings of their own: what `STEP` was chosen by.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--choose", action="store_true", help="SparseGPT by its step, no more")
args = parser.parse_args()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported, so before it

import numpy as np  # noqa: E402

import minilora as ml  # noqa: E402
from minilora.compress import observe, prune, quantise_model, sparsify  # noqa: E402

SEEDS, BASE = range(3), ml.load_base()
SPARSITIES = [(s, None) for s in (0.3, 0.4, 0.5, 0.6, 0.7)] + [(0.5, 4)]
GPTQ = {
    "": {},
    ", clipped": {"clip": True},
    ", act-order": {"act_order": True},
    ", both": {"clip": True, "act_order": True},
}


def strings(n, seed):
    """Examples of the five skills, mixed."""
    return ml.tasks.sample(list(ml.tasks.SKILLS), n, np.random.default_rng(seed))


CALIBRATION = [strings(256, 500 + seed)[:, :-1] for seed in SEEDS]
GRAMS = [observe(BASE, inputs) for inputs in CALIBRATION]


def scores(make, ids):
    """Exact match in % of `make(seed)` for each seed."""
    return np.array([100 * ml.evaluate(make(seed), ids).exact_match for seed in SEEDS])


def pruned(sparsity, scope, compensate):
    """By the grams of a seed."""
    form = {"scope": scope, "compensate": compensate}
    return lambda seed: sparsify(ml.load_base(), sparsity, grams=GRAMS[seed], **form)


def rounded(bits, in_turn=False, **form):
    """By GPTQ, one scale a row; `in_turn`: each block for what the rounded ones before make."""

    def make(seed):
        by = {"in_turn": CALIBRATION[seed]} if in_turn else {"grams": GRAMS[seed]}
        return quantise_model(ml.load_base(), bits, block="row", **by, **form)

    return make


def tell(label, found):
    """A line: the mean, and each seed."""
    print(f"{label:34} {found.mean():5.1f}   {np.round(found, 1)}", flush=True)
    return found


def choose():
    """SparseGPT by how many columns it looks at together."""
    ids = strings(500, 1234)
    for prune.STEP in (1, 2, 4, 8, 16, 32, 64):
        row = [scores(pruned(s, None, True), ids).mean() for s in (0.4, 0.5, 0.6, 0.7)]
        print(f"{prune.STEP:3} columns, 40 to 70% pruned", np.round(row, 1), f"{np.mean(row):.1f}")


def main():
    if args.choose:
        raise SystemExit(choose())
    ids, aims = strings(500, 4321), []
    for sparsity, scope in SPARSITIES:
        what = f"{sparsity:.0%} pruned" + (", 2:4" if scope else "")
        wanda, gpt = (
            tell(f"{what}, {name}", scores(pruned(sparsity, scope, by), ids))
            for name, by in (("Wanda", False), ("SparseGPT", True))
        )
        aims.append((gpt >= wanda).all())
    for bits in (3, 2, 1):
        for name, clip in (("", False), (", clipped", True)):
            near = quantise_model(ml.load_base(), bits, block="row", clip=clip)
            tell(f"{bits}-bit nearest{name}", scores(lambda seed, near=near: near, ids))
        for name, form in GPTQ.items():
            at_once = tell(f"{bits}-bit GPTQ{name}", scores(rounded(bits, **form), ids))
            tell(f"{bits}-bit GPTQ{name}, in turn", scores(rounded(bits, True, **form), ids))
            if name == ", clipped" and bits == 3:
                nearest = scores(lambda seed: quantise_model(ml.load_base(), 3, block="row"), ids)
                aims.append(at_once.mean() >= nearest.mean() + 18)
    print("SparseGPT never below Wanda:", all(aims[:-1]), end="   ")
    print("3 bits, GPTQ with clipping 18 points above nearest:", aims[-1])
    raise SystemExit(not all(aims))


if __name__ == "__main__":
    main()
