"""No printed number hangs by a thread: a notebook prints the same when its training is pushed.

A short notebook stands for all in `pytest`; `pytest -m nightly` runs each of them.
"""

import copy
import inspect

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from notebook_lint import UNCOMPARED, code_cells, seconds_to_run, tags
from refresh_notebooks import execute, find, read


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


def execute_pushed(nb, folder):
    """The cells of a notebook that ran with its training pushed, and whether anything was."""
    nb = copy.deepcopy(nb)
    nb.cells = [new_code_cell(INJECTED), *nb.cells, new_code_cell("print(bool(_pushed))")]
    # Errors are kept and compared like all else, so that a failure names its cell.
    _, *cells, last = execute(nb, folder, allow_errors=True).cells
    return cells, list(printed(last)) == [("stdout", "True\n")]


def test_a_number_that_hangs_by_a_thread_is_caught(tmp_path):
    sources = [
        "import minilora as ml\nimport numpy as np\nw = ml.Parameter(np.array([0.3]))",
        "(w * w).sum().backward()\nml.SGD([w], lr=0.1).step()\nx = w.item()\nprint(f'{x:.4f}')",
        "for _ in range(80):\n    x = 3.9 * x * (1 - x)  # chaos\nprint(f'{x:.4f}')",
    ]
    nb = new_notebook(cells=[new_code_cell(source) for source in sources])
    (_, calm, chaos), pushed = execute_pushed(nb, tmp_path)
    _, calm_before, chaos_before = execute(nb, tmp_path).cells
    assert pushed
    assert list(printed(calm)) == list(printed(calm_before)) == [("stdout", "0.2400\n")]
    assert list(printed(chaos)) != list(printed(chaos_before))


def check(path):
    """Run a notebook with its training pushed, and compare what nbval compares, too."""
    nb = read(path)
    again, pushed = execute_pushed(nb, path.parent)
    told = [(i, list(printed(cell)), list(printed(again[i]))) for i, cell in code_cells(nb)]
    compared = [row for row in told if not tags(nb.cells[row[0]]) & UNCOMPARED]
    assert [row for row in compared if row[1] != row[2]] == []
    source = "".join(cell.source for _, cell in code_cells(nb))
    assert pushed or not any(f"{name}(" in source for name in ("fit", "AdamW", "SGD"))


def test_a_short_notebook_prints_the_same_when_its_training_is_pushed():
    training = [path for path in find() if "fit(" in path.read_text("utf-8")]
    check(min(training, key=lambda path: seconds_to_run(read(path))))


@pytest.mark.nightly
@pytest.mark.parametrize("path", find(), ids=lambda path: path.stem)
def test_a_notebook_prints_the_same_when_its_training_is_pushed(path):
    check(path)
