"""Hostile model and adapter files: a file never asks for more than it holds.

    python tests/fuzz_files.py [how many, 4000] [seed, 0]

Each mutant is a valid file of which one number, word, key or array is another. It must load, or be
refused in one ValueError that names the file: within two seconds, and within half a gigabyte above
what the process has. Exit code 1 and a line for each that does otherwise.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import minilora as ml
from minilora import compress, peft, safetensors
from test_io import COMPRESSED, RECIPES, shake, small

ODD = [
    0,
    1,
    -1,
    2,
    7,
    10**9,
    2**31,
    2**63,
    10**30,
    1e308,
    0.5,
    None,
    True,
    "",
    "x",
    [],
    {},
    [10**9],
]
ODD += [[10**5, 10**5], [0, 0], {"kind": "LoRA"}, "Adapter", "Prefix", "float16", [1] * 50_000]


def _rng():
    return np.random.default_rng(1)


ADAPTERS = RECIPES | {
    "dora": lambda m: ml.lora(m, 2, variant=peft.DoRA, rng=_rng()),
    "tables": lambda m: ml.lora(m, 2, targets=["tokens", "positions"], rng=_rng()),
    "adapter": lambda m: ml.adapter(m, 2, rng=_rng()),
    "parallel": lambda m: ml.adapter(m, 2, parallel=True, scale=4, rng=_rng()),
    "prefix": lambda m: ml.prefix(m, 2, rng=_rng()),
    "prefix mlp": lambda m: ml.prefix(m, 2, hidden=3, rng=_rng()),
    "prompt": lambda m: ml.prompt(m, 2, rng=_rng()),
    "ia3": ml.ia3,
    "rows": lambda m: ml.token_rows(m, [3, 0]),
}
MODELS = COMPRESSED | {"plain": lambda m: m, "gptq": lambda m: compress.quantise_model(m, 2)}


def leaves(value, at=()):
    """The paths to all that can be changed in nested lists and dictionaries."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield (*at, key)
        if isinstance(item, (dict, list)):
            yield from leaves(item, (*at, key))


def mutate(arrays, metadata, rng):
    """Change one thing in a file's arrays or in its metadata, in place."""
    name = list(arrays)[rng.integers(len(arrays))] if arrays else None
    how = rng.random()
    if name and how < 0.1:
        del arrays[name]
    elif name and how < 0.2:
        shape = rng.integers(0, 9, rng.integers(0, 4)).tolist()
        arrays[name] = np.zeros(shape, [np.float32, np.uint8, np.int64][rng.integers(3)])
    elif name and how < 0.25:
        arrays[f"{name}.x"] = arrays.pop(name)
    else:
        texts = [k for k, v in metadata.items() if v.startswith(("{", "["))]
        key = texts[rng.integers(len(texts))] if texts else "config"
        value = json.loads(metadata.get(key, "{}"))
        paths = list(leaves(value))
        odd = ODD[rng.integers(len(ODD))]
        if not paths or rng.random() < 0.05:
            value = odd
        else:
            *way, last = paths[rng.integers(len(paths))]
            inner = value
            for step in way:
                inner = inner[step]
            if rng.random() < 0.2 and isinstance(inner, dict):
                inner["zzz" if rng.random() < 0.5 else "m"] = inner.pop(last)
            else:
                inner[last] = odd
        metadata[key] = json.dumps(value)


def attempt(load, path):
    """What is wrong with how a file was taken, or None."""
    start = time.perf_counter()
    try:
        load(path)
    except ValueError as error:
        if str(path) not in str(error) or "\n" in str(error):
            return f"its error is {str(error)[:200]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    took = time.perf_counter() - start
    return f"it took {took:.1f} s" if took > 2 else None


def differences(n, seed, folder):
    """A line for each of `n` mutants that is taken or refused in another way than promised."""
    rng, path, files = np.random.default_rng(seed), Path(folder, "f"), []
    for name, recipe in ADAPTERS.items():
        ml.save_adapter(shake(recipe(small())), path)
        load = lambda path: ml.load_adapter(small(), path)  # noqa: E731
        files.append((name, load, safetensors.read(path)))
    for name, recipe in MODELS.items():
        ml.save_model(recipe(small()), path)
        files.append((name, ml.load_model, safetensors.read(path)))
    for i in range(n):
        name, load, (arrays, metadata) = files[i % len(files)]
        arrays, metadata = dict(arrays), dict(metadata)
        mutate(arrays, metadata, rng)
        safetensors.write(path, arrays, metadata)
        if wrong := attempt(load, path):
            yield f"{i}, {name}: {wrong}\n    {str(metadata)[:300]}"


def main():
    """Returns the exit code."""
    n, seed = (int(a) for a in (*sys.argv[1:], *(4000, 0)[len(sys.argv) - 1 :]))
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        for line in differences(n, seed, folder):
            found += 1
            print(line)
    print(f"{n} files, {found} taken or refused in another way than promised")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
