#!/usr/bin/env bash
# Do the notebooks' stored outputs come out again on other machines? Each setting below runs all
# notebooks by strict nbval in what stands for another machine, and prints one line; `perturbed`
# pushes each training by 1e-13 instead. Every night a machine does so for each setting.
#
#   tests/reproduce.sh              every setting
#   tests/reproduce.sh nehalem …    only these
#   tests/reproduce.sh --list       their names
#
# The settings on kernels and threads use the environment's own `python`. Those on versions make
# virtual environments in the folder MINILORA_VENVS, which is kept, or else in a temporary one.
set -euo pipefail
cd "$(dirname "$0")/.."

settings="perturbed nehalem haswell skylakex threads-2 no-avx512
          numpy-1.26 python3.10 python3.11 python3.12 python3.13 python3.14"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venvs=${MINILORA_VENVS:-$scratch/venvs}
status=0

say() { printf '%-11s %s\n' "$1" "$2"; }

has() { # a CPU feature, as Linux spells it
    grep -qsw "$1" /proc/cpuinfo ||
        sysctl -n machdep.cpu.features machdep.cpu.leaf7_features 2>/dev/null | grep -qiw "$1"
}

count() { # passed or failed: how many did, by pytest's closing line
    tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0
}

tests=notebooks
notebooks() { # setting, python, VARIABLE=value …: run all `tests`
    local setting=$1 python=$2 log="$scratch/$1.log" started=$SECONDS verdict=ok
    shift 2
    env "$@" "$python" -m pytest $tests -q --color=no \
        -p no:cacheprovider >"$log" 2>&1 </dev/null || verdict=FAILED
    say "$setting" "$(printf '%-6s' "$verdict") $(count passed) passed, $(count failed) failed, \
$("$python" -c 'import platform, numpy
print("Python", platform.python_version() + ", NumPy", numpy.__version__)'), \
$((SECONDS - started)) s"
    if [ "$verdict" = FAILED ]; then
        status=1
        tail -n 60 "$log"
    fi
}

blas_kernel() { # setting, the name that OpenBLAS has for it, the CPU feature that it needs
    local core
    if ! has "$3"; then
        say "$1" "skipped: no $4"
        return
    fi
    core=$(OPENBLAS_VERBOSE=2 OPENBLAS_CORETYPE=$2 python -c 'import numpy' 2>&1 |
        sed -n 's/^Core: //p')
    if [ "$core" != "$2" ]; then
        say "$1" "skipped: NumPy has no OpenBLAS kernel of this name here"
        return
    fi
    notebooks "$1" python "OPENBLAS_CORETYPE=$2"
}

without_avx512() {
    # NumPy named these features anew in 2.4, and refuses to disable one that it does not know.
    local features="X86_V4 AVX512_ICL AVX512_SPR"
    if ! has avx512f; then
        say no-avx512 "skipped: no AVX-512"
        return
    fi
    if python -c 'import sys, numpy; sys.exit(numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0")'
    then
        features="AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
    fi
    notebooks no-avx512 python "NPY_DISABLE_CPU_FEATURES=$features" OPENBLAS_CORETYPE=Haswell
}

find_python() { # a version: the interpreter, if this machine has one
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        # A shim of pyenv is on the PATH even where it leads nowhere: only running it tells.
        if "$candidate" -c 'import venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

versions() { # setting, Python's version, what to install beside the requirements
    local setting=$1 interpreter venv="$venvs/$1"
    interpreter=$(find_python "$2")
    shift 2
    if [ -z "$interpreter" ]; then
        say "$setting" "skipped: no such Python here"
        return
    fi
    # The notebooks run without the lab, which would be half of the download.
    grep -v '^jupyter' requirements.txt >"$scratch/requirements.txt"
    if ! { "$interpreter" -m venv "$venv" &&
        "$venv/bin/python" -m pip install -q -r "$scratch/requirements.txt" "$@"; } \
        >"$scratch/install.log" 2>&1 </dev/null; then
        status=1
        say "$setting" "FAILED: could not be installed"
        tail -n 20 "$scratch/install.log"
        return
    fi
    notebooks "$setting" "$venv/bin/python"
}

run() {
    case $1 in
        perturbed)
            tests="tests/test_perturbed.py -m nightly --dist=load" notebooks perturbed python
            ;;
        nehalem) blas_kernel nehalem Nehalem sse4_2 SSE4.2 ;;
        haswell) blas_kernel haswell Haswell avx2 AVX2 ;;
        skylakex) blas_kernel skylakex SkylakeX avx512f AVX-512 ;;
        # One worker: two that spin on two threads each would wait for one another.
        threads-2) notebooks threads-2 python MINILORA_THREADS=2 PYTEST_ADDOPTS="-n 0" ;;
        no-avx512) without_avx512 ;;
        # The last Python for which NumPy 1.26 and today's matplotlib both have wheels is 3.12.
        numpy-1.26) versions numpy-1.26 3.11 'numpy==1.26.*' ;;
        python3.*) versions "$1" "${1#python}" ;;
    esac
}

if [ "${1:-}" = --list ]; then
    printf '%s\n' $settings
    exit
fi
for setting in "$@"; do
    if ! grep -qxF -- "$setting" <<<"$(printf '%s\n' $settings)"; then
        echo "no setting is called $setting; there are: "$settings >&2
        exit 2
    fi
done
for setting in "${@:-$settings}"; do
    # Unquoted: without arguments this is the whole list.
    for one in $setting; do
        run "$one"
    done
done
exit "$status"
