"""Quantising a real model's layer, and going back, against copying it.

    python tests/benchmarks/pack_time.py

A layer of 576 x 1,536, of which SmolLM2-135M has about 120, from interleaved runs in one process.
Prints medians over rounds, and their ratios within each round. The aims are what a person would
feel: the whole model quantised in 3 s, which is 25 ms a layer, and, as QLoRA makes the weight
dense twice a step, no more than a quarter of the time of its two matrix products for that.
"""

import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--shape", type=int, nargs=2, default=(1536, 576), help="d_out and d_in")
parser.add_argument("--tokens", type=int, default=2048, help="rows of the matrix products")
parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
args = parser.parse_args()
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when NumPy is imported, so before it

import numpy as np  # noqa: E402

from minilora.compress import dequantise, quantise  # noqa: E402

FORMS = {
    "symmetric 8-bit": {"bits": 8},
    "symmetric 4-bit": {"bits": 4},
    "symmetric 3-bit": {"bits": 3},
    "affine 4-bit": {"bits": 4, "kind": "affine"},
    "NF4": {"kind": "nf4"},
    "NF4, double": {"kind": "nf4", "double": True},
}


def main():
    rng = np.random.default_rng(0)
    w = rng.standard_normal(args.shape, dtype=np.float32)
    x = rng.standard_normal((args.tokens, w.shape[1]), dtype=np.float32)
    copy, y = np.empty_like(w), x @ w.T
    work = {"copy": lambda: np.copyto(copy, w), "two products": lambda: (x @ w.T, y @ w)}
    for name, settings in FORMS.items():
        q = quantise(w, **settings)
        work[name] = lambda s=settings: quantise(w, **s)
        work[f"back from {name}"] = lambda q=q: dequantise(q)
    times = {name: [] for name in work}
    for f in work.values():
        f()
    for _ in range(args.rounds):
        for name, f in work.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["copy"], strict=True))
        print(f"{name:26} {1e3 * statistics.median(values):7.2f} ms, {ratio:5.1f} copies")
    products = statistics.median(times["two products"])
    back = max(statistics.median(times[f"back from {name}"]) for name in FORMS)
    slowest = max(statistics.median(times[name]) for name in FORMS)
    print(f"a layer in 25 ms: {slowest < 0.025}, dense twice in {2 * back / products:.0%}", end="")
    print(f" of two products: {2 * back < products / 4}")
    raise SystemExit(not (slowest < 0.025 and 2 * back < products / 4))


if __name__ == "__main__":
    main()
