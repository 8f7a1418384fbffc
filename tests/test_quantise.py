"""Quantisation: packing, levels, blocks, bounds, bytes; GPTQ; the layers and the recipes."""

import copy
import json
import tracemalloc
from math import frexp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as some_array

from helpers import same_arrays
from minilora import (
    Linear,
    LoRA,
    Tensor,
    Transformer,
    check_vjp,
    lora,
    merge,
    ops,
)
from minilora.compress import (
    QuantLinear,
    StraightThrough,
    dequantise,
    gptq,
    kmeans,
    kmeans_levels,
    nf4_levels,
    observe,
    pack,
    quantise,
    quantise_aware,
    quantise_model,
    unpack,
)
from minilora.compress.quantise import block_size, nearest, small_floats
from minilora.transformer import attend

IDS = np.random.default_rng(9).integers(7, size=(2, 5))
NF4 = [  # as published with QLoRA
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])
all_bits = pytest.mark.parametrize("bits", range(1, 9))
FORMATS = [
    *[{"bits": bits, "kind": kind} for bits in (2, 4, 8) for kind in ("symmetric", "affine")],
    {"bits": 1, "kind": "symmetric"},
    {"bits": 1, "kind": "affine"},
    {"bits": 4, "kind": "nf4"},
    {"bits": 4, "kind": "mxfp4"},
    {"bits": 4, "kind": "nvfp4"},
    {"bits": 2, "kind": "levels", "levels": [-1.0, 0.0, 0.5]},
]
formats = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f['bits']} {f['kind']}")
blocks = st.one_of(st.none(), st.just("row"), st.integers(1, 40))


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0, dtype=np.float32):
    return rng(seed).standard_normal(shape).astype(dtype)


def small(dtype=np.float64, **changes):
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}
    return Transformer(**sizes | changes, rng=rng(), dtype=dtype)


def mse(w, **settings):
    return float(np.mean((w - dequantise(quantise(w, **settings), w.dtype)) ** 2))


def spread(q, values):
    """A number for each block as an array in the shape of the weights."""
    n = int(np.prod(q.shape))
    size = {None: n, "row": n // q.shape[0]}.get(q.block, q.block)
    return np.repeat(values, size)[:n].reshape(q.shape)


# ------------------------------------------------------------------ packing


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_packing_is_exact_and_takes_the_bytes_it_should(bits, n, seed):
    codes = rng(seed).integers(1 << bits, size=n)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (-(-n * bits // 8),)
    back = unpack(packed, bits, n)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes)


@all_bits
def test_packed_codes_are_a_string_of_bits_lowest_first(bits):
    codes = rng(bits).integers(1 << bits, size=37)
    number = sum(int(code) << bits * i for i, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == number.to_bytes(-(-37 * bits // 8), "little")


def test_two_codes_of_four_bits_are_one_byte():
    assert pack([[1, 2], [15, 0]], 4).tolist() == [0x21, 0x0F]


def test_packing_does_not_write_to_the_codes():
    codes = np.arange(16, dtype=np.uint8)
    pack(codes, 4)
    assert codes.tolist() == list(range(16))


# ------------------------------------------------------------------ levels


def test_nf4_levels_are_the_published_ones():
    levels = nf4_levels()
    np.testing.assert_allclose(levels, NF4, atol=1e-6)
    assert levels[7] == 0 and levels[0] == -1 and levels[-1] == 1
    with pytest.raises(ValueError, match="read-only"):
        levels[0] = 0


@both
def test_an_nf4_code_is_that_of_the_nearest_level_whatever_the_weight(dtype):
    levels = nf4_levels()
    middle = ((levels[1:] + levels[:-1]) / 2).astype(dtype)
    edges = [middle, np.nextafter(middle, dtype(2)), np.nextafter(middle, dtype(-2))]
    x = np.concatenate([*edges, levels.astype(dtype), rng().uniform(-1, 1, 5000).astype(dtype)])
    x = np.append(x, dtype(1))  # the largest: the scale is 1, so that x stays what it is
    codes = unpack(quantise(x, kind="nf4", block=None).packed, 4, x.size)
    distance = np.abs(x[:, None].astype(np.float64) - levels)
    chosen = distance[np.arange(x.size), codes]
    np.testing.assert_allclose(chosen, distance.min(axis=1), rtol=0, atol=5e-16)


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 256])
def test_few_levels_and_many_are_searched_alike(k):
    levels = np.sort(rng(k).standard_normal(k))
    x = np.append(rng(1).standard_normal(500), (levels[1:] + levels[:-1]) / 2)
    wanted = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    np.testing.assert_array_equal(nearest(x, levels), wanted)


@given(some_array(np.float64, st.integers(1, 60), elements=st.floats(-9, 9)), st.integers(1, 9))
def test_kmeans_levels_are_increasing_and_within_the_weights(w, k):
    levels = kmeans_levels(w, k)
    assert 1 <= levels.size <= k and (np.diff(levels) > 0).all()
    assert levels[0] >= w.min() - 1e-9 and levels[-1] <= w.max() + 1e-9


def test_kmeans_finds_a_finite_set_exactly_and_a_fixed_point_otherwise():
    np.testing.assert_allclose(kmeans_levels([3, 1, 3, 2, 1, 1, 2, 3], 3), [1, 2, 3], rtol=1e-12)
    w = rng().standard_normal(2000)
    levels = kmeans_levels(w, 8, iterations=1000)
    codes = nearest(w, levels)
    np.testing.assert_allclose(levels, [w[codes == i].mean() for i in range(8)], rtol=1e-9)


def test_each_iteration_of_kmeans_lowers_the_error():
    w = rng().standard_normal(3000)
    errors = []
    for iterations in range(8):
        levels = kmeans_levels(w, 8, iterations)
        errors.append(np.mean((w - levels[nearest(w, levels)]) ** 2))
    assert (np.diff(errors) < 0).all()


@pytest.mark.parametrize("block", [None, 64])
def test_kmeans_beats_the_uniform_grid_and_counts_its_levels(block):
    w = normal(64, 64)
    q = kmeans(w, 3, block=block)
    assert np.unique(dequantise(kmeans(w, 3))).size == 8  # a finite set
    assert np.mean((w - dequantise(q)) ** 2) < 0.8 * mse(w, bits=3, block=block)
    assert q.nbytes == 4096 * 3 // 8 + 4 * 8 + 4 * (1 if block is None else 64)


# ------------------------------------------------------------------ quantise and dequantise


@given(
    st.integers(2, 8),
    blocks,
    st.sampled_from(["symmetric", "affine"]),
    st.sampled_from([np.float32, np.float64]),
    st.tuples(st.integers(1, 9), st.integers(1, 30)),
    st.integers(0, 99),
)
def test_no_error_is_above_half_a_step(bits, block, kind, dtype, shape, seed):
    w = normal(*shape, seed=seed, dtype=dtype)
    q = quantise(w, bits, block=block, kind=kind)
    back = dequantise(q, dtype)
    assert back.dtype == dtype and back.shape == shape
    room = 1e-6 * np.abs(w).max()
    assert (np.abs(back - w) <= spread(q, q.scales()) * 0.50001 + room).all()


@given(
    st.sampled_from(FORMATS),
    blocks,
    st.booleans(),
    st.tuples(st.integers(1, 9), st.integers(1, 30)),
)
def test_the_bytes_are_those_of_the_formula(form, block, double, shape):
    q = quantise(normal(*shape), block=block, double=double, **form)
    n = shape[0] * shape[1]
    size = {None: n, "row": shape[1]}.get(block, block)
    count = -(-n // size)
    wanted = -(-n * form["bits"] // 8)
    fp4 = form["kind"] in ("mxfp4", "nvfp4") and not double
    wanted += count + 4 * -(-count // 256) + 4 if double else (1 if fp4 else 4) * count
    wanted += 4 if fp4 and form["kind"] == "nvfp4" else 0
    if form["kind"] == "affine":  # zeros, in 8 bits between the ends of their group
        wanted += count + 8 * -(-count // 256) if double else 4 * count
    wanted += 4 * 3 if form["kind"] == "levels" else 0
    assert q.nbytes == wanted == sum(array.nbytes for array in q.arrays().values())
    assert q.bits_per_weight == 8 * wanted / n


def test_double_quantisation_takes_the_scales_from_a_half_to_an_eighth_of_a_bit():
    w = normal(256, 256)
    plain, double = (quantise(w, kind="nf4", double=d) for d in (False, True))
    assert plain.bits_per_weight == 4.5
    mean = 32 / w.size
    assert double.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + mean
    assert double.bits_per_weight == pytest.approx(4.127, abs=6e-4)
    np.testing.assert_allclose(double.scales(), plain.scales(), rtol=0.01)
    assert mse(w, kind="nf4", double=True) < 1.01 * mse(w, kind="nf4")


def test_doubly_quantised_scales_that_are_too_small_clip_and_do_not_wrap_round():
    w = normal(64 * 256)
    w[:64] *= 1000
    q = quantise(w, double=True)
    back = dequantise(q)
    assert (np.abs(back) <= np.abs(w[:64]).max() * 1.01).all()
    assert (back[64:] * w[64:] >= 0).all()


@both
def test_codes_are_those_of_the_scales_that_are_stored(dtype):
    w = normal(64, 256, dtype=dtype)
    q = quantise(w, double=True)
    step = spread(q, q.scales())
    inside = np.abs(w) <= 7 * step  # what lies beyond was clipped
    assert inside.mean() > 0.98
    assert (np.abs(dequantise(q, dtype) - w)[inside] <= 0.50001 * step[inside]).all()


def test_half_a_step_holds_for_subnormal_weights_too():
    w = np.float32(1e-40) * normal(4, 64)
    for bits in range(2, 9):
        q = quantise(w, bits)
        assert (np.abs(dequantise(q) - w) <= 0.50001 * spread(q, q.scales())).all()


@both
@formats
def test_zeros_come_back_as_zeros(form, dtype):
    for block in (None, "row", 7, 64):
        back = dequantise(quantise(np.zeros((5, 33), dtype), block=block, **form), dtype)
        assert back.dtype == dtype and not back.any()


@given(
    st.integers(1, 8),
    blocks,
    some_array(np.float32, (4, 11), elements=st.floats(-100, 100, width=32)),
)
def test_quantising_a_second_time_changes_nothing(bits, block, w):
    once = quantise(w, bits, block=block)
    twice = quantise(dequantise(once), bits, block=block)
    if bits > 1:  # with 1 bit a zero goes to one side
        live = spread(once, once.scales()) > 1e-30
        codes = (unpack(q.packed, bits, w.size).reshape(w.shape) for q in (once, twice))
        np.testing.assert_array_equal(*(c[live] for c in codes))
    np.testing.assert_allclose(dequantise(twice), dequantise(once), rtol=2.5e-7, atol=1e-30)


@pytest.mark.parametrize("kind", ["symmetric", "affine"])
@pytest.mark.parametrize("block", [None, "row", 64])
def test_a_bit_less_is_about_four_times_the_error(kind, block):
    w = normal(256, 256)
    errors = [mse(w, bits=bits, block=block, kind=kind) for bits in range(2, 9)]
    assert (np.diff(errors) < 0).all()
    ratios = np.divide(errors[3:-1], errors[4:])  # 5 to 8 bits
    np.testing.assert_allclose(ratios, 4, rtol=0.1)


def test_one_bit_by_the_mean_beats_the_three_levels_of_two_bits_by_the_largest():
    w = normal(256, 256)
    assert mse(w, bits=1) == pytest.approx(1 - 2 / np.pi, rel=0.03)  # E(|w| − E|w|)²
    assert mse(w, bits=1) < mse(w, bits=2)
    assert mse(w, bits=1, kind="affine") > mse(w, bits=2, kind="affine")


def test_one_bit_is_the_sign_times_the_mean_size():
    w = normal(8, 64)
    wanted = np.sign(w) * np.abs(w).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(dequantise(quantise(w, 1)), wanted, rtol=1e-6)


@both
def test_the_ends_of_a_block_are_hit(dtype):
    w = normal(10, 64, dtype=dtype) + 3
    back = dequantise(quantise(w, 3, kind="affine"), dtype)
    np.testing.assert_allclose(back.min(axis=1), w.min(axis=1), rtol=1e-6)
    np.testing.assert_allclose(back.max(axis=1), w.max(axis=1), rtol=1e-6)
    for form in ({"bits": 3}, {"kind": "nf4"}):
        back = dequantise(quantise(w, **form), dtype)
        np.testing.assert_allclose(back.max(axis=1), w.max(axis=1), rtol=1e-6)


def test_affine_beats_symmetric_on_weights_that_lean_to_one_side():
    w = normal(64, 64) + 3
    assert mse(w, kind="affine") < 0.5 * mse(w)


def test_nf4_wins_on_gaussian_weights_and_loses_on_uniform_ones():
    gaussian = normal(256, 256)
    uniform = rng().uniform(-1, 1, (256, 256)).astype(np.float32)
    assert mse(gaussian, kind="nf4") < 0.95 * mse(gaussian)
    assert mse(uniform, kind="nf4") > 1.05 * mse(uniform)


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # as published, OCP Microscaling Formats 1.0, section 5.3.3


def test_small_floats_are_the_published_ones():
    np.testing.assert_array_equal(small_floats(2, 1), FP4)
    e4m3 = small_floats(4, 3)[:-1]
    np.testing.assert_array_equal(e4m3[:10], np.arange(10) / 512)  # even steps up to 2⁻⁵
    assert (e4m3[8], e4m3[56], e4m3[57], e4m3[-1]) == (2**-6, 1, 1.125, 448)
    np.testing.assert_array_equal(small_floats(8, 0)[:-1], 2.0 ** np.arange(-127, 128))
    e5m2 = small_floats(5, 2)
    assert (e5m2[1], e5m2[4], e5m2[123]) == (2**-16, 2**-14, 57344)


def nearest_fp4(x):
    levels = np.unique([-np.array(FP4), FP4])
    return levels[np.abs(x[..., None] - levels).argmin(axis=-1)]


def test_mxfp4_is_that_of_the_standard():
    w = normal(40, 64) * np.exp2(np.arange(-20, 20))[:, None].astype(np.float32)
    w[3], w[4, :3] = 0, (4.0, 8.0, np.nextafter(np.float32(8), np.float32(0)))
    q = quantise(w, kind="mxfp4", block=32)
    assert q.bits_per_weight == 4.25
    blocks = w.reshape(-1, 32).astype(np.float64)
    exponents = [frexp(np.abs(block).max())[1] - 1 for block in blocks]  # of the largest
    scale = np.exp2(np.array(exponents) - 2.0)[:, None]  # that of the largest level is 2
    np.testing.assert_array_equal(q.scale, np.array(exponents) - 2 + 127)
    wanted = nearest_fp4(blocks / scale) * scale
    np.testing.assert_array_equal(dequantise(q, np.float64), wanted.reshape(w.shape))


def test_nvfp4_has_float8_scales_over_one_for_the_tensor():
    w = normal(40, 64) * np.exp2(np.arange(-8, 2, 0.25))[:, None].astype(np.float32)
    q = quantise(w, kind="nvfp4", block=16)
    assert q.bits_per_weight == 4.5 + 32 / w.size
    blocks, e4m3 = w.reshape(-1, 16).astype(np.float64), small_floats(4, 3)[:-1]
    most = np.abs(blocks).max(axis=1)
    whole = most.max() / 6 / 448
    np.testing.assert_allclose(q.mean, whole, rtol=1e-6)
    scale = e4m3[np.abs(most[:, None] / 6 / whole - e4m3).argmin(axis=1)]
    np.testing.assert_allclose(q.scales(), scale * whole, rtol=1e-6)
    scale = q.scales()[:, None].astype(np.float64)
    wanted = nearest_fp4(blocks / np.where(scale, scale, 1)) * scale
    np.testing.assert_allclose(dequantise(q, np.float64), wanted.reshape(w.shape), rtol=1e-12)


def test_at_equal_bits_nvfp4_is_near_nf4_and_mxfp4_is_behind():
    w = normal(256, 256)
    errors = [mse(w, kind=k, block=b) for k, b in (("nf4", 64), ("nvfp4", 16), ("mxfp4", 32))]
    assert errors[0] < errors[1] < 1.1 * errors[0] < 1.4 * errors[0] < errors[2]


def test_an_outlier_ruins_the_tensor_but_not_the_blocks():
    w = normal(64, 64)
    hit = w.copy()
    hit[3, 5] = 100
    assert mse(hit, block=None) > 30 * mse(w, block=None)
    assert mse(hit, block=64) < 3 * mse(w, block=64)
    assert mse(hit, block="row") < 3 * mse(w, block="row")


def test_many_chunks_are_as_one_and_the_order_of_memory_does_not_matter():
    w = normal(403, 501)  # several chunks, and a short last block
    for block in (7, 64, "row"):
        parts = quantise(w, 3, block=block)
        size = 501 if block == "row" else block
        n = w.size // size * size
        rows = w.reshape(-1)[:n].reshape(-1, size)
        step = np.abs(rows).max(axis=1, keepdims=True) / np.float32(3)
        wanted = np.clip(np.rint(rows / step), -3, 3) * step
        got = dequantise(parts).reshape(-1)[:n].reshape(rows.shape)
        assert np.isclose(got, wanted, rtol=1e-5).mean() > 0.9999  # but for ties
    turned = np.asfortranarray(w)
    np.testing.assert_array_equal(quantise(turned, 3).packed, quantise(w, 3).packed)


@both
def test_the_weights_are_not_written_to(dtype):
    w = normal(9, 30, dtype=dtype)
    before = w.copy()
    for form in FORMATS:
        dequantise(quantise(w, **form), dtype)
    kmeans(w, 2)
    gptq(w, np.eye(30), block="row")
    np.testing.assert_array_equal(w, before)


@formats
def test_very_small_and_very_large_weights_stay_finite(form):
    for size in (1e-45, 1e-40, 1e-30, 1e30, 5e37):
        w = np.float32(size) * np.array([1, -0.5, 0.25, 0, 0.75], np.float32)
        back = dequantise(quantise(w, **form))
        assert np.isfinite(back).all()
        assert (np.abs(back) <= 2 * max(size, 1e-37)).all()


@pytest.mark.parametrize("form", [f for f in FORMATS if f["kind"] != "nvfp4"], ids=str)
@pytest.mark.parametrize("block", [None, "row", 7])
def test_a_clipped_block_never_errs_more_and_takes_no_more_bytes(form, block):
    w = normal(6, 30) ** 3  # heavy tails
    plain, clipped = (quantise(w, block=block, clip=clip, **form) for clip in (False, True))
    starts = np.arange(0, w.size, {None: w.size, "row": 30}.get(block, block))
    errors = [
        np.add.reduceat((dequantise(q, np.float64) - w).ravel() ** 2, starts)
        for q in (plain, clipped)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert clipped.nbytes == plain.nbytes and clipped.settings() == plain.settings()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_clipped_scale_is_the_best_of_many(bits):
    w, top = normal(8, 64, dtype=np.float64), (1 << bits - 1) - 1
    errors = []
    for share in np.linspace(0.2, 1, 401):
        scale = share * np.abs(w).max(axis=1, keepdims=True) / top
        near = np.clip(np.rint(w / scale), -top, top) * scale
        errors.append(np.square(w - near).sum(axis=1))
    got = np.square(w - dequantise(quantise(w, bits, clip=True), np.float64)).sum(axis=1)
    best = np.min(errors, axis=0)
    assert (got >= best * (1 - 1e-5)).all() and got.sum() < 1.05 * best.sum()


@pytest.mark.parametrize("kind", ["symmetric", "affine"])
def test_clipping_pays_on_gaussian_weights_at_few_bits(kind):
    w, settings = normal(64, 256), {"block": "row", "kind": kind}
    gain = [mse(w, bits=b, clip=True, **settings) / mse(w, bits=b, **settings) for b in (2, 3, 4)]
    assert gain[0] < gain[1] < gain[2] < 0.9


@formats
@pytest.mark.parametrize("double", [False, True])
def test_a_float32_model_and_its_float64_copy_have_the_same_codes(form, double):
    w, gram = normal(40, 33), correlated(33, 2)
    w[::7], w[3, 5] = 0.1, 1e30
    wide = w.astype(np.float64)
    for block in (None, "row", 11):
        pairs = [[quantise(a, block=block, double=double, **form) for a in (w, wide)]]
        if form["kind"] != "levels" and block != "row":
            pairs.append([gptq(a, gram, block=block, double=double, **form) for a in (w, wide)])
        for narrow, again in pairs:
            assert narrow.settings() == again.settings()
            for name, a in narrow.arrays().items():
                np.testing.assert_array_equal(a, again.arrays()[name], strict=True)


def test_kmeans_of_float32_weights_has_the_codes_of_their_float64_copy():
    w = normal(40, 33)
    np.testing.assert_array_equal(kmeans(w, 3).packed, kmeans(w.astype(np.float64), 3).packed)


def hard(case, shape):
    """Weights at which a formula may break."""
    w = normal(*shape)
    if case == "zeros":
        w[...] = 0
    elif case == "one block of zeros":
        w.ravel()[:5] = 0
    elif case == "one huge":
        w[0, 0] = 5e37
    elif case == "subnormal":
        w *= np.float32(1e-41)
    elif case == "equal rows":
        w[...] = w[:, :1]
    return w


@formats
@pytest.mark.parametrize(
    "case", ["zeros", "one block of zeros", "one huge", "subnormal", "equal rows"]
)
def test_hard_weights_and_grams_come_back_finite_and_no_larger(case, form):
    room = 1.2 if form["kind"] in ("mxfp4", "nvfp4") else 1.01  # 5.1 becomes 6
    for shape, dtype in [((1, 1), np.float32), ((12, 1), np.float64), ((5, 12), np.float32)]:
        w, d = hard(case, shape).astype(dtype), shape[1]
        for block, double in ((None, False), (4, True), ("row", False)):
            back = dequantise(quantise(w, block=block, double=double, **form), dtype)
            assert back.dtype == dtype
            assert (np.abs(back) <= room * np.abs(w).max() + 2e-38).all()
        if case == "equal rows" and form["kind"] == "affine":
            np.testing.assert_allclose(back, w, rtol=1e-6)
        for gram in (np.zeros((d, d)), np.ones((d, d)), 1e-300 * np.eye(d)):
            if form["kind"] != "levels":
                assert np.isfinite(dequantise(gptq(w, gram, block="row", **form), dtype)).all()
        if form["kind"] == "nf4":
            back = dequantise(kmeans(w, 2, block="row"), dtype)
            assert (np.abs(back) <= room * np.abs(w).max() + 2e-38).all()


def test_sizes_near_32_bits_do_not_overflow():
    shape = (2**20, 2**20)
    q = quantise(normal(4, 4), block="row")._replace(shape=shape)
    assert q.bits_per_weight == 8 * q.nbytes / 2**40
    assert block_size(shape, None) == 2**40 and block_size(shape, "row") == 2**20


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": "4"}, "bits is '4'"),
        ({"kind": "int4"}, "int4"),
        ({"kind": "nf4", "bits": 3}, "nf4"),
        ({"block": 0}, "block"),
        ({"block": 2.5}, "block"),
        ({"kind": "levels"}, "levels is None"),
        ({"levels": [0, 1]}, "levels"),
        ({"kind": "levels", "levels": [1, 0]}, "levels"),
        ({"kind": "levels", "levels": []}, "levels"),
        ({"kind": "levels", "levels": range(3), "bits": 1}, "levels"),
        ({"w": np.array([1.0, np.nan])}, "finite"),
        ({"w": np.array([1.0, -np.inf])}, "finite"),
        ({"w": np.array([1e300])}, "finite"),
    ],
    ids=str,
)
def test_quantise_refuses(settings, word):
    with pytest.raises(ValueError, match=word):
        quantise(**{"w": normal(3, 4)} | settings)


# ------------------------------------------------------------------ GPTQ


def correlated(d, seed, n=400):
    mix = rng(seed).standard_normal((d, d)) * np.linspace(0.1, 2, d)
    x = rng(seed + 1).standard_normal((n, d)) @ mix
    return x.T @ x / n


def data_error(w, q, gram):
    e = w - dequantise(q, w.dtype)
    return float(np.einsum("oi,ij,oj->", e, gram, e))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "block": 16},
        {"bits": 3, "block": "row"},
        {"bits": 2, "block": None, "kind": "affine"},
        {"kind": "nf4", "block": 16, "double": True},
    ],
    ids=str,
)
def test_gptq_errs_less_on_correlated_data_than_rounding_to_nearest(form, seed):
    w, gram = normal(24, 32, seed=seed), correlated(32, seed)
    plain, better = quantise(w, **form), gptq(w, gram, **form)
    assert data_error(w, better, gram) < 0.9 * data_error(w, plain, gram)
    assert better.nbytes == plain.nbytes
    np.testing.assert_array_equal(better.scales(), plain.scales())


@both
@pytest.mark.parametrize("form", FORMATS[:-1], ids=str)
def test_gptq_is_rounding_to_nearest_when_features_are_not_correlated(form, dtype):
    w = normal(6, 24, dtype=dtype)
    for block in (None, "row", 8):
        plain = quantise(w, block=block, **form)
        for gram in (3 * np.eye(24), np.diag(np.arange(1.0, 25)), np.zeros((24, 24))):
            better = gptq(w, gram, block=block, **form)
            np.testing.assert_array_equal(better.packed, plain.packed)


def test_gptq_equals_its_definition_by_the_inverse_hessian():
    w, gram = normal(5, 12, dtype=np.float64), correlated(12, 3)
    upper = np.linalg.cholesky(np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(12))).T
    rest, scale = w.copy(), np.abs(w).max(axis=1).astype(np.float32) / np.float32(7)
    wanted = np.zeros_like(w)
    for j in range(12):
        wanted[:, j] = np.clip(np.rint(rest[:, j] / scale), -7, 7) * scale
        rest[:, j:] -= np.outer((rest[:, j] - wanted[:, j]) / upper[j, j], upper[j, j:])
    got = dequantise(gptq(w, gram, block="row"), np.float64)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_act_order_is_gptq_of_the_columns_from_the_loudest_to_the_faintest():
    harm = []
    for seed in range(8):
        w, gram = normal(16, 32, seed=seed, dtype=np.float64), correlated(32, seed)
        order = np.argsort(-np.diag(gram))
        turned = gptq(w[:, order], gram[order][:, order], 3, block="row")
        wanted = np.empty_like(w)
        wanted[:, order] = dequantise(turned, np.float64)
        got = gptq(w, gram, 3, block="row", act_order=True)
        np.testing.assert_array_equal(dequantise(got, np.float64), wanted)
        plain = gptq(w, gram, 3, block="row")
        harm.append(data_error(w, got, gram) / data_error(w, plain, gram))
    assert np.mean(harm) < 1


def test_clipping_helps_gptq_where_there_are_few_levels():
    for seed in range(5):
        w, gram = normal(24, 64, seed=seed), correlated(64, seed)
        wide, clipped = (gptq(w, gram, 2, block="row", clip=clip) for clip in (False, True))
        assert data_error(w, clipped, gram) < 0.8 * data_error(w, wide, gram)


def test_gptq_takes_a_singular_gram():
    x = normal(4, 16, dtype=np.float64)  # fewer samples than features
    assert np.isfinite(dequantise(gptq(normal(3, 16), x.T @ x / 4, block="row"))).all()


@pytest.mark.parametrize("block", [5, 7, 64])
def test_a_block_of_gptq_may_cross_rows(block):
    w, gram, form = normal(24, 32), correlated(32, 0), {"bits": 3, "block": block}
    plain, better = quantise(w, **form), gptq(w, gram, **form)
    assert data_error(w, better, gram) < 0.9 * data_error(w, plain, gram)
    np.testing.assert_array_equal(better.scales(), plain.scales())


# ------------------------------------------------------------------ the layer


def layer(d_in=6, d_out=5, dtype=np.float64, bias=True):
    made = Linear(d_in, d_out, rng=rng(), dtype=dtype, bias=bias)
    if bias:
        made.bias.data[...] = rng(1).standard_normal(d_out)
    return made


@both
@pytest.mark.parametrize("bias", [True, False])
def test_a_quant_linear_computes_with_its_dense_weight(dtype, bias):
    base = layer(dtype=dtype, bias=bias)
    quant = QuantLinear(base, 3, block=4)
    x = normal(2, 3, 6, dtype=dtype)
    wanted = x @ dequantise(quantise(base.dense(), 3, block=4), dtype).T
    wanted = wanted + base.bias.data if bias else wanted
    got = quant(Tensor(x))
    assert got.dtype == quant.dense().dtype == dtype and (quant.d_in, quant.d_out) == (6, 5)
    np.testing.assert_allclose(got.data, wanted, rtol=1e-6, atol=1e-6)
    assert [n for n, _ in quant.named_parameters()] == (["bias"] if bias else [])
    assert not quant.trainable()


def test_the_gradients_of_a_quant_linear_agree_with_differences():
    quant = QuantLinear(layer(), 3, block=4)

    def f(x, bias):
        quant.bias = bias
        return quant(x)

    check_vjp(f, normal(2, 3, 6), normal(5))


def test_no_dense_weight_lies_between_forward_and_backward():
    quant = QuantLinear(layer(256, 256, np.float32), 4)
    x = Tensor(normal(1, 256), requires_grad=True)
    quant(x).sum().backward()  # what is made once is made now
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    y = quant(x)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 256 * 256  # a dense weight takes four times as much
    y.sum().backward()
    np.testing.assert_allclose(x.grad[0], 2 * quant.dense().sum(axis=0), rtol=1e-4, atol=1e-4)


def test_lora_over_a_quant_linear_trains_and_its_gradients_agree_with_differences():
    wrapper = LoRA(QuantLinear(layer(), 4, block=3), 2, rng=rng(1))
    wrapper.B.data[...] = normal(5, 2)

    def f(x, a, b):
        wrapper.A, wrapper.B = a, b
        return wrapper(x)

    check_vjp(f, normal(3, 6), wrapper.A.data, wrapper.B.data)


def test_qlora_on_a_model_trains_its_bypass_alone_and_merges_dense_or_requantised():
    model = quantise_model(small(), 4, block=8)
    lora(model, 2, rng=rng(1))
    wrapper, packed = model.blocks[0].attn.q, model.blocks[0].attn.q.base.quantised.packed.copy()
    assert sorted(model.trainable())[0] == "blocks.0.attn.q.A" and len(model.trainable()) == 8
    losses = []
    for _ in range(20):
        loss = ops.cross_entropy(model(IDS), IDS)
        model.zero_grad()
        loss.backward()
        for p in model.trainable().values():
            p.data -= 0.5 * p.grad
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    np.testing.assert_array_equal(wrapper.base.quantised.packed, packed)

    dense, before = wrapper.dense(), model(IDS).data
    again = wrapper.base.requantised(wrapper.merged())
    assert type(again) is QuantLinear and again.config() == wrapper.base.config()
    step = spread(again.quantised, again.quantised.scales())
    assert (np.abs(again.dense() - dense) <= 0.50001 * step).all()
    merge(model, requantise=False)
    assert type(model.blocks[0].attn.q) is Linear
    np.testing.assert_allclose(model(IDS).data, before, rtol=1e-9, atol=1e-9)


def test_requantised_takes_the_bias_of_the_other_layer_and_keeps_the_format():
    quant, other = QuantLinear(layer(), 3, block=4, kind="affine", double=True), layer()
    other.bias.data += 1
    other.weight.data *= 2
    again = quant.requantised(other)
    assert again.config() == quant.config() and not again.trainable()
    np.testing.assert_array_equal(again.bias.data, other.bias.data)
    np.testing.assert_allclose(again.dense(), 2 * quant.dense(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "bias, double, dtype", [(True, False, np.float64), (False, True, np.float32)]
)
@formats
def test_arrays_and_config_restore_a_layer(form, double, bias, dtype):
    base = layer(dtype=dtype, bias=bias)
    q = quantise(base.dense(), block=4, double=double, **form)
    quant = QuantLinear.of(q, base.bias.data if bias else None, dtype)
    again = QuantLinear.restore(quant.arrays(), quant.config())
    assert again.config() == quant.config()
    same_arrays(again.arrays(), quant.arrays())
    x = Tensor(normal(3, 6, dtype=dtype))
    np.testing.assert_array_equal(again(x).data, quant(x).data)
    np.testing.assert_array_equal(again.requantised(base).dense(), quant.dense())


def test_a_config_survives_json():
    quant = QuantLinear(layer(), np.int64(4), block=np.int64(4), double=True)
    config = json.loads(json.dumps(quant.config()))
    assert config == quant.config()
    again = QuantLinear.restore(quant.arrays(), config)
    np.testing.assert_array_equal(again.dense(), quant.dense())


def test_restore_refuses_arrays_that_do_not_fit_the_config():
    quant = QuantLinear(layer(), 4, block=4)
    arrays, config = quant.arrays(), quant.config()
    for changed, word in [
        ({"codes": arrays["codes"][:-1]}, "14"),
        ({"scale": arrays["scale"].astype(np.float64)}, "float64"),
        ({"scale": arrays["scale"] * np.float32(np.nan)}, "finite"),
        ({"extra": arrays["scale"]}, "extra"),
        ({"bias": np.ones(3)}, "bias"),
    ]:
        with pytest.raises(ValueError, match=word):
            QuantLinear.restore(arrays | changed, config)
    with pytest.raises(ValueError, match="expected"):
        QuantLinear.restore({"codes": arrays["codes"]}, config)
    with pytest.raises(ValueError, match="bits is 9"):
        QuantLinear.restore(arrays, config | {"bits": 9})


def test_a_code_above_the_highest_level_reads_as_that():
    q = quantise(normal(5, 6), 2, kind="levels", levels=[-1, 0, 1])
    high = dequantise(q._replace(packed=np.full_like(q.packed, 255)))
    np.testing.assert_array_equal(high, np.full((5, 6), q.scale[0]))


def test_a_quant_linear_refuses_inputs_that_do_not_fit():
    quant = QuantLinear(layer())
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(5, 6\) do not fit"):
        quant(Tensor(np.zeros((2, 5))))
    with pytest.raises(TypeError, match="float32"):
        quant(Tensor(np.zeros((2, 6), np.float32)))


def test_repr_names_the_format():
    assert repr(QuantLinear(layer())) == "QuantLinear(6 -> 5, 4-bit symmetric in blocks of 64)"
    bare = QuantLinear(layer(bias=False), 1, block=None)
    assert repr(bare) == "QuantLinear(6 -> 5, 1-bit symmetric in one block, no bias)"


# ------------------------------------------------------------------ straight-through


def test_the_gradient_passes_through_the_rounding_unchanged():
    wrapper, x = StraightThrough(layer(), 2, block="row"), normal(3, 6, dtype=np.float64)
    wrapper.base.weight.requires_grad = True
    rounded = Linear.of(dequantise(quantise(wrapper.base.dense(), 2, block="row"), np.float64))
    for model in (wrapper, rounded):
        (model(Tensor(x)) * Tensor(normal(3, 5, seed=1, dtype=np.float64))).sum().backward()
    np.testing.assert_array_equal(wrapper.dense(), rounded.weight.data)
    np.testing.assert_array_equal(wrapper.base.weight.grad, rounded.weight.grad)


@both
def test_straight_through_trains_towards_the_grid_and_merges_to_what_it_computes(dtype):
    x = normal(64, 8, dtype=dtype)
    target = x @ normal(4, 8, seed=2, dtype=dtype).T
    wrapper = StraightThrough(layer(8, 4, dtype), 3, block="row")
    errors = []
    for _ in range(60):
        gap = wrapper(Tensor(x)) - target
        loss = (gap * gap).mean()
        loss.backward()
        for p in wrapper.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None
        errors.append(loss.item())
    assert errors[-1] < 0.2 * errors[0]
    merged = wrapper.merged()
    assert type(merged) is QuantLinear and not merged.trainable()
    np.testing.assert_array_equal(merged.dense(), wrapper.dense())
    np.testing.assert_allclose(merged(Tensor(x)).data, wrapper(Tensor(x)).data, rtol=1e-5)


def test_quantise_aware_wraps_trains_everything_and_merges():
    model = quantise_aware(small(), 4, "blocks.*.attn.*", block=8)
    assert len(model.trainable()) == len(model.parameters())
    assert repr(model.blocks[0].attn.q) == "StraightThrough(4 bits, base=Linear(8 -> 8))"
    before = model(IDS).data
    merge(model)
    assert type(model.blocks[0].attn.q) is QuantLinear
    np.testing.assert_allclose(model(IDS).data, before, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ the recipes


def test_quantise_model_replaces_what_matches_and_freezes_the_rest():
    model, plain = small(), small()
    assert quantise_model(model, 8, "blocks.*.mlp.*", block="row") is model
    kinds = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert kinds == {f"blocks.{i}.mlp.{n}" for i in (0, 1) for n in ("up", "down")}
    assert not model.trainable()
    np.testing.assert_allclose(model(IDS).data, plain(IDS).data, atol=0.05)


def test_grams_round_a_model_by_what_flows_through_it():
    model, plain = small(), small()
    grams = observe(plain, IDS)
    quantise_model(model, 2, block="row", grams=grams)
    name = "blocks.0.mlp.up"
    layers, weights = dict(model.named_modules()), dict(plain.named_modules())
    w = weights[name].dense()
    wanted = gptq(w, grams[name], 2, block="row")
    np.testing.assert_array_equal(layers[name].quantised.packed, wanted.packed)
    assert (wanted.packed != quantise(w, 2, block="row").packed).any()


def by_hand(model, ids, make):
    """`make(w, gram)` for every layer, each block's after the blocks before it, written out."""
    model = copy.deepcopy(model)
    x = model.tokens(ids).data + model.positions(np.arange(ids.shape[1])).data
    found = {}
    for i, block in enumerate(model.blocks):
        h = block.norm1(Tensor(x))
        a = attend(block.attn.q(h), block.attn.k(h), block.attn.v(h), block.attn.n_head)
        m = block.norm2(Tensor(x + block.attn.o(a).data))
        inner = ops.gelu(block.mlp.up(m))
        given = {"attn.q": h, "attn.k": h, "attn.v": h, "attn.o": a, "mlp.up": m, "mlp.down": inner}
        for name, layer in block.named_modules():
            if name in given:
                flat = given[name].data.reshape(-1, layer.d_in)
                layer.weight.data = make(layer.weight.data, flat.T @ flat / len(flat))
                found[f"blocks.{i}.{name}"] = layer.weight.data
        x = block(Tensor(x)).data
    return found


def test_blocks_in_turn_are_each_rounded_for_what_the_rounded_ones_before_make():
    form = {"bits": 2, "block": "row"}
    wanted = by_hand(small(), IDS, lambda w, c: dequantise(gptq(w, c, **form), np.float64))
    model = quantise_model(small(), in_turn=IDS, **form)
    at_once = quantise_model(small(), grams=observe(small(), IDS), **form)
    assert not model.trainable() and len(wanted) == 12
    for name, module in at_once.named_modules():
        if name in wanted:
            got = dict(model.named_modules())[name].dense()
            np.testing.assert_allclose(got, wanted[name], rtol=1e-6, err_msg=name)
            assert name.startswith("blocks.1") or (got == module.dense()).all()
    assert (model.blocks[1].mlp.up.dense() != at_once.blocks[1].mlp.up.dense()).any()


def test_an_error_in_a_later_block_puts_the_first_ones_back():
    model = small()
    model.blocks[1].mlp.down.weight.data[0, 0] = 1e100  # finite, and no float32 scale fits
    before = untouched(model)
    with pytest.raises(ValueError, match="w is not finite and below"):
        quantise_model(model, in_turn=IDS)
    assert untouched(model) == before


def untouched(model):
    modules = {name: id(m) for name, m in model.named_modules()}
    return modules, {
        n: (id(p), p.requires_grad, p.data.tobytes()) for n, p in model.named_parameters()
    }


def broken(model):
    model.blocks[1].mlp.down.weight.data[0, 0] = np.nan


BAD_MODELS = [
    (None, {"bits": 0}, ValueError, "bits is 0"),
    (None, {"block": 0}, ValueError, "block is 0"),
    (None, {"targets": "blocks.*.w"}, LookupError, "right kind"),
    (None, {"targets": ["blocks.*", "head"]}, ValueError, "tied"),
    (lambda model: lora(model, rng=rng()), {}, ValueError, "adapter"),
    (lambda model: quantise_model(model, block=8), {}, TypeError, "plain Linear"),
    (broken, {}, ValueError, "blocks.1.mlp.down"),
]


@pytest.mark.parametrize("recipe", [quantise_model, quantise_aware])
@pytest.mark.parametrize("harm, settings, kind, word", BAD_MODELS, ids=[m[3] for m in BAD_MODELS])
def test_what_is_refused_leaves_the_model_as_it_was(recipe, harm, settings, kind, word):
    model = small(tied=True)
    if harm:
        harm(model)
    before = untouched(model)
    with pytest.raises(kind, match=word):
        recipe(model, **settings)
    assert untouched(model) == before


def test_grams_must_name_every_layer():
    model = small()
    grams, before = observe(model, IDS, "blocks.0.*"), untouched(model)
    with pytest.raises(KeyError, match="blocks.1.attn.q"):
        quantise_model(model, grams=grams, block="row")
    assert untouched(model) == before


def test_what_is_put_in_takes_the_training_mode():
    for recipe in (quantise_model, quantise_aware):
        model = recipe(small().train())
        assert all(module.training for _, module in model.named_modules())
