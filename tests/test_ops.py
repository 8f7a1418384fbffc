"""Every primitive: a table checked by `check_vjp` and by a few laws, then values and errors."""

import math
import weakref

import numpy as np
import pytest

from minilora import Tensor, check_vjp, no_grad, ops

IDS = np.array([[0, 2, 2], [4, 0, 2]])  # repeated ids: 2 three times, 1 and 3 never
LABELS = np.array([[1, -100, 0], [3, 2, -100]])
TURN = np.arange(6.0).reshape(3, 2)  # angles of 3 positions, heads of 4 features
MASK = np.where(np.arange(5) > 2, -np.inf, 0)  # two keys of five are hidden
PICK = np.array([2, 0, 2])  # an element taken twice


def dropped(x):
    return ops.dropout(x, 0.4, np.random.default_rng(1))  # the same mask at each call


# (name, function, shapes of its inputs)
TABLE = [
    ("add", ops.add, [(3, 4), (3, 4)]),
    ("add broadcasts a row", ops.add, [(3, 4), (4,)]),
    ("add broadcasts both ways", ops.add, [(3, 1), (2, 1, 4)]),
    ("add broadcasts a scalar", ops.add, [(), (2, 3)]),
    ("add of length 0", ops.add, [(0, 3), (3,)]),
    ("add stretches to length 0", ops.add, [(1, 3), (0, 3)]),
    ("mul", ops.mul, [(3, 4), (3, 4)]),
    ("mul broadcasts a column", ops.mul, [(3, 4), (3, 1)]),
    ("mul broadcasts both ways", ops.mul, [(2, 1, 3), (5, 1)]),
    ("mul by itself", lambda x: ops.mul(x, x), [(3,)]),
    ("mul of length 0", ops.mul, [(2, 0), ()]),
    ("power 3", lambda x: ops.power(x, 3), [(3, 2)]),
    ("power 1", lambda x: ops.power(x, 1), [(3, 2)]),
    ("power -2", lambda x: ops.power(x * x + 1, -2), [(5,)]),
    ("power .5", lambda x: ops.power(x * x + 1, 0.5), [(5,)]),
    ("exp", ops.exp, [(2, 3)]),
    ("log", lambda x: ops.log(x * x + 0.5), [(2, 3)]),
    ("tanh", ops.tanh, [(2, 3)]),
    ("relu", ops.relu, [(7, 3)]),
    ("reshape", lambda x: ops.reshape(x, 4, -1), [(2, 2, 3)]),
    ("reshape to length 0", lambda x: ops.reshape(x, 0, 7), [(3, 0)]),
    ("transpose", ops.transpose, [(2, 3, 4)]),
    ("transpose 2 0 1", lambda x: ops.transpose(x, 2, 0, 1), [(2, 3, 4)]),
    ("transpose 0 -1 -2", lambda x: ops.transpose(x, 0, -1, -2), [(2, 3, 4)]),
    ("index an integer", lambda x: ops.index(x, 1), [(3, 4)]),
    ("index a slice", lambda x: ops.index(x, (slice(None, None, -2), slice(1, 3))), [(5, 4)]),
    ("index an array", lambda x: ops.index(x, PICK), [(3, 4)]),
    ("index pairs", lambda x: ops.index(x, (PICK, np.array([1, 1, 1]))), [(3, 4)]),
    ("index a mask", lambda x: ops.index(x, np.array([True, False, True])), [(3, 4)]),
    ("index nothing", lambda x: ops.index(x, slice(0, 0)), [(3, 4)]),
    ("index one number", lambda x: ops.index(x, 2), [(3,)]),
    ("prepend", ops.prepend, [(2, 3), (4, 5, 3)]),
    ("prepend nothing", ops.prepend, [(0, 3), (2, 1, 3)]),
    ("sum", ops.sum, [(2, 3)]),
    ("sum of a scalar", ops.sum, [()]),
    ("sum of length 0", ops.sum, [(0, 3)]),
    ("sum over 0", lambda x: ops.sum(x, 0), [(2, 3)]),
    ("sum over -2", lambda x: ops.sum(x, -2), [(2, 3, 4)]),
    ("sum over 0 and -1", lambda x: ops.sum(x, (0, -1)), [(2, 3, 4)]),
    ("sum keeps axes", lambda x: ops.sum(x, (0, 2), keepdims=True), [(2, 3, 4)]),
    ("mean", ops.mean, [(2, 5)]),
    ("mean over 1", lambda x: ops.mean(x, 1), [(2, 5, 3)]),
    ("mean keeps axes", lambda x: ops.mean(x, (0, 1), keepdims=True), [(2, 5, 3)]),
    ("matmul", ops.matmul, [(2, 3), (3, 4)]),
    ("matmul of 1 x 1", ops.matmul, [(1, 1), (1, 1)]),
    ("matmul of stacks", ops.matmul, [(5, 2, 3), (5, 3, 4)]),
    ("matmul broadcasts b", ops.matmul, [(5, 2, 3), (3, 4)]),
    ("matmul broadcasts both", ops.matmul, [(5, 1, 2, 3), (2, 3, 1)]),
    ("matmul over length 0", ops.matmul, [(2, 0), (0, 3)]),
    ("linear", ops.linear, [(2, 5, 3), (4, 3), (4,)]),
    ("linear without bias", ops.linear, [(2, 5, 3), (4, 3)]),
    ("linear of a vector", ops.linear, [(3,), (4, 3), (4,)]),
    ("linear of no rows", ops.linear, [(0, 3), (4, 3), (4,)]),
    ("embedding", lambda w: ops.embedding(w, IDS), [(5, 3)]),
    ("embedding of one id", lambda w: ops.embedding(w, 1), [(5, 3)]),
    ("embedding of no ids", lambda w: ops.embedding(w, np.zeros((2, 0), int)), [(5, 3)]),
    ("layer_norm", ops.layer_norm, [(2, 3, 5), (5,), (5,)]),
    ("layer_norm of a vector", ops.layer_norm, [(5,), (5,), (5,)]),
    ("layer_norm of no rows", ops.layer_norm, [(0, 5), (5,), (5,)]),
    ("rms_norm", ops.rms_norm, [(2, 3, 5), (5,)]),
    ("rms_norm of heads", ops.rms_norm, [(2, 3, 8), (4,)]),
    ("rms_norm of no rows", ops.rms_norm, [(0, 5), (5,)]),
    ("gelu_erf", ops.gelu_erf, [(3, 5)]),
    ("gelu_erf far out", lambda x: ops.gelu_erf(x * 8), [(40,)]),
    ("swiglu", ops.swiglu, [(2, 3, 5), (2, 3, 5)]),
    ("swiglu of itself", lambda x: ops.swiglu(x, x), [(7,)]),
    ("rotary", lambda x: ops.rotary(x, np.cos(TURN), np.sin(TURN)), [(2, 3, 8)]),
    ("gelu", ops.gelu, [(3, 5)]),
    ("gelu of length 0", ops.gelu, [(3, 0)]),
    ("gelu over 3 blocks", ops.gelu, [(2 * ops.GELU_BLOCK + 3,)]),
    ("softmax", ops.softmax, [(2, 3, 5)]),
    ("softmax of one", ops.softmax, [(3, 1)]),
    ("softmax of no rows", ops.softmax, [(0, 4)]),
    ("cross_entropy", lambda z: ops.cross_entropy(z, LABELS), [(2, 3, 5)]),
    ("cross_entropy, one row", lambda z: ops.cross_entropy(z, 2), [(4,)]),
    ("cross_entropy ignores 0", lambda z: ops.cross_entropy(z, LABELS % 5, 0), [(2, 3, 5)]),
    ("attention", ops.attention, [(2, 3, 4, 5)] * 3),
    ("attention sees all", lambda *qkv: ops.attention(*qkv, causal=False), [(2, 4, 3)] * 3),
    ("attention with S > T", ops.attention, [(2, 3, 4), (2, 5, 4), (2, 5, 4)]),
    ("attention sees all, S < T", lambda *a: ops.attention(*a, False), [(4, 3), (2, 3), (2, 3)]),
    ("attention by a mask", lambda *a: ops.attention(*a, MASK), [(2, 3, 4), (2, 5, 4), (2, 5, 4)]),
    ("attention of one", ops.attention, [(1, 1)] * 3),
    ("self-attention", lambda x: ops.attention(x, x, x), [(3, 4)]),
    ("dropout", dropped, [(6, 5)]),
    ("causal_mask", lambda x: ops.softmax(x + ops.causal_mask(3, 5)), [(2, 3, 5)]),
    ("a + 2 and 2 + a", lambda a: (a + 2) * (2 + a), [(3,)]),
    ("-a", lambda a: -a, [(3,)]),
    ("a - b", lambda a, b: a - b, [(2, 3), (3,)]),
    ("a - 2 and 2 - a", lambda a: (a - 2) * (2 - a), [(3,)]),
    ("a / b", lambda a, b: a / (b * b + 1), [(2, 3), (3,)]),
    ("a / 4 and 4 / a", lambda a: a / 4 + 4 / (a * a + 1), [(3,)]),
    ("a ** 2", lambda a: a**2, [(3,)]),
    ("a @ b", lambda a, b: a @ b, [(2, 3), (3, 2)]),
    ("a @ array, array @ a", lambda a: np.ones((1, 2)) @ a @ np.ones((3, 1)), [(2, 3)]),
    ("methods", lambda a: a[1:].sum(0).reshape(3, 1).T.transpose(1, 0).mean(), [(3, 3)]),
]
table = pytest.mark.parametrize("f, shapes", [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])


def draw(shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def scattered(a):
    """The same numbers, neither contiguous nor in row order: every second one, axes reversed."""
    room = np.full(tuple(2 * n for n in a.T.shape), np.nan, a.dtype)
    view = room[(slice(None, None, 2),) * a.ndim].T if a.ndim else a
    view[...] = a
    return view


def gradients(f, arrays, train=None, seed=1):
    """The value of `f` and the gradients of those inputs that `train` says (all)."""
    train = [True] * len(arrays) if train is None else train
    inputs = [Tensor(a, requires_grad=t) for a, t in zip(arrays, train, strict=True)]
    out = f(*inputs)
    out.backward(draw([out.shape], out.dtype, seed)[0])
    return out.data, [x.grad for x in inputs]


# ------------------------------------------------------------------ laws of all primitives


@table
def test_gradients_agree_with_differences(f, shapes):
    check_vjp(f, *draw(shapes), tol=1e-7)


@table
def test_non_contiguous_inputs_give_the_same(f, shapes):
    arrays = draw(shapes)
    strange = [scattered(a) for a in arrays]
    value, wanted = gradients(f, arrays)
    got, grads = gradients(f, strange)
    np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-12)
    for g, w in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


@table
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_and_shapes_are_kept(f, shapes, dtype):
    value, grads = gradients(f, draw(shapes, dtype))
    assert value.dtype == dtype
    assert [(g.dtype, g.shape) for g in grads] == [(dtype, shape) for shape in shapes]


@table
def test_float32_agrees_with_float64(f, shapes):
    arrays = draw(shapes, np.float32)
    value, grads = gradients(f, arrays)
    exact, wanted = gradients(f, [a.astype(np.float64) for a in arrays])
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-5)
    for g, w in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


@table
def test_nothing_writes_into_its_inputs_or_its_gradient(f, shapes):
    arrays = draw(shapes)
    for a in arrays:
        a.flags.writeable = False
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    out = f(*inputs)
    g = np.ones(out.shape)
    g.flags.writeable = False
    out.backward(g)  # NumPy raises if anything is written


@table
def test_freezing_the_others_changes_no_gradient(f, shapes):
    arrays = draw(shapes)
    _, together = gradients(f, arrays)
    for i, wanted in enumerate(together):
        _, alone = gradients(f, arrays, train=[i == j for j in range(len(arrays))])
        np.testing.assert_array_equal(alone[i], wanted)
        assert all(g is None for j, g in enumerate(alone) if j != i)


@table
def test_frozen_inputs_make_no_node_and_no_grad_gives_the_same(f, shapes):
    arrays = draw(shapes)
    frozen = f(*[Tensor(a) for a in arrays])
    with no_grad():
        unrecorded = f(*[Tensor(a, requires_grad=True) for a in arrays])
    assert frozen.node is None and unrecorded.node is None
    value, _ = gradients(f, arrays)
    np.testing.assert_array_equal(frozen.data, value)
    np.testing.assert_array_equal(unrecorded.data, value)


@table
def test_the_graph_holds_no_tensor(f, shapes):
    inputs = [Tensor(a, requires_grad=True) for a in draw(shapes)]
    gone = [weakref.ref(x) for x in inputs]
    out = f(*inputs)
    del inputs
    assert out.requires_grad and [ref() for ref in gone] == [None] * len(gone)


# ------------------------------------------------------------------ scalars keep float32


@pytest.mark.parametrize("s", [2, 2.0, np.float64(2), np.float32(2), np.int64(2), np.array(2.0)])
@pytest.mark.parametrize(
    "f, wanted",
    [
        (lambda x, s: x + s, 5),
        (lambda x, s: s + x, 5),
        (lambda x, s: x - s, 1),
        (lambda x, s: s - x, -1),
        (lambda x, s: x * s, 6),
        (lambda x, s: s * x, 6),
        (lambda x, s: x / s, 1.5),
        (lambda x, s: s / x, 2 / 3),
        (lambda x, s: x**s, 9),
    ],
    ids=["x+s", "s+x", "x-s", "s-x", "x*s", "s*x", "x/s", "s/x", "x**s"],
)
def test_a_scalar_causes_no_upcast(f, wanted, s):
    x = Tensor(np.full(2, 3, np.float32), requires_grad=True)
    y = f(x, s)
    assert isinstance(y, Tensor) and y.dtype == np.float32
    np.testing.assert_allclose(y.data, wanted, rtol=1e-6)
    y.sum().backward()
    assert x.grad.dtype == np.float32


def test_a_list_or_an_array_takes_the_dtype_of_the_tensor():
    x, pair = Tensor(np.ones(2, np.float32)), [1.0, 2.0]
    for y in (x + pair, pair + x, x + np.array(pair), np.array(pair) + x):
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y.data, [2, 3])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_an_array_of_integers_subtracts_as_numbers(dtype):
    y = Tensor([1.0, 1.0]) - np.array([1, 3], dtype)
    np.testing.assert_array_equal(y.data, [0, -2])


# ------------------------------------------------------------------ values against plain NumPy

X = np.random.default_rng(3).standard_normal((2, 3, 5))


@pytest.mark.parametrize(
    "f, wanted",
    [
        (ops.exp, np.exp(X)),
        (ops.tanh, np.tanh(X)),
        (ops.relu, np.maximum(X, 0)),
        (lambda t: ops.log(ops.exp(t)), X),
        (lambda t: ops.reshape(t, 5, 6), X.reshape(5, 6)),
        (ops.transpose, X.T),
        (lambda t: ops.transpose(t, 1, 2, 0), X.transpose(1, 2, 0)),
        (lambda t: t[0, 1:, ::2], X[0, 1:, ::2]),
        (lambda t: ops.sum(t, (0, 2)), X.sum((0, 2))),
        (lambda t: ops.mean(t, -1, keepdims=True), X.mean(-1, keepdims=True)),
        (lambda t: t @ X[0].T, X @ X[0].T),
        (lambda t: -t / 3 - t**2, -X / 3 - X**2),
    ],
)
def test_plain_primitives_are_those_of_numpy(f, wanted):
    np.testing.assert_allclose(f(Tensor(X)).data, wanted, rtol=1e-14, atol=1e-15)


def test_relu_at_zero_has_no_slope():
    t = Tensor([-1.0, 0.0, 1.0], requires_grad=True)
    ops.relu(t).sum().backward()
    np.testing.assert_array_equal(t.grad, [0, 0, 1])


def test_linear_is_x_wt_plus_bias():
    w, b = draw([(4, 5), (4,)])
    got = ops.linear(Tensor(X), Tensor(w), Tensor(b)).data
    np.testing.assert_allclose(got, np.einsum("bti,oi->bto", X, w) + b, rtol=1e-13)


def test_embedding_looks_rows_up_and_adds_up_their_gradients():
    w = Tensor(np.arange(10.0).reshape(5, 2), requires_grad=True)
    for ids in (IDS, IDS.astype(np.uint8), IDS.tolist()):
        w.grad = None
        y = ops.embedding(w, ids)
        np.testing.assert_array_equal(y.data, w.data[IDS])
        y.backward(np.arange(1.0, 7.0).reshape(2, 3, 1) * [1, 10])
        # id 0 stands at places 1 and 5, id 2 at 2, 3 and 6, id 4 at 4
        np.testing.assert_array_equal(w.grad[:, 0], [1 + 5, 0, 2 + 3 + 6, 0, 4])
        np.testing.assert_array_equal(w.grad[:, 1], 10 * w.grad[:, 0])


def test_prepend_puts_the_same_rows_before_every_sequence():
    rows, x = draw([(2, 3), (4, 5, 3)])
    got = ops.prepend(Tensor(rows), Tensor(x)).data
    for one, wanted in zip(got, x, strict=True):
        np.testing.assert_array_equal(one, np.concatenate([rows, wanted]))


def test_layer_norm_is_the_formula():
    w, b = draw([(5,), (5,)])
    wanted = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-5) * w + b
    got = ops.layer_norm(Tensor(X), Tensor(w), Tensor(b)).data
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-14)


def test_layer_norm_of_a_constant_row_is_the_bias():
    got = ops.layer_norm(Tensor(np.full((1, 4), 7.0)), Tensor(np.ones(4)), Tensor(np.arange(4.0)))
    np.testing.assert_array_equal(got.data, [np.arange(4)])


def test_layer_norm_adds_eps_to_the_variance():
    one, zero = Tensor(np.ones(2)), Tensor(np.zeros(2))
    got = ops.layer_norm(Tensor([[-1.0, 1.0]]), one, zero, eps=3.0).data
    np.testing.assert_allclose(got, [[-0.5, 0.5]], rtol=1e-15)


@pytest.mark.parametrize("n", [5, ops.GELU_BLOCK + 1])
def test_gelu_is_the_tanh_form(n):
    a = np.linspace(-6, 6, n)
    wanted = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    np.testing.assert_allclose(ops.gelu(Tensor(a)).data, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_far_out_is_0_or_x_without_a_warning(dtype):
    t = Tensor(np.array([-1e4, 1e4], dtype), requires_grad=True)
    y = ops.gelu(t)
    y.sum().backward()
    np.testing.assert_array_equal(y.data, [0, 1e4])
    np.testing.assert_array_equal(t.grad, [0, 1])


@pytest.mark.parametrize("dtype, atol", [(np.float32, 3e-7), (np.float64, 1e-9)])
def test_gelu_erf_is_the_formula_and_far_out_0_or_x(dtype, atol):
    a = np.linspace(-9, 9, 2001).astype(dtype)
    wanted = [x * (1 + math.erf(x / 2**0.5)) / 2 for x in a.tolist()]
    np.testing.assert_allclose(ops.gelu_erf(Tensor(a)).data, wanted, atol=atol, rtol=1e-6)
    far = ops.gelu_erf(Tensor(np.array([-1e4, 1e4], dtype))).data
    np.testing.assert_allclose(far, [0, 1e4], rtol=1e-6, atol=1e-2 * atol)


def test_rms_norm_is_the_formula_and_takes_each_head_alone():
    x, w = draw([(2, 3, 8), (4,)])
    rows = x.reshape(-1, 4)
    wanted = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 0.1) * w
    got = ops.rms_norm(Tensor(x), Tensor(w), eps=0.1).data
    np.testing.assert_allclose(got, wanted.reshape(x.shape), rtol=1e-13)


def test_swiglu_is_the_formula_and_far_out_without_a_warning():
    a, b = draw([(3, 4), (3, 4)])
    np.testing.assert_allclose(ops.swiglu(Tensor(a), Tensor(b)).data, a / (1 + np.exp(-a)) * b)
    far = Tensor(np.array([-1e4, 1e4], np.float32), requires_grad=True)
    y = ops.swiglu(far, Tensor(np.ones(2, np.float32)))
    y.sum().backward()
    np.testing.assert_array_equal([y.data, far.grad], [[0, 1e4], [0, 1]])


def test_rotary_keeps_lengths_and_makes_scores_depend_on_the_distance_alone():
    q, k = draw([(1, 1, 8), (1, 1, 8)])

    def turned(x, t):
        angles = t * np.array([[1.0, 0.3]])  # two heads of four features
        return ops.rotary(Tensor(x), np.cos(angles), np.sin(angles)).data[0, 0]

    assert np.linalg.norm(turned(q, 5)) == pytest.approx(np.linalg.norm(q), rel=1e-14)
    near, far = (turned(q, t + 2)[:4] @ turned(k, t)[:4] for t in (0, 40))
    assert near == pytest.approx(far, rel=1e-12)
    assert abs(near - turned(q, 3)[:4] @ turned(k, 0)[:4]) > 1e-3


def naive_softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def test_softmax_is_the_formula_and_takes_large_numbers():
    np.testing.assert_allclose(ops.softmax(Tensor(X)).data, naive_softmax(X), rtol=1e-14)
    for far in (1e4, -1e4):
        got = ops.softmax(Tensor(X + far)).data
        np.testing.assert_allclose(got, naive_softmax(X), rtol=1e-10)


def test_cross_entropy_is_the_mean_over_what_counts():
    got = ops.cross_entropy(Tensor(X), LABELS).item()
    p = naive_softmax(X)
    rows = [(0, 0, 1), (0, 2, 0), (1, 0, 3), (1, 1, 2)]
    assert got == pytest.approx(np.mean([-np.log(p[row]) for row in rows]), rel=1e-13)


def test_cross_entropy_of_what_is_ignored_has_no_gradient():
    z = Tensor(X, requires_grad=True)
    ops.cross_entropy(z, LABELS).backward()
    wanted = (naive_softmax(X) - np.eye(5)[LABELS.clip(0)]) / 4
    wanted[LABELS == -100] = 0
    np.testing.assert_allclose(z.grad, wanted, rtol=1e-12, atol=1e-16)


def test_cross_entropy_ignores_the_target_that_it_is_told_to():
    z, targets = Tensor(X[0]), np.array([1, 0, 3])
    got = ops.cross_entropy(z, targets, ignore_index=0).item()
    assert got == ops.cross_entropy(z, np.array([1, -100, 3])).item()
    with pytest.raises(IndexError, match="targets run from -100 to 3, V is 5"):
        ops.cross_entropy(z, np.array([1, -100, 3]), ignore_index=0)


def test_cross_entropy_takes_large_logits_and_small_integers():
    z = Tensor([[1e4, -1e4], [1e4, -1e4]])
    assert ops.cross_entropy(z, np.array([0, 1], np.uint8)).item() == 1e4


@pytest.mark.parametrize("t, s, causal", [(3, 3, True), (3, 3, False), (2, 5, True), (4, 2, False)])
def test_attention_is_the_formula(t, s, causal):
    q, k, v = draw([(2, 2, t, 4), (2, 2, s, 4), (2, 2, s, 4)])
    wanted = np.zeros(q.shape)
    for i in range(t):  # one query at a time over the keys that it may see
        seen = i + s - t + 1 if causal else s
        scores = np.einsum("bhd,bhsd->bhs", q[:, :, i], k[:, :, :seen]) / 2
        wanted[:, :, i] = np.einsum("bhs,bhsd->bhd", naive_softmax(scores), v[:, :, :seen])
    got = ops.attention(Tensor(q), Tensor(k), Tensor(v), causal).data
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_causal_mask_lets_the_last_query_see_every_key():
    ninf = -np.inf
    np.testing.assert_array_equal(ops.causal_mask(2, 3), [[0, 0, ninf], [0, 0, 0]])
    np.testing.assert_array_equal(ops.causal_mask(1, 1), [[0]])
    assert ops.causal_mask(2, 2, np.float32).dtype == np.float32


def test_dropout_zeroes_a_share_and_scales_the_rest():
    y = ops.dropout(Tensor(np.ones(20000)), 0.25, np.random.default_rng(0)).data
    assert set(np.unique(y)) == {0, 1 / 0.75}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_dropout_draws_from_the_generator_it_is_given():
    one = Tensor(np.ones(50))
    rng = np.random.default_rng(5)
    first, second = ops.dropout(one, 0.5, rng).data, ops.dropout(one, 0.5, rng).data
    again = ops.dropout(one, 0.5, np.random.default_rng(5)).data
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


# ------------------------------------------------------------------ the ends of the range

INF, NAN = np.inf, np.nan
ENDS = [-INF, -1.0, -0.0, 0.0, 1.0, INF, NAN]
# value and slope at each of ENDS, as PyTorch has them (`tests/ends_oracle.py` compares many more)
AT_ENDS = {
    "exp": (ops.exp, [0, np.exp(-1), 1, 1, np.e, INF, NAN], [0, np.exp(-1), 1, 1, np.e, INF, NAN]),
    "log": (ops.log, [NAN, NAN, -INF, -INF, 0, INF, NAN], [-0.0, -1, -INF, INF, 1, 0, NAN]),
    "relu": (ops.relu, [0, 0, 0, 0, 1, INF, NAN], [0, 0, 0, 0, 1, 1, 1]),
    "gelu": (lambda x: ops.gelu(x)[[2, 3, 6]], [0, 0, NAN], [NAN, 0, 0.5, 0.5, 0, NAN, NAN]),
    "x ** 0": (lambda x: x**0, [1] * 7, [0] * 7),
    "x ** .5": (
        lambda x: x**0.5,
        [NAN, NAN, -0.0, 0, 1, INF, NAN],
        [NAN, NAN, -INF, INF, 0.5, 0, NAN],
    ),
    "x ** -1": (
        lambda x: x**-1,
        [-0.0, -1, -INF, INF, 1, 0, NAN],
        [-0.0, -1, -INF, -INF, -1, -0.0, NAN],
    ),
    "2 ** x": (
        lambda x: 2**x,
        [0, 0.5, 1, 1, 2, INF, NAN],
        np.log(2) * np.array([0, 0.5, 1, 1, 2, INF, NAN]),
    ),
    "x / 0": (lambda x: x / 0, [-INF, -INF, NAN, NAN, INF, INF, NAN], [INF] * 7),
    "x · 0": (lambda x: x * 0, [NAN, 0, 0, 0, 0, NAN, NAN], [0] * 7),
    "1 / x": (
        lambda x: 1 / x,
        [-0.0, -1, -INF, INF, 1, 0, NAN],
        [-0.0, -1, -INF, -INF, -1, -0.0, NAN],
    ),
}


@pytest.mark.parametrize("name", AT_ENDS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_ends_of_the_range_are_those_of_pytorch(name):
    f, values, slopes = AT_ENDS[name]
    x = Tensor(ENDS, requires_grad=True)
    y = f(x)
    y.sum().backward()
    np.testing.assert_allclose(y.data, values, rtol=1e-12)
    np.testing.assert_allclose(x.grad, slopes, rtol=1e-12)


@pytest.mark.parametrize(
    "row, softmax, loss",
    [
        ([INF, 0, 0], [NAN, NAN, NAN], NAN),
        ([-INF, 0, 0], [0, 0.5, 0.5], INF),
        ([-INF, -INF, -INF], [NAN, NAN, NAN], NAN),
        ([NAN, 0, 0], [NAN, NAN, NAN], NAN),
        ([1e308, -1e308, 0], [1, 0, 0], 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_infinite_scores_are_those_of_pytorch(row, softmax, loss):
    np.testing.assert_array_equal(ops.softmax(Tensor(row)).data, softmax)
    np.testing.assert_array_equal(ops.cross_entropy(Tensor([row]), np.array([0])).data, loss)


# ------------------------------------------------------------------ counting matrix products


def test_gemms_are_counted_by_size_and_only_in_the_block():
    a, b = Tensor(np.ones((5, 1, 2, 3)), requires_grad=True), Tensor(np.ones((4, 3, 6)))
    ops.matmul(a, b)
    with ops.count_gemms() as log:
        y = ops.matmul(a, b).sum()
        ops.linear(Tensor(np.ones((2, 7, 3))), Tensor(np.ones((4, 3))))
        y.backward()
    ops.matmul(a, b)
    assert log == [(20, 2, 3, 6), (1, 14, 3, 4), (20, 2, 6, 3)]
    assert ops.flops(log) == 2 * (720 + 168 + 720)
    assert ops.flops([(1, 2**20, 2**20, 2**20)]) == 2**61  # no 32-bit integer on the way


def test_attention_works_out_the_gradient_of_its_scores_once():
    q = Tensor(np.ones((3, 4)), requires_grad=True)
    y = ops.attention(q, q, q).sum()
    with ops.count_gemms() as log:
        y.backward()
    assert len(log) == 4  # of the scores, q, k and v


# ------------------------------------------------------------------ errors


def ones(*shape, dtype=np.float64):
    return Tensor(np.ones(shape, dtype))


BAD = {  # a key word of the message; ours where NumPy would go on in silence
    "broadcast": lambda: ones(2, 3) + ones(2),
    "do not mix": lambda: ones(2) + ones(2, dtype=np.float32),
    "plain number": lambda: ones(2) ** ones(2),
    r"matmul: shapes \(2, 3\) and \(4, 3\)": lambda: ones(2, 3) @ ones(4, 3),
    r"matmul: shapes \(3,\) and \(3, 2\)": lambda: ones(3) @ ones(3, 2),
    r"\(5,2,3\).*\(4,3,2\)": lambda: ones(5, 2, 3) @ ones(4, 3, 2),
    "must match": lambda: ops.prepend(ones(2, 3), ones(5, 4, 2)),
    "dimension": lambda: ops.prepend(ones(2, 3), ones(4, 3)),
    r"size 6 into shape \(4,\)": lambda: ones(2, 3).reshape(4),
    r"linear: shapes \(2, 3\) and \(4, 2\)": lambda: ops.linear(ones(2, 3), ones(4, 2)),
    "convert one": lambda: ops.linear(ones(2, 3), ones(4, 3, dtype=np.float32)),
    "of integer": lambda: ops.cross_entropy(ones(2, 3), [0.0, 1.0]),
    "of integer .or boolean": lambda: ops.embedding(ones(4, 2), [0.0, 1.0]),
    "run from 0 to 4; expected 0 to 3": lambda: ops.embedding(ones(4, 2), [0, 4]),
    "run from -1 to 2": lambda: ops.embedding(ones(4, 2), [-1, 2]),
    r"\(3, 2\)": lambda: ops.cross_entropy(ones(2, 3, 5), np.zeros((3, 2), int)),
    "zero-size": lambda: ops.cross_entropy(ones(2, 5), [-100, -100]),
    "run from 0 to 5": lambda: ops.cross_entropy(ones(2, 5), [0, 5]),
    "run from -1 to 4": lambda: ops.cross_entropy(ones(2, 5), [-1, 4]),
    "n · d": lambda: ops.rms_norm(ones(2, 4), ones(3)),
    "expected the same": lambda: ops.swiglu(ones(2, 4), ones(4)),
    "size 4 is different": lambda: ops.attention(ones(2, 3), ones(2, 4), ones(2, 4)),
    "size 3 is different": lambda: ops.attention(ones(2, 3), ones(2, 3), ones(3, 3)),
    "1 keys for 3 queries": lambda: ops.attention(ones(3, 2), ones(1, 2), ones(1, 2)),
}


@pytest.mark.parametrize("word", BAD)
def test_errors_say_what_is_wrong(word):
    with pytest.raises((ValueError, TypeError, IndexError), match=word):
        BAD[word]()


def test_the_slope_of_a_constant_power_is_zero_at_zero_too():
    x = Tensor([0.0, 2.0], requires_grad=True)
    ops.power(x, 0).sum().backward()
    assert np.array_equal(x.grad, [0, 0])
