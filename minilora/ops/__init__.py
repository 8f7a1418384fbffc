"""The primitives: each forward pass with its vector-Jacobian products beside it.

How to read one: the value first, then `record(value, (parent, vjp), …)`, where `vjp` maps the
gradient `g` of the value to the gradient of that parent. A VJP captures the arrays it needs and
no more. Shapes: B batch, T positions, H heads, d features; `…` any leading axes.
"""

import numpy as np

from ..tensor import Tensor
from .basic import add, count_gemms, div, embedding, exp, flops, index, linear, log, matmul, mean
from .basic import mul, power, prepend, relu, reshape, sub, sum, tanh, transpose
from .fused import GELU_BLOCK, attention, causal_mask, cross_entropy, dropout, gelu, gelu_erf
from .fused import layer_norm, rms_norm, rotary, softmax, swiglu

# ------------------------------------------------------------------ operators

Tensor.__add__ = Tensor.__radd__ = add
Tensor.__mul__ = Tensor.__rmul__ = mul
Tensor.__neg__ = lambda a: mul(a, -1)
Tensor.__sub__, Tensor.__rsub__ = sub, lambda a, b: sub(b, a)
Tensor.__truediv__, Tensor.__rtruediv__ = div, lambda a, b: div(b, a)
Tensor.__pow__, Tensor.__rpow__ = power, lambda a, b: exp(mul(a, np.log(b)))
Tensor.__matmul__ = matmul
Tensor.__rmatmul__ = lambda a, b: matmul(b, a)
Tensor.__getitem__ = index
Tensor.sum, Tensor.mean = sum, mean
Tensor.reshape, Tensor.transpose = reshape, transpose
Tensor.T = property(transpose)
