"""Named arrays in one file: a reader and a writer of the safetensors format, over NumPy alone.

The format, as github.com/huggingface/safetensors describes it: 8 bytes hold the length of the
header, little-endian; the header is a JSON object in UTF-8, padded with spaces; the rest is the
data, little-endian and row by row, with neither holes nor overlaps. The header maps each name to
`{"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}`, with offsets counted from the
start of the data, and may map `"__metadata__"` to texts by name. So a file is data and no more:
a pickle can run code as it loads, this cannot.
"""

import itertools
import json
import math
import os
import re
import secrets
import shutil

import numpy as np

# From wide to narrow: written in this order, each array starts at a multiple of its item size.
# Ties go as in the official writer.
_CODES = {"U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4"}
_CODES |= {"F16": "<f2", "U16": "<u2", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
_NAMES = {code: name for name, code in _CODES.items()}
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$)', re.DOTALL)  # JSON's, whole or cut
_HEADER_CAP = 100_000_000  # bytes; the official limit


class FormatError(ValueError):
    """A file that breaks the format, or that holds a dtype foreign to NumPy or to this library."""


def write(path, arrays, metadata=None):
    """Write `arrays` to the file `path`, whole or not at all. The same input, the same bytes.

    Args:
        path: where to. A file already there is replaced in one step, and its mode is kept.
        arrays: names to NumPy arrays of booleans, or of integers or floats of up to 64 bits.
        metadata: texts to texts, or `None`.
    """
    codes = {n: getattr(a, "dtype", np.dtype("O")).newbyteorder("<").str for n, a in arrays.items()}
    odd = [name for name, code in codes.items() if code not in _NAMES or type(name) is not str]
    odd += [text for text in itertools.chain(*(metadata or {}).items()) if type(text) is not str]
    odd += ["__metadata__"] * ("__metadata__" in arrays)
    if odd:
        raise TypeError(f"{odd[0]!r}: expected texts, and arrays by name of {' '.join(_CODES)}")
    plain = {name: a.astype(codes[name], copy=False) for name, a in arrays.items()}
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
    if len(text) > _HEADER_CAP:
        raise ValueError(f"the header would have {len(text)} bytes, expected up to {_HEADER_CAP}")
    head = [len(text).to_bytes(8, "little"), text]
    try:
        write_whole(path, itertools.chain(head, (plain[name].tobytes() for name in order)))
    except OSError as error:
        # in the name of what was asked for, not of the spare file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_whole(path, chunks):
    """Write the bytes of `chunks` to the file `path`, whole or not at all."""
    path = os.path.realpath(path)  # so that a link stays a link
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # tempfile would keep it private, whatever the umask
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read(path):
    """Read the file `path`, trusting nothing in it: no array is larger than the file.

    Whatever the official reader refuses is a `FormatError` that names the file, and so are a few
    things that it lets pass: a key twice in one object, an entry with more than three fields,
    null metadata, C64, a BOOL that is neither 0 nor 1, and more axes than NumPy has.

    Returns: a dict from names to arrays, in the order of the file, and the metadata, a dict from
    text to text, empty if there are none.
    """
    with open(path, "rb") as file:
        raw = file.read()
    found, metadata = _parsed(path, raw, _CODES)
    arrays = {}
    for name, array in found.items():
        if array.dtype == bool and array.view(np.uint8).max(initial=0) > 1:  # NumPy trusts them
            raise FormatError(f"{path}: {name!r} is BOOL, expected its bytes to be 0 or 1")
        arrays[name] = array.astype(array.dtype.newbyteorder("="))  # a copy, in its place in memory
    return arrays, metadata


def mapped(path):
    """Like `read`, but nothing is copied: an array's bytes come from the disk when it is used.

    The file must stay as it is while its arrays live. BF16, which NumPy lacks, is let through as
    an array with one field, `bf16`, the upper 16 bits of a float32; a BOOL is not looked at.
    """
    raw = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else b""
    return _parsed(path, raw, _CODES | {"BF16": np.dtype([("bf16", "<u2")])})


def _parsed(path, raw, codes):
    try:
        return _parse(raw, codes)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise FormatError(f"{path}: {str(what)[:400]}") from None  # it may quote a lot


def _parse(raw, codes):
    start = 8 + int.from_bytes(bytes(raw[:8]), "little")
    if len(raw) < 8 or start > min(len(raw), 8 + _HEADER_CAP):
        raise ValueError(f"the header claims to end at byte {start} of {len(raw)}")
    header, data = _header(bytes(raw[8:start])), memoryview(raw)[start:]
    metadata, arrays, end = header.pop("__metadata__", {}), {}, 0
    if type(metadata) is not dict or any(type(text) is not str for text in metadata.values()):
        raise ValueError(f"__metadata__ is {metadata!r}, expected an object of texts")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, stop) = entry["shape"], entry["data_offsets"]
        if len(entry) != 3 or entry["dtype"] not in [*codes] or len(shape) > 64:
            raise ValueError(f"{name!r} is {entry!r}, a dtype, shape or field that NumPy lacks")
        size = math.prod(shape) * np.dtype(code := codes[entry["dtype"]]).itemsize
        whole = all(type(n) is int for n in shape + entry["data_offsets"])  # of lists alone
        if not whole or begin != end or stop - begin != size:
            raise ValueError(f"{name!r} is {entry!r}, expected to begin at {end} and fit its shape")
        arrays[name], end = np.frombuffer(data[begin:stop], code).reshape(shape), stop
    if end != len(data):
        raise ValueError(f"the tensors end at byte {end} of the data, expected {len(data)}")
    return arrays, metadata


def _header(raw):
    if raw[:1] != b"{":  # with this, whatever JSON it is, it is an object
        raise ValueError(f"the header starts with {raw[:8]!r}, expected '{{'")
    text = raw.decode()
    # Checked first, since the parser recurses: in a browser, too deep a nest ends Python.
    brackets = re.finditer(r"[][{}]", re.sub(_STRING, "", text))
    steps = (1 if bracket[0] in "[{" else -1 for bracket in brackets)
    if max(itertools.accumulate(steps), default=0) > 3:
        raise ValueError("the brackets of the header nest too deep")
    header = json.loads(text, object_pairs_hook=_unique, parse_int=_natural)
    json.dumps(header, ensure_ascii=False).encode()  # fails on half an escaped surrogate pair
    return header


def _unique(pairs):
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"a key comes twice among {[key for key, _ in pairs]}")
    return table


def _natural(digits):
    if digits[0] == "-" or len(digits) > 19:  # even -0; and 19 digits always fit in 64 bits
        raise ValueError(f"the number {digits[:20]}, expected 0 or more and at most 19 digits")
    return int(digits)
