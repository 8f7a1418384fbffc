"""Do PEFT and minilora compute the same from the same files? Run it by `tests/peft_oracle.sh`.

A line for each case, with the largest difference of outputs over the largest output: out (we
write, PEFT reads; and we read again), back (PEFT writes, we read; and we write again, PEFT reads),
and twenty steps of AdamW on both sides from one file. Last, three voices on SmolLM2: swapped, in
one batch, mixed. Exit code 1 if one is above 1e-5 in float32 or 1e-10 in float64.
"""

import sys
import tempfile

import numpy as np
import peft
import torch
import transformers

import minilora as ml
from helpers import biased, logits, rng, shake
from minilora.real import export_peft, import_peft, open_model, save_pretrained
from minilora.real.__main__ import find_model
from minilora.real.__main__ import voices as stored
from real_oracle import FAMILIES, tokenizer_file

SIZES = {"vocab_size": 97, "n_positions": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
IDS = rng(3).integers(1, 97, size=(3, 9))
LIMITS = {"float32": 1e-5, "float64": 1e-10}
KINDS = "opt", "gpt2", "llama 3", "qwen3", "bert"
VOICES = "voices"  # on the command line, as a kind is
ROTARY = "llama 3", "qwen3"  # transformers norms and turns in float32, whatever the model's dtype


def toy(dtype, **changes):
    """A toy whose every part does something, and the OPT that transformers makes of its folder.

    The folder must also come back to us as it was.
    """
    model = biased(ml.Transformer(**SIZES | changes, rng=rng(1), dtype=dtype))
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.data += 0.1 * rng(p.size).standard_normal(p.shape).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        again, _ = open_model(folder, dtype)
        assert again.config == model.config
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert p.dtype == q.dtype and np.array_equal(p.data, q.data)
        return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def pair(kind, dtype):
    """The same small model here and in transformers."""
    if kind == "opt":
        return toy(dtype)
    config, cls, sizes = FAMILIES[kind]
    torch.manual_seed(0)
    theirs = cls(config(**sizes)).to(getattr(torch, dtype)).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no bias of zeros, no norm of ones
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        tokenizer_file(folder)
        return open_model(folder, dtype)[0], theirs


def wrapped(theirs, folder, trainable=False):
    """PEFT's model from a folder, in the precision of its base, its dropout off."""
    dtype = next(theirs.parameters()).dtype
    more = {"is_trainable": trainable, "autocast_adapter_dtype": False}
    torch.set_default_dtype(dtype)  # else a prompt would be cut to float32 on its way
    found = peft.PeftModel.from_pretrained(theirs, folder, **more).eval()
    torch.set_default_dtype(torch.float32)
    return found


def answer(theirs, ids=IDS, **more):
    """What the other side gives for ids: logits, but none for a prompt; BERT's mean state."""
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(ids), **more)
        if hasattr(found, "logits"):
            return found.logits[:, -ids.shape[1] :].numpy()
        return found.last_hidden_state.mean(1).numpy()


def gap(a, b):
    """The largest difference over the largest number."""
    return float(abs(a - b).max() / abs(b).max())


# ------------------------------------------------------------------ out

LINEAR = "blocks.*.attn.[qkvo]", "blocks.*.mlp.*"
RANKS = {"blocks.0.attn.q": 1, "blocks.*.attn.[qv]": 3, "blocks.1.mlp.up": 5}
OUT = {
    "lora": lambda m: ml.lora(m, 2, alpha=5, rng=rng(2)),
    "lora everywhere": lambda m: ml.lora(m, 3, targets=LINEAR, rng=rng(2)),
    "rslora": lambda m: ml.lora(m, 4, targets=LINEAR, rslora=True, rng=rng(2)),
    "ranks": lambda m: ml.lora(m, RANKS, rng=rng(2)),
    "dora": lambda m: ml.lora(m, 2, targets=LINEAR, variant=ml.DoRA, rng=rng(2)),
    "pissa": lambda m: ml.lora(m, 2, targets=LINEAR, variant=ml.PiSSA, rng=rng(2)),
    "pissa, rslora": lambda m: ml.lora(m, 3, rslora=True, variant=ml.PiSSA, rng=rng(2)),
    "ia3": lambda m: ml.ia3(m),
    "table": lambda m: ml.lora(m, 2, targets=("tokens", "*.q"), rng=rng(2)),
    "head": lambda m: ml.lora(m, 2, targets=("head", "*.q"), rng=rng(2)),
    "prefix": lambda m: ml.prefix(m, 4, rng=rng(2)),
    "prefix by an MLP": lambda m: ml.prefix(m, 4, hidden=8, rng=rng(2)),
    "prompt": lambda m: ml.prompt(m, 4, rng=rng(2)),
}
NOT_OUT = {"gpt2": {"table", "head", "prefix", "prefix by an MLP", "prompt"}}  # tied; it moves
NOT_OUT |= {"opt": {"prefix", "prefix by an MLP", "prompt"}, "bert": {"head", *list(OUT)[-3:]}}


def out(kind, dtype, recipe):
    """We write, PEFT reads; and we read again."""
    model, theirs = pair(kind, dtype)
    ours = logits(shake(recipe(model), size=0.1), IDS)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder)
        again = import_peft(pair(kind, dtype)[0], folder)
        return gap(answer(wrapped(theirs, folder)), ours), gap(logits(again, IDS), ours)


# ------------------------------------------------------------------ back

_llama = {"all": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]}
_llama |= {"one": "model.layers.1.mlp.up_proj", "tables": ["embed_tokens", "lm_head", "q_proj"]}
_llama |= {"scaled": (["k_proj", "v_proj", "down_proj"], ["down_proj"])}
LAYERS = {
    "opt": {
        "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "one": "layers.1.self_attn.q_proj",
        "tables": ["embed_tokens", "lm_head", "q_proj"],
        "scaled": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    },
    "gpt2": {
        "all": ["c_attn", "c_proj", "c_fc"],
        "one": "h.1.attn.c_attn",
        "tables": ["wpe", "c_fc"],  # the other is tied
        "scaled": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    },
    "bert": {
        "all": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
        "one": "layer.1.attention.self.query",
        "tables": ["word_embeddings", "position_embeddings", "token_type_embeddings"],
        "scaled": (["key", "value", "layer.0.output.dense"], ["layer.0.output.dense"]),
    },
    "llama 3": _llama,
    "qwen3": _llama,
}


def back_cases(kind, dtype):
    """PEFT's own configurations, by name."""
    at, task = LAYERS[kind], "FEATURE_EXTRACTION" if kind == "bert" else "CAUSAL_LM"
    scaled, feedforward = at["scaled"]

    def lora(r=2, names="all", **more):
        more |= {"task_type": task, "fan_in_fan_out": kind == "gpt2", "lora_alpha": 5}
        return peft.LoraConfig(r=r, target_modules=at[names], **more)

    yield "lora", lora(init_lora_weights="gaussian", lora_dropout=0.3)
    yield "rslora", lora(4, use_rslora=True)
    yield "ranks", lora(3, rank_pattern={at["one"]: 1}, alpha_pattern={at["one"]: 7})
    yield "dora", lora(use_dora=True)
    yield "tables", lora(names="tables")
    if kind != "gpt2" and dtype == "float32":  # PEFT has none in float64
        yield "pissa", lora(init_lora_weights="pissa")
    more = {"target_modules": scaled, "feedforward_modules": feedforward, "task_type": task}
    yield "ia3", peft.IA3Config(**more)
    if kind != "bert":
        virtual = {"task_type": task, "num_virtual_tokens": 4}
        yield "prefix", peft.PrefixTuningConfig(**virtual)
        yield "prefix by an MLP", peft.PrefixTuningConfig(prefix_projection=True, **virtual)
        yield "prompt", peft.PromptTuningConfig(**virtual)


def back(kind, dtype, config):
    """PEFT writes, we read; and we write again, PEFT reads."""
    model, theirs = pair(kind, dtype)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    theirs = theirs.to(getattr(torch, dtype)).eval()
    torch.manual_seed(4)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    wanted = answer(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        import_peft(model, folder)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder)
        again = answer(wrapped(pair(kind, dtype)[1], folder))
    return gap(logits(model, IDS), wanted), gap(again, wanted)


# ------------------------------------------------------------------ twenty steps


def steps(kind, dtype, recipe, n=20):
    """The largest difference of the losses on the way, and of the outputs at its end."""
    model, theirs = pair(kind, dtype)
    recipe(model)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder)
        theirs = wrapped(theirs, folder, trainable=True)
    kwargs = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours = ml.AdamW(model.trainable().values(), **kwargs)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}]  # vectors do not decay here
    groups += [{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    other, losses = torch.optim.AdamW([g for g in groups if g["params"]], **kwargs), []
    for ids in rng(6).integers(97, size=(n, 4, 10)):
        inputs, targets = ids[:, :-1], ids[:, 1:]
        loss = ml.ops.cross_entropy(model(inputs), targets)
        model.zero_grad()
        ml.backward(loss)
        ours.step()
        z = theirs(input_ids=torch.tensor(inputs)).logits.flatten(0, 1)
        their_loss = torch.nn.functional.cross_entropy(z, torch.tensor(targets).flatten())
        other.zero_grad()
        their_loss.backward()
        other.step()
        losses.append([loss.item(), their_loss.item()])
    losses = np.array(losses)
    assert len(set(losses[:, 0])) == n  # it does learn
    return gap(losses[:, 0], losses[:, 1]), gap(logits(model, IDS), answer(theirs))


# ------------------------------------------------------------------ three voices


def voices():
    """SmolLM2 with three voices in PEFT: yields what was compared, and how far apart it is."""
    path = find_model()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model, tokenizer = open_model(path, packed=False)
    ids = np.array([tokenizer.chat("What is a guitar?")])  # (1, T)
    ours, adapters = {None: logits(model, ids)}, {}
    yield "base", gap(ours[None], answer(theirs, ids))

    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, pairs) in enumerate(stored()["voices"].items()):
            batch, at = tokenizer.pairs(pairs["train"][:3]), f"{folder}/{name}"
            ml.lora(model, r=8, alpha=16, targets="blocks.*.attn.[qv]", rng=rng(seed))
            ml.fit(model, lambda _, batch=batch: batch, steps=4, lr=1e-2, progress=False)
            ours[name] = logits(model, ids)
            export_peft(model, at)
            adapters[name] = ml.detach(model)
            if len(adapters) == 1:
                theirs = peft.PeftModel.from_pretrained(theirs, at, adapter_name=name).eval()
            else:
                theirs.load_adapter(at, adapter_name=name)
        names = list(adapters)
        assert min(gap(ours[a], ours[b]) for a in ours for b in ours if a != b) > 0.05

        for name in [*names, names[0]]:  # back to the first at the end
            theirs.set_adapter(name)
            yield f"set_adapter({name})", gap(answer(theirs, ids), ours[name])
        with theirs.disable_adapter():
            yield "disable_adapter", gap(answer(theirs, ids), ours[None])

        rows, four = [*names, None], np.repeat(ids, 4, axis=0)  # (4, T)
        ml.many(model, adapters)
        with ml.choose(model, rows):
            together = logits(model, four)
        ml.detach(model)
        chosen = [name or "__base__" for name in rows]
        yield "a batch", gap(answer(theirs, four, adapter_names=chosen), together)
        yield "each alone", gap(np.concatenate([ours[name] for name in rows]), together)

        theirs.add_weighted_adapter(names, [1 / 3] * 3, "mix", combination_type="cat")
        theirs.set_adapter("mix")
        ml.attach(model, ml.combine(adapters.values(), [1 / 3] * 3))
        mixed = logits(model, ids)
        ml.detach(model)
        yield "a mix", gap(answer(theirs, ids), mixed)
        theirs.save_pretrained(folder, selected_adapters=["mix"])
        yield "a mix, back", gap(logits(import_peft(model, f"{folder}/mix"), ids), mixed)


def main(kinds):
    """Every case of these kinds; returns the exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bad = []

    def tell(dtype, what, *gaps):
        # Its files leave out what PiSSA took from the base: each side does the SVD anew, in
        # float32, and where two singular values are close they part them a little differently.
        ok = max(gaps) <= (1e-4 if what.endswith("back: pissa") else LIMITS[dtype])
        bad.extend([] if ok else [what])
        print(
            f"{dtype} {what:36}", *(f"{g:8.1e}" for g in gaps), "" if ok else "TOO MUCH", flush=True
        )

    for dtype in LIMITS:
        for kind in [kind for kind in kinds if kind != VOICES]:
            if dtype == "float64" and kind in ROTARY:
                continue
            model, theirs = pair(kind, dtype)
            tell(dtype, f"{kind} base", gap(logits(model, IDS), answer(theirs)))
            if kind == "opt":
                model, theirs = toy(dtype, tied=True, d_ff=24)
                tell(dtype, "opt base, tied, narrow", gap(logits(model, IDS), answer(theirs)))
            for name in [name for name in OUT if name not in NOT_OUT.get(kind, ())]:
                tell(dtype, f"{kind} out: {name}", *out(kind, dtype, OUT[name]))
            for name, config in back_cases(kind, dtype):
                tell(dtype, f"{kind} back: {name}", *back(kind, dtype, config))
            for name in {"opt": ("lora", "dora"), "llama 3": ("lora",)}.get(kind, ()):
                tell(dtype, f"{kind} twenty steps: {name}", *steps(kind, dtype, OUT[name]))
    if VOICES in kinds:
        for what, far in voices():
            tell("float32", f"SmolLM2: {what}", far)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}: {len(bad)} too far")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or (*KINDS, VOICES)))
