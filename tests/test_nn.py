"""Modules find what they hold by name; layers start as documented and compute their formula."""

import numpy as np
import pytest

from minilora import MLP, Embedding, LayerNorm, Linear, Module, Parameter, Tensor, check_vjp

both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def rng(seed=0):
    return np.random.default_rng(seed)


class Net(Module):
    """Two layers in a list, a shared weight, and things that are no parameters."""

    def __init__(self):
        self.gain = Parameter(np.ones(2))
        self.layers = [Linear(2, 2, rng=rng()), "no module", LayerNorm(2)]
        self.table = Embedding(2, 2, rng=rng())
        self.table.weight = self.layers[0].weight
        self.constant = Tensor([1.0])
        self.note = "text"

    def forward(self, x, *, twice=False):
        return self.layers[0](x) * (2 if twice else 1)


# ------------------------------------------------------------------ Module


def test_parameter_is_a_tensor_that_trains_unless_told_otherwise():
    assert Parameter([1.0]).requires_grad and isinstance(Parameter([1.0]), Tensor)
    assert not Parameter([1.0], requires_grad=False).requires_grad


def test_children_and_modules_are_found_depth_first():
    net = Net()
    assert [name for name, _ in net.own(Module)] == ["layers.0", "layers.2", "table"]
    assert [name for name, _ in net.named_modules()] == ["", "layers.0", "layers.2", "table"]
    assert dict(net.named_modules())["layers.2"] is net.layers[2]
    outer = Module()
    outer.net = net
    names = ["", "net", "net.layers.0", "net.layers.2", "net.table"]
    assert [name for name, _ in outer.named_modules()] == names


def test_parameters_are_found_once_under_their_first_name():
    net = Net()
    names = ["gain", "layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert [name for name, _ in net.named_parameters()] == names
    assert [id(p) for p in net.parameters()] == [id(p) for _, p in net.named_parameters()]


def test_trainable_leaves_out_what_is_frozen():
    net = Net()
    net.layers[0].weight.requires_grad = net.gain.requires_grad = False
    assert list(net.trainable()) == ["layers.0.bias", "layers.2.weight", "layers.2.bias"]


def test_train_and_eval_reach_every_module_and_touch_no_weight():
    net = Net()
    before = [p.data.copy() for p in net.parameters()]
    assert not net.training
    assert net.train() is net
    assert all(module.training for _, module in net.named_modules())
    assert net.eval() is net
    assert not any(module.training for _, module in net.named_modules())
    for p, wanted in zip(net.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.data, wanted)


def test_zero_grad_forgets_every_gradient_and_lets_frozen_ones_be():
    net = Net()
    net.gain.requires_grad = False
    net(Tensor(np.ones((1, 2), np.float32))).sum().backward()
    assert net.layers[0].weight.grad is not None
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_call_is_forward_with_all_its_arguments():
    net, x = Net(), Tensor(np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(net(x, twice=True).data, 2 * net(x).data)


def test_repr_shows_the_tree():
    net = Module()
    net.table = Embedding(3, 2, rng=rng())
    net.layers = [Linear(2, 3, rng=rng()), Linear(3, 2, rng=rng(), bias=False)]
    net.inner = Module()
    net.inner.norm = LayerNorm(4)
    assert repr(net) == (
        "Module(\n"
        "  table: Embedding(3 rows of 2)\n"
        "  layers.0: Linear(2 -> 3)\n"
        "  layers.1: Linear(3 -> 2, no bias)\n"
        "  inner: Module(\n"
        "    norm: LayerNorm(4))"
        ")"
    )


# ------------------------------------------------------------------ Linear


@both
def test_linear_is_x_wt_plus_bias(dtype):
    layer = Linear(3, 5, rng=rng(), dtype=dtype)
    layer.bias.data[:] = np.arange(5)
    x = rng(1).standard_normal((2, 4, 3)).astype(dtype)
    got = layer(Tensor(x))
    assert (layer.weight.shape, layer.bias.shape, got.dtype) == ((5, 3), (5,), dtype)
    np.testing.assert_allclose(got.data, x @ layer.weight.data.T + np.arange(5), rtol=1e-5)
    assert (layer.d_in, layer.d_out) == (3, 5)
    assert layer.dense() is layer.weight.data


def test_linear_starts_with_variance_one_over_d_in_and_no_bias():
    layer = Linear(100, 400, rng=rng())
    assert layer.weight.data.std() == pytest.approx(0.1, rel=0.02)
    assert layer.weight.data.mean() == pytest.approx(0, abs=0.002)
    assert not layer.bias.data.any()
    assert Linear(100, 400, rng=rng(), std=0.5).weight.data.std() == pytest.approx(0.5, rel=0.02)
    assert not Linear(3, 3, rng=rng(), std=0).weight.data.any()


def test_the_start_comes_from_the_generator_alone():
    first, second = Linear(3, 2, rng=rng(7)), Linear(3, 2, rng=rng(7))
    np.testing.assert_array_equal(first.weight.data, second.weight.data)
    assert (first.weight.data != Linear(3, 2, rng=rng(8)).weight.data).all()
    shared = rng(7)
    assert (Linear(3, 2, rng=shared).weight.data != Linear(3, 2, rng=shared).weight.data).all()


def test_linear_without_bias():
    layer = Linear(3, 2, rng=rng(), bias=False)
    assert layer.bias is None and [n for n, _ in layer.named_parameters()] == ["weight"]
    assert layer(Tensor(np.ones((1, 3), np.float32))).shape == (1, 2)


def test_linear_of_given_arrays():
    w, b = np.arange(6.0).reshape(2, 3), np.ones(2)
    layer = Linear.of(w, b)
    np.testing.assert_array_equal(layer(Tensor(np.ones((1, 3)))).data, [[4, 13]])
    assert layer.weight.data is w and layer.bias.data is b and Linear.of(w).bias is None


# ------------------------------------------------------------------ the others


@both
def test_embedding_looks_up_rows(dtype):
    table = Embedding(7, 3, rng=rng(), dtype=dtype)
    got = table([[6, 0], [0, 1]])
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.data, table.weight.data[[[6, 0], [0, 1]]])
    assert table.dense() is table.weight.data


def test_embedding_starts_with_std_and_of_takes_an_array():
    assert Embedding(400, 100, rng=rng()).weight.data.std() == pytest.approx(0.1, rel=0.02)
    assert Embedding(400, 100, rng=rng(), std=2).weight.data.std() == pytest.approx(2, rel=0.02)
    w = np.arange(6.0).reshape(3, 2)
    assert Embedding.of(w).weight.data is w


@both
def test_layer_norm_starts_as_plain_normalisation(dtype):
    norm = LayerNorm(64, dtype=dtype)
    y = norm(Tensor(rng().standard_normal((5, 64)).astype(dtype) * 9 + 4)).data
    assert y.dtype == dtype
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-4)


def test_layer_norm_scales_and_shifts():
    norm = LayerNorm(2, dtype=np.float64)
    norm.weight.data[:], norm.bias.data[:] = (10, 100), (1, 2)
    got = norm(Tensor([[-1e6, 1e6]])).data
    np.testing.assert_allclose(got, [[1 - 10, 2 + 100]], rtol=1e-9)


def test_mlp_is_up_gelu_down():
    mlp = MLP(3, rng=rng(), dtype=np.float64)
    assert (mlp.up.weight.shape, mlp.down.weight.shape) == ((12, 3), (3, 12))
    assert MLP(3, rng=rng(), d_ff=6).up.d_out == 6
    mlp.up.bias.data[:], mlp.down.bias.data[:] = 0.3, -0.2
    x = rng(1).standard_normal((2, 3))
    u = x @ mlp.up.weight.data.T + 0.3
    h = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    got = mlp(Tensor(x)).data
    np.testing.assert_allclose(got, h @ mlp.down.weight.data.T - 0.2, rtol=1e-12)


def test_gradients_reach_every_parameter_of_an_mlp():
    mlp = MLP(2, rng=rng(), dtype=np.float64)

    def f(x, *arrays):
        for layer, w, b in zip((mlp.up, mlp.down), arrays[::2], arrays[1::2], strict=True):
            layer.weight, layer.bias = w, b
        return mlp(x)

    check_vjp(f, rng(2).standard_normal((3, 2)), *[p.data for p in mlp.parameters()])


def test_parameters_and_layers_in_lists_and_dictionaries_are_found():
    class Net(Module):
        def __init__(self, parts):
            self.parts = parts

    one, two = (Linear(2, 2, bias=False, rng=np.random.default_rng(0)) for _ in range(2))
    for parts in ([one, two], {"a": one, "b": [two]}, [[one], [[two]]], [one.weight, two.weight]):
        assert sum(p.size for p in Net(parts).parameters()) == 8
    with pytest.raises(TypeError, match="list"):
        Net((one,))
