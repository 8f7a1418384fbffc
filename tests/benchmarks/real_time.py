"""SmolLM2-135M: a LoRA step and greedy generation, against PEFT and transformers on PyTorch eager.

    python tests/benchmarks/real_time.py --threads 1

Each contestant is a process of its own, so that its peak memory is its own, and they take turns:
us on plain float32 layers, us on the file's 4-bit blocks, and PEFT, if it is installed, on a Llama
of the same shapes and random weights. A step: LoRA (r = 8 on q and v), batch 4 x 31, Adam included.
Generation: 32 tokens after 30, with a cache. Prints medians of the seconds by the clock and of the
processor, and the largest resident memory.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

KINDS = "float32", "packed", "peft"
LORA = {"r": 8, "lora_alpha": 16}


def ours(packed):
    """(step, generate) of this library."""
    import numpy as np

    import minilora as ml
    from minilora.real import open_model
    from minilora.real.__main__ import find_model

    model, _ = open_model(find_model(), packed=packed)
    ml.lora(model, r=8, alpha=16, rng=np.random.default_rng(0))
    optimizer = ml.AdamW(model.parameters(), 1e-4)
    ids = np.random.default_rng(0).integers(0, 49152, (4, 32))

    def step():
        model.zero_grad()
        ml.ops.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()

    return step, lambda: ml.generate(model, ids[:1, :30], 32)


def peft():
    """(step, generate) of PEFT and transformers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    sizes |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, eos_token_id=None)
    model = LlamaForCausalLM(config)
    model = get_peft_model(model, LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(0, 49152, (4, 32), generator=torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    def generate():
        start = ids[:1, :30]
        with torch.no_grad():
            found = model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=32,
                do_sample=False,
                pad_token_id=0,
            )
        assert found.shape[1] == 62

    return step, generate


def work(kind):
    """Answer each line, `step` or `generate`, with the seconds it took and the peak so far."""
    step, generate = peft() if kind == "peft" else ours(kind == "packed")
    jobs = {"step": step, "generate": generate}
    print("ready", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        jobs[line.strip()]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def main():
    """Start the contestants, let them take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--jobs", nargs="+", default=["step", "generate"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    names = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
    env = os.environ | dict.fromkeys(names, str(args.threads))
    running = {}
    for kind in args.kinds:
        command = [sys.executable, __file__, "--work", kind]
        running[kind] = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        if running[kind].stdout.readline() != "ready\n":  # it has said why
            del running[kind]
    for job in args.jobs:
        found = {kind: [] for kind in running}
        for i in range(args.rounds + 1):
            for kind, process in running.items():
                process.stdin.write(f"{job}\n")
                process.stdin.flush()
                numbers = [float(x) for x in process.stdout.readline().split()]
                found[kind] += [numbers] if i else []  # the first one warms up
        for kind, rows in found.items():
            wall, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{job:9}{kind:9}{wall:7.3f} s  {cpu:7.3f} s cpu  {peak:6.0f} MB", flush=True)
    for process in running.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
