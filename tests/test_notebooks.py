"""The notebooks keep the rules, the rules can fail, and no machine's settings reach a kernel.

That each stored output comes out again is nbval's part: `pytest` collects the notebooks too.
"""

import base64
import functools
import io
import os
import re
import subprocess
import sys

import nbformat
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import notebook_lint
import plugin
from minilora.real import __main__ as real
from notebook_lint import LESSON, RULES, SHEET, code_cells, number
from refresh_notebooks import find, normalise, read
from surroundings import ROOT

NOTEBOOKS = find()


def test_there_are_notebooks():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers
    assert len(set(numbers)) == len(numbers), "two notebooks share a number"
    assert numbers == [number(read(path)) for path in NOTEBOOKS], "file and title differ"


def test_no_two_predictions_share_their_name():
    """A guess is kept by it."""
    sources = [cell.source for path in NOTEBOOKS for _, cell in code_cells(read(path))]
    names = re.findall(r"Prediction\(([^)]+)\)", "\n".join(sources))
    assert names and len(set(names)) == len(names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_keeps_the_rules(path):
    if problems := broken(read(path)):
        pytest.fail("\n".join([path.name, *problems]), pytrace=False)


def broken(nb):
    """What every rule says against a notebook, each with the rule itself."""
    spared = LESSON if number(nb) == SHEET else ()
    rules = [rule for name, rule in RULES.items() if name not in spared]
    return [f"{found} ({rule.__doc__})" for rule in rules for found in rule(nb)]


def test_a_notebook_about_a_real_model_is_left_out_where_its_own_is_not(monkeypatch):
    paths = [ROOT / "notebooks" / f"{n}_a.ipynb" for n in (22, 23, 26, 27, 28)]
    for here, missing in (
        ((), [False, True, True, True, False]),
        ((real.PACKAGE,), [False, False, False, True, False]),
        ((real.ENCODER,), [False, True, True, False, False]),
        ((real.PACKAGE, real.ENCODER), [False] * 5),
    ):
        monkeypatch.setattr(real, "find_model", lambda package, here=here: package in here or None)
        assert [plugin.lacks_its_model(path) for path in paths] == missing
        assert [plugin.pytest_ignore_collect(path) or False for path in paths] == missing


def test_a_model_is_found_in_its_package_as_a_file_or_as_a_folder(tmp_path, monkeypatch):
    for package, inside in (("speaks", "a.gguf"), ("reads", "model/config.json"), ("none", "a")):
        file = tmp_path / package / inside
        file.parent.mkdir(parents=True)
        file.touch()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = [real.find_model(name) for name in ("speaks", "reads", "none", "not_there")]
    assert found == [tmp_path / "speaks" / "a.gguf", tmp_path / "reads" / "model", None, None]


# --- the rules can fail: each is shown small notebooks that it must refuse --------------------


@functools.cache
def png(dpi=72, side=1.0):
    """A picture, in base64."""
    buffer = io.BytesIO()
    Figure(figsize=(side, side)).savefig(buffer, dpi=dpi)
    return base64.b64encode(buffer.getvalue()).decode()


def figure(text="Figure: a square in which there is nothing to see", **picture):
    """The output that `show` leaves."""
    alt = text.removeprefix("Figure: ")
    data = {"image/png": png(**picture), "text/plain": text}
    return new_output("display_data", data, metadata={"image/png": {"alt": alt}})


def error():
    """The output that an exception leaves."""
    return new_output("error", ename="E", evalue="e", traceback=["E: e"])


def code(source, *outputs, tags=(), slide="fragment"):
    """A code cell; what shows a figure is folded."""
    folded = {"jupyter": {"source_hidden": True}} if "hide-input" in tags else {}
    metadata = {"tags": list(tags), "slideshow": {"slide_type": slide}} | folded
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def text(source, slide="fragment"):
    """A Markdown cell."""
    return new_markdown_cell(source, metadata={"slideshow": {"slide_type": slide}})


def stream(text, name="stdout"):
    """Printed text."""
    return new_output("stream", name=name, text=text)


GAP = """def mine(x):
    ### BEGIN SOLUTION
    a = x
    b = a
    return b
    ### END SOLUTION


f = ml.gap(mine, theirs, lambda f: f(1))"""


def good():
    """The smallest notebook that keeps every rule."""
    words = " ".join(f"**{words}** Words.\n\n" for words in notebook_lint.OPENING[:-1])
    time = "**Time.** About 3 minutes to read and do, 9 seconds to run."
    cells = [
        text(f"# 05 · Title\n\n{words}{time}", "slide"),
        text("## One\n\n**Predict.** It is 3: *exact here*.", "slide"),
        code("print(3)", stream("3\n")),
        code("ml.show(fig, '…')", figure(), tags=["hide-input"]),
        code("raise E('e')", error(), tags=["break-it", "raises-exception"]),
        code(
            "# ignored: a duration is never the same twice\nprint(time())",
            stream("7\n"),
            tags=["nbval-ignore-output"],
        ),
        *(code(f"a = {i}") for i in range(9)),
        text("**Predict.** Which?"),
        code("g, h = ml.Prediction('first'), ml.Prediction('second')"),
        code("g.score(3)\nh.score(4)"),
        text("45 minutes: 40. 90 minutes: 80. Say it.", "notes"),
        text("<details><summary>Hint</summary>\n\nSo.\n</details>"),
        code(GAP),
        text(
            "## Exercises\n\n### Exercise 1 (5 minutes)\n\nDo.\n\n"
            "<details>\n<summary>Solution</summary>\n\n```python\na = 1\n```\nSo.\n</details>",
            "skip",
        ),
        code("# check\nassert f(a) == g(3)", slide="skip"),
        text("## Summary\n\nDone.\n\n## Where the paper says it\n\nSection 4.", "skip"),
        text("Words.", "skip"),
        text("45 minutes: 1. 90 minutes: 1. Hello.", "notes"),
        text("Words.", "skip"),
    ]
    nb = normalise(new_notebook(cells=cells))
    for count, (_, cell) in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    return nb


def edit(i, old, new):
    """A mutation: in the source of cell `i`, `new` for `old`."""

    def mutate(nb):
        assert old in nb.cells[i].source
        nb.cells[i].source = nb.cells[i].source.replace(old, new)

    return mutate


def put(i, *outputs):
    """A mutation: cell `i` holds these outputs."""
    return lambda nb: nb.cells[i].update(outputs=list(outputs))


def label(i, *names):
    """A mutation: cell `i` has these tags."""
    return lambda nb: nb.cells[i].metadata.update(tags=list(names))


def slide(i, kind):
    """A mutation: cell `i` is this in the slides."""
    return lambda nb: nb.cells[i].metadata.update(slideshow={"slide_type": kind})


def store(text):
    """A mutation: the cell that prints holds `text` instead."""
    return put(2, stream(text))


PRINTS, SHOWS, RAISES, IGNORED, PLAIN, PREDICTS, SCORES, NOTES = 2, 3, 4, 5, 6, 16, 17, 18
HINT, GAPS, EXERCISE, CHECK, CLOSING = 19, 20, 21, 22, 23

# For each rule, what is done to a good notebook that it must then refuse.
BAD = {
    "executed_in_order": [
        lambda nb: nb.cells[PLAIN].update(execution_count=None),
        lambda nb: nb.cells[PLAIN].update(execution_count=99),
    ],
    "outputs_present": [
        put(PRINTS),
        put(SHOWS),
        put(SHOWS, stream("a figure\n")),
        edit(PLAIN, "a = 0", "for i in range(3):\n    print(i)"),
        edit(SHOWS, "ml", "plt.show()\nml"),
    ],
    "errors_are_meant": [put(PLAIN, error()), put(RAISES), label(RAISES, "break-it")],
    "no_stderr": [put(PLAIN, stream("40%", name="stderr"))],
    "few_ignored_outputs": [
        edit(IGNORED, "# ignored: a duration", "# a duration"),
        edit(IGNORED, "a duration is never the same twice", "."),
        label(PLAIN, "nbval-skip"),
        lambda nb: [label(i, "nbval-ignore-output")(nb) for i in range(PLAIN, PLAIN + 4)],
    ],
    "tags_are_known": [
        label(PLAIN, "nbval-ignore-outputs"),
        label(PLAIN, "raise-exception", "raises-exceptions"),
        edit(PLAIN, "a = 0", "# NBVAL_IGNORE_OUTPUT\na = 0"),
    ],
    "outputs_are_portable": [
        store("np.float64(3.0)\n"),
        store("<Linear object at 0x7f3a5c0d1e80>\n"),
        put(PLAIN, new_output("execute_result", {"text/plain": "np.int64(3)"})),
    ],
    "metadata_is_clean": [
        lambda nb: nb.update(nbformat_minor=4),
        lambda nb: nb.metadata.update(widgets={}),
        lambda nb: nb.metadata.kernelspec.update(name="venv"),
        lambda nb: nb.metadata.language_info.update(version="3.11.7"),
        lambda nb: nb.cells[PLAIN].update(id="f00d"),
        lambda nb: nb.cells[PLAIN].metadata.update(execution={"iopub.status.busy": "12:00"}),
        lambda nb: nb.cells[0].update(attachments={"a.png": {}}),
        lambda nb: nb.cells[SHOWS].outputs[0].metadata.update(needs_background="light"),
        put(PLAIN, new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})),
    ],
    "no_paths_of_a_machine": [
        store("/home/ada/minilora/data/base.safetensors\n"),
        store("saved to '/root/x'\n"),
        store("C:\\Users\\ada\n"),
        edit(PLAIN, "a = 0", "path = '/work'"),
        edit(CLOSING, "Done.", "Done in /tmp/x."),
        put(RAISES, new_output("error", ename="E", evalue="e", traceback=["File /Users/a.py"])),
    ],
    "figures_have_alt_text": [
        put(SHOWS, figure("Figure: too short")),
        put(SHOWS, figure("<Figure size 640x480 with 1 Axes>")),
        lambda nb: nb.cells[SHOWS].outputs[0].data.pop("text/plain"),
        lambda nb: nb.cells[SHOWS].outputs[0].update(metadata={}),
    ],
    "figures_are_light": [
        put(SHOWS, figure(dpi=100)),
        lambda nb: nb.cells[SHOWS].outputs[0].data.update({"image/png": "A" * 210_000}),
        lambda nb: nb.cells[SHOWS].outputs[0].data.update({"image/svg+xml": "A" * 150_000}),
    ],
    "outputs_are_short": [store("line\n" * 61)],
    "length": [
        lambda nb: nb.cells.pop(),
        lambda nb: nb.cells.extend(text("Words.") for _ in range(36)),
    ],
    "code_and_words": [
        edit(PLAIN, "a = 0", "a = 0\n" * 36),
        edit(CLOSING, "Done.", "Done. " * 3000),
        lambda nb: (
            [edit(i, "a = ", "a = 0\n" * 34 + "a = ")(nb) for i in range(6, 15)]
            and [edit(0, "05", "01")(nb)]
        ),
        lambda nb: nb.cells.extend(code("a = 0\n" * 35) for _ in range(13)),
    ],
    "honest_time": [
        edit(0, "About 3", "About 9"),
        edit(0, "About 3 minutes to read and do", "3 minutes to read"),
        edit(CLOSING, "Done.", "Done. " * 900),
    ],
    "opening": [
        edit(0, "# 05", "## 05"),
        edit(0, "# 05", "05"),
        lambda nb: nb.cells.insert(0, code("import numpy")),
        *(edit(0, f"**{words}**", words) for words in notebook_lint.OPENING),
        edit(0, "About 3 minutes", "an hour"),
        edit(0, ", 9 seconds to run", ""),
    ],
    "predicts": [
        edit(PREDICTS, "'first'", "'first', 3"),
        edit(PREDICTS, "'first'", "'first', guess=3"),
        edit(PREDICTS, "ml.Prediction('first')", "0"),
        edit(PREDICTS - 1, "**Predict.**", "Predict."),
        edit(SCORES, "h.score(4)", "h"),
    ],
    "gaps": [
        edit(GAPS, "    ### END SOLUTION\n", ""),
        edit(GAPS, "    b = a\n", ""),
        edit(GAPS, "    b = a\n", "    b = a\n" * 7),
        edit(GAPS, "    ### END SOLUTION\n", "    ### END SOLUTION\n    c = 0\n"),
        edit(GAPS, "f = ml.gap", "ml.gap"),
        edit(GAPS, "f = ml.gap", "mine = ml.gap"),
        edit(GAPS, "    ", ""),
        edit(HINT, "Hint", "Help"),
        lambda nb: nb.cells[GAPS].update(source="a = 0"),
    ],
    "no_answer_to_read": [
        edit(CHECK, "g(3)", "3"),
        edit(CHECK, "f(a) == g(3)", "8 * (64 + 256) == a"),
        edit(CHECK, "g(3)", "'B'"),
    ],
    "slides": [
        lambda nb: nb.cells[PLAIN].metadata.pop("slideshow"),
        slide(PLAIN, "-"),
        slide(PLAIN, "notes"),
        slide(1, "fragment"),
        slide(1, "skip"),
        edit(1, "## One", "Words.\n\n## One"),
        edit(1, "Predict.**", "Predict.**\n\n## Two\n\n"),
        edit(NOTES, "45 minutes: 40.", "45 minutes: 50."),
        edit(NOTES, "45 minutes: 40.", "40 minutes."),
        edit(NOTES, "90 minutes: 80.", "90 minutes: 60."),
    ],
    "figures_are_folded": [
        label(SHOWS),
        lambda nb: nb.cells[SHOWS].metadata.pop("jupyter"),
        lambda nb: nb.cells[SHOWS].metadata.pop("jupyter") and label(SHOWS)(nb),
    ],
    "ending": [
        edit(EXERCISE, "## Exercises", "Exercises"),
        edit(CLOSING, "## Summary", "## In short"),
        edit(CLOSING, "## Where the paper says it", "## Sources"),
        lambda nb: nb.cells.append(text("## One more thing")),
        lambda nb: nb.cells.append(nb.cells.pop(EXERCISE)),
    ],
    "exercises": [
        edit(EXERCISE, "### Exercise 1", "Exercise 1"),
        edit(EXERCISE, "5 minutes", "short"),
        edit(EXERCISE, "<details>", "<details open>"),
        edit(EXERCISE, "</details>", ""),
        edit(EXERCISE, "```python", "```"),
        edit(EXERCISE, "<details>", "<details></details><details>"),
        edit(EXERCISE, "Do.", "Do.\n\n### Exercise 2 (1 minute)\n\nDo."),
        lambda nb: nb.cells.pop(CHECK),
    ],
    "breaks_something": [label(RAISES, "raises-exception")],
    "claims_are_labelled": [edit(1, "*exact here*", "**exact here**"), edit(1, "*exact", "exact")],
}


def test_a_good_notebook_keeps_every_rule():
    assert not broken(good())


def test_every_rule_is_shown_to_fail():
    assert set(BAD) == set(RULES)


@pytest.mark.parametrize(
    ("rule", "mutate"),
    [
        pytest.param(rule, mutate, id=f"{rule}-{number}")
        for rule, mutations in BAD.items()
        for number, mutate in enumerate(mutations, 1)
    ],
)
def test_a_bad_notebook_is_refused(rule, mutate):
    nb = good()
    mutate(nb)
    assert list(RULES[rule](nb))


@pytest.mark.parametrize(
    "change",
    [
        edit(PLAIN, "a = 0", "%matplotlib inline\na = 3\na % 2"),
        edit(PLAIN, "a = 0", "def f():\n    print(1)\n\n\nif False:\n    ml.show(fig, '')"),
        edit(CLOSING, "Done.", "See https://example.org/home/x and/or the framework/work in h/w."),
        edit(1, "*exact here*", "_Toy evidence:_ it is"),
        edit(EXERCISE, "So.", "```sh\n## Not a heading\n```"),
        store("0x1f\nnumbers\n"),
    ],
    ids=["magic", "not run", "URL", "label", "fence", "hexadecimal"],
)
def test_what_only_looks_bad_passes(change):
    nb = good()
    change(nb)
    assert not broken(nb)


def test_each_setting_of_reproduce_runs_every_night():
    script = (ROOT / "tests" / "reproduce.sh").read_text("utf-8")
    settings = re.search(r'^settings="(.*?)"', script, re.M | re.S)[1].split()
    nightly = (ROOT / ".github" / "workflows" / "nightly.yml").read_text("utf-8")
    assert settings == re.findall(r"^          - (\S+)$", nightly, re.M)


# --- a notebook in a run of its own, started by someone with settings -------------------------

FACTS = """
import os, matplotlib, minilora
print("spoilt" in globals(), __debug__, open(os.devnull).encoding.lower())
print(matplotlib.rcParams["figure.figsize"], "inline" in os.environ["MPLBACKEND"])
print(*map(os.environ.get, ["PYTHONSTARTUP", "OMP_NUM_THREADS", "COLUMNS"]))
"one"
"two"
"""
SEEN = "False True utf-8\n[6.4, 4.8] True\nNone 1 80\n"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each cell: one tells of its surroundings, then an exercise is solved twice."""
    folder, theirs = tmp_path_factory.mktemp("notebook"), tmp_path_factory.mktemp("theirs")
    value = new_output("execute_result", {"text/plain": "'two'"}, execution_count=1)
    folded = "<details><summary>Solution</summary>\n```python\nanswer = {}\n```\n</details>"
    cells = [
        code(FACTS, stream(SEEN), value),
        code("answer = None\n# check\nprint('Right.' if answer == 3 else 'No.')", stream("No.\n")),
        *(new_markdown_cell(folded.format(n)) for n in "34"),
    ]
    cells[0].execution_count = cells[1].execution_count = 1
    nbformat.write(normalise(new_notebook(cells=cells)), folder / "facts.ipynb")

    config = "c = get_config()\nc.InteractiveShell.ast_node_interactivity = 'all'\n"
    (theirs / "profile_default").mkdir()
    (theirs / "profile_default" / "ipython_config.py").write_text(config, "utf-8")
    (theirs / "matplotlibrc").write_text("figure.figsize: 1, 1\n", "utf-8")
    for module in ("helpers", "surroundings", "minilora", "matplotlib"):
        (theirs / f"{module}.py").write_text("spoilt = True\n", "utf-8")
    hostile = dict.fromkeys(["IPYTHONDIR", "MPLCONFIGDIR"], str(theirs)) | {
        "MINILORA_TEST_HOME": "",  # not the one of this run
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": os.pathsep.join([str(theirs), os.environ.get("PYTHONPATH", "")]),
        "PYTHONSTARTUP": str(theirs / "helpers.py"),
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "MPLBACKEND": "svg",
        "OMP_NUM_THREADS": "7",
        "LC_ALL": "C",
        "COLUMNS": "20",
    }
    # The notebook lies elsewhere, so the settings must be named.
    options = "-c pyproject.toml -p no:cacheprovider -n 0 -rA --color=no".split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, folder / "facts.ipynb"],
        cwd=ROOT,
        env=os.environ | hostile,
        capture_output=True,
        encoding="utf-8",
    )
    found = {cell: how for how, cell in re.findall(r"^([A-Z]+) .*::(\w+ \d)", done.stdout, re.M)}
    assert len(found) == 4, done.stdout + done.stderr
    return found, done.stdout


def test_nothing_that_a_reader_has_set_reaches_a_kernel(outcomes):
    found, text = outcomes
    assert found["Cell 0"] == found["Cell 1"] == "PASSED", text


def test_a_solution_must_pass_the_check_of_its_exercise(outcomes):
    found, text = outcomes
    assert (found["Solution 1"], found["Solution 2"]) == ("PASSED", "FAILED"), text
