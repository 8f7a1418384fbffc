"""Editions of the notebooks, from the masters in `notebooks/`: student, solution, slides.

    python -m minilora.editions                      # all, into build/editions
    python -m minilora.editions FOLDER --only 06 07

A *student* edition has its gaps open, no outputs and no solutions. A *solution* is filled in and
run. *Slides* are HTML for a browser: a section a slide, the code of figures left out, and what to
say in the speaker notes (press S). They are made by nbconvert, which comes with Jupyter.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from .command import Parser

MASTERS = Path(__file__).resolve().parent.parent / "notebooks"
# nbgrader's markers, so that it reads the same gaps
GAP = re.compile(r"^( *)### BEGIN SOLUTION *\n(.*?)\n *### END SOLUTION *$", re.M | re.S)
SOLUTION = re.compile(r"\n*<details>\s*<summary>Solution.*?</details>", re.S)


def read(path):
    """A notebook, as JSON has it, with the source of each cell in one string."""
    notebook = json.loads(Path(path).read_text("utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def is_note(cell):
    """Whether a cell is there for who teaches: shown in the speaker notes of the slides only."""
    return cell["metadata"].get("slideshow", {}).get("slide_type") == "notes"


def solved(notebook):
    """(position, source) of the code cell of each exercise, with its solution filled in.

    The solution stands below it, in a folded block; it takes the place of all above `# check`.
    """
    at, source = None, ""
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            at, source = i, cell["source"]
        for block in SOLUTION.findall(cell["source"]):
            for code in re.findall(r"```python\n(.*?)```", block, re.S):
                yield at, f"{code}\n# check{source.partition('# check')[2]}"


def blank(notebook):
    """A copy without outputs and without the cells for who teaches."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook["cells"] = [cell for cell in notebook["cells"] if not is_note(cell)]
    return notebook


def student(notebook):
    """A copy with its gaps open, no outputs and no solutions."""
    notebook = blank(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = GAP.sub(r"\1...  # your lines", cell["source"])
        else:
            cell["source"] = SOLUTION.sub("", cell["source"]).strip("\n")
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"]]
    return notebook


def solution(notebook):
    """A copy with every exercise filled in, not yet run."""
    notebook = copy.deepcopy(notebook)
    for i, source in solved(notebook):
        notebook["cells"][i]["source"] = source
    return blank(notebook)


def convert(parser, path, *options):
    """Hand a notebook to nbconvert; leave in one line if it fails."""
    command = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", *options, str(path)]
    quiet = os.environ | {"MINILORA_GUESSES": ""}  # nobody's predictions get into an edition
    done = subprocess.run(command, env=quiet, capture_output=True, encoding="utf-8")
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.strip()] or ["nbconvert failed"]
        parser.error(f"{path.name}: {re.sub(chr(27) + r'[[][0-9;]*m', '', why[-1])}")


def build(parser, path, folder):
    """Write the three editions of one notebook."""
    master = read(path)
    for edition, made in (
        ("student", student(master)),
        ("solution", solution(master)),
        ("slides", master),
    ):
        target = folder / edition / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", "utf-8")
        if edition == "solution":
            convert(parser, target, "--to=notebook", "--execute", "--inplace")
        if edition == "slides":
            fold = "--TagRemovePreprocessor.remove_input_tags=hide-input"
            convert(
                parser, target, "--to=slides", "--no-prompt", "--SlidesExporter.reveal_scroll=True",
                "--TagRemovePreprocessor.enabled=True", fold,
            )  # fmt: skip
            target.unlink()
            target = target.with_suffix(".slides.html")
        print(f"{edition:8} {target}", flush=True)


def main(args=None):
    """The command line."""
    parser = Parser(prog="python -m minilora.editions", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/editions"))
    parser.add_argument("--only", nargs="+", metavar="NN", default=[""], help="their numbers")
    args = parser.parse_args(args)
    masters = sorted(MASTERS.glob("[0-9]*.ipynb"))
    if not masters:
        parser.error(f"there is no notebook in {MASTERS}; run it in a copy of the repository")
    for name in args.only:
        if not any(path.name.startswith(name) for path in masters):
            parser.error(f"no notebook is called {name!r}; expected a number such as 06")
    try:
        for path in masters:
            if path.name.startswith(tuple(args.only)):
                build(parser, path, args.folder)
    except OSError as error:
        parser.error(f"cannot write to {str(args.folder)!r}: {error.strerror or error}")


if __name__ == "__main__":
    main()
