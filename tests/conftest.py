"""What must be set before any test: kernels and xdist's workers inherit the environment."""

import pytest
from hypothesis import settings

from refresh_notebooks import one_thread

one_thread()
pytest.register_assert_rewrite("helpers")  # its assertions then say what differs

# A slow machine fails no test, and every run tries the same examples.
settings.register_profile("minilora", deadline=None, derandomize=True, database=None)
settings.load_profile("minilora")


def pytest_configure():
    # Not by MPLBACKEND: kernels would inherit it, and stop showing figures as a learner sees them.
    import matplotlib

    matplotlib.use("Agg")
