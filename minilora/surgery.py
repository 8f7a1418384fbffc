"""Operations on a model from outside: replace modules, freeze, merge, detach, count.

A *wrapper* is a module that holds what it wraps in `base`. The model does not know of it.
"""

from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from .nn import Embedding, Linear, Module, Parameter


class Wrapper(Module):
    """A module that holds another in `base`, and has its sizes.

    One that can be merged has `dense()`, the weight it acts with; another says `why_not_merged`.
    `settings` names what rebuilds it around its base, for a file.
    """

    why_not_merged, settings = None, ()

    def config(self):
        return {"kind": type(self).__name__} | {name: getattr(self, name) for name in self.settings}

    def learned(self):
        """The parameters by name that this wrapper adds to its base: what trains and is saved."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("base.")}

    def merged_bias(self):
        bias = getattr(self.base, "bias", None)
        return None if bias is None else bias.data.copy()

    def merged(self):
        """A new plain layer that computes the same, frozen where the base is."""
        if isinstance(self.base, Embedding):
            return like(self.base, Embedding.of(self.dense()))
        return like(self.base, Linear.of(self.dense(), self.merged_bias()))

    d_in = property(lambda self: self.base.d_in)
    d_out = property(lambda self: self.base.d_out)


def like(base, layer):
    """`layer`, frozen where `base` is; a base without that parameter counts as frozen."""
    for name, p in layer.named_parameters():
        p.requires_grad = getattr(getattr(base, name, None), "requires_grad", False)
    return layer


def as_patterns(patterns):
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matching(names, patterns, what):
    """Those of `names` that match some pattern; a pattern that hits nothing is an error."""
    names, hits = list(names), set()
    for pattern in as_patterns(patterns) or ("",):  # no pattern at all hits nothing either
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            near = ", ".join(get_close_matches(pattern, names, n=4, cutoff=0) or names[:4])
            raise LookupError(f"pattern {pattern!r} matches no {what}; near names: {near}")
        hits |= found
    return [name for name in names if name in hits]


def put(model, name, module):
    """Set the module at a dotted name, such as `blocks.0.attn.q`, in the model's training mode."""
    at, (*path, last) = vars(model), name.split(".")
    for step in path:
        at = at[_key(at, step)]
        at = vars(at) if isinstance(at, Module) else at
    at[_key(at, last)] = module
    module.train(model.training)


def _key(at, step):
    return int(step) if isinstance(at, list) else next(key for key in at if str(key) == step)


def find(model, patterns, kind=Module):
    """The modules of a kind whose names match, by name; a pattern that hits nothing is an error.

    Args:
        patterns: one or several of `fnmatch`'s: `blocks.*.attn.[qv]`; a `*` crosses dots.
        kind: a class, a tuple of classes, or the names of what the module must have: "up down"
            for an MLP, "q k v o|up down" for attention or an MLP.
    """

    def fits(module):
        if not isinstance(kind, str):
            return isinstance(module, kind)
        return any(all(hasattr(module, n) for n in names.split()) for names in kind.split("|"))

    modules = {name: m for name, m in model.named_modules() if name and fits(m)}
    what = "module" if kind is Module else "layer of the right kind"
    return {name: modules[name] for name in _matching(modules, patterns, what)}


def put_all(model, modules):
    """Put modules in their places by name, what is inside of another first. Returns the model."""
    for name in sorted(modules, key=lambda name: -name.count(".")):
        put(model, name, modules[name])
    return model


def replace(model, patterns, wrap, kind=Module):
    """Replace every module that `find` finds by `wrap(module)`; returns their names.

    All are wrapped before anything is replaced, so that an error leaves the model as it was.
    """
    fresh = {name: wrap(module) for name, module in find(model, patterns, kind).items()}
    put_all(model, fresh)
    return list(fresh)


def plain(model, patterns, kind=Linear, ties=False):
    """What `find` finds, on a model that carries no adapter: the one guard of every recipe.

    A weight under two names is refused, as a new layer in one of its places would part them.
    Prompts and biases put none there: `ties=True`. To be compressed, `kind=Linear`, a layer must
    also be a plain one, with finite numbers.
    """
    if wrappers(model):
        raise ValueError("this model carries an adapter already; merge or detach it first")
    found, owners = find(model, patterns, kind), {}
    for prefix, module in model.named_modules():
        for name, p in module.own(Parameter):
            owners.setdefault(id(p), []).append(f"{prefix}.{name}")
    for name, module in found.items():
        if kind is Linear and type(module) is not Linear:
            raise TypeError(f"{name} is {module!r}; expected a plain Linear")
        for part, p in module.named_parameters():
            shared = len(owners[id(p)]) > 1 and part.endswith(("weight", "bias"))  # or Tucker's
            if shared and not ties:
                both = " and ".join(owners[id(p)])
                raise ValueError(f"{name} is tied: {both} are one parameter; leave it out")
            if kind is Linear and not np.isfinite(p.data).all():
                raise ValueError(f"{name} holds a nan or an infinity; expected finite weights")
    return found


def _set_trains(model, patterns, trains):
    parameters = dict(model.named_parameters())
    for name in _matching(parameters, patterns, "parameter"):
        parameters[name].requires_grad = trains
    return model


def freeze(model, patterns="*"):
    """Take the parameters whose names match off the tape: no gradient, no state, no decay."""
    return _set_trains(model, patterns, False)


def unfreeze(model, patterns="*"):
    """Put the parameters whose names match on the tape: they train."""
    return _set_trains(model, patterns, True)


def wear(model, fresh):
    """Put wrappers in their places by name; what they add trains, and nothing else does."""
    freeze(put_all(model, fresh))
    for wrapper in fresh.values():
        for p in wrapper.learned().values():
            p.requires_grad = True
    return model


def wrappers(model):
    """The outermost wrappers of a model by name."""
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and isinstance(module, Wrapper) and not inside:
            found[name] = module
    return found


def merge(model, requantise=None):
    """Fold every wrapper into the layer it wraps: plain layers again, at no extra cost.

    `wrapper.merged()` makes a new layer; the old one is not written to, so nothing can be merged
    twice. `requantise` must be said if the base is quantised: `False` for plain layers, `True`
    for layers quantised as the base was. Returns the model, changed in place.
    """
    found = wrappers(model)
    if not found:
        raise ValueError("merge: this model has no wrapper (was it merged or detached before?)")
    for name, wrapper in found.items():
        why = wrapper.why_not_merged or ("" if hasattr(wrapper, "dense") else "it has no dense()")
        if why:
            raise TypeError(f"merge: {name} ({type(wrapper).__name__}) cannot be merged: {why}")
    quantised = [name for name, wrapper in found.items() if hasattr(wrapper.base, "requantised")]
    if (requantise is None) == bool(quantised):
        what = f"requantise is {requantise}, but no layer here is quantised"
        if quantised:
            what = f"{quantised[0]}: the base is quantised; say requantise=True or False"
        raise ValueError(f"merge: {what}")
    fresh = {}
    for name, wrapper in found.items():
        layer = fresh[name] = wrapper.merged()
        if not all(np.isfinite(p.data).all() for p in layer.parameters()):
            raise ValueError(f"merge: {name} would hold a nan or an infinity; training diverged")
        if requantise and name in quantised:
            fresh[name] = wrapper.base.requantised(layer)
    return put_all(model, fresh)


def detach(model):
    """Take the adapter off and return it, the wrappers by name; `attach` puts it back.

    Several adapters can be kept for one model in a dictionary of yours; they share the base and
    hold no copy of it. What was trained outside of them, biases or norms, stays as it is.
    """
    adapter = wrappers(model)
    put_all(model, {name: wrapper.base for name, wrapper in adapter.items()})
    return adapter


def attach(model, adapter):
    """Put an adapter that `detach` returned on its model, in place of the one that is on."""
    on, modules = wrappers(model), dict(model.named_modules())
    for name, wrapper in adapter.items():
        at = on[name].base if name in on else modules.get(name)
        if at is not wrapper.base:
            raise LookupError(f"attach: the layer at {name} is not the one this adapter wraps")
    detach(model)
    return put_all(model, adapter)


@contextmanager
def detached(model):
    """Inside this block the model is its bare base: the adapter is off, then on again.

    An adapter that the block puts on must be off again at its end, or it would be lost.
    """
    adapter = detach(model)
    try:
        yield model
        if wrappers(model):
            raise ValueError("detached: the block left an adapter on; detach and keep it inside")
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
        head = f"trainable params: {self.trainable:,} || all params: {self.total:,}"
        return f"{head} || trainable%: {100 * self.share:.4f}"


def count(model, quiet=False):
    """Count the parameters, and print the line that users of PEFT know unless `quiet`."""
    parameters = model.parameters()
    packed = sum(getattr(module, "packed_size", 0) for _, module in model.named_modules())
    total = sum(p.size for p in parameters) + packed  # quantised weights are no parameters
    found = Count(sum(p.size for p in parameters if p.requires_grad), total)
    if not quiet:
        print(found)
    return found
