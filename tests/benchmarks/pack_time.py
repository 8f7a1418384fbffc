"""Quantising a real model's layer, and going back, against copying it.

    python tests/benchmarks/pack_time.py

A layer of 576 x 1,536, of which SmolLM2-135M has about 120, from interleaved runs in one process.
Prints medians over rounds, and their ratios within each round. The aims are what a person would
feel: the whole model quantised in 3 s, which is 25 ms a layer, and, as QLoRA makes the weight
dense twice a step, no more than a quarter of the time of its two matrix products for that. With
1,536 features coming in, GPTQ and SparseGPT are to take no more than 25 Cholesky factorisations.
"""

import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--shape", type=int, nargs=2, default=(576, 1536), help="d_out and d_in")
parser.add_argument("--tokens", type=int, default=2048, help="rows of the matrix products")
parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
args = parser.parse_args()
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when NumPy is imported, so before it

import numpy as np  # noqa: E402

from minilora.compress import dequantise, gptq, quantise, sparse_gpt  # noqa: E402

FORMS = {
    "symmetric 8-bit": {"bits": 8},
    "symmetric 4-bit": {"bits": 4},
    "symmetric 3-bit": {"bits": 3},
    "affine 4-bit": {"bits": 4, "kind": "affine"},
    "NF4": {"kind": "nf4"},
    "NF4, double": {"kind": "nf4", "double": True},
}


def seconds(f):
    """One call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


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
            times[name].append(seconds(f))
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["copy"], strict=True))
        print(f"{name:26} {1e3 * statistics.median(values):7.2f} ms, {ratio:5.1f} copies")
    products = statistics.median(times["two products"])
    back = 2 * max(statistics.median(times[f"back from {name}"]) for name in FORMS) / products
    slowest = max(statistics.median(times[name]) for name in FORMS)
    gram = x.T @ x.astype(np.float64) / len(x)
    by_data = {
        "cholesky": lambda: np.linalg.cholesky(gram),
        "GPTQ": lambda: gptq(w, gram, 4, block="row"),
        "SparseGPT": lambda: sparse_gpt(w, gram, 0.5),
        "SparseGPT, 2:4": lambda: sparse_gpt(w, gram, 0.5, scope=4),
    }
    rounds = [[seconds(f) for f in by_data.values()] for _ in range(3)]
    ratios = np.median([[t / each[0] for t in each] for each in rounds], axis=0)
    for name, ratio in zip(by_data, ratios, strict=True):
        print(f"{name:26} {ratio:7.1f} factorisations")
    aims = slowest < 0.025, back < 0.25, ratios.max() < 25
    print(
        f"a layer in 25 ms: {aims[0]}; dense twice in {back:.0%} of two products: {aims[1]};",
        end="",
    )
    print(f" all within 25 factorisations: {aims[2]}")
    raise SystemExit(not all(aims))


if __name__ == "__main__":
    main()
