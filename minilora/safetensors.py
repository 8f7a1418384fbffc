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
_FOREIGN = "BF16 C64 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ F6_E2M3 F6_E3M2 F4"
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$)', re.DOTALL)  # JSON's, whole or cut
_HEADER_CAP = 100_000_000  # bytes; the official limit


class FormatError(ValueError):
    """A file that breaks the format, or that holds a dtype foreign to NumPy or to this library."""


def write(path, arrays, metadata=None):
    """Write `arrays` to the file `path`, whole or not at all. The same input, the same bytes.

    Args:
        path: where to. A file already there is replaced in one step, and its mode is kept.
        arrays: a dict from names to NumPy arrays of booleans, or of integers or floats of up to
            64 bits.
        metadata: a dict from text to text, or `None`.

    Raises:
        TypeError, ValueError: the format cannot hold this; nothing is written.
        OSError: the disk refused; a file that was there is still there, whole.

    Example::

        write("adapter.safetensors", {"A": np.ones((4, 64))}, {"alpha": "8"})
        arrays, metadata = read("adapter.safetensors")
    """
    if not isinstance(arrays, dict):
        raise TypeError(f"arrays is a {type(arrays).__name__}, expected a dict")
    if not isinstance(metadata, dict | None):
        raise TypeError(f"metadata is a {type(metadata).__name__}, expected a dict or None")
    header, plain = {}, {}
    if metadata is not None:
        for key, value in metadata.items():
            _check_text("a key of metadata", key)
            _check_text(f"metadata[{key!r}]", value)
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name, array in arrays.items():
        _check_text("a name in arrays", name)
        if name == "__metadata__":
            raise ValueError("a name in arrays is '__metadata__', expected one that is not taken")
        if not isinstance(array, np.ndarray):
            raise TypeError(f"arrays[{name!r}] is a {type(array).__name__}, expected a NumPy array")
        code = array.dtype.newbyteorder("<").str
        if code not in _NAMES:
            known = " ".join(_CODES)
            raise TypeError(f"arrays[{name!r}] has dtype {array.dtype}, expected one of {known}")
        plain[name] = array.astype(code, copy=False)

    order = sorted(plain, key=lambda name: (list(_NAMES).index(plain[name].dtype.str), name))
    end = 0
    for name in order:
        begin, end = end, end + plain[name].nbytes
        header[name] = {"dtype": _NAMES[plain[name].dtype.str], "shape": plain[name].shape}
        header[name]["data_offsets"] = begin, end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_CAP:
        raise ValueError(
            f"arrays and metadata need a header of {len(text)} bytes, expected up to {_HEADER_CAP}"
        )

    head = len(text).to_bytes(8, "little") + text
    _replace(path, itertools.chain([head], (plain[name].tobytes() for name in order)))


def _check_text(argument, text):
    shown = " ".join(repr(text).split())[:80]
    if not isinstance(text, str):
        raise TypeError(f"{argument} is {shown}, expected a str")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{argument} is {shown}, expected text that UTF-8 can hold") from None


def _replace(path, chunks):
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
    """Read the file `path`, trusting nothing in it.

    Whatever the official reader refuses is refused, and a few things that it lets pass: a header
    that starts with a space, a key twice in one object, an entry that is not an object of three
    fields, null metadata, C64, and a BOOL that is neither 0 nor 1.

    Args:
        path: the file to read.

    Returns:
        A pair: a dict from names to fresh arrays, in the order of the file, and the metadata, a
        dict from text to text, empty if there are none.

    Raises:
        FormatError: names the file and what is wrong with it.
        OSError: the file could not be read.
    """
    with open(path, "rb") as file:
        try:
            return _read(file)
        except ValueError as error:  # cut, as it may quote most of a bad header
            raise FormatError(f"{path}: {str(error)[:400]}") from None


def _read(file):
    size = file.seek(0, os.SEEK_END) - 8
    file.seek(0)
    if size < 0:
        raise ValueError(f"the file has {size + 8} bytes, expected at least 8")
    length = int.from_bytes(file.read(8), "little")
    most = min(size, _HEADER_CAP)
    if length > most:
        raise ValueError(f"the header claims {length} bytes, expected at most {most}")
    header, size = _header(file.read(length)), size - length
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(text) is not str for text in metadata.values()):
        raise ValueError(f"__metadata__ is {metadata!r}, expected an object of texts")
    for name, entry in header.items():
        _check_entry(name, entry)
    covered = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if covered != size:  # checked before any array is made, so none is larger than the file
        raise ValueError(f"the tensors end at byte {covered} of the data, expected {size}")

    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(_CODES[entry["dtype"]]), entry["shape"]
        begin, stop = entry["data_offsets"]
        if begin != end:
            raise ValueError(f"tensor {name!r} begins at byte {begin} of the data, expected {end}")
        end, need = stop, math.prod(shape) * dtype.itemsize
        if stop - begin != need:
            raise ValueError(f"tensor {name!r} has {stop - begin} bytes, expected {need}")
        try:
            array = np.empty(shape, dtype)
        except ValueError as error:  # with a zero in it, any shape fits, but not in NumPy
            raise ValueError(f"tensor {name!r} has shape {shape}: {error}") from None
        if file.readinto(array) != need:
            raise ValueError("the file shrank while it was read")
        if dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:  # NumPy trusts them
            raise ValueError(f"tensor {name!r} is BOOL, expected its bytes to be 0 or 1")
        arrays[name] = array.astype(dtype.newbyteorder("="), copy=False)
    return arrays, metadata


def _header(raw):
    if raw[:1] != b"{":  # with this, whatever JSON it is, it is an object
        raise ValueError(f"the header starts with {raw[:8]!r}, expected '{{'")
    try:
        text = raw.decode()
        # Checked first, since the parser recurses: in a browser, too deep a nest ends Python.
        brackets = re.finditer(r"[][{}]", re.sub(_STRING, "", text))
        steps = (1 if bracket[0] in "[{" else -1 for bracket in brackets)
        depth = max(itertools.accumulate(steps), default=0)
        if depth > 3:
            raise ValueError(f"its brackets nest {depth} deep, expected at most 3")
        header = json.loads(text, object_pairs_hook=_unique, parse_int=_natural)
        json.dumps(header, ensure_ascii=False).encode()  # fails on half an escaped surrogate pair
    except ValueError as error:
        raise ValueError(f"the header, JSON in UTF-8, is malformed: {error}") from None
    return header


def _unique(pairs):
    table = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} comes twice")
        table[key] = value
    return table


def _natural(digits):
    if digits[0] == "-" or len(digits) > 19:  # even -0; and 19 digits always fit in 64 bits
        raise ValueError(f"the number {digits[:20]}, expected 0 or more and at most 19 digits")
    return int(digits)


def _check_entry(name, entry):
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is {entry!r}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in _FOREIGN.split():
        raise ValueError(f"tensor {name!r} has dtype {dtype}, which NumPy or this library lacks")
    if dtype not in list(_CODES):
        known = " ".join(_CODES)
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, expected one of {known}")
    if not _are_whole(shape) or len(shape) > 64:  # NumPy's limit; without it, prod could crawl
        raise ValueError(f"tensor {name!r} has shape {shape!r}, expected up to 64 whole numbers")
    if not _are_whole(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has offsets {offsets!r}, expected two whole numbers")


def _are_whole(numbers):
    return type(numbers) is list and all(type(number) is int for number in numbers)
