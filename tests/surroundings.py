"""The same surroundings for every test, kernel and stored output, whoever's machine it is.

What a person sets for their own work would otherwise reach the tests: an IPython profile that
prints more, a matplotlibrc of another size, a start-up file, a folder of modules, a locale,
colours. Kernels and pytest's workers inherit the environment, so it is set once, in the process
that starts them: by `plugin.py` and by `refresh_notebooks.py`.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Where jupyter is installed, nbformat would build a grammar of web addresses as it is imported, two
# seconds in each process, to check what no notebook holds. It does without where there is none.
sys.modules.setdefault("rfc3987_syntax", None)

ROOT = Path(__file__).resolve().parent.parent

# Whose names start so is dropped, …
DROPPED = (
    "PYTHON",  # warnings, start-up files, modes, encodings, colours
    "IPYTHON",
    "JUPYTER",
    "MPL",  # a backend would keep kernels from showing figures as a learner sees them
    "TQDM_",
    "LC_",
    "LANG",
    "CLICOLOR",
    "NO_COLOR",
    "FORCE_COLOR",
    "PY_COLORS",
    "OPENBLAS_VERBOSE",
)
# … but for what only says where Python finds itself and keeps its files.
KEPT = {
    "PYTHONHOME",
    "PYTHONNOUSERSITE",
    "PYTHONUSERBASE",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPYCACHEPREFIX",
    "MPLCONFIGDIR",  # holds the cache of fonts, too; its matplotlibrc is not read
}


def settle():
    """Give this process, and those that it starts, the surroundings that the tests expect.

    Call it before NumPy or matplotlib is loaded. A second call changes nothing.
    """
    env, home = os.environ, os.environ.get("MINILORA_TEST_HOME", "")
    home = Path(home) if home and Path(home).is_dir() else _new_home()
    entries = [os.path.abspath(p) for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    foreign = {entry for entry in entries if not _is_needed(Path(entry).resolve())}
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) not in foreign]
    path = [entry for entry in entries if entry not in foreign]

    for name in [name for name in env if name.startswith(DROPPED) and name not in KEPT]:
        del env[name]
    if path:
        env["PYTHONPATH"] = os.pathsep.join(path)
    env["MINILORA_TEST_HOME"] = str(home)
    env["IPYTHONDIR"] = str(home / "ipython")
    env["JUPYTER_CONFIG_DIR"] = env["JUPYTER_DATA_DIR"] = str(home / "jupyter")
    env["MATPLOTLIBRC"] = str(home / "matplotlibrc")
    env["PYTHONUTF8"] = "1"
    env["COLUMNS"] = "80"
    env["MINILORA_GUESSES"] = ""  # a reader's predictions are neither read nor kept
    # Sums then come in the same order everywhere, and two workers on two cores do not get in each
    # other's way. `reproduce.sh` says otherwise by MINILORA_THREADS.
    for library in ("OPENBLAS", "OMP", "MKL"):
        env[f"{library}_NUM_THREADS"] = env.get("MINILORA_THREADS", "1")


def _new_home():
    """An empty folder for the configuration of all that is started, gone when we are."""
    home = Path(tempfile.mkdtemp(prefix="minilora-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "ipython").mkdir()
    (home / "jupyter").mkdir()
    # For tests and scripts. A kernel shows figures as a learner sees them, whatever stands here.
    (home / "matplotlibrc").write_text("backend: Agg\n", encoding="ascii")
    return home


def _is_needed(folder):
    """Whether an entry of PYTHONPATH leads to this repository or to installed packages."""
    return folder.is_relative_to(ROOT) or any(folder.glob("*.dist-info"))
