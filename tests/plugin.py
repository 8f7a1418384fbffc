"""What holds for all tests, those in `notebooks/` too: surroundings, order, solved exercises."""

import math
from collections import defaultdict

import pytest
from hypothesis import settings
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell, IPyNbFile

from surroundings import settle

pytest.register_assert_rewrite("helpers")  # its assertions then say what differs

# A slow machine fails no test, and every run tries the same examples.
settings.register_profile("minilora", deadline=None, derandomize=True, database=None)
settings.load_profile("minilora")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Before a worker or kernel starts and before NumPy is loaded."""
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        # What pytest itself prints keeps the reader's width; its colours are chosen by now.
        terminal._tw.fullwidth = terminal._tw.fullwidth
    settle()


class Solution(IPyNbCell):
    """The solution of an exercise and its check, in the kernel that has run the notebook."""

    def runtest(self):
        """The check must have the last word."""
        super().runtest()
        told = "".join(out.text for out in self.test_outputs if out.output_type == "stream")
        if told.splitlines()[-1:] != ["Right."]:
            self.raise_cell_error("The check does not end on: Right.", told)


class Notebook(IPyNbFile):
    """A notebook whose exercises are solved after its last cell."""

    def setup(self):
        """Start a kernel, which coverage does not follow: a line that only runs is not tested."""
        self.config.option.cov_source = None  # where nbval looks; pytest-cov has it by now
        super().setup()

    def collect(self):
        """Its own cells, to be compared with what is stored, then a cell for each solution."""
        from minilora.editions import solved  # here, for it loads NumPy
        from notebook_lint import seconds_to_run

        cells = list(super().collect())
        self.seconds = seconds_to_run(self.nb)
        for i, (_, source) in enumerate(solved(self.nb), 1):
            cells.append(
                Solution.from_parent(
                    self,
                    name=f"Solution {i}",
                    cell_num=len(cells),
                    cell=new_code_cell(source),
                    options=defaultdict(bool),  # no output to compare
                )
            )
        return cells


def lacks_its_model(path):
    """Whether a notebook is one of part V, about a real model, and its model is not here."""
    if not (path.suffix == ".ipynb" and "23" <= path.name[:2] <= "27"):
        return False
    from minilora.real import __main__ as real  # here, for it loads NumPy

    package = real.ENCODER if path.name[:2] == "27" else real.PACKAGE
    return real.find_model(package) is None


def pytest_ignore_collect(collection_path):
    """What cannot run here is no test; `True` is the last word, None leaves it to others."""
    return lacks_its_model(collection_path) or None


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    """nbval's notebooks become ours."""
    return [
        Notebook.from_parent(parent, path=file_path) if isinstance(found, IPyNbFile) else found
        for found in (yield)
    ]


def pytest_collection_modifyitems(config, items):
    """Unit tests first, then notebooks, the long ones first, so that all workers end together.

    What is marked `nightly` runs only where the marker is asked for: `pytest -m nightly`.
    """
    if "nightly" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    items.sort(key=lambda item: -getattr(item.parent, "seconds", math.inf))
