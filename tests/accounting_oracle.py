"""Does `accounting.shape_of` count as transformers does? A script, for those who have it:

    pip install torch transformers && python tests/accounting_oracle.py [configurations a kind]

Two families of tiny configurations, each built without memory for its weights: random ones, in
which fields are present, missing or null, and one for each field that transformers knows, changed
alone. Each must have the same number of parameters and of biases here, or be refused here.
"""

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minilora.accounting import GPT2_NAMES, SIZES, UNCOUNTED, USUAL, shape_of

GPT2 = {"vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 2}
LLAMA = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 10, "num_key_value_heads": 1}
LLAMA |= {"pad_token_id": 0}  # Phi-3's own is beyond so few tokens
RANDOM = {  # what a field may be; "missing" leaves it out
    "n_positions": ["missing", 5, 9],
    "n_inner": ["missing", None, 7],
    "num_attention_heads": [2, 32],
    "num_key_value_heads": ["missing", None, 1, 2],
    "head_dim": ["missing", "missing", None, 6],
    "tie_word_embeddings": ["missing", True, False],
    "attention_bias": ["missing", True, False],
    "mlp_bias": ["missing", True, False],
    "intermediate_size": [3, 10],
    "hidden_size": [64, 128],
    "sliding_window": ["missing", None, 4],
    "use_sliding_window": ["missing", True, False],
    "max_window_layers": ["missing", 1],
    "layer_types": ["missing", ["full_attention", "sliding_attention"]],
    "rope_theta": ["missing", 500.0],
    "num_local_experts": ["missing", "missing", 4],
    "num_experts_per_tok": ["missing", 1, 3],
    "add_cross_attention": ["missing", False, True],
}


def counted(config):
    """Parameters, and those of them in biases, by transformers; None if it refuses."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception:
        return None
    found = dict(model.named_parameters())  # a tied one is there once
    biases = sum(p.numel() for name, p in found.items() if name.endswith(".bias"))
    return sum(p.numel() for p in found.values()), biases


def ours(config):
    """The same by minilora."""
    try:
        shape = shape_of(config)
    except ValueError:
        return None
    return shape.parameters(), shape.biases()


def refusable(config):
    """Whether it has what may be refused: a field that is not counted, or no size."""
    nulls = [name for name in (*SIZES, *GPT2_NAMES) if config.get(name, 1) is None]
    return bool(nulls or any(map(config.get, UNCOUNTED)))


def random_configs(kind, n, rng):
    """So many random configurations of a kind."""
    for _ in range(n):
        drawn = {name: rng.choice(values) for name, values in RANDOM.items()}
        config = {"model_type": kind} | (GPT2 if kind == "gpt2" else LLAMA) | drawn
        if kind == "gpt2" and rng.random() < 0.7:  # by its own names alone
            config |= {"hidden_size": "missing", "num_attention_heads": "missing"}
        yield {name: x for name, x in config.items() if x != "missing"}


def single_changes(kind):
    """One configuration for each field that transformers knows, changed alone."""
    from transformers import AutoConfig

    base = {"model_type": kind} | (GPT2 if kind == "gpt2" else LLAMA)
    for name, usual in AutoConfig.for_model(kind).to_dict().items():
        changes = [None, True, False, 1, 2, 3, 24, 0.5, "gelu", {}, ["full_attention"] * 2]
        for value in changes if name not in ("model_type", "architectures") else ():
            if type(value) is type(usual) or usual is None or value is None:
                yield base | {name: value}


def main(n=150):
    """Compare; returns the exit code."""
    try:
        import transformers
    except ImportError:
        print("skipped: transformers is not installed")
        return 0
    transformers.logging.set_verbosity_error()
    rng, told, bad = random.Random(0), Counter(), 0
    for kind in USUAL:
        for config in [*random_configs(kind, n, rng), *single_changes(kind)]:
            theirs = counted(config)
            mine = theirs and ours(config)
            if theirs is None:
                told[kind, "refused by transformers"] += 1
            elif mine is None and refusable(config):
                told[kind, "refused here"] += 1
            elif mine == theirs:
                told[kind, "equal"] += 1
            else:
                bad += 1
                print(f"{mine} here, {theirs} there: {config}")
    for (kind, what), times in told.items():
        print(f"{kind:11} {what:24} {times}")
    print(f"transformers {transformers.__version__}: {bad} of {told.total() + bad} differ")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
