"""Models and adapters on disk: one safetensors file each, the configuration in its metadata.

An adapter's file holds the wrappers, what else trains, and a fingerprint of the frozen tensors,
so that it cannot be put on another base by mistake. To go on training another day, save the
optimiser's `state_arrays()` beside it by `safetensors.write`.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import compress, peft, safetensors, tasks
from .nn import Embedding, Linear
from .surgery import freeze, put, put_all, wrappers
from .transformer import Transformer

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" if (HERE / "data").is_dir() else HERE.parent / "data"  # a wheel, a clone
MODEL, ADAPTER = "minilora model 1", "minilora adapter 2"
DAMAGE = ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, re.error


def save_model(model, path):
    """Write a whole `Transformer` to one file. Atomic: a crash leaves the old file whole.

    Compressed layers are written as they are stored, and a matrix with so many zeros that a
    bitmap makes it smaller as bitmap and values: the file is as small as the model is. An adapter
    must be merged or detached first, and what `load_model` could not build is refused.
    """
    if wrappers(model):
        raise ValueError("save_model: this model carries an adapter; merge or detach it first")
    if type(model) is not Transformer:
        raise TypeError(f"save_model: this is a {type(model).__name__}; expected a Transformer")
    arrays, layers = _parts(model)
    blank = Transformer(**model.config, rng=None)
    if odd := _odd(_dense(model, layers), _dense(blank, layers)):
        raise TypeError(f"save_model: {odd[0]} has no form for a file, which holds a Transformer")
    sparse = {}
    for name, a in list(arrays.items()):
        zeros = 1 - np.count_nonzero(a) / a.size
        if name.endswith(".weight") and zeros > compress.break_even_sparsity(8 * a.itemsize):
            sparse[name] = list(arrays.pop(name).shape)
            arrays[f"{name}.bits"], arrays[f"{name}.values"] = compress.to_bitmap(a)
    tables = {"layers": layers, "sparse": sparse}
    metadata = {"format": MODEL, "config": json.dumps(model.config)}
    metadata |= {key: json.dumps(table) for key, table in tables.items() if table}
    safetensors.write(path, arrays, metadata)


def _parts(model):
    """What a model stores, by name in the plain model, and the forms of its compressed layers."""
    arrays, layers = {_plain(name): p.data for name, p in model.named_parameters()}, {}
    for name, layer in model.named_modules():
        if type(layer).__name__ in compress.LAYERS:
            own = _plain(f"{name}.")
            arrays = {key: a for key, a in arrays.items() if not key.startswith(own)}
            arrays |= {own + key: a for key, a in layer.arrays().items()}
            layers[own[:-1]] = layer.config()
    return arrays, layers


def _dense(model, layers):
    """The parameters of a model, by name, but for those of its compressed layers."""
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers}


def load_model(path, dtype=None):
    """Read a `Transformer` from a file that `save_model` wrote, as stored or in another dtype.

    A ValueError names the file if it is damaged, or no model's, or does not fit its configuration.
    """
    arrays, metadata = _read(path, MODEL)
    config, layers, sparse = (_json(path, metadata, key) for key in ("config", "layers", "sparse"))
    with said_of(path):
        if dtype is None:
            dtype = next((a.dtype for a in arrays.values() if a.dtype.kind == "f"), np.float32)
        for name, shape in sparse.items():
            bits, values = arrays.pop(f"{name}.bits"), arrays.pop(f"{name}.values")
            arrays[name] = compress.from_bitmap(bits, values, shape)
        if not 1 <= config["n_layer"] <= len(arrays):
            raise ValueError(f"n_layer is {config['n_layer']}, for {len(arrays)} tensors")
        model = Transformer(**config, rng=None, dtype=dtype)  # no memory is taken yet
        modules = dict(model.named_modules())
        for name, form in layers.items():
            old = modules[name]
            own = {k: arrays.pop(k) for k in list(arrays) if k.startswith(f"{name}.")}
            own = {key.removeprefix(f"{name}."): a for key, a in own.items()}
            layer = compress.LAYERS[form["kind"]].restore(own, form, dtype)
            if not isinstance(old, Linear) or layer.shape != old.shape:
                raise ValueError(f"{name} is {layer!r}; expected {old!r}")
            put(model, name, layer)
        fill(_dense(model, layers), arrays)
    return model


def save_adapter(model, path):
    """Write the wrappers of a model, and what else trains in it, to one file. Atomic.

    After full fine-tuning that is every weight; after `lora` it is A and B of each layer, frozen
    or not. A wrapper that `load_adapter` could not put back, such as a mask, is refused.
    """
    on = wrappers(model)
    kinds = {name: type(wrapper).__name__ for name, wrapper in on.items()}
    if odd := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in peft.WRAPPERS]:
        raise TypeError(f"save_adapter: {odd[0]}, which is no adapter; merge, then save_model")
    kept = {f"{name}.{key}": p for name, w in on.items() for key, p in w.learned().items()}
    kept |= model.trainable()
    if not kept:
        raise ValueError("save_adapter: nothing trains in this model, so there is nothing to save")
    arrays = {_plain(name): p.data for name, p in kept.items()}
    forms = {name: wrapper.config() for name, wrapper in on.items()}
    metadata = {"format": ADAPTER, "wrappers": json.dumps(forms)}
    metadata["frozen"] = _fingerprint(model, arrays)
    frozen = [_plain(name) for name, p in kept.items() if not p.requires_grad]
    if frozen:
        metadata["still"] = json.dumps(dict.fromkeys(frozen))  # saved, and does not train
    safetensors.write(path, arrays, metadata)


def load_adapter(model, path):
    """Put an adapter that `save_adapter` wrote on a plain model, which then trains what it trained.

    A ValueError names the file if it is damaged, or no adapter's, or if it was made for another
    model, and then what differs. The model, changed in place, is left as it was on an error.
    """
    if wrappers(model):
        raise ValueError("load_adapter: this model carries an adapter; detach or merge it first")
    arrays, metadata = _read(path, ADAPTER)
    forms, still = (_json(path, metadata, key) for key in ("wrappers", "still"))
    modules, plain = dict(model.named_modules()), dict(model.named_parameters())
    with said_of(path):
        expected, fresh = {name: plain[name] for name in arrays if name in plain}, {}
        for name, form in forms.items():
            if name not in modules:
                raise ValueError(f"made for another model: this one has no layer {name}")
            kind = peft.WRAPPERS[form["kind"]]
            settings = {key: form[key] for key in form if key != "kind"}
            if isinstance(modules[name], Embedding) != (form["kind"] in peft.TABLES):
                raise ValueError(f"{name} is {modules[name]!r}, which no {form['kind']} wraps")
            # What draws its start is not shown the file: its sizes are checked against the base.
            rng = None if kind in peft.BLANK else np.random.default_rng(0)
            fresh[name] = kind(modules[name], rng=rng, **settings)
            expected |= {f"{name}.{key}": p for key, p in fresh[name].learned().items()}
        found, here = metadata.get("frozen", ""), _fingerprint(model, arrays)
        if found != here:
            frozen = zip(_frozen(model, arrays), here, found, strict=False)  # a digit for each
            odd = next((n for n, a, b in frozen if a != b), "the set of frozen weights")
            raise ValueError(f"made for another model: {odd} differs; load it on its own base")
        fill(expected, arrays)
    freeze(put_all(model, fresh))
    for name, p in expected.items():
        p.requires_grad = name not in still
    return model


def _frozen(model, kept):
    """The arrays of a model that are not among `kept`, by their names in the plain model."""
    arrays, _ = _parts(model)
    return {name: arrays[name] for name in sorted(arrays) if name not in kept}


def _fingerprint(model, kept):
    """Which base is it? A digit for each frozen tensor, then as much of a checksum of them all.

    float32, so that a float64 copy has the same.
    """
    sums = []
    for name, a in _frozen(model, kept).items():
        data = a.astype("<f4" if a.dtype.kind == "f" else a.dtype).tobytes()
        sums.append(hashlib.sha256(name.encode() + data).hexdigest())
    every = hashlib.sha256("".join(sums).encode()).hexdigest()
    return "".join(s[0] for s in sums) + every[: max(0, 64 - len(sums))]


def load_base(dtype=np.float64, n_positions=None):
    """The pre-trained base that comes with the project, in `data/`.

    Args:
        dtype: float64 for steady numbers, float32 for speed.
        n_positions: rows of zeros make the table of positions so long: room for a prefix or a
            prompt, which the base's own 17 leave none for.
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


@contextmanager
def said_of(path):
    """Whatever a damaged file makes fail inside this block, it is said of the file, in one line."""
    try:
        yield
    except DAMAGE as e:
        what = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        what = " ".join(what.split()).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {what[:400]}") from None


def _read(path, expected):
    arrays, metadata = safetensors.read(path)
    if metadata.get("format") != expected:
        raise ValueError(f"{path}: its format is {metadata.get('format')!r}; expected {expected!r}")
    return arrays, metadata


def _json(path, metadata, key):
    """A table in the metadata; one that is not there is empty."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: its metadata has no valid {key!r}")
    return value


def _odd(these, those):
    """The first name under which the arrays differ in shape, and both shapes; None if none do."""
    for name in sorted({*these, *those}):
        shapes = [each[name].shape if name in each else "missing" for each in (these, those)]
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None


def fill(parameters, arrays):
    """Put arrays into parameters of the same names and shapes: all of them, or none."""
    if odd := _odd(parameters, arrays):
        name, here, there = odd
        raise ValueError(f"made for another model: {name} is {there} in the file, {here} here")
    for name, a in arrays.items():
        if a.dtype.kind != "f":
            raise ValueError(f"{name} has dtype {a.dtype}; expected floats")
    for name, p in parameters.items():
        p.data = np.array(arrays[name], p.dtype)


def _plain(name):
    """A name in the model without wrappers."""
    return name.replace(".base.", ".")
