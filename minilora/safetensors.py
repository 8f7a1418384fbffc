"""Named arrays in one file: a reader and a writer of the safetensors format, over NumPy alone.

The format, as github.com/huggingface/safetensors describes it: 8 bytes hold the length of the
header, little-endian; the header is a JSON object in UTF-8, padded with spaces; the rest is the
data, little-endian and row by row, with neither holes nor overlaps. The header maps each name to
`{"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}`, with offsets counted from the
start of the data, and may map `"__metadata__"` to texts by name. So a file is data and no more:
a pickle can run code as it loads, this cannot.
"""

import json
import os
import secrets
import shutil

import numpy as np

# From wide to narrow: written in this order, each array starts at a multiple of its item size.
_CODES = {"U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4"}
_CODES |= {"F16": "<f2", "U16": "<u2", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
_NAMES = {code: name for name, code in _CODES.items()}


class FormatError(ValueError):
    """A file that breaks the format, or that holds a dtype foreign to NumPy."""


def write(path, arrays, metadata=None):
    """Write `arrays`, by name, and `metadata`, texts by name, to a file, whole or not at all.

    A file already there is replaced in one step. The same input gives the same bytes.

    Example::

        write("adapter.safetensors", {"A": np.ones((4, 64))}, {"alpha": "8"})
        arrays, metadata = read("adapter.safetensors")
    """
    plain = {name: a.astype(a.dtype.newbyteorder("<"), copy=False) for name, a in arrays.items()}
    order = sorted(plain, key=lambda name: (list(_NAMES).index(plain[name].dtype.str), name))
    header = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        a, begin, end = plain[name], end, end + plain[name].nbytes
        header[name] = {
            "dtype": _NAMES[a.dtype.str],
            "shape": a.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = os.path.realpath(path)  # so that a link stays a link
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(plain[name].tobytes() for name in order)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read(path):
    """Read a file: arrays by name, in the order of the file, and metadata, texts by name.

    Raises:
        FormatError: names the file and what is wrong with it. Whatever the header claims, no
            array can be larger than the file: NumPy makes each from bytes that are there.
    """
    with open(path, "rb") as file:
        raw = file.read()
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        header, data, arrays, end = json.loads(raw[8:start]), raw[start:], {}, 0
        if start > len(raw):
            raise ValueError(f"the header claims to end at byte {start} of {len(raw)}")
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"__metadata__ is {metadata!r}, expected texts by name")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if begin != end or min(entry["shape"], default=0) < 0:
                raise ValueError(f"tensor {name!r} is {entry}, expected to begin at byte {end}")
            array = np.frombuffer(data[begin:stop], _CODES[entry["dtype"]]).reshape(entry["shape"])
            arrays[name], end = array.astype(array.dtype.newbyteorder("=")), stop
        if end != len(data):
            raise ValueError(f"the tensors end at byte {end} of the data, expected {len(data)}")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: {str(error)[:400]}") from None
    return arrays, metadata
