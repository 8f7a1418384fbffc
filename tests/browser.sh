#!/usr/bin/env bash
# Build the site and try it as a reader would, in a headless Chromium: tests/browser.py says what.
#
#     tests/browser.sh                  # the pages and slides; run notebook 16 in the browser
#     tests/browser.sh 00 06 16         # run these there (about 8 times slower than natively)
#
# It installs what it needs into a virtual environment of its own; a browser too, if there is none.
# PYODIDE names a folder with the runtime, for where no network is. MINILORA_VENVS is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v npm >/dev/null || { echo "tests/browser.sh needs npm, which comes with Node.js" >&2; exit 2; }
venvs=${MINILORA_VENVS:-$(mktemp -d)}
[ -n "${MINILORA_VENVS:-}" ] || trap 'rm -rf "$venvs"' EXIT
[ -d "$venvs/site" ] || python3 -m venv "$venvs/site"
python=$venvs/site/bin/python
"$python" -m pip install -q -r .github/site/requirements.txt numpy matplotlib tqdm

if ! command -v chromium >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq chromium
    else
        "$python" -m playwright install chromium
    fi
fi

"$python" .github/site/build.py ${PYODIDE:+--runtime "$PYODIDE"}
"$python" tests/browser.py _site "${@:-16}"
