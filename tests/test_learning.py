"""Does it learn? LoRA beside full fine-tuning on the hard task, over three seeds."""

import numpy as np
import pytest

from minilora import count, evaluate, fit, full, load_base, load_eval, lora

TASK = "sort_descending"


def tuned(recipe, lr, seed):
    """The share of trainable parameters, and the exact match after 400 steps."""
    model = load_base(np.float32)
    frozen = {name: p.data.copy() for name, p in model.named_parameters()}
    recipe(model)
    share = count(model, quiet=True).trainable / sum(a.size for a in frozen.values())
    fit(model, TASK, steps=400, lr=lr, seed=seed, progress=False)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            np.testing.assert_array_equal(p.data, frozen[name.replace(".base.", ".")])
    return share, evaluate(model, load_eval(TASK)).exact_match


@pytest.mark.slow
def test_lora_comes_within_ten_points_of_full_fine_tuning_with_a_tenth_of_its_parameters():
    assert evaluate(load_base(), load_eval(TASK)).exact_match == 0  # new to the base
    for seed in range(3):
        share, whole = tuned(full, 2e-3, seed)
        assert share == 1 and whole > 0.8
        rng = np.random.default_rng(seed)
        share, low = tuned(lambda m, rng=rng: lora(m, r=4, targets="blocks.*", rng=rng), 2e-2, seed)
        assert share < 0.1
        assert low > whole - 0.10, f"seed {seed}: full {whole:.1%}, LoRA {low:.1%}"
