"""What the jobs share: a command line that answers in one line, and tables of text."""

import argparse


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def error(self, message):
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def several(self, flag, names, usual):
        """An option for one or more of `names`; those that are `usual` if it is not given."""
        told = "; ".join(names)
        self.add_argument(flag, nargs="+", choices=names, default=usual, metavar="NAME", help=told)

    def writable(self, path, size=2**20):
        """Leave with an error unless a file of `size` bytes can be written at `path`.

        To be called before the work, which could not be kept otherwise. What is there stays.
        """
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is there, and no file")
            if path.exists():
                path.open("r+b").close()  # may it be changed?
            spare = path.with_name(f"{path.name}.tmp")
            try:
                spare.write_bytes(bytes(size))
            finally:
                spare.unlink(missing_ok=True)
        except OSError as error:
            self.error(f"cannot write {str(path)!r}: {error.strerror or error}")


def whole(low, high):
    """A type for argparse: a whole number from `low` to `high`."""

    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, {low} to {high}")
        return int(text)

    return parse


def table(columns, rows):
    """Rows as text, the first column flush left, the others flush right.

    `columns` maps heads, of one line or two, to templates of their cells, which the rows fill.
    """
    heads = [[head.partition("\n")[i] for head in columns] for i in (0, 2)]
    lines = heads + [[cell.format(**row) for cell in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        line[:] = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
    return "\n".join("  ".join(line) for line in lines)
