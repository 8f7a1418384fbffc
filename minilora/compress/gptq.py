"""GPTQ: rounding a layer by what flows through it, each column making up for those before it."""

from numbers import Real

import numpy as np

from ..peft.lora import is_whole
from .levels import squeeze
from .quantise import TINY, block_size, check_weights, level_set, quantise, round_codes


def gptq(w, gram, bits=4, *, block=64, kind="symmetric", double=False, damping=0.01):
    """Round a weight column by column, each column making up for the errors before it.

    What rounding column j does wrong is spread over the columns still to come, so that the
    error on the data, the mean tr(E C Eᵀ) of ‖(W − Ŵ) x‖², is as small as they can make it.
    With C + λI = R Rᵀ, R upper triangular, row j of R⁻¹ says how. The scales are those that
    `quantise` gives, and so are the bytes. It helps where features are correlated and the grid
    leaves room to make up for an error; with 1 bit it may do harm.

    Args:
        w: (d_out, d_in), float32 or float64.
        gram: C (d_in, d_in), the mean of x xᵀ over inputs, as `observe` finds it.
        bits, block, kind, double: as for `quantise`; a whole `block` must divide d_in, and kind
            `"levels"` is not for here.
        damping: λ over the mean of C's diagonal.

    Returns:
        A `Quantised` of the same format as that of `quantise`.

    Raises:
        ValueError: if a setting is out of range, the shapes do not fit, or C is not positive
            definite after damping.

    Source: Frantar et al. 2022, arXiv 2210.17323, section 3.
    """
    w, gram = check_weights(w), np.asarray(gram, np.float64)
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}; expected (d_out, d_in)")
    d_out, d_in = w.shape
    if gram.shape != (d_in, d_in) or not np.isfinite(gram).all():
        raise ValueError(f"gram has shape {gram.shape}; expected ({d_in}, {d_in}), all finite")
    if not (isinstance(damping, Real) and 0 <= damping < np.inf):
        raise ValueError(f"damping is {damping!r}; expected a number from 0")
    if is_whole(block) and block >= 1 and d_in % block:
        raise ValueError(f"block is {block}; expected a divisor of d_in = {d_in}, 'row' or None")
    q = quantise(w, bits, block=block, kind=kind, double=double)  # for its checks and its scales
    diagonal = damping * np.mean(np.diag(gram)) * np.eye(d_in) if gram.any() else np.eye(d_in)
    try:
        # The Cholesky form from the last row up, by turning the matrix round twice.
        root = np.linalg.cholesky((gram + diagonal)[::-1, ::-1])[::-1, ::-1]  # R
    except np.linalg.LinAlgError:
        raise ValueError(
            f"gram is not positive definite with damping {damping}; expected the mean of x xᵀ "
            "over inputs, or more damping"
        ) from None
    spread = np.linalg.inv(root)
    spread /= np.diag(spread)[:, None].copy()  # row j: how column j's error falls on the rest

    width = min(block_size(w.shape, block), d_in)

    def for_rows(each):  # a number for each block -> (blocks of a row, d_out)
        return np.broadcast_to(each.reshape(-1, d_in // width), (d_out, d_in // width)).T

    scale = for_rows(q.scales().astype(w.dtype))
    inverse = 1 / np.maximum(scale, TINY)
    zero = None if q.zero is None else for_rows(q.zero.astype(w.dtype))
    levels = level_set(q.bits, kind, None)
    middle = 0 if kind == "affine" else (1 << q.bits - 1) - 1
    columns = w.T.astype(np.float64, order="C")  # (d_in, d_out), so that a column lies together
    codes = np.empty((d_in, d_out), np.uint8)
    for j in range(d_in):
        b = j // width
        x = columns[j].astype(w.dtype)  # (d_out,)
        x = (x if zero is None else x - zero[b]) * inverse[b]
        codes[j] = round_codes(x, q.bits, kind, None)
        level = codes[j] - np.float64(middle) if levels is None else levels[codes[j]]
        error = columns[j] - level * scale[b] - (0 if zero is None else zero[b])
        columns[j + 1 :] -= spread[j, j + 1 :, None] * error  # (d_in − j − 1, d_out)
    return q._replace(packed=squeeze(codes.T.ravel(), q.bits))
