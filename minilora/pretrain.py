"""Remake everything in `data/`: `python -m minilora.pretrain`.

The base is pre-trained by next-token prediction on five skills mixed, a quarter of the examples
under `?` in place of the skill's name. Then it is saved with one evaluation set for each task, the
history of its training, and checksums.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from . import io, safetensors, tasks
from .command import Parser
from .train import evaluate, fit
from .transformer import Transformer

RECIPE = {"steps": 5000, "lr": 4e-3, "seed": 0, "batch_size": 64, "unnamed": 16}
FILES = "base.safetensors", "eval.safetensors", "history.json", "SHA256SUMS"
EVAL_EXAMPLES, EVAL_SEED = 500, 2026


def fresh(dtype=np.float32):
    """The base before its first step."""
    rng = np.random.default_rng(RECIPE["seed"])
    return Transformer(
        vocab_size=tasks.VOCAB_SIZE, n_positions=tasks.N_POSITIONS, rng=rng, dtype=dtype
    )


def draw(rng):
    """One batch, inputs and targets (64, 17): 48 examples under their names, 16 under `?`."""
    under_names = [*tasks.SKILLS, "sort"]  # sort comes twice: it is the hardest
    named = tasks.sample(under_names, RECIPE["batch_size"] - RECIPE["unnamed"], rng)
    unnamed = tasks.sample(list(tasks.SKILLS), RECIPE["unnamed"], rng)
    unnamed[:, 0] = tasks.UNNAMED
    return tasks.inputs_and_targets(np.concatenate([named, unnamed]), answers_only=False)


def pretrain(model, **kwargs):
    """Train by the recipe, on every token of every example; `kwargs` go to `fit`."""
    settings = {name: RECIPE[name] for name in ("steps", "lr", "seed")}
    return fit(model, draw, **(settings | {"label": "pre-training"} | kwargs))


def evaluation_sets():
    """One fixed set for each task, as unsigned bytes (500, 18)."""
    rng = np.random.default_rng(EVAL_SEED)
    return {t: tasks.sample(t, EVAL_EXAMPLES, rng).astype(np.uint8) for t in tasks.TASKS}


def store(folder, model, history):
    """Write all of FILES. What is there is replaced only when the new ones are complete."""
    story = {
        "recipe": RECIPE,
        "loss": [float(f"{x:.7g}") for x in history.loss],  # nats per token, by step
        "exact_match": history.scores,  # (step, {skill: share of answers right})
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
        base, sets, told = (Path(name, file) for file in FILES[:3])
        io.save_model(model, base)
        safetensors.write(sets, evaluation_sets())
        told.write_text(json.dumps(story) + "\n", encoding="utf-8")
        for path in (base, sets, told):
            os.replace(path, folder / path.name)
    io.write_sums(folder)


def main(argv=None):
    """Remake the data; returns the exit code."""
    parser = Parser(prog="python -m minilora.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=io.DATA, help="folder to write (data/)")
    out = parser.parse_args(argv).out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make {str(out)!r}: {error.strerror}")
    for name in FILES:
        parser.writable(out / name)

    model = fresh()
    sets = {task: ids.astype(np.int64) for task, ids in evaluation_sets().items()}

    def skills(model):
        return {task: round(evaluate(model, sets[task]).exact_match, 4) for task in tasks.SKILLS}

    history = pretrain(model, watch=skills, watch_every=100)
    if history.interrupted:
        print("interrupted: nothing was written")
        return 130
    for task, ids in sets.items():
        _, letters, exact = evaluate(model, ids)
        print(f"{task:16} exact match {exact:6.1%}   letters {letters:6.1%}")
    # a disk that has filled up meanwhile must not cost the work
    for folder in (out, Path(tempfile.gettempdir(), "minilora-data")):
        try:
            store(folder, model, history)
            print(f"The data are in {folder}.")
            return int(folder != out)
        except OSError as error:
            print(f"cannot write into {str(folder)!r}: {error.strerror or error}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
