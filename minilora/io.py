"""Models and adapters on disk: one safetensors file each, the configuration in its metadata.

An adapter's file holds only the tensors that train, and a fingerprint of the frozen ones, so
that it cannot be put on another base by mistake.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from . import peft, safetensors, tasks
from .nn import Embedding
from .surgery import freeze, put, wrappers
from .transformer import Transformer

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL, ADAPTER = "minilora model 1", "minilora adapter 1"


def save_model(model, path):
    """Write a whole `Transformer` to one file. Atomic: a crash leaves the old file whole.

    Raises:
        ValueError: if the model carries an adapter: merge or detach it first.
    """
    if wrappers(model):
        raise ValueError("save_model: this model carries an adapter; merge or detach it first")
    arrays = {name: p.data for name, p in model.named_parameters()}
    safetensors.write(path, arrays, {"format": MODEL, "config": json.dumps(model.config)})


def load_model(path, dtype=None):
    """Read a `Transformer` from a file that `save_model` wrote.

    Args:
        path: the file. dtype: float32 or float64; as stored if not given.

    Raises:
        ValueError: if the file is damaged, is not a model's, or does not fit its configuration.
    """
    arrays, metadata = _read(path, MODEL)
    config = _json(path, metadata, "config")
    if dtype is None:
        dtype = next(iter(arrays.values())).dtype if arrays else np.float32
    sizes = [np.shape(arrays.get(f"{table}.weight")) for table in ("tokens", "positions")]
    n, d = config.get("n_layer"), config.get("n_embd")
    expected = [(config.get("vocab_size"), d), (config.get("n_positions"), d)]
    if sizes != expected or not isinstance(n, int) or n > len(arrays):
        # before anything is built: a small file must not ask for a large model
        raise ValueError(f"{path}: its tensors do not fit its configuration {config}")
    try:
        model = Transformer(**config, rng=np.random.default_rng(0), dtype=dtype)
    except (TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: the configuration makes no model: {error}") from None
    _fill(path, dict(model.named_parameters()), arrays)
    return model


def save_adapter(model, path):
    """Write what trains in a model, and how it is wrapped, to one file. Atomic.

    After full fine-tuning that is every weight; after `lora` it is A and B of each layer.

    Raises:
        ValueError: if nothing trains.
    """
    arrays = {_plain(name): p.data for name, p in model.trainable().items()}
    if not arrays:
        raise ValueError("save_adapter: nothing trains in this model, so there is nothing to save")
    metadata = {
        "format": ADAPTER,
        "wrappers": json.dumps({name: w.config() for name, w in wrappers(model).items()}),
        "frozen": _fingerprint(model, set(arrays)),
    }
    safetensors.write(path, arrays, metadata)


def load_adapter(model, path):
    """Put an adapter that `save_adapter` wrote on a plain model, which then trains what it trained.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: if the file is damaged or is not an adapter's, if the model carries an
            adapter already, or if the adapter was made for another model. The model is then
            left as it was.
    """
    if wrappers(model):
        raise ValueError("load_adapter: this model carries an adapter; detach or merge it first")
    arrays, metadata = _read(path, ADAPTER)
    modules, plain = dict(model.named_modules()), dict(model.named_parameters())
    new, expected = {}, {}
    for name, config in _json(path, metadata, "wrappers").items():
        if name not in modules:
            raise ValueError(f"{path}: made for another model: this one has no layer {name}")
        try:
            config = dict(config)
            kind = config.pop("kind")
            if kind not in peft.WRAPPERS:
                raise ValueError(f"kind is {kind!r}; expected one of {', '.join(peft.WRAPPERS)}")
            new[name] = peft.WRAPPERS[kind](modules[name], rng=np.random.default_rng(0), **config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the wrapper of {name} cannot be made: {error}") from None
        own = new[name].named_parameters()
        expected |= {f"{name}.{k}": p for k, p in own if not k.startswith("base.")}
    expected |= {name: plain[name] for name in arrays if name in plain}
    if metadata.get("frozen") != _fingerprint(model, set(arrays)):
        raise ValueError(f"{path}: made for another model: the frozen weights differ")
    _fill(path, expected, arrays)
    for name, wrapper in new.items():
        put(model, name, wrapper)
    freeze(model)
    for p in expected.values():
        p.requires_grad = True
    return model


def load_base(dtype=np.float64, n_positions=None):
    """The pre-trained base that comes with the project, in `data/`.

    Args:
        dtype: float64 for steady numbers, float32 for speed.
        n_positions: if given, the table of positions gets rows of zeros up to this many: room
            for a prefix or a prompt, which the base's own 17 positions leave none for.
    """
    model = load_model(DATA / "base.safetensors", dtype)
    if n_positions is not None:
        extra = n_positions - model.config["n_positions"]
        if extra < 0:
            raise ValueError(f"n_positions is {n_positions}; expected 17 or more")
        table = np.pad(model.positions.dense(), ((0, extra), (0, 0)))  # (17, d) -> (n, d)
        model.positions = Embedding.of(table)
        model.config["n_positions"] = n_positions
    return model


def load_eval(task):
    """The fixed evaluation set of a task: token ids (N, 18)."""
    tasks.check(task)
    return safetensors.read(DATA / "eval.safetensors")[0][task].astype(np.int64)


def _read(path, expected):
    arrays, metadata = safetensors.read(path)
    found = metadata.get("format")
    if found != expected:
        raise ValueError(f"{path}: its format is {found!r}; expected {expected!r}")
    return arrays, metadata


def _json(path, metadata, key):
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: its metadata has no valid {key!r}")
    return value


def _fill(path, parameters, arrays):
    """Copy arrays into parameters of the same names and shapes: all of them, or none."""
    missing, extra = sorted(parameters.keys() - arrays), sorted(arrays.keys() - parameters)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which this model has not"
        raise ValueError(f"{path}: made for another model: it {what}")
    for name, p in parameters.items():
        if arrays[name].shape != p.shape:
            raise ValueError(
                f"{path}: {name} has shape {arrays[name].shape}; this model expects {p.shape}"
            )
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{path}: {name} has dtype {arrays[name].dtype}; expected floats")
    for name, p in parameters.items():
        p.data[...] = arrays[name]


def _plain(name):
    """A parameter's name in the model without wrappers."""
    return name.replace(".base.", ".")


def _fingerprint(model, trained):
    """A checksum of the weights that are not `trained`, under their names in the plain model."""
    digest = hashlib.sha256()
    for name, p in sorted((_plain(name), p) for name, p in model.named_parameters()):
        if name not in trained:
            digest.update(name.encode())
            digest.update(p.data.astype("<f4").tobytes())  # the same for a float64 copy
    return digest.hexdigest()
