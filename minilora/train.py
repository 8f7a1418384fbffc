"""The training loop, the progress bar, and the scores."""

import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import ops, tasks
from .optim import AdamW, cosine
from .tensor import no_grad


@dataclass
class History:
    """What a run leaves for plotting: `loss` by step, `scores` as (step, whatever `watch` gave)."""

    loss: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    interrupted: bool = False


class Score(NamedTuple):
    """Over a set of examples: mean loss in nats, share of letters and of whole answers right."""

    loss: float
    token_accuracy: float
    exact_match: float


def evaluate(model, ids):
    """Score a model on examples (N, 18) in one forward pass.

    An answer counts as exact if each letter is the most likely one given the right letters
    before it. For a causal model that is so exactly when greedy generation gives the right
    answer: as long as it has made no mistake, both see the same input.
    """
    inputs, targets = tasks.inputs_and_targets(ids)
    with model.mode(training=False), no_grad():
        logits = model(inputs)
        loss = ops.cross_entropy(logits, targets).item()
    right = (logits.data.argmax(axis=-1) == targets)[:, -tasks.LENGTH :]  # (N, LENGTH)
    return Score(loss, float(right.mean()), float(right.all(axis=1).mean()))


def fit(
    model,
    draw,
    *,
    steps,
    lr,
    seed=0,
    schedule=cosine,
    weight_decay=0.0,
    optimizer=None,
    watch=None,
    watch_every=50,
    progress=True,
    label="training",
):
    """Train what is not frozen.

    Args:
        draw: takes a `numpy.random.Generator` and returns (inputs, targets) of one batch, or a
            task's name (or a list of names) for batches of 64 of its examples.
        seed: of the generator that `draw` gets.
        schedule: (step, steps) to a factor for `lr`.
        optimizer: used instead of `AdamW` if given: anything with `step(lr)`.
        watch: called as `watch(model)` before the first step, then every `watch_every` steps and
            after the last; what it returns goes into `history.scores`.
        progress: whether to show a bar. label: its text.

    Returns a `History`. After Ctrl-C it holds what there was, with `interrupted` set, and the model
    keeps what it has learnt. A loss or a gradient that is not finite is a FloatingPointError; the
    model is then as the last good step left it.
    """
    if steps < 1 or not 0 < lr < np.inf:
        raise ValueError(f"steps is {steps} and lr {lr}; expected 1 or more, and a number above 0")
    if not callable(draw):
        draw = task_batches(draw)
    rng = np.random.default_rng(seed)
    optimizer = optimizer or AdamW(model.parameters(), lr, weight_decay=weight_decay)
    trained = model.trainable().values()
    held = getattr(optimizer, "parameters", trained)
    if not {id(p) for p in held} & {id(p) for p in trained}:
        raise ValueError("the optimiser holds nothing that trains; make it after the recipe")
    history = History()

    def look(step):
        seen = history.scores and history.scores[-1][0] == step
        if watch is not None and not seen:
            history.scores.append((step, watch(model)))

    look(0)
    bar = _bar(steps, label, progress)
    try:
        with model.mode(training=True):
            for step in range(steps):
                inputs, targets = draw(rng)
                model.zero_grad()
                with np.errstate(over="ignore", invalid="ignore"):  # said below, and better
                    loss = ops.cross_entropy(model(inputs), targets)
                    if np.isfinite(loss.data):
                        loss.backward()
                    # one square that overflows counts too: Adam would divide by infinity
                    size = sum(np.vdot(p.grad, p.grad) for p in trained if p.grad is not None)
                if not np.isfinite(loss.data + size):
                    bad = not np.isfinite(loss.data)
                    what = f"the loss is {loss.item()}" if bad else "a gradient is not finite"
                    hint = f"a lower learning rate than {lr:g} may help"
                    raise FloatingPointError(f"{what} at step {step} of {steps}; {hint}")
                optimizer.step(lr * schedule(step, steps))
                history.loss.append(loss.item())
                bar.update()
                if (step + 1) % watch_every == 0:
                    look(step + 1)
    except KeyboardInterrupt:
        history.interrupted = True
        print(f"stopped at step {len(history.loss)} of {steps}; what was learnt is kept")
    finally:
        bar.close()
        model.zero_grad()
    look(len(history.loss))
    return history


def task_batches(task, batch_size=64, answers_only=True):
    """A `draw` for `fit`: fresh examples of a task, or of several, at each step."""

    def draw(rng):
        return tasks.inputs_and_targets(tasks.sample(task, batch_size, rng), answers_only)

    return draw


class _Lines:
    """A log wants one line after another, not one line written over again."""

    last = ""

    def write(self, text):
        text = text.strip("\r\n")
        if text and text != self.last:  # on closing, the bar is drawn once more
            sys.stderr.write(text + "\n")
            self.last = text

    def flush(self):
        sys.stderr.flush()


def _bar(steps, label, progress):
    """A bar. Away from a terminal it moves ten times and shows no clock: the same everywhere."""
    if sys.stderr.isatty():
        return tqdm(total=steps, desc=label, disable=not progress)
    tqdm.monitor_interval = 0  # no thread beside the bar: a browser has none to give
    in_notebook = type(sys.stdout).__module__.startswith(("ipykernel", "pyodide_kernel"))
    form = {"bar_format": "{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} steps"}
    form |= {"ascii": " #", "file": sys.stdout if in_notebook else _Lines()}
    form |= {"miniters": max(1, steps // 10), "mininterval": 0, "maxinterval": float("inf")}
    return tqdm(total=steps, desc=label, disable=not progress, **form)
