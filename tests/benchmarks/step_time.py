"""One training step against PyTorch eager, as ratios from interleaved runs in one process.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/step_time.py --threads 1

Prints, for four sizes of Transformer and for full fine-tuning and LoRA (r = 4 on q and v), Adam
included, the time of our step over PyTorch's, over that of its matrix products alone (the floor),
and LoRA's over full's. PyTorch is left out if it is not installed. Also prints what the graphs of
LoRA and full fine-tuning retain.
"""

import argparse
import os
import statistics
import time
import tracemalloc

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds")
args = parser.parse_args()
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(args.threads)  # read when NumPy is imported, so before it

import numpy as np  # noqa: E402

import minilora as ml  # noqa: E402

try:
    import torch
except ImportError:
    torch = None

VOCAB = 64
SIZES = {  # layers, width, batch, length
    "2 layers, d = 64, 32 x 32": (2, 64, 32, 32),
    "4 layers, d = 128, 32 x 64": (4, 128, 32, 64),
    "4 layers, d = 256, 16 x 128": (4, 256, 16, 128),
    "2 layers, d = 768, 4 x 128": (2, 768, 4, 128),
}


def ours(layers, d, batch, length, method):
    """A function that takes one step, and one that gives what its graph retains in MiB."""
    rng = np.random.default_rng(0)
    model = ml.Transformer(
        vocab_size=VOCAB, n_positions=length, n_embd=d, n_head=4, n_layer=layers, rng=rng
    )
    if method == "lora":
        ml.lora(model, 4, rng=rng)
    optimizer = ml.AdamW(model.parameters(), 1e-3)
    ids = rng.integers(VOCAB, size=(batch, length))

    def step():
        loss = ml.ops.cross_entropy(model(ids), ids)
        model.zero_grad()
        loss.backward()
        optimizer.step()

    def retained():
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        loss = ml.ops.cross_entropy(model(ids), ids)
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return (after - before) / 2**20, loss

    return step, retained


def products(step):
    """The same matrix products as a step makes, and nothing else."""
    with ml.ops.count_gemms() as log:
        step()
    pairs = [
        [np.ones((n, *shape) if n > 1 else shape, np.float32) for shape in ((m, k), (k, p))]
        for n, m, k, p in log
    ]

    def floor():
        for a, b in pairs:
            np.matmul(a, b)

    return floor


def theirs(layers, d, batch, length, method):
    """The same step in PyTorch: the same shapes, its own fused attention, LayerNorm and GELU."""
    from torch import nn
    from torch.nn import functional as F

    class Lora(nn.Module):
        def __init__(self, base, r=4, alpha=8):
            super().__init__()
            self.base, self.scaling = base, alpha / r
            self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
            self.B = nn.Parameter(torch.zeros(base.out_features, r))

        def forward(self, x):
            return self.base(x) + F.linear(F.linear(x, self.A) * self.scaling, self.B)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            h = self.norm1(x)
            q, k, v = (
                f(h).view(*h.shape[:2], 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(h.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCAB, d), nn.Embedding(length, d)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCAB, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Model()
    if method == "lora":
        model.requires_grad_(False)
        for block in model.blocks:
            block.q, block.v = Lora(block.q), Lora(block.v)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(VOCAB, (batch, length))

    def step():
        loss = F.cross_entropy(model(ids).view(-1, VOCAB), ids.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def interleaved(steps, rounds):
    """The times of each step, one of each a round, so that noise falls on all alike."""
    times = {name: [] for name in steps}
    for step in steps.values():
        step(), step(), step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times, a, b):
    """The median of the ratios within each round."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def main():
    if torch is not None:
        torch.set_num_threads(args.threads)
    else:
        print("PyTorch is not installed: only LoRA against full fine-tuning is shown")
    print(f"threads: {args.threads}")
    for size, shape in SIZES.items():
        steps, kept = {}, {}
        for method in ("full", "lora"):
            steps[method], retained = ours(*shape, method)
            steps[method]()
            kept[method] = retained()[0]
            steps[f"products, {method}"] = products(steps[method])
            if torch is not None:
                steps[f"torch {method}"] = theirs(*shape, method)
        times = interleaved(steps, args.rounds)
        print(f"{size}:")
        for name, values in times.items():
            print(f"  {name:14} {1e3 * min(values):7.2f} ms at best")
        for method in ("full", "lora"):
            over = ratio(times, method, f"products, {method}")
            print(f"  {method}: ours / products alone = {over:.2f}")
        if torch is not None:
            for method in ("full", "lora"):
                print(f"  {method}: ours / PyTorch = {ratio(times, method, 'torch ' + method):.2f}")
        print(f"  LoRA / full, time = {ratio(times, 'lora', 'full'):.2f}")
        print(
            f"  LoRA / full, retained graph = {kept['lora'] / kept['full']:.2f} "
            f"({kept['lora']:.1f} against {kept['full']:.1f} MiB)"
        )


if __name__ == "__main__":
    main()
