"""Editions: what is taken out, that nothing leaks, and that each runs to its end.

06 is built for every change; `pytest -m nightly` builds each notebook.
"""

import json
import re

import nbformat
import pytest

from minilora import editions
from plugin import lacks_its_model
from refresh_notebooks import execute, find, read

PATHS = [
    pytest.param(path, marks=() if path.name[:2] == "06" else pytest.mark.nightly, id=path.stem)
    for path in find()
    if not lacks_its_model(path)
]
GAP = """def f(x):
    # x (n,) -> (n,)
    ### BEGIN SOLUTION
    y = x + 1

    return y
    ### END SOLUTION


print(f(1))"""
FOLDED = "<details><summary>{}</summary>\n\n```python\nanswer = 4\n```\n</details>"


def cell(source, kind="code", **metadata):
    """A cell as JSON has it."""
    ran = {"outputs": [{"output_type": "stream", "name": "stdout", "text": "2\n"}]}
    ran = ran | {"execution_count": 1} if kind == "code" else {}
    return {"cell_type": kind, "id": "a", "metadata": metadata, "source": source} | ran


def small():
    """A notebook with a gap, a hint, an exercise and a note."""
    cells = [
        cell(FOLDED.format("Hint"), "markdown"),
        cell(GAP),
        cell("45 minutes: 1. 90 minutes: 2.", "markdown", slideshow={"slide_type": "notes"}),
        cell("answer = None\n# check\nprint(answer)"),
        cell(f"Do it.\n\n{FOLDED.format('Solution')}", "markdown"),
        cell(FOLDED.format("Solution"), "markdown"),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def sources(notebook):
    """The source of every cell."""
    return [cell["source"] for cell in notebook["cells"]]


def test_the_student_edition_is_open_and_empty():
    master = small()
    made = editions.student(master)
    assert master == small()
    assert sources(made) == [
        FOLDED.format("Hint"),
        "def f(x):\n    # x (n,) -> (n,)\n    ...  # your lines\n\n\nprint(f(1))",
        "answer = None\n# check\nprint(answer)",
        "Do it.",
    ]
    assert all(c["outputs"] == [] for c in made["cells"] if c["cell_type"] == "code")


def test_the_solution_edition_is_filled_in():
    made = editions.solution(small())
    assert sources(made)[1:3] == [GAP, "answer = 4\n\n# check\nprint(answer)"]
    assert "45 minutes" not in "".join(sources(made))


@pytest.fixture
def masters(tmp_path, monkeypatch):
    """A folder of masters that holds one small notebook."""
    folder = tmp_path / "masters"
    folder.mkdir()
    (folder / "06_small.ipynb").write_text(json.dumps(small()), "utf-8")
    monkeypatch.setattr(editions, "MASTERS", folder)
    return folder


def test_one_command_makes_all_three(masters, tmp_path):
    editions.main([str(tmp_path / "out"), "--only", "06"])
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/*/*"))
    notebooks = [f"{edition}/06_small.ipynb" for edition in ("solution", "student")]
    assert names == ["slides/06_small.slides.html", *notebooks]
    ran = read(tmp_path / "out" / "solution" / "06_small.ipynb")
    assert [c.outputs[0].text for c in ran.cells if c.cell_type == "code"] == ["2\n", "4\n"]
    slides = (tmp_path / "out/slides/06_small.slides.html").read_text("utf-8")
    assert re.search(r'<aside class="notes">.*?45 minutes', slides, re.S)


@pytest.mark.parametrize(
    ("args", "told"),
    [(["--only", "77"], "77"), (["{}/masters/06_small.ipynb"], "cannot write"), (["a", "b"], "b")],
)
def test_an_error_takes_one_line(masters, tmp_path, capsys, args, told):
    with pytest.raises(SystemExit) as left:
        editions.main([arg.format(tmp_path) for arg in args])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(("source", "told"), [("1 / 0", "ZeroDivisionError"), (None, "notebook")])
def test_a_master_that_fails_is_named_in_one_line(masters, tmp_path, capsys, source, told):
    path = masters / "06_small.ipynb"
    path.write_text(json.dumps(small()).replace("print(f(1))", source) if source else "{", "utf-8")
    with pytest.raises(SystemExit):
        editions.main([str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "06_small" in error and told in error and error.count("\n") == 1


# ------------------------------------------------------------------ of the notebooks themselves


def told(notebook):
    """What its checks say, one line each."""
    texts = [out.text for c in notebook.cells for out in c.get("outputs", []) if "text" in out]
    return re.findall(r"^(?:Right\.|No answer yet|Not yet).*", "\n".join(texts), re.M)


@pytest.mark.parametrize("path", PATHS)
def test_no_line_of_a_solution_leaks(path):
    master = editions.read(path)
    made = json.dumps(editions.student(master), ensure_ascii=False)
    gaps = [region[2] for source in sources(master) for region in editions.GAP.finditer(source)]
    lines = {line.strip() for gap in gaps for line in gap.splitlines()}
    leaks = [line for line in lines if len(line) > 12 and json.dumps(line)[1:-1] in made]
    assert leaks == []
    assert "SOLUTION" not in made and "<summary>Solution" not in made
    assert gaps or path.name[:2] in ("00", "22") or path.name > "23"


@pytest.mark.parametrize("path", PATHS)
def test_an_opened_student_edition_runs_unanswered(path):
    made = nbformat.from_dict(editions.student(editions.read(path)))
    starts = [source.split("# check")[0] for source in sources(made) if "# check" in source]
    begun = sum("None" not in start for start in starts)  # an exercise may begin with wrong lines
    found = told(execute(made, path.parent))
    other = [line for line in found if not line.startswith("No answer yet")]
    assert len(other) == begun and all(line.startswith("Not yet") for line in other), found


@pytest.mark.parametrize("path", PATHS)
def test_a_student_edition_filled_with_the_solutions_passes_every_check(path):
    master = editions.read(path)
    made, filled = editions.student(master), editions.solution(master)
    answers = {c["id"]: c["source"] for c in filled["cells"]}
    opened = sources(made)
    for c in made["cells"]:
        if c["cell_type"] == "code":
            c["source"] = answers[c["id"]]
    changed = sum(a != b for a, b in zip(opened, sources(made), strict=True))
    found = told(execute(nbformat.from_dict(made), path.parent))
    checks = any("ml.gap(" in source or "ml.check(" in source for source in opened)
    assert bool(found) == checks and all(line == "Right." for line in found), found
    assert changed >= len(list(editions.solved(master)))
