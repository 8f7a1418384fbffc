"""The checker is checked: each kind of wrong gradient is planted, and must be caught."""

import re

import numpy as np
import pytest

from minilora import Tensor, check_vjp, ops, record

A = np.random.default_rng(0).standard_normal((3, 4))
ROW = np.random.default_rng(1).standard_normal(4)


def planted(value, vjp):
    """An operation of one input with this value and this VJP, right or wrong."""
    return lambda x: record(value(x.data), (x, lambda g: vjp(g, x.data)))


WRONG = {
    "sign": planted(np.exp, lambda g, x: -g * np.exp(x)),
    "factor": planted(np.square, lambda g, x: g * x),
    "slightly wrong factor": planted(np.square, lambda g, x: 2.00001 * g * x),
    "no gradient": planted(np.square, lambda g, x: 0 * g),
    "forgets what comes after": planted(np.square, lambda g, x: 2 * x),
    "a little added on the diagonal": planted(
        np.square, lambda g, x: 2 * g * x + np.eye(3, 4) * 1e-3
    ),
    "wrong order": planted(lambda x: x * 2, lambda g, x: 2 * g[::-1]),
    "not a number": planted(np.square, lambda g, x: g * np.nan),
    "off the tape": lambda x: Tensor(x.data * 1) + 0 * x,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_vjp_is_caught(name):
    with pytest.raises(AssertionError, match="check_vjp: backward gives .*, differences give"):
        check_vjp(WRONG[name], A)


@pytest.mark.parametrize(
    "vjp, shape",
    [
        (lambda g: g, "(3, 4)"),
        (lambda g: g.sum(), "()"),
        (lambda g: g.sum(0, keepdims=True), "(1, 4)"),
    ],
    ids=["no unbroadcast", "a scalar", "an axis too many"],
)
def test_a_gradient_of_another_shape_is_caught(vjp, shape):
    def add(x, row):
        return record(x.data + row.data, (x, lambda g: g), (row, vjp))

    wanted = f"check_vjp: gradient {shape} for an input (4,)"
    with pytest.raises(AssertionError, match=re.escape(wanted)):
        check_vjp(add, A, ROW)


def test_a_mistake_in_the_second_input_only_is_caught():
    def mul(a, b):
        return record(a.data * b.data, (a, lambda g: g * b.data), (b, lambda g: g * b.data))

    with pytest.raises(AssertionError, match="differences give"):
        check_vjp(mul, A, A + 1)


def test_a_gradient_that_is_added_only_once_is_caught():
    def square(x):  # both edges are needed: d(x·x) is 2x
        return record(x.data * x.data, (x, lambda g: g * x.data))

    with pytest.raises(AssertionError, match="differences give"):
        check_vjp(square, A)


def test_a_right_vjp_passes_and_the_largest_error_comes_back():
    error = check_vjp(lambda x, row: ops.exp(x) * row, A, ROW)
    assert type(error) is float and 0 <= error < 1e-7


def test_an_input_that_is_not_used_has_a_gradient_of_zero():
    assert check_vjp(lambda x, row: x * 2, A, ROW) < 1e-7


def test_float32_and_integer_points_are_checked_in_float64():
    assert check_vjp(ops.tanh, A.astype(np.float32)) < 1e-8
    assert check_vjp(ops.tanh, np.arange(3)) < 1e-8


def test_tol_eps_trials_and_rng_are_used():
    square = WRONG["slightly wrong factor"]
    assert check_vjp(square, A, tol=1e-3) > 1e-6
    calls = []
    check_vjp(lambda x: calls.append(0) or x * 2, A, trials=5)
    assert len(calls) == 5 * 3  # one forward with gradient and two for the difference
    with pytest.raises(AssertionError):
        check_vjp(ops.exp, A, eps=0.5)  # too long a step for a curve
    errors = [check_vjp(ops.exp, A, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert errors[0] == errors[1] != errors[2]


def test_the_inputs_are_not_changed():
    before = A.copy()
    check_vjp(ops.exp, A)
    np.testing.assert_array_equal(A, before)
