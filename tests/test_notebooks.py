"""The notebooks keep the rules, the rules can fail, and no printed number hangs by a thread.

That each stored output comes out again is nbval's part: `pytest` collects the notebooks too.
"""

import base64
import copy
import functools
import inspect
import io
import re

import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import notebook_lint
from notebook_lint import RULES, UNCOMPARED, code_cells, markdown, tags
from refresh_notebooks import execute, find, normalise, read

NOTEBOOKS = find()
read_once = functools.cache(read)


def test_there_are_notebooks():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers
    assert len(set(numbers)) == len(numbers), "two notebooks share a number"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_keeps_the_rules(path, rule):
    if problems := list(RULES[rule](read_once(path))):
        pytest.fail("\n".join([f"{path.name}: {RULES[rule].__doc__}", *problems]), pytrace=False)


# --- the rules can fail: each is shown small notebooks that it must refuse --------------------


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


def code(source, *outputs, tags=()):
    """A code cell."""
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def stream(text, name="stdout"):
    """Printed text."""
    return new_output("stream", name=name, text=text)


def good():
    """The smallest notebook that keeps every rule."""
    words = " ".join(f"**{words}** Words.\n\n" for words in notebook_lint.OPENING[:-1])
    cells = [
        new_markdown_cell(f"# Title\n\n{words}**Time.** 20 minutes to read, 9 seconds to run."),
        new_markdown_cell("## Predict\n\nIt is 3: *exact here*."),
        code("print(3)", stream("3\n")),
        code("ml.show(fig, '…')", figure()),
        code("raise E('e')", error(), tags=["break-it", "raises-exception"]),
        code(
            "# ignored: a duration is never the same twice\nprint(time())",
            stream("7\n"),
            tags=["nbval-ignore-output"],
        ),
        *(code(f"a = {i}") for i in range(15)),
        new_markdown_cell(
            "## Exercises\n\n### Exercise 1 (5 minutes)\n\nDo.\n\n"
            "<details>\n<summary>Solution</summary>\n\nSo.\n</details>"
        ),
        code("assert True"),
        new_markdown_cell("## Summary\n\nDone.\n\n## Where the paper says it\n\nSection 4."),
        new_markdown_cell("Words."),
    ]
    nb = normalise(new_notebook(cells=cells))
    for number, (_, cell) in enumerate(code_cells(nb), 1):
        cell.execution_count = number
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


def store(text):
    """A mutation: the cell that prints holds `text` instead."""
    return put(2, stream(text))


PRINTS, SHOWS, RAISES, IGNORED, PLAIN, EXERCISE, CHECK, CLOSING = 2, 3, 4, 5, 6, 21, 22, 23

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
        lambda nb: nb.cells[SHOWS].outputs[0].data.update({"image/png": "A" * 140_000}),
    ],
    "outputs_are_short": [store("line\n" * 61)],
    "length": [
        lambda nb: nb.cells.pop(),
        lambda nb: nb.cells.extend(new_markdown_cell("Words.") for _ in range(26)),
    ],
    "opening": [
        edit(0, "# Title", "## Title"),
        edit(0, "# Title", "Title"),
        lambda nb: nb.cells.insert(0, code("import numpy")),
        *(edit(0, f"**{words}**", words) for words in notebook_lint.OPENING),
        edit(0, "20 minutes", "an hour"),
        edit(0, ", 9 seconds to run", ""),
    ],
    "predicts": [
        edit(1, "## Predict", "## Guess"),
        edit(1, "## Predict", "```\n## Predict\n```"),
    ],
    "ending": [
        edit(EXERCISE, "## Exercises", "Exercises"),
        edit(CLOSING, "## Summary", "## In short"),
        edit(CLOSING, "## Where the paper says it", "## Sources"),
        lambda nb: nb.cells.append(new_markdown_cell("## One more thing")),
        lambda nb: nb.cells.append(nb.cells.pop(EXERCISE)),
    ],
    "exercises": [
        edit(EXERCISE, "### Exercise 1", "Exercise 1"),
        edit(EXERCISE, "5 minutes", "short"),
        edit(EXERCISE, "<details>", "<details open>"),
        edit(EXERCISE, "</details>", ""),
        edit(EXERCISE, "<details>", "<details></details><details>"),
        edit(EXERCISE, "Do.", "Do.\n\n### Exercise 2 (1 minute)\n\nDo."),
        lambda nb: nb.cells.pop(CHECK),
    ],
    "breaks_something": [label(RAISES, "raises-exception")],
    "claims_are_labelled": [edit(1, "*exact here*", "**exact here**"), edit(1, "*exact", "exact")],
}


def test_a_good_notebook_keeps_every_rule():
    nb = good()
    assert not {name: found for name, rule in RULES.items() if (found := list(rule(nb)))}


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
        edit(EXERCISE, "So.", "```python\n## Not a heading\n```"),
        store("0x1f\nnumbers\n"),
    ],
    ids=["magic", "not run", "URL", "label", "fence", "hexadecimal"],
)
def test_what_only_looks_bad_passes(change):
    nb = good()
    change(nb)
    assert not {name: found for name, rule in RULES.items() if (found := list(rule(nb)))}


# --- no printed number hangs by a thread ------------------------------------------------------


def perturb_training():
    """Runs in the notebook's kernel, before its first cell: each training is pushed by 1e-13.

    That is far more than another BLAS kernel makes of the same sum; in float32 it is 1e-6. It
    comes with the first step of each optimiser, and only to what that step has moved, since the
    laws that hold to the bit on every machine shall hold here as well: B = 0 keeps A in its place
    at step 1, a frozen weight stays. Equal trainings get equal pushes and stay equal.

    Returns:
        A list that grows by the shape of each parameter that was pushed.
    """
    import functools

    import numpy as np

    from minilora import optim

    shapes = []

    def pushed(step):
        @functools.wraps(step)
        def wrapper(self, *args, **kwargs):
            if hasattr(self, "was_pushed"):
                return step(self, *args, **kwargs)
            self.was_pushed = True
            before = [p.data.copy() for p in self.parameters]
            step(self, *args, **kwargs)
            rng = np.random.default_rng(2026)
            for p, old in zip(self.parameters, before, strict=True):
                size = 1e-13 if p.dtype == np.float64 else 1e-6
                p.data += size * (p.data != old) * rng.standard_normal(p.shape)
                shapes.append(p.shape)

        return wrapper

    for optimizer in (optim.SGD, optim.AdamW):
        optimizer.step = pushed(optimizer.step)
    return shapes


INJECTED = f"{inspect.getsource(perturb_training)}\n_pushed = perturb_training()\n"


def printed(cell):
    """What a cell says in words: streams, values, and the message of an error."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.name, output.text
        elif output.output_type == "error":
            yield output.ename, output.evalue
        else:
            yield "value", output.data.get("text/plain")


def solved(nb):
    """For each exercise, a cell with its solution and then its check."""
    source = ""
    for cell in nb.cells:
        if cell.cell_type == "code":
            source = cell.source
        for code in re.findall(r"<details>.*?```python\n(.*?)```.*?</details>", cell.source, re.S):
            yield new_code_cell(f"{code}\n{source.partition('# check')[2]}")


def execute_pushed(nb, folder):
    """Run a notebook with its training pushed, and then every solution with its check.

    Returns:
        Its cells, those with the solutions, and whether anything was pushed.
    """
    nb, n = copy.deepcopy(nb), len(nb.cells)
    solutions = list(solved(nb))
    nb.cells.insert(0, new_code_cell(INJECTED))
    nb.cells += [new_code_cell("print(bool(_pushed))"), *solutions]
    # Errors are kept and compared like all else, so that a failure names its cell.
    cells = execute(nb, folder, allow_errors=True).cells[1:]
    return cells[:n], cells[n + 1 :], list(printed(cells[n])) == [("stdout", "True\n")]


def test_a_number_that_hangs_by_a_thread_is_caught(tmp_path):
    sources = [
        "import minilora as ml\nimport numpy as np\nw = ml.Parameter(np.array([0.3]))",
        "(w * w).sum().backward()\nml.SGD([w], lr=0.1).step()\nx = w.item()\nprint(f'{x:.4f}')",
        "for _ in range(80):\n    x = 3.9 * x * (1 - x)  # chaos\nprint(f'{x:.4f}')",
    ]
    nb = new_notebook(cells=[new_code_cell(source) for source in sources])
    (_, calm, chaos), _, pushed = execute_pushed(nb, tmp_path)
    _, calm_before, chaos_before = execute(nb, tmp_path).cells
    assert pushed
    assert list(printed(calm)) == list(printed(calm_before)) == [("stdout", "0.2400\n")]
    assert list(printed(chaos)) != list(printed(chaos_before))


@pytest.fixture(scope="class")
def rerun(request):
    """What `execute_pushed` makes of the notebook of this class."""
    return execute_pushed(read_once(request.cls.path), request.cls.path.parent)


class Perturbed:
    """A notebook prints the same when its training starts a hair's breadth away.

    Its exercises can be solved, too: the run goes on with every solution and its check.
    """

    def test_something_was_pushed_if_it_trains(self, rerun):
        assert rerun[2] or not self.trains

    def test_every_solution_passes_its_check(self, rerun):
        told = [list(printed(cell)) for cell in rerun[1]]
        assert len(told) == markdown(read_once(self.path)).count("<details>") > 0
        for words in told:
            kind, text = words[-1]
            assert (kind, text.splitlines()[-1]) == ("stdout", "Right.")

    def test_prints_the_same(self, rerun, cell):
        stored, again = read_once(self.path).cells[cell], rerun[0][cell]
        assert list(printed(again)) == list(printed(stored))


def pytest_generate_tests(metafunc):
    """One test for each cell whose output nbval compares, too."""
    if "cell" in metafunc.fixturenames:
        cells = code_cells(read_once(metafunc.cls.path))
        metafunc.parametrize("cell", [i for i, cell in cells if not tags(cell) & UNCOMPARED])


# One class for each notebook: xdist hands a class to one worker as a whole, so that
# the notebook runs once, and different classes to different workers.
for _path in NOTEBOOKS:
    _source = "".join(cell.source for _, cell in code_cells(read_once(_path)))
    _trains = bool(re.search(r"\b(fit|AdamW|SGD)\(", _source))
    _name = f"TestPerturbed_{_path.stem}"
    globals()[_name] = type(_name, (Perturbed,), {"path": _path, "trains": _trains})
