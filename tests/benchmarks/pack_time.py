"""Quantise-and-pack of a large matrix against copying it, from interleaved runs in one process.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/pack_time.py

Prints the times of `np.copyto` and of quantising, as medians over rounds, and their ratios
within each round. The aims: symmetric 4-bit at most 8 copies, NF4 at most 20.
"""

import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
parser.add_argument("--block", type=int, default=64, help="weights that share a scale")
parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
args = parser.parse_args()
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when NumPy is imported, so before it

import numpy as np  # noqa: E402

from minilora.compress.quantise import dequantise, quantise  # noqa: E402


def main():
    w = np.random.default_rng(0).standard_normal((args.size, args.size), dtype=np.float32)
    copy = np.empty_like(w)
    forms = {
        "symmetric 4-bit": {"bits": 4},
        "symmetric 3-bit": {"bits": 3},
        "affine 4-bit": {"bits": 4, "kind": "affine"},
        "NF4": {"kind": "nf4"},
        "NF4, double": {"kind": "nf4", "double": True},
    }
    work = {"copy": lambda: np.copyto(copy, w)}
    work |= {name: lambda s=s: quantise(w, block=args.block, **s) for name, s in forms.items()}
    for name in ("symmetric 4-bit", "NF4"):
        q = quantise(w, block=args.block, **forms[name])
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
        print(f"{name:25} {1e3 * statistics.median(values):7.1f} ms, {ratio:5.1f} copies")


if __name__ == "__main__":
    main()
