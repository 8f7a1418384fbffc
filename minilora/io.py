"""Models and adapters on disk: one safetensors file each, the configuration in its metadata.

An adapter's file holds only the tensors that train, and a fingerprint of the frozen ones, so
that it cannot be put on another base by mistake.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from . import compress, peft, safetensors, tasks
from .nn import Embedding, Linear
from .surgery import freeze, put, wrappers
from .transformer import Transformer

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL, ADAPTER = "minilora model 1", "minilora adapter 1"


def save_model(model, path):
    """Write a whole `Transformer` to one file. Atomic: a crash leaves the old file whole.

    Compressed layers are written as they are stored, and a matrix with so many zeros that a
    bitmap makes it smaller as bitmap and values: the file is as small as the model is.

    Raises:
        ValueError: if the model carries an adapter: merge or detach it first.
        TypeError: if a layer has no form for a file, such as one that shares its factors.
    """
    if wrappers(model):
        raise ValueError("save_model: this model carries an adapter; merge or detach it first")
    arrays = {name: p.data for name, p in model.named_parameters()}
    layers, sparse = {}, {}
    for name, layer in model.named_modules():
        if type(layer).__name__ in compress.LAYERS:
            arrays = {k: a for k, a in arrays.items() if not k.startswith(f"{name}.")}
            arrays |= {f"{name}.{k}": a for k, a in layer.arrays().items()}
            layers[name] = layer.config()
        elif isinstance(layer, Linear) and type(layer) is not Linear:
            raise TypeError(f"save_model: {name} is {layer!r}, which has no form for a file")
    for name, a in list(arrays.items()):
        if a.ndim == 2 and a.dtype.kind == "f" and name.endswith(".weight"):
            zeros = 1 - np.count_nonzero(a) / a.size
            if zeros > compress.break_even_sparsity(8 * a.itemsize):
                sparse[name] = list(arrays.pop(name).shape)
                arrays[f"{name}.bits"], arrays[f"{name}.values"] = compress.to_bitmap(a)
    metadata = {"format": MODEL, "config": json.dumps(model.config)}
    smaller = {}  # what pruning has made smaller than the configuration says
    for i, block in enumerate(model.blocks):
        sizes = {
            "n_head": block.attn.n_head,
            "width": block.attn.o.d_in,
            "inner": block.mlp.down.d_in,
        }
        if sizes != _sizes(model.config):
            smaller[i] = sizes
    extras = {"layers": layers, "sparse": sparse, "smaller": smaller}
    metadata |= {key: json.dumps(value) for key, value in extras.items() if value}
    safetensors.write(path, arrays, metadata)


def load_model(path, dtype=None):
    """Read a `Transformer` from a file that `save_model` wrote.

    Args:
        path: the file. dtype: float32 or float64; as stored if not given.

    Raises:
        ValueError: if the file is damaged, is not a model's, or does not fit its configuration.
    """
    arrays, metadata = _read(path, MODEL)
    config = _json(path, metadata, "config")
    extras = {
        key: _json(path, metadata, key) if key in metadata else {}
        for key in ("layers", "sparse", "smaller")
    }
    try:
        for name, shape in extras["sparse"].items():
            bits, values = arrays.pop(f"{name}.bits"), arrays.pop(f"{name}.values")
            arrays[name] = compress.from_bitmap(bits, values, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the bitmap of {name} cannot be read: {error}") from None
    if dtype is None:
        dtype = next((a.dtype for a in arrays.values() if a.dtype.kind == "f"), np.float32)
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
    try:
        restored = _compressed(model, arrays, extras["layers"], extras["smaller"], dtype)
    except (AttributeError, IndexError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its compressed layers cannot be made: {error}") from None
    own = dict(model.named_parameters())
    _fill(path, {k: p for k, p in own.items() if not k.startswith(restored)}, arrays)
    return model


def _sizes(config):
    """The sizes inside each block of an unpruned model."""
    d = config["n_embd"]
    return {"n_head": config["n_head"], "width": d, "inner": 4 * d}


def _compressed(model, arrays, layers, smaller, dtype):
    """Make the blocks as small as `smaller` says, then put in the layers that are compressed.

    Takes what those need out of `arrays`. Returns the start of the names of their parameters.
    """
    d = model.config["n_embd"]
    for i, sizes in smaller.items():
        full, attn, mlp = _sizes(model.config), model.blocks[int(i)].attn, model.blocks[int(i)].mlp
        n_head, width, inner = (sizes[key] for key in full)
        for key in full:
            if not isinstance(sizes[key], int) or not 1 <= sizes[key] <= full[key]:
                raise ValueError(f"{key} is {sizes[key]!r}; expected 1 to {full[key]}")
        if width % n_head:
            raise ValueError(f"n_head is {n_head}; expected a divisor of {width}")
        blank = lambda *shape: Linear.of(np.zeros(shape, dtype), np.zeros(shape[0], dtype))  # noqa: E731
        attn.n_head, attn.o, mlp.up, mlp.down = (
            n_head,
            blank(d, width),
            blank(inner, d),
            blank(d, inner),
        )
        for part in "qkv":
            setattr(attn, part, blank(width, d))
    modules = dict(model.named_modules())
    for name, config in layers.items():
        own = [key for key in arrays if key.startswith(f"{name}.")]
        own = {key.removeprefix(f"{name}."): arrays.pop(key) for key in own}
        old = modules[name]
        if config.get("shape", [old.d_out, old.d_in]) != [old.d_out, old.d_in]:
            raise ValueError(f"{name} has shape {config['shape']}; expected {old!r}")
        layer = compress.LAYERS[config["kind"]].restore(own, config, dtype)
        if (layer.d_in, layer.d_out) != (old.d_in, old.d_out):
            raise ValueError(f"{name} is {layer!r}; expected {old.d_in} -> {old.d_out}")
        put(model, name, layer)
    return tuple(f"{name}." for name in layers)


def save_adapter(model, path):
    """Write what trains in a model, and how it is wrapped, to one file. Atomic.

    After full fine-tuning that is every weight; after `lora` it is A and B of each layer.

    Raises:
        ValueError: if nothing trains.
        TypeError: if the model carries a wrapper that `load_adapter` could not put back, such as
            a mask.
    """
    for name, wrapper in wrappers(model).items():
        if type(wrapper).__name__ not in peft.WRAPPERS:
            raise TypeError(
                f"save_adapter: {name} is {type(wrapper).__name__}, which is no adapter; merge, "
                "then save_model"
            )
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
    return model


def load_eval(task):
    """The fixed evaluation set of a task: token ids (N, 18)."""
    tasks.check(task)
    return safetensors.read(DATA / "eval.safetensors")[0][task].astype(np.int64)


def write_sums(folder):
    """Write `SHA256SUMS`: a checksum for each data file in a folder. Run it after each change."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="ascii", newline="\n")


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
    arrays = {_plain(name): p.data for name, p in model.named_parameters()}
    for name, layer in model.named_modules():
        if type(layer).__name__ in compress.LAYERS:
            arrays |= {f"{_plain(name + '.')}{key}": a for key, a in layer.arrays().items()}
    for name, a in sorted(arrays.items()):
        if name not in trained:
            digest.update(name.encode())
            # float32, so that a float64 copy has the same
            digest.update(a.astype("<f4" if a.dtype.kind == "f" else a.dtype).tobytes())
    return digest.hexdigest()
