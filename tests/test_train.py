"""The training loop: seeded, watched, interrupted, diverging; the bar; the scores."""

import io
import re
import sys

import numpy as np
import pytest

from minilora import (
    SGD,
    AdamW,
    Linear,
    Module,
    Parameter,
    Tensor,
    Transformer,
    constant,
    cosine,
    evaluate,
    fit,
    freeze,
    generate,
    load_base,
    load_eval,
    lora,
    ops,
    task_batches,
    tasks,
)


def small(seed=0, dtype=np.float32):
    return Transformer(
        vocab_size=tasks.VOCAB_SIZE,
        n_positions=tasks.N_POSITIONS,
        n_embd=8,
        n_head=2,
        n_layer=1,
        rng=np.random.default_rng(seed),
        dtype=dtype,
    )


def quick(model, draw="copy", **settings):
    return fit(model, draw, **{"steps": 4, "lr": 1e-2, "progress": False} | settings)


def weights(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


def assert_same(model, wanted):
    for name, data in weights(model).items():
        np.testing.assert_array_equal(data, wanted[name])


def stops_at(step, how):
    """A `draw` that does `how` in place of its batch number `step`, counted from 0."""
    real, calls = task_batches("copy"), []

    def draw(rng):
        calls.append(0)
        return how() if len(calls) == step + 1 else real(rng)

    return draw


def ctrl_c():
    raise KeyboardInterrupt


# ------------------------------------------------------------------ fit


def test_the_same_seed_gives_identical_losses_and_weights():
    one, two, other = small(), small(), small()
    first, second, third = quick(one), quick(two), quick(other, seed=1)
    assert first.loss == second.loss
    assert_same(one, weights(two))
    assert first.loss[0] != third.loss[0]


def test_the_seed_is_that_of_the_generator_that_draw_gets():
    seen = []

    def draw(rng):
        seen.append(rng.integers(1000))
        return np.zeros((1, 17), int), np.zeros((1, 17), int)

    quick(small(), draw, steps=3, seed=5)
    rng = np.random.default_rng(5)
    assert seen == [rng.integers(1000) for _ in range(3)]


def test_a_step_is_loss_backward_and_the_optimiser():
    model, by_hand = small(dtype=np.float64), small(dtype=np.float64)
    ids = tasks.sample("copy", 64, np.random.default_rng(3))
    inputs, targets = tasks.inputs_and_targets(ids)
    history = quick(
        model, seed=3, steps=1, lr=0.5, schedule=constant, optimizer=SGD(model.parameters(), lr=9.0)
    )
    loss = ops.cross_entropy(by_hand(inputs), targets)
    loss.backward()
    assert history.loss == [loss.item()]
    for p in by_hand.parameters():
        p.data -= 0.5 * p.grad
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-12)


def test_gradients_do_not_carry_over_from_step_to_step():
    model, by_hand = small(dtype=np.float64), small(dtype=np.float64)
    quick(model, steps=2, lr=0.1, schedule=constant, optimizer=SGD(model.parameters(), lr=9.0))
    rng, draw = np.random.default_rng(0), task_batches("copy")
    for _ in range(2):
        inputs, targets = draw(rng)
        by_hand.zero_grad()
        ops.cross_entropy(by_hand(inputs), targets).backward()
        for p in by_hand.parameters():
            p.data -= 0.1 * p.grad
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-12)


def test_the_rate_follows_the_schedule():
    class Spy:
        def __init__(self):
            self.rates = []

        def step(self, lr):
            self.rates.append(lr)

    spy, model = Spy(), small()
    quick(model, steps=5, lr=0.2, optimizer=spy)
    assert spy.rates == [0.2 * cosine(step, 5) for step in range(5)]
    asked = []
    quick(model, steps=3, optimizer=spy, schedule=lambda *a: asked.append(a) or 1)
    assert asked == [(0, 3), (1, 3), (2, 3)]


def test_training_learns_and_decay_shrinks():
    model, decayed = small(), small()
    history = quick(model, steps=60, lr=3e-2)
    assert np.mean(history.loss[-5:]) < history.loss[0] - 0.3
    quick(decayed, steps=60, lr=3e-2, weight_decay=1.0)
    assert np.linalg.norm(decayed.head.weight.data) < np.linalg.norm(model.head.weight.data)


def test_only_what_is_not_frozen_moves():
    model = small()
    freeze(model, "blocks.*")
    before = weights(model)
    quick(model, weight_decay=0.5)
    for name, data in weights(model).items():
        assert (data == before[name]).all() == name.startswith("blocks.")


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        quick(freeze(small()))


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_below_one_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        quick(small(), steps=steps)


@pytest.mark.parametrize("lr", [0, -0.1, np.nan, np.inf])
def test_a_rate_that_is_not_finite_and_above_zero_is_refused(lr):
    with pytest.raises(ValueError, match=f"lr {lr}"):
        quick(small(), lr=lr)


def test_an_unknown_task_is_refused_with_the_list():
    with pytest.raises(ValueError, match="task is 'srot'; expected one of copy"):
        quick(small(), "srot")


def test_dropout_is_on_while_it_runs_and_off_for_the_watch_and_after():
    seen, model = [], small()

    class Eyes(Module):
        def forward(self, x):
            seen.append(self.training)
            return x

    model.norm = Eyes()
    quick(
        model,
        steps=2,
        watch=lambda m: evaluate(m, tasks.sample("copy", 2, np.random.default_rng())),
    )
    assert seen == [False, True, True, False]
    assert not any(m.training for _, m in model.named_modules())


def test_no_gradient_is_left_behind():
    model = small()
    quick(model)
    assert all(p.grad is None for p in model.parameters())


def test_batches_are_64_fresh_examples_with_answers_only():
    inputs, targets = task_batches("sort")(np.random.default_rng(1))
    ids = tasks.sample("sort", 64, np.random.default_rng(1))
    np.testing.assert_array_equal(inputs, ids[:, :-1])
    assert (targets[:, :9] == -100).all() and (targets[:, 9:] == ids[:, 10:]).all()
    inputs, targets = task_batches(["sort", "copy"], 7, answers_only=False)(
        np.random.default_rng(1)
    )
    assert inputs.shape == targets.shape == (7, 17) and (targets >= 0).all()


# ------------------------------------------------------------------ history and watch


@pytest.mark.parametrize(
    "steps, every, wanted",
    [(5, 2, [0, 2, 4, 5]), (4, 2, [0, 2, 4]), (3, 50, [0, 3]), (2, 1, [0, 1, 2])],
)
def test_watch_looks_before_every_so_often_and_after(steps, every, wanted):
    model, start = small(), weights(small())
    history = quick(model, steps=steps, watch=lambda m: weights(m), watch_every=every)
    assert [step for step, _ in history.scores] == wanted
    np.testing.assert_array_equal(history.scores[0][1]["head.weight"], start["head.weight"])
    assert_same(model, history.scores[-1][1])
    assert len(history.loss) == steps and not history.interrupted
    assert all(type(x) is float for x in history.loss)


def test_without_a_watch_there_are_no_scores():
    assert quick(small()).scores == []


# ------------------------------------------------------------------ Ctrl-C and divergence


def test_ctrl_c_keeps_what_was_learnt(capsys):
    model, wanted = small(), small()
    history = quick(model, stops_at(3, ctrl_c), steps=10, schedule=constant, watch=lambda m: "seen")
    assert history.interrupted and len(history.loss) == 3
    assert capsys.readouterr().out == "stopped at step 3 of 10; what was learnt is kept\n"
    assert quick(wanted, steps=3, schedule=constant).loss == history.loss
    assert_same(model, weights(wanted))
    assert history.scores == [(0, "seen"), (3, "seen")]
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_ctrl_c_just_after_a_watch_does_not_look_twice(capsys):
    history = quick(small(), stops_at(2, ctrl_c), steps=9, watch=lambda m: 0, watch_every=2)
    assert history.scores == [(0, 0), (2, 0)]


def test_ctrl_c_at_the_first_step(capsys):
    model = small()
    before = weights(model)
    history = quick(model, stops_at(0, ctrl_c))
    assert history.interrupted and history.loss == []
    assert_same(model, before)


class Poisoned(Module):
    """One layer from numbers to logits, so that a batch can hold a nan."""

    def __init__(self):
        self.layer = Linear(3, 4, rng=np.random.default_rng(0))

    def forward(self, x):
        return self.layer(Tensor(np.asarray(x, np.float32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_step(bad):
    def draw_until(step):
        seen = []

        def draw(rng):
            seen.append(0)
            x = rng.standard_normal((5, 3))
            return (x * bad if len(seen) > step else x), rng.integers(4, size=5)

        return draw

    model, wanted = Poisoned(), Poisoned()
    with pytest.raises(FloatingPointError) as error, np.errstate(all="ignore"):
        quick(model, draw_until(2), steps=9, schedule=constant)
    text = "the loss is nan at step 2 of 9; a lower learning rate than 0.01 may help"
    assert str(error.value) == text
    quick(wanted, draw_until(2), steps=2, schedule=constant)
    assert_same(model, weights(wanted))
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_rate_far_too_hot_gives_that_error_and_no_stray_warning():
    with pytest.raises(FloatingPointError, match="a lower learning rate than 1e.30 may help"):
        quick(small(), steps=20, lr=1e30)


def test_any_other_error_comes_through_and_leaves_the_model_calm():
    def broken():
        raise OSError("no data")

    model = small()
    with pytest.raises(OSError, match="no data"):
        quick(model, stops_at(1, broken))
    assert not model.training and all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ the bar


def test_in_a_log_the_bar_is_plain_lines_without_a_clock(capsys):
    texts = []
    for _ in range(2):
        quick(small(), steps=20, progress=True, label="copying")
        texts.append(capsys.readouterr())
    assert texts[0] == texts[1] and texts[0].out == ""
    bars = ["#" * n + " " * (20 - n) for n in range(0, 21, 2)]
    wanted = [f"copying: {5 * n:3}% |{bars[n // 2]}| {n}/20 steps" for n in range(0, 21, 2)]
    assert texts[0].err.splitlines() == wanted


def test_a_short_run_shows_each_step_and_a_long_one_ten(capsys):
    quick(small(), steps=3, progress=True)
    assert [line[-9:] for line in capsys.readouterr().err.splitlines()] == [
        "0/3 steps",
        "1/3 steps",
        "2/3 steps",
        "3/3 steps",
    ]
    quick(small(), task_batches("copy", batch_size=1), steps=200, progress=True)
    assert len(capsys.readouterr().err.splitlines()) == 11


def test_an_interrupted_bar_ends_where_it_stood(capsys):
    quick(small(), stops_at(5, ctrl_c), steps=10, progress=True)
    assert capsys.readouterr().err.splitlines()[-1].endswith("5/10 steps")


def test_progress_can_be_turned_off(capsys):
    quick(small(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_the_bar_has_a_clock_on_one_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    quick(small(), progress=True)
    text = sys.stderr.getvalue()
    assert "\r" in text and re.search(r"4/4 \[\d\d:\d\d", text)
    assert text.count("\n") == 1 and text.endswith("\n")


def test_in_a_notebook_the_bar_goes_to_stdout_without_a_clock(monkeypatch):
    class OutStream(io.StringIO):
        __module__ = "ipykernel.iostream"

    texts = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdout", OutStream())
        quick(small(), progress=True)
        texts.append(sys.stdout.getvalue())
    assert texts[0] == texts[1]
    last = texts[0].rstrip("\n").split("\r")[-1]
    assert last == "training: 100% |####################| 4/4 steps"


# ------------------------------------------------------------------ evaluate


@pytest.fixture(scope="module")
def shaken():
    """The base with noise on its weights, so that it gets some answers right and some not."""
    model, rng = load_base(), np.random.default_rng(0)
    for p in model.parameters():
        p.data += 0.25 * p.data.std() * rng.standard_normal(p.shape)
    return model


@pytest.mark.parametrize("task", ["sort", "reverse"])
def test_exact_match_is_that_of_greedy_generation(shaken, task):
    ids = load_eval(task)[:100]
    score = evaluate(shaken, ids)
    made = generate(shaken, ids[:, : tasks.PROMPT], tasks.LENGTH)
    assert score.exact_match == (made == ids).all(axis=1).mean()
    assert 0.05 < score.exact_match < 0.95  # else the comparison would say little


def test_scores_are_counted_letter_by_letter(shaken):
    ids = load_eval("sort")[:50]
    logits = shaken(ids[:, :-1]).data
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats, right = [], []
    for row in range(50):
        for place in range(10, 18):  # the letters of the answer
            nats.append(-np.log(p[row, place - 1, ids[row, place]]))
            right.append(logits[row, place - 1].argmax() == ids[row, place])
    score = evaluate(shaken, ids)
    assert score.loss == pytest.approx(np.mean(nats), rel=1e-10)
    assert score.token_accuracy == np.mean(right)
    assert score.exact_match == np.reshape(right, (50, 8)).all(axis=1).mean()
    assert [type(x) for x in score] == [float] * 3


@pytest.mark.parametrize("training", [False, True])
def test_evaluate_turns_dropout_off_and_back_as_it_was(training):
    model = lora(small(), r=2, dropout=0.5, rng=np.random.default_rng(0))
    model.blocks[0].attn.q.B.data[...] = 1
    ids = tasks.sample("copy", 5, np.random.default_rng(0))
    model.train(training)
    assert evaluate(model, ids) == evaluate(model, ids)
    assert {m.training for _, m in model.named_modules()} == {training}


def test_evaluate_restores_the_mode_when_it_fails():
    model = small().train()
    with pytest.raises(IndexError):
        evaluate(model, np.full((1, 18), 99))
    assert model.training


# ------------------------------------------------------------------ nothing is spoilt in silence


class Norms(Module):
    """A finite loss at w = 0 whose gradient is not: the square root has no slope there."""

    def __init__(self):
        self.w = Parameter(np.zeros((3, 2)))

    def forward(self, x):
        return ((self.w * self.w).sum(axis=1) ** 0.5).reshape(1, 3) + np.zeros((len(x), 3))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    model = Norms()
    with pytest.raises(FloatingPointError, match="gradient"), np.errstate(all="ignore"):
        fit(model, lambda rng: (np.zeros((3, 1)), np.arange(3)), steps=1, lr=0.1, progress=False)
    assert not model.w.data.any()


def test_an_optimiser_of_another_model_is_refused():
    with pytest.raises(ValueError, match="optimiser"):
        quick(small(), steps=1, optimizer=AdamW(small().parameters(), 1e-2))


def test_every_module_gets_its_own_mode_back():
    model = small()
    model.blocks[0].training = True
    quick(model, steps=1)
    assert [n for n, m in model.named_modules() if m.training] == ["blocks.0"]


def test_a_run_goes_on_from_saved_state_as_if_it_had_not_stopped():
    def go(model, optimizer, steps):
        settings = {"lr": 1e-2, "schedule": constant, "progress": False, "optimizer": optimizer}
        return quick(model, steps=steps, **settings).loss

    model = small()
    optimizer = AdamW(model.parameters(), 1e-2)
    go(model, optimizer, 3)
    kept, state = weights(model), optimizer.state_arrays()
    wanted = go(model, optimizer, 5)
    fresh = small()
    for name, p in fresh.named_parameters():
        p.data[...] = kept[name]
    again = AdamW(fresh.parameters(), 1e-2)
    again.load_state(state)
    assert go(fresh, again, 5) == wanted
    with pytest.raises(ValueError, match="load_state"):
        AdamW([fresh.head.weight], 1e-2).load_state(state)
