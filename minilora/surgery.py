"""Operations on a model from outside: replace modules, freeze, merge, detach, count.

A *wrapper* is a module that holds what it wraps in `base`. The model does not know of it.
"""

from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from .nn import Module


class Wrapper(Module):
    """A module that holds another in `base`, and has its sizes."""

    @property
    def d_in(self):
        """Features that come in."""
        return self.base.d_in

    @property
    def d_out(self):
        """Features that go out."""
        return self.base.d_out


def as_patterns(patterns):
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matching(names, patterns, what):
    """Those of `names` that match some pattern; a pattern that hits nothing is an error."""
    names, hits = list(names), set()
    for pattern in as_patterns(patterns):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            near = get_close_matches(pattern, names, n=4, cutoff=0) or names[:4]
            raise LookupError(
                f"pattern {pattern!r} matches no {what}; near names: {', '.join(near)}"
            )
        hits |= found
    return [name for name in names if name in hits]


def put(model, name, module):
    """Set the module at a dotted name, such as `blocks.0.attn.q`."""
    *path, last = name.split(".")
    for step in path:
        model = model[int(step)] if isinstance(model, list) else getattr(model, step)
    if isinstance(model, list):
        model[int(last)] = module
    else:
        setattr(model, last, module)


def replace(model, patterns, wrap, kind=Module):
    """Replace every module whose name matches by `wrap(module)`.

    Args:
        model: the module to work on; changed in place.
        patterns: one pattern or several, matched by `fnmatch`: `blocks.*.attn.[qv]`. A `*`
            crosses dots, so `blocks.*` is everything in the blocks.
        wrap: takes the old module and returns the new one. All are called before anything is
            replaced, so that an error leaves the model as it was.
        kind: only modules of this class (or tuple of classes) count.

    Returns:
        The names of the modules replaced.

    Raises:
        LookupError: if a pattern matches nothing; the message lists near names.
    """
    modules = {name: m for name, m in model.named_modules() if name and isinstance(m, kind)}
    hits = _matching(modules, patterns, "module" if kind is Module else "layer of the right kind")
    fresh = {name: wrap(modules[name]) for name in hits}
    for name in sorted(hits, key=lambda name: -name.count(".")):  # what is inside goes in first
        put(model, name, fresh[name])
    return hits


def _set_requires_grad(model, patterns, value):
    parameters = dict(model.named_parameters())
    for name in _matching(parameters, patterns, "parameter"):
        parameters[name].requires_grad = value
    return model


def freeze(model, patterns="*"):
    """Take the parameters whose names match off the tape: no gradient, no state, no decay."""
    return _set_requires_grad(model, patterns, False)


def unfreeze(model, patterns="*"):
    """Put the parameters whose names match on the tape: they train."""
    return _set_requires_grad(model, patterns, True)


def wrappers(model):
    """The outermost wrappers of a model by name."""
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if name and hasattr(module, "base") and not inside:
            found[name] = module
    return found


def merge(model, requantise=None):
    """Fold every wrapper into the layer it wraps: plain layers again, at no extra cost.

    `wrapper.merged()` makes a new layer; the old one is not written to, so nothing can be
    merged twice.

    Args:
        model: changed in place.
        requantise: must be said if the base is quantised: `False` for plain layers, `True` for
            layers quantised as the base was.

    Returns:
        The model.

    Raises:
        ValueError: if there is nothing to merge, if a merged weight would not be finite, or if
            `requantise` is missing where it is needed, or given where nothing is quantised.
        TypeError: if a wrapper cannot be merged; the message says which and why.
        In each case the model is left as it was.
    """
    found = wrappers(model)
    if not found:
        raise ValueError("merge: this model has no wrapper (was it merged or detached before?)")
    for name, wrapper in found.items():
        if not hasattr(wrapper, "merged"):
            why = getattr(wrapper, "why_not_merged", "it has no merged()")
            raise TypeError(f"merge: {name} ({type(wrapper).__name__}) cannot be merged: {why}")
    quantised = {name for name, wrapper in found.items() if hasattr(wrapper.base, "requantised")}
    if requantise is not None and not quantised:
        raise ValueError(f"merge: requantise is {requantise!r}, but no layer here is quantised")
    fresh = {}
    for name, wrapper in found.items():
        try:
            fresh[name] = wrapper.merged(requantise) if name in quantised else wrapper.merged()
        except ValueError as error:
            raise ValueError(f"merge: {name}: {error}") from error
    for name, module in fresh.items():
        put(model, name, module)
    return model


def detach(model):
    """Take the adapter off: the wrapped layers stand alone again.

    Returns:
        The adapter: the wrappers by name. `attach` puts it back. Several adapters can be kept
        for one model in a dictionary of yours; they share the base and hold no copy of it.
        What was trained outside the wrappers, such as biases or norms, stays as it is.
    """
    adapter = wrappers(model)
    for name, wrapper in adapter.items():
        put(model, name, wrapper.base)
    return adapter


def attach(model, adapter):
    """Put an adapter that `detach` returned on its model, in place of the one that is on.

    Raises:
        LookupError: if the adapter wraps layers that this model does not have, such as those of
            another model, or those from before a merge. The model is left as it was.
    """
    on = wrappers(model)
    modules = dict(model.named_modules())
    for name, wrapper in adapter.items():
        at = on[name].base if name in on else modules.get(name)
        if at is not wrapper.base:
            raise LookupError(f"attach: the layer at {name} is not the one this adapter wraps")
    detach(model)
    for name, wrapper in adapter.items():
        put(model, name, wrapper)
    return model


@contextmanager
def detached(model):
    """Inside this block the model is its bare base: the adapter is off, then on again."""
    adapter = detach(model)
    try:
        yield model
    finally:
        attach(model, adapter)


class Count(NamedTuple):
    """How many parameters train, and how many there are. Tied weights count once."""

    trainable: int
    total: int

    @property
    def share(self):
        """trainable / total, from 0 to 1."""
        return self.trainable / self.total

    def __str__(self):
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {100 * self.share:.4f}"
        )


def count(model, quiet=False):
    """Count the parameters, and print the line that users of PEFT know unless `quiet`."""
    parameters = model.parameters()
    packed = sum(getattr(module, "packed_size", 0) for _, module in model.named_modules())
    found = Count(
        sum(p.size for p in parameters if p.requires_grad),
        sum(p.size for p in parameters) + packed,  # quantised weights are no parameters
    )
    if not quiet:
        print(found)
    return found
