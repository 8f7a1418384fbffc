"""Do PEFT and minilora compute the same from the same files? Run it by `tests/peft_oracle.sh`.

A line for each case, with the largest difference of logits over the largest logit: out (we write,
PEFT reads), back (PEFT writes, we read), and for LoRA twenty steps of AdamW from one file. Exit
code 1 if one is above 1e-5 in float32 or 1e-10 in float64.
"""

import sys
import tempfile

import numpy as np
import peft
import torch
import transformers

import minilora as ml
from helpers import biased, logits, rng, shake
from minilora.real.peft_files import export_peft, import_peft, open_opt, save_pretrained

SIZES = {"vocab_size": 19, "n_positions": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
IDS = rng(3).integers(19, size=(3, 9))
LIMITS = {"float32": 1e-5, "float64": 1e-10}


def toy(family, dtype, **changes):
    """A model whose every part does something, and the same one in transformers."""
    model = biased(ml.Transformer(**SIZES | changes, rng=rng(1), dtype=dtype))
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.data += 0.1 * rng(p.size).standard_normal(p.shape).astype(dtype)
    return model, (opt if family == "opt" else gpt2)(model)


def opt(model):
    """By the folder that we write, which must also come back to us as it was."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        again = open_opt(folder)
        assert all(
            np.array_equal(p.data, q.data) and p.dtype == q.dtype
            for p, q in zip(model.parameters(), again.parameters(), strict=True)
        )
        assert again.config == model.config
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def gpt2(model):
    """A GPT-2 with the same weights; its c_attn, c_fc and c_proj are (d_in, d_out)."""
    c = model.config
    sizes = {k: c[k] for k in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=bool(c["tied"]))
    theirs = transformers.GPT2LMHeadModel(config).to(getattr(torch, str(model.norm.weight.dtype)))
    state = {"transformer.ln_f": model.norm, "lm_head": model.head}
    state |= {"transformer.wte": model.tokens, "transformer.wpe": model.positions}
    for i, block in enumerate(model.blocks):
        at = f"transformer.h.{i}."
        state |= {f"{at}ln_1": block.norm1, f"{at}ln_2": block.norm2}
        qkv = [getattr(block.attn, x) for x in "qkv"]
        weight, bias = (
            np.concatenate([getattr(m, n).data for m in qkv]) for n in ("weight", "bias")
        )
        state |= {f"{at}attn.c_attn": ml.Linear.of(weight, bias), f"{at}attn.c_proj": block.attn.o}
        state |= {f"{at}mlp.c_fc": block.mlp.up, f"{at}mlp.c_proj": block.mlp.down}
    arrays = {
        f"{n}.{k}": p.data.T if ".c_" in n and k == "weight" else p.data
        for n, m in state.items()
        for k, p in m.named_parameters()
    }
    theirs.load_state_dict({k: torch.tensor(a.copy()) for k, a in arrays.items()})
    return theirs.eval()


def wrapped(theirs, folder, trainable=False):
    """PEFT's model from a folder, in the precision of its base, its dropout off."""
    found = peft.PeftModel.from_pretrained(
        theirs, folder, is_trainable=trainable, autocast_adapter_dtype=False
    )
    return found.to(next(theirs.parameters()).dtype).eval()


def answer(theirs):
    """PEFT's logits for IDS. A prompt's own are in front, which we do not have."""
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(IDS)).logits[:, -IDS.shape[1] :].numpy()


def gap(a, b):
    """The largest difference over the largest logit."""
    return float(abs(a - b).max() / abs(b).max())


LINEAR = "blocks.*.attn.[qkvo]", "blocks.*.mlp.*"
RECIPES = {
    "lora": lambda m: ml.lora(m, 2, alpha=5, rng=rng(2)),
    "lora of four layers": lambda m: ml.lora(m, 3, targets=LINEAR, rng=rng(2)),
    "rslora": lambda m: ml.lora(m, 4, targets=LINEAR, rslora=True, rng=rng(2)),
    "ranks": lambda m: ml.lora(
        m, {"blocks.0.attn.q": 1, "blocks.*.attn.[qv]": 3, "blocks.1.mlp.up": 5}, rng=rng(2)
    ),
    "dora": lambda m: ml.lora(m, 2, targets=LINEAR, variant=ml.DoRA, rng=rng(2)),
    "pissa": lambda m: ml.lora(m, 2, targets=LINEAR, variant=ml.PiSSA, rng=rng(2)),
    "pissa, rslora": lambda m: ml.lora(m, 3, rslora=True, variant=ml.PiSSA, rng=rng(2)),
    "head and table": lambda m: ml.lora(m, 2, targets=("head", "tokens", "*.q"), rng=rng(2)),
    "ia3": lambda m: ml.ia3(m),
}
_qkv = {"opt": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
_all = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
_one = {"opt": "layers.1.self_attn.q_proj", "gpt2": "h.1.attn.c_attn"}
_kv = {"opt": ["k_proj", "v_proj", "fc2"], "gpt2": ["c_attn", "mlp.c_proj"]}
_ff = {"opt": ["fc2"], "gpt2": ["mlp.c_proj"]}
_table = {"opt": ["embed_tokens", "lm_head", "q_proj"], "gpt2": ["wte", "wpe", "lm_head", "c_fc"]}


def configs(family, dtype):
    """PEFT's own configurations, by the name of the case."""
    lora = {"task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2", "lora_alpha": 5}
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    one = _one[family]
    yield "lora", peft.LoraConfig(r=2, target_modules=_qkv[family], **lora)
    yield (
        "gaussian",
        peft.LoraConfig(r=2, target_modules=_all[family], init_lora_weights="gaussian", **lora),
    )
    yield "rslora", peft.LoraConfig(r=4, target_modules=_all[family], use_rslora=True, **lora)
    yield (
        "ranks",
        peft.LoraConfig(
            r=3, target_modules=_all[family], rank_pattern={one: 1}, alpha_pattern={one: 7}, **lora
        ),
    )
    yield "dora", peft.LoraConfig(r=2, target_modules=_all[family], use_dora=True, **lora)
    yield "head and tables", peft.LoraConfig(r=2, target_modules=_table[family], **lora)
    if family == "opt":
        yield (
            "pissa",
            peft.LoraConfig(r=2, target_modules=_all[family], init_lora_weights="pissa", **lora),
        )
    yield (
        "ia3",
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=_kv[family], feedforward_modules=_ff[family]
        ),
    )
    yield "prefix", peft.PrefixTuningConfig(**virtual)
    yield "prefix by an MLP", peft.PrefixTuningConfig(prefix_projection=True, **virtual)
    yield "prompt", peft.PromptTuningConfig(**virtual)


def out(family, dtype, recipe, **changes):
    """We write, PEFT reads; then we read what we wrote."""
    model, theirs = toy(family, dtype, **changes)
    ours = logits(shake(recipe(model), size=0.2), IDS)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder, family)
        found = gap(answer(wrapped(theirs, folder)), ours)
        again = import_peft(toy(family, dtype, **changes)[0], folder)
        kinds = {type(w).__name__ for w in ml.surgery.wrappers(again).values()}
        return found, gap(logits(again, IDS), ours), kinds


def back(family, dtype, config):
    """PEFT writes, we read; then we write, and PEFT reads that."""
    model, theirs = toy(family, dtype)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    theirs = theirs.to(getattr(torch, dtype))
    torch.manual_seed(4)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    wanted = answer(theirs.eval())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        import_peft(model, folder)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder, family)
        again = answer(wrapped(toy(family, dtype)[1], folder))
    return gap(logits(model, IDS), wanted), gap(again, wanted)


def steps(family, dtype, recipe, n=20):
    """The largest difference of loss on the way, and of logits at its end."""
    model, theirs = toy(family, dtype)
    recipe(model)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder, family)
        theirs = wrapped(theirs, folder, trainable=True)
    kwargs = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    mine = ml.AdamW(model.trainable().values(), **kwargs)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}]
    groups += [{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    other = torch.optim.AdamW([g for g in groups if g["params"]], **kwargs)
    losses = []
    for ids in rng(6).integers(19, size=(n, 4, 10)):
        loss = ml.ops.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        model.zero_grad()
        ml.backward(loss)
        mine.step()
        z = theirs(input_ids=torch.tensor(ids[:, :-1])).logits
        their_loss = torch.nn.functional.cross_entropy(
            z.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
        )
        other.zero_grad()
        their_loss.backward()
        other.step()
        losses.append([float(loss.data), their_loss.item()])
    losses = np.array(losses)
    assert losses[-1, 0] != losses[0, 0]
    return gap(losses[:, 0], losses[:, 1]), gap(logits(model, IDS), answer(theirs))


def main():
    """Every case; returns the exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bad = 0

    def tell(dtype, what, gaps, more=""):
        nonlocal bad
        ok = max(gaps) <= LIMITS[dtype]
        bad += not ok
        numbers = " ".join(f"{g:8.1e}" for g in gaps)
        print(f"{dtype} {what:42} {numbers}  {more}{'' if ok else '  TOO MUCH'}", flush=True)

    for dtype in LIMITS:
        for family in ("opt", "gpt2"):
            for tied in (False, True):
                model, theirs = toy(family, dtype, tied=tied)
                tell(
                    dtype, f"{family} base, tied {tied}", [gap(answer(theirs), logits(model, IDS))]
                )
            for name, recipe in RECIPES.items():
                *gaps, kinds = out(family, dtype, recipe)
                tell(dtype, f"{family} out: {name}", gaps, ", ".join(sorted(kinds)))
            for name, config in configs(family, dtype):
                tell(dtype, f"{family} back: {name}", back(family, dtype, config))
            for name in ("lora", "dora") if family == "opt" else ():
                tell(dtype, f"{family} twenty steps: {name}", steps(family, dtype, RECIPES[name]))
    print(f"peft {peft.__version__}, transformers {transformers.__version__}: {bad} too far apart")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
