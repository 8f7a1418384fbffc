"""The forward pass with half of the neurons pruned, against the FLOPs that this saves.

    python tests/benchmarks/prune_time.py

A whole Transformer of width 256 against the same with half of the neurons of each MLP, from
interleaved runs in one process. Prints the ratio of the FLOPs of all matrix products, the median
ratio of the times, and their quotient. Fails if a quotient is below 80%.
"""

import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds")
args = parser.parse_args()
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(args.threads)  # read when NumPy is imported, so before it

import numpy as np  # noqa: E402

import minilora as ml  # noqa: E402
from minilora.compress import prune_neurons  # noqa: E402

VOCAB, D, LAYERS = 64, 256, 2
SIZES = [(32, 17), (64, 32)]  # batch, length
GOAL = 0.8


def build(length):
    """The same model at each call."""
    rng = np.random.default_rng(0)
    return ml.Transformer(
        vocab_size=VOCAB, n_positions=length, n_embd=D, n_head=4, n_layer=LAYERS, rng=rng
    )


def flops(model, ids):
    """Of the matrix products of one forward pass."""
    with ml.no_grad(), ml.ops.count_gemms() as log:
        model(ids)
    return sum(2 * batch * m * k * n for batch, m, k, n in log)


def seconds(model, ids):
    """One forward pass, with nothing recorded."""
    with ml.no_grad():
        start = time.perf_counter()
        model(ids)
        return time.perf_counter() - start


def main():
    print(f"d = {D}, {LAYERS} layers, half of the neurons, threads: {args.threads}")
    worst = float("inf")
    for batch, length in SIZES:
        models = build(length), prune_neurons(build(length), 0.5)
        ids = np.random.default_rng(1).integers(VOCAB, size=(batch, length))
        saved = flops(models[0], ids) / flops(models[1], ids)
        for model in models:
            seconds(model, ids), seconds(model, ids), seconds(model, ids)
        rounds = [[seconds(model, ids) for model in models] for _ in range(args.rounds)]
        faster = statistics.median(whole / pruned for whole, pruned in rounds)
        worst = min(worst, faster / saved)
        print(
            f"{batch} x {length}: FLOPs / {saved:.3f}, time / {faster:.3f}, "
            f"quotient {faster / saved:.3f}  ({1e3 * min(r[0] for r in rounds):.2f} against "
            f"{1e3 * min(r[1] for r in rounds):.2f} ms at best)"
        )
    print(f"at least {GOAL:.0%} of the FLOPs saved is time saved: {worst >= GOAL}")
    raise SystemExit(worst < GOAL)


if __name__ == "__main__":
    main()
