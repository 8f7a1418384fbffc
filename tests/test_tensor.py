"""The tape: what a tensor keeps, what `record` drops, what `backward` does and frees."""

import threading
import weakref

import numpy as np
import pytest

import minilora as ml
from minilora import Node, Tensor, backward, no_grad, record


def leaf(*values):
    return Tensor(list(values), requires_grad=True)


# ------------------------------------------------------------------ a tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_keep_their_dtype_and_are_not_copied(dtype):
    a = np.ones(3, dtype)
    assert Tensor(a).dtype == dtype
    assert Tensor(a).numpy() is a


@pytest.mark.parametrize(
    "data", [[1, 2], [True, False], np.arange(2, dtype=np.uint8), np.float16(1)]
)
def test_other_numbers_become_float64(data):
    assert Tensor(data).dtype == np.float64
    np.testing.assert_array_equal(Tensor(data).data, np.asarray(data, np.float64))


@pytest.mark.parametrize("data", ["ab", [1j], [None], np.array("2020", "M8[D]")])
def test_what_is_not_a_real_number_is_refused(data):
    with pytest.raises(TypeError, match="data has dtype .*; expected real numbers"):
        Tensor(data)


def test_a_tensor_of_a_tensor_is_refused():
    with pytest.raises(TypeError, match="data is a Tensor already; use tensor.detach()"):
        Tensor(Tensor([1.0]))


def test_attributes_are_those_of_the_array():
    t = Tensor(np.zeros((2, 3), np.float32))
    assert (t.shape, t.ndim, t.size, len(t), t.dtype) == ((2, 3), 2, 6, 2, np.float32)
    assert type(Tensor([2.5]).item()) is float and Tensor([2.5]).item() == 2.5


def test_repr_shows_values_dtype_and_requires_grad():
    assert repr(leaf(1.0, 2.5)) == "Tensor([1. , 2.5], requires_grad=True)"
    frozen = Tensor(np.eye(2, dtype=np.float32))
    text = "Tensor([[1., 0.],\n        [0., 1.]], dtype=float32, requires_grad=False)"
    assert repr(frozen) == text


def test_requires_grad_is_having_a_node():
    t = Tensor([1.0])
    assert not t.requires_grad and t.node is None
    t.requires_grad = True
    node = t.node
    assert t.requires_grad and isinstance(node, Node)
    t.requires_grad = True
    assert t.node is node  # nothing changed, so the gradient it may hold is kept
    t.requires_grad = False
    assert t.node is None


def test_requires_grad_of_a_result_cannot_be_set():
    y = leaf(1.0) * 2
    for _ in range(2):  # before its graph is freed, and after
        with pytest.raises(ValueError, match="only be set on a leaf; use detach"):
            y.requires_grad = False
        if y.node.edges:
            y.backward()


def test_detach_shares_the_array_off_the_tape():
    y = leaf(1.0) * 2
    assert y.detach().data is y.data and not y.detach().requires_grad


def test_grad_of_a_frozen_tensor_is_none_and_cannot_be_set():
    t = Tensor([1.0])
    assert t.grad is None
    t.grad = None
    with pytest.raises(ValueError, match="requires_grad=False, so it holds no gradient"):
        t.grad = np.ones(1)


def test_grad_can_be_set_on_a_leaf():
    x = leaf(1.0)
    x.grad = np.array([5.0])
    (x * 2).backward()
    assert x.grad == 7


# ------------------------------------------------------------------ record


def test_record_drops_the_edges_of_frozen_parents():
    x, frozen = leaf(1.0), Tensor([2.0])
    y = record(np.ones(1), (x, lambda g: g), (frozen, lambda g: g))
    assert [parent for parent, _ in y.node.edges] == [x.node]
    assert record(np.ones(1), (frozen, lambda g: g)).node is None


def test_the_vjp_of_a_frozen_parent_is_never_called():
    def never(g):
        raise AssertionError("called")

    x = leaf(1.0)
    record(np.ones(1), (x, lambda g: 3 * g), (Tensor([2.0]), never)).backward()
    assert x.grad == 3


def test_the_graph_keeps_no_inner_tensor_alive():
    x = leaf(1.0)
    inner = x + 1
    gone = weakref.ref(inner)
    y = inner + 1
    del inner
    assert gone() is None
    y.backward()
    assert x.grad == 1


def test_nodes_have_slots():
    with pytest.raises(AttributeError):
        Node().tensor = Tensor([1.0])


def test_no_grad_records_nothing_and_ends_with_the_block():
    x = leaf(1.0)
    with no_grad():
        with no_grad():
            assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_ends_when_the_block_raises():
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (leaf(1.0) * 2).requires_grad


def test_no_grad_in_one_thread_leaves_the_others_alone():
    seen = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((leaf(1.0) * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


# ------------------------------------------------------------------ backward


def test_gradients_add_up_over_several_backwards():
    x = leaf(3.0)
    for _ in range(2):
        (x * x).backward()
    assert x.grad == 12


def test_backward_of_a_leaf_is_one():
    x = leaf(3.0)
    x.backward()
    assert x.grad == 1


def test_backward_takes_the_gradient_of_what_comes_after():
    x = leaf(1.0, 2.0)
    backward(x * x, [10, 100])
    np.testing.assert_array_equal(x.grad, [20, 400])


def test_the_gradient_has_the_dtype_of_the_tensor():
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    (x * x).backward(np.ones(2))  # float64 from outside
    assert x.grad.dtype == np.float32


def test_a_diamond_passes_through_each_node_once():
    x = leaf(2.0)
    calls = []

    def double(t):
        return record(2 * t.data, (t, lambda g: calls.append(g) or 2 * g))

    y = double(x)
    (y * y + y).backward()  # 4x² + 2x
    assert x.grad == 8 * 2 + 2
    assert len(calls) == 1


def test_what_the_graph_held_is_freed():
    kept = np.ones(5)
    gone = weakref.ref(kept)
    x = leaf(1.0)
    y = record(np.ones(1), (x, lambda g, kept=kept: g * kept[:1]))
    z = y * 1
    del kept
    assert gone() is not None
    z.backward()
    assert gone() is None and y.node.edges is None and y.grad is None


def test_a_shared_part_that_was_freed_is_an_error_and_moves_no_gradient():
    x, w = leaf(1.0), leaf(1.0)
    shared = x * 2
    other = shared * w
    (shared * 3).backward()
    with pytest.raises(RuntimeError, match="freed by an earlier backward; run the forward pass"):
        other.backward()
    assert x.grad == 6 and w.grad is None


def test_backward_of_what_does_not_train_is_an_error():
    with pytest.raises(RuntimeError, match="nothing here requires a gradient.*frozen"):
        Tensor([1.0]).backward()


def test_backward_of_a_vector_wants_a_sum_or_a_grad():
    with pytest.raises(RuntimeError, match=r"shape is \(2,\), not a scalar; sum it, or pass"):
        leaf(1.0, 2.0).backward()


def test_a_grad_of_another_shape_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        leaf(1.0, 2.0).backward(np.ones(3))


def test_what_a_newcomer_tries_gives_a_number_or_an_error():
    one, two = Tensor([0.0]), Tensor([1.0, 2.0])
    assert not one and float(Tensor(3.0)) == 3.0 and f"{Tensor(3.0):.2f}" == "3.00"
    np.testing.assert_array_equal(two == np.array([1.0, 3.0]), [True, False])
    assert {two: 1}[two] == 1
    with pytest.raises(ValueError, match="ambiguous"):
        bool(two)


def test_numpy_and_a_tuple_of_axes_are_taken_as_a_newcomer_writes_them():
    t = Tensor(np.arange(24.0).reshape(2, 3, 4), requires_grad=True)
    assert np.array(t).dtype == np.float64 and np.array(t).shape == (2, 3, 4)
    assert t.transpose((0, 2, 1)).shape == t.transpose([0, 2, 1]).shape == (2, 4, 3)
    assert np.asarray(t, np.float32).dtype == np.float32
    np.array(t)[...] = 7
    assert t.data[0, 0, 1] == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: ml.nn.Linear(3, 4, rng=np.random.default_rng(0), dtype=dtype),
        lambda dtype: ml.Transformer(
            vocab_size=3, n_positions=4, rng=np.random.default_rng(0), dtype=dtype
        ),
        ml.load_base,
    ],
)
def test_a_request_for_float16_says_what_there_is(make):
    with pytest.raises((TypeError, ValueError), match="float16; expected float32 or float64"):
        make(np.float16)
