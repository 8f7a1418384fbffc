"""The tape: a `Tensor` is an array, a `Node` is its place in the graph, `backward` walks it.

Reverse-mode differentiation in one law: an operation hands `record` its value and, for each
parent, the vector-Jacobian product that carries a gradient back to it. A parent that needs no
gradient gets no edge, so a frozen weight costs nothing: its gradient is never computed, and
what only its gradient would need is never kept.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

_recording = ContextVar("recording", default=True)

# A step makes and drops arrays of megabytes. The C library of Linux hands each back to the system
# and asks for it anew, until it has seen a large one go; this one is never touched.
np.empty(2**25 - 2**16, np.uint8)


class Node:
    """A place in the graph: the edges to its parents, and the gradient if it is a leaf.

    `edges` is a tuple of (parent node, vjp). A leaf has none; a freed node has `None`.
    A node never refers to a tensor, so the graph keeps only the arrays that the VJPs captured.
    """

    __slots__ = ("edges", "grad")

    def __init__(self, edges=()):
        self.edges = edges
        self.grad = None


class Tensor:
    """A NumPy array of floats that can remember how it was made.

    `data` is anything that `np.asarray` takes: float32 and float64 are kept as they are, other
    numbers become float64. With `requires_grad`, `backward` leaves a gradient in `.grad`.

    Example:
        >>> x = Tensor([3.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> x.grad
        array([6.])
    """

    # Makes `array * tensor` call our `__rmul__` and not NumPy's element-by-element loop.
    __array_ufunc__ = None

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("data is a Tensor already; use tensor.detach() for a copy off the tape")
        data = np.asarray(data)
        if data.dtype not in (np.float32, np.float64):
            if data.dtype.kind not in "iubf":
                raise TypeError(f"data has dtype {data.dtype}; expected real numbers")
            data = data.astype(np.float64)
        self.data = data
        self.node = Node() if requires_grad else None

    @property
    def requires_grad(self):
        """Whether gradients flow to here: no more than having a node in the graph."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted):
        if self.node is not None and self.node.edges != ():
            raise ValueError("requires_grad can only be set on a leaf; use detach() on a result")
        if bool(wanted) != self.requires_grad:
            self.node = Node() if wanted else None

    @property
    def grad(self):
        """The gradient that `backward` left here: an array of this shape, or `None`.

        Two leaves may share one gradient array, so treat it as read-only.
        """
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value):
        if self.node is not None:
            self.node.grad = value
        elif value is not None:
            raise ValueError("this tensor has requires_grad=False, so it holds no gradient")

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)

    def __len__(self):
        return len(self.data)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype)  # a copy, whatever is asked for

    def __bool__(self):
        return bool(self.data)

    def __float__(self):
        return self.item()

    def __format__(self, spec):
        return format(self.item(), spec) if spec else repr(self)

    def __eq__(self, other):
        return self.data == (other.data if isinstance(other, Tensor) else other)

    __hash__ = object.__hash__  # a key stands for itself, whatever its numbers

    def item(self):
        """The one number in this tensor, as a Python float."""
        return self.data.item()

    def numpy(self):
        """The array itself, no copy."""
        return self.data

    def detach(self):
        """The same array in a tensor that is off the tape."""
        return Tensor(self.data)

    def backward(self, grad=None):
        """Run `backward` from this tensor."""
        backward(self, grad)

    def __repr__(self):
        body = np.array2string(self.data, separator=", ", prefix="Tensor(")
        extra = "" if self.dtype == np.float64 else f", dtype={self.dtype}"
        return f"Tensor({body}{extra}, requires_grad={self.requires_grad})"


def record(value, *edges):
    """Make the result of an operation, a tensor of the array `value`, and put it on the tape.

    `edges` are pairs (parent, vjp). `vjp(g)` takes the gradient of the result and returns the
    parent's share of it, an array of the parent's shape. It must not write into `g`, and it may
    return `g` itself or a view of it. Without a parent on the tape the result is off it too.
    """
    result = Tensor(value)
    if _recording.get():
        live = tuple((parent.node, vjp) for parent, vjp in edges if parent.node is not None)
        result.node = Node(live) if live else None
    return result


@contextmanager
def no_grad():
    """Inside this block nothing is recorded: for evaluation, generation and merging."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def backward(tensor, grad=None):
    """Add the gradient of `tensor` to the `.grad` of every leaf below it, and free the graph.

    `grad` is the gradient of what comes after, of the tensor's shape; 1 for a scalar.
    """
    if tensor.node is None:
        raise RuntimeError("backward: nothing here requires a gradient (is every weight frozen?)")
    if grad is None and tensor.size != 1:
        raise RuntimeError(f"backward: shape is {tensor.shape}, not a scalar; sum it, or pass grad")
    grad = np.asarray(1 if grad is None else grad, tensor.dtype)
    waiting = {tensor.node: np.broadcast_to(grad, tensor.shape)}
    for node in reversed(_topological_order(tensor.node)):
        g = waiting.pop(node)
        if not node.edges:
            node.grad = g if node.grad is None else node.grad + g
            continue
        for parent, vjp in node.edges:
            share = vjp(g)
            # Out of place: a VJP may have returned a view of what another edge still needs.
            waiting[parent] = waiting[parent] + share if parent in waiting else share
        node.edges = None


def _topological_order(root):
    """Nodes from the leaves up to `root`, each once, without recursion: chains may be long."""
    order, seen, stack = [], {root}, [(root, 0)]
    while stack:
        node, i = stack.pop()
        if node.edges is None:
            why = "this graph was freed by an earlier backward; run the forward pass again"
            raise RuntimeError(f"backward: {why}")
        if i < len(node.edges):
            stack.append((node, i + 1))
            parent = node.edges[i][0]
            if parent not in seen:
                seen.add(parent)
                stack.append((parent, 0))
        else:
            order.append(node)
    return order
