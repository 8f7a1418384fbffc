#!/usr/bin/env bash
# Build the site and try it as a reader would, in a headless Chromium: tests/browser.py says what.
#
#     tests/browser.sh                  # the pages and slides; run notebook 16 in the browser
#     tests/browser.sh 00 06 16         # run these there (about 8 times slower than natively)
#     tests/browser.sh all
#
# It installs what it needs into a virtual environment of its own; a browser too, if there is none.
# PYODIDE names a folder with the runtime, for where no network is; with neither, no notebook is run.
# MINILORA_VENVS is kept between runs. It leaves with 2 if something cannot be had here.
set -euo pipefail
cd "$(dirname "$0")/.."

lacking() {
    echo "tests/browser.sh: $1" >&2
    exit 2
}

command -v npm >/dev/null || lacking "npm is missing; it comes with Node.js"
venvs=${MINILORA_VENVS:-$(mktemp -d)}
[ -n "${MINILORA_VENVS:-}" ] || trap 'rm -rf "$venvs"' EXIT
[ -d "$venvs/site" ] || python3 -m venv "$venvs/site"
python=$venvs/site/bin/python
[ -d "$venvs/site/bin" ] || python=$venvs/site/Scripts/python # Windows
"$python" -m pip install -q -r .github/site/requirements.txt numpy matplotlib tqdm ||
    lacking "the packages of .github/site/requirements.txt cannot be installed"
[ -d .github/site/node_modules ] ||
    npm install --silent --no-audit --no-fund --no-package-lock --prefix .github/site ||
    lacking "what .github/site/package.json names cannot be installed"
if ! command -v chromium >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq chromium >/dev/null
    else
        "$python" -m playwright install chromium
    fi || lacking "no Chromium can be installed"
fi

"$python" - <<'END' || lacking "Chromium does not start"
import shutil
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]).close()
END

build=() try=("${@:-16}")
if [ -n "${PYODIDE:-}" ]; then
    build=(--runtime "$PYODIDE")
elif ! "$python" .github/site/build.py --reach; then
    echo "Pyodide is out of reach: pages and slides only"
    build=(--no-lite) try=(--parts files pages slides)
fi
"$python" .github/site/build.py "${build[@]}"
"$python" tests/browser.py _site "${try[@]}"
