"""The optimisers against their algorithms written out, and what they leave alone."""

import math

import numpy as np
import pytest

from minilora import SGD, AdamW, Parameter, constant, cosine

rng = np.random.default_rng(0)
START = [rng.standard_normal((3, 2)), rng.standard_normal(3), rng.standard_normal((2, 2, 2))]
GRADS = [[rng.standard_normal(a.shape) for a in START] for _ in range(6)]


def parameters(dtype=np.float64):
    return [Parameter(a.astype(dtype)) for a in START]


def drive(optimizer, ps, lrs=None):
    """Take a step with each of GRADS."""
    for i, grads in enumerate(GRADS):
        for p, g in zip(ps, grads, strict=True):
            p.grad = g.astype(p.dtype)
        optimizer.step() if lrs is None else optimizer.step(lrs[i])
    return [p.data for p in ps]


def adamw(lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, lrs=None):
    """The algorithm of the paper, line by line, in float64. Only matrices decay."""
    thetas = []
    for j, theta in enumerate(START):
        m = v = np.zeros_like(theta)
        for t, grads in enumerate(GRADS, start=1):
            rate = lr if lrs is None else lrs[t - 1]
            g = grads[j]
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            shrink = decay * theta if theta.ndim > 1 else 0
            theta = theta - rate * (m_hat / (np.sqrt(v_hat) + eps) + shrink)
        thetas.append(theta)
    return thetas


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"decay": 0.3}, {"b1": 0.5, "b2": 0.6, "eps": 0.1}],
    ids=["plain", "decay", "betas and eps"],
)
def test_adamw_is_the_algorithm(settings, dtype, rtol):
    ps = parameters(dtype)
    args = dict(settings)
    betas = (args.pop("b1", 0.9), args.pop("b2", 0.999))
    decay = args.pop("decay", 0.0)
    got = drive(AdamW(ps, 0.05, betas, weight_decay=decay, **args), ps)
    for a, wanted in zip(got, adamw(0.05, **settings), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, wanted, rtol=rtol, atol=rtol)


def test_adamw_takes_another_rate_at_each_step():
    lrs = [0.1, 0.0, 0.02, 0.3, 0.1, 0.05]
    ps = parameters()
    got = drive(AdamW(ps, 99.0, weight_decay=0.1), ps, lrs)
    for a, wanted in zip(got, adamw(None, decay=0.1, lrs=lrs), strict=True):
        np.testing.assert_allclose(a, wanted, rtol=1e-12, atol=1e-12)


def test_the_first_step_of_adam_is_lr_whatever_the_gradient():
    p = Parameter(np.zeros(3))
    p.grad = np.array([1e-3, -5.0, 1e3])
    AdamW([p], lr=0.1).step()
    np.testing.assert_allclose(p.data, [-0.1, 0.1, -0.1], rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_the_algorithm(momentum):
    ps = parameters()
    got = drive(SGD(ps, 0.1, momentum), ps)
    for j, a in enumerate(got):
        theta, step = START[j], 0
        for grads in GRADS:
            step = momentum * step + grads[j]
            theta = theta - 0.1 * step
        np.testing.assert_allclose(a, theta, rtol=1e-12)


def test_sgd_takes_another_rate_and_keeps_float32():
    p = Parameter(np.ones(2, np.float32))
    p.grad = np.ones(2, np.float32)
    SGD([p], lr=99.0).step(np.float64(0.25))
    assert p.dtype == np.float32
    np.testing.assert_array_equal(p.data, 0.75)


# ------------------------------------------------------------------ what they leave alone

makers = pytest.mark.parametrize(
    "make",
    [
        lambda ps: AdamW(ps, 0.1, weight_decay=0.5),
        lambda ps: SGD(ps, 0.1),
        lambda ps: SGD(ps, 0.1, momentum=0.9),
    ],
    ids=["AdamW", "SGD", "momentum"],
)


@makers
def test_frozen_weights_are_untouched_even_by_decay(make):
    ps = parameters()
    ps[0].requires_grad = False
    optimizer = make(ps)
    for p, g in zip(ps[1:], GRADS[0][1:], strict=True):
        p.grad = g
    optimizer.step()
    np.testing.assert_array_equal(ps[0].data, START[0])
    assert (ps[2].data != START[2]).all()


@makers
def test_a_parameter_without_a_gradient_stays(make):
    ps = parameters()
    optimizer = make(ps)
    ps[1].grad = GRADS[0][1]
    optimizer.step()
    np.testing.assert_array_equal(ps[0].data, START[0])
    assert (ps[1].data != START[1]).all()


@makers
def test_gradients_are_not_written_to(make):
    ps = parameters()
    optimizer = make(ps)
    for p, g in zip(ps, GRADS[0], strict=True):
        p.grad = g.copy()
        p.grad.flags.writeable = False
    optimizer.step()
    optimizer.step()


def test_state_only_for_what_trains():
    ps = parameters(np.float32)
    ps[0].requires_grad = False
    adam = AdamW(ps)
    assert [a.shape for a in adam.m] == [a.shape for a in adam.v] == [(3,), (2, 2, 2)]
    assert adam.state_size == 2 * (3 + 8)
    assert all(a.dtype == np.float32 for a in adam.m + adam.v)
    assert SGD(ps, 0.1).m == []
    assert [a.shape for a in SGD(ps, 0.1, momentum=0.9).m] == [(3,), (2, 2, 2)]


@makers
def test_nothing_to_train_is_an_error(make):
    with pytest.raises(ValueError, match="nothing to train: every parameter is frozen"):
        make([Parameter(np.ones(2), requires_grad=False)])


# ------------------------------------------------------------------ schedules


def test_constant_is_one():
    assert [constant(step, 10) for step in (0, 5, 9)] == [1, 1, 1]


def test_cosine_rises_in_a_line_and_falls_by_a_cosine():
    factors = [cosine(step, 100, warmup=0.2) for step in range(100)]
    np.testing.assert_allclose(factors[:20], np.arange(1, 21) / 20)
    fall = [0.5 * (1 + math.cos(math.pi * i / 80)) for i in range(80)]
    np.testing.assert_allclose(factors[20:], fall)
    assert factors[60] == pytest.approx(0.5)


def test_cosine_warms_up_over_a_twentieth_unless_told():
    assert [cosine(step, 100) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1]
    assert cosine(5, 100) == 1 and cosine(6, 100) < 1


@pytest.mark.parametrize("warmup", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_cosine_stays_in_0_to_1_and_reaches_1(steps, warmup):
    factors = [cosine(step, steps, warmup) for step in range(steps)]
    assert 0 < min(factors) and max(factors) == 1
    top = factors.index(1)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
