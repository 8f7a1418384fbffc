"""Run notebooks from top to bottom in a fresh kernel and store what they print and draw.

    python tests/refresh_notebooks.py                  # all of them
    python tests/refresh_notebooks.py 05 00_tour       # those whose names start so

Only this script should write outputs into a notebook. Whoever runs it gets the same file: cells
are numbered, nothing of the machine, the user or the clock is kept.
"""

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from surroundings import ROOT, settle

NOTEBOOKS = ROOT / "notebooks"
KEPT = ("jupyter", "slideshow", "tags")  # of a cell's metadata
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def find():
    """The notebooks, in reading order."""
    return sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def read(path):
    """The notebook at `path`."""
    return nbformat.read(path, as_version=4)


def execute(notebook, folder, allow_errors=False):
    """Run every cell in a fresh kernel that works in `folder`. Fills in the outputs in place.

    Raises:
        CellExecutionError: for an error in a cell that is not tagged `raises-exception`, unless
            `allow_errors`.
    """
    NotebookClient(
        notebook,
        timeout=600,  # a cell; as for nbval, so that what can be stored can be tested
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        allow_errors=allow_errors,
        extra_arguments=["--log-level=ERROR"],
        record_timing=False,
        # One stream per cell: how the kernel cuts it into pieces depends on the clock.
        coalesce_streams=True,
    ).execute()
    return notebook


def normalise(notebook):
    """Drop what differs between machines and editors; number the cells."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        kept = {name: cell.metadata[name] for name in KEPT if cell.metadata.get(name)}
        cell.metadata = nbformat.from_dict(kept)
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                # The frames above the message hold paths of this machine.
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return notebook


def refresh(path):
    """Execute the notebook at `path`, store it, and return a line that says how it went."""
    notebook = read(path)
    started = time.perf_counter()
    execute(notebook, path.parent)
    seconds = time.perf_counter() - started
    nbformat.write(normalise(notebook), path)
    kilobytes = path.stat().st_size / 1000
    return f"{path.name:28} {seconds:6.1f} s {len(notebook.cells):4} cells {kilobytes:7.0f} kB"


def main(names):
    """Refresh the notebooks that `names` pick (all, when there are none); the exit code."""
    paths = [p for p in find() if not names or any(p.name.startswith(Path(n).name) for n in names)]
    if not paths:
        print(f"no notebook is called {' or '.join(names)}; there are:", file=sys.stderr)
        print("\n".join(p.name for p in find()), file=sys.stderr)
        return 2
    settle()
    failed = False
    for path in paths:
        try:
            print(refresh(path), flush=True)
        except CellExecutionError as error:
            failed = True
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without its colours
            print(f"{path.name:28} FAILED, left as it was\n{plain}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
