"""The site, in one folder: pages, slides, and the notebooks to run in the browser.

    pip install -r requirements.txt -r .github/site/requirements.txt
    python .github/site/build.py             # into _site/

Nothing is run but the stored figures' arrays once more for the front page. Pages ask no other host
for anything: what they need is copied in at build time (npm brings MathJax and reveal.js; Pyodide
comes from --runtime, a folder, or from its usual address).
"""

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import nbformat
import yaml
from slides import alt, picture, slides

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # minilora need not be installed
from minilora import editions  # noqa: E402

PYODIDE = "https://cdn.jsdelivr.net/pyodide/v0.27.7/full"
NEEDED = "ipython jedi matplotlib micropip numpy sqlite3 ssl".split()  # and what they need
HOME = "OWNER/minilora"  # as the notebooks' line on installing has it
PARTS = {0: "The machine", 5: "LoRA", 12: "The other ways", 17: "Compression", 23: "The real thing"}
MARKER = re.compile(r"^ *### (BEGIN|END) SOLUTION *\n?", re.M)
ELSEWHERE = re.compile(r"\n+\[Colab\]\(.*\)$")  # a page has them in its row of links
INSTALL = re.compile(r"try:\n    import minilora as ml\nexcept ImportError:.*", re.S)


def run(*command, cwd=ROOT, **env):
    """Run a command; its words are shown only if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def part(name):
    """The title of the part that a notebook is in."""
    return PARTS[max(first for first in PARTS if first <= int(name[:2]))]


def node_modules():
    """The folder of what npm brings; fetched once."""
    if not (HERE / "node_modules").is_dir():
        run("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", cwd=HERE)
    return HERE / "node_modules"


# --- pages -----------------------------------------------------------------------------------


def ways(name, repository, lite):
    """The row of links above a notebook."""
    links = [
        ("Slides", f"slides/{name}.html"),
        (
            "Colab",
            f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb",
        ),
        (
            "Binder",
            f"https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/notebooks/{name}.ipynb",
        ),
        ("Source", f"https://github.com/{repository}/blob/main/notebooks/{name}.ipynb"),
    ]
    if part(name) == PARTS[23]:  # what loads a real model does not run in a browser
        lite = {}
    run_here = "".join(
        f'<a class="run" href="lite/notebooks/index.html?path={edition}/{name}.ipynb">{words}</a>'
        for edition, words in lite.items()
    )
    others = "".join(f'<a href="{url}">{words}</a>' for words, url in links)
    return f'<div class="ways">{run_here}{others}</div>'


def page(nb, name, repository, lite):
    """A notebook for the page builder: with links, alternative texts, and gaps folded away."""
    nb.cells = [
        cell
        for cell in nb.cells
        if not INSTALL.fullmatch(cell.source.strip())
        and cell.metadata.get("slideshow", {}).get("slide_type") != "notes"
    ]
    title, _, rest = ELSEWHERE.sub("", nb.cells[0].source).partition("\n")
    nb.cells[0].source = f"{title}\n\n{ways(name, repository, lite)}\n{rest}"
    for cell in nb.cells:
        if MARKER.search(cell.source):
            cell.source = MARKER.sub("", cell.source)
            cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "hide-input"]
        alts = [alt(output) for output in cell.get("outputs", ()) if picture(output)]
        if alts:  # one picture a cell is the rule
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(alts)}}
    return nb


def tidy(text):
    """A built page without what it loads for nothing: cells that run elsewhere, icons twice."""
    for pattern in (
        r"<script>const THEBE_JS_URL.*?</script>",
        r"<script[^>]*(sphinx-thebe\.js|fontawesome)[^>]*></script>",
        r"<link[^>]*(sphinx-thebe\.css)[^>]*>",
        r'<script type="text/x-thebe-config">.*?</script>',
    ):
        text = re.sub(pattern, "", text, flags=re.S)
    return text


def headline(path):
    """The front page's figure, from the stored runs; returns its alternative text."""
    import matplotlib

    matplotlib.use("svg")
    import numpy as np

    from minilora import compare, io, plots, tasks

    found = compare.by_distance(compare.load(io.DATA / "compare.json"))
    shown = [
        m for m in ("full", "lora", "adapter", "ia3", "prefix", "bitfit", "token row") if m in found
    ]
    words = {"elicit": "a skill it has", "compose": "two it has", "build": "one it lacks"}
    fan = {
        way: {f"{place}:\n{words.get(place, '')}": found[way][place] for place in tasks.DISTANCES}
        for way in shown
    }
    fig = plots.fan(fan, "Answers right after 300 steps, by distance of the new task")
    with matplotlib.rc_context({"svg.hashsalt": "minilora", "svg.fonttype": "none"}):
        fig.savefig(path, metadata={"Date": None})
    last = {way: 100 * np.mean(found[way]["build"]) for way in shown}
    ends = ", ".join(f"{way} {last[way]:.0f}%" for way in sorted(last, key=last.get, reverse=True))
    return (
        f"Lines that start together where a skill is elicited and fan out to building one: {ends}."
    )


def pages(work, out, notebooks, repository, lite):
    """Build the pages by jupyter-book."""
    source = work / "pages"
    source.mkdir(parents=True)
    for name, nb in notebooks.items():
        nbformat.write(page(nb, name, repository, lite), source / f"{name}.ipynb")
    first = next(iter(notebooks))
    edition = next(iter(lite), None)
    door = f"lite/notebooks/index.html?path={edition}/{first}.ipynb" if edition else f"{first}.html"
    front = (HERE / "front.md").read_text("utf-8")
    words = headline(source / "headline.svg")
    front = front.format(first=first, run=door, repository=repository, alt=words)
    (source / "index.md").write_text(front, "utf-8")
    chapters = {}
    for name in notebooks:
        chapters.setdefault(part(name), []).append({"file": name})
    toc = {"format": "jb-book", "root": "index", "parts": []}
    toc["parts"] = [{"caption": title, "chapters": files} for title, files in chapters.items()]
    guide = ROOT / "notebooks" / "TEACHING.md"
    if guide.exists():
        names = "|".join(notebooks)
        text = re.sub(rf"\((?:\./)?({names})\.ipynb\)", r"(\1.ipynb)", guide.read_text("utf-8"))
        (source / "teaching.md").write_text(text, "utf-8")
        toc["parts"].append({"caption": "For a class", "chapters": [{"file": "teaching"}]})
    (source / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), "utf-8")
    static = source / "_static"
    static.mkdir()
    shutil.copy(HERE / "site.css", static)
    shutil.copy(HERE / "site.js", static)
    config = {
        "title": "minilora",
        "author": "the minilora authors",
        "copyright": "",
        "execute": {"execute_notebooks": "off"},
        "only_build_toc_files": True,
        "repository": {
            "url": f"https://github.com/{repository}",
            "branch": "main",
            "path_to_book": "notebooks",
        },
        "html": {"use_repository_button": True, "use_multitoc_numbering": False},
        "sphinx": {
            "recursive_update": True,
            "config": {
                "html_theme_options": {"use_download_button": False},
                "mathjax_path": "mathjax/tex-mml-chtml.js",
                "suppress_warnings": [
                    "mystnb.unknown_mime_type",
                    "myst.header",
                    "myst.xref_missing",
                ],
                "html_show_copyright": False,
                "html_copy_source": False,
            },
        },
    }
    (source / "_config.yml").write_text(yaml.safe_dump(config), "utf-8")
    book = shutil.which("jupyter-book", path=str(Path(sys.executable).parent)) or "jupyter-book"
    said = run(book, "build", source, "--path-output", work)
    spare = shutil.ignore_patterns("_sources", ".buildinfo", "*macros.html", "sphinx-thebe.*")
    shutil.copytree(work / "_build/html", out, ignore=spare)
    # only now, since the builder would load each script that it finds
    mathjax = node_modules() / "mathjax" / "es5"
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(mathjax / fonts, out / "_static/mathjax" / fonts)
    shutil.copy(mathjax / "tex-mml-chtml.js", out / "_static/mathjax")
    for path in out.glob("*.html"):
        path.write_text(tidy(path.read_text("utf-8")), "utf-8")
    return re.findall(r".*WARNING.*", said)


def decks(out, notebooks):
    """Slides of each notebook."""
    folder = out / "slides"
    (folder / "reveal").mkdir(parents=True)
    for name, nb in notebooks.items():
        title = nb.cells[0].source.partition("\n")[0].strip("# ")
        nb.cells = [c for c in nb.cells if not INSTALL.fullmatch(c.source.strip())]
        nb.cells[0].source = ELSEWHERE.sub("", nb.cells[0].source)
        for cell in nb.cells:
            cell.source = MARKER.sub("", cell.source)
            cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](../\1.html)", cell.source)
        text = slides(nb, title, HERE / "slides")
        home = f'<a class="home" href="../{name}.html">{html.escape(title)}</a>'
        text = text.replace('<div class="reveal">', f'<div class="reveal">{home}', 1)
        (folder / f"{name}.html").write_text(text, "utf-8")
    reveal = node_modules() / "reveal.js"
    for file in ("dist/reveal.js", "dist/reveal.css", "plugin/notes/notes.js"):
        shutil.copy(reveal / file, folder / "reveal")
    for path in (HERE / "slides/slides.css", HERE / "slides/slides.js"):
        shutil.copy(path, folder)


# --- in the browser --------------------------------------------------------------------------


EDITIONS = {"student": "Run in the browser", "solution": "with solutions"}


def write_editions(folder, paths, repository):
    """Write what is to be run: {edition}/{notebook}, not yet run."""
    for edition in EDITIONS:
        (folder / edition).mkdir(parents=True)
        for path in paths:
            nb = getattr(editions, edition)(editions.read(path))
            text = json.dumps(nb, ensure_ascii=False, indent=1) + "\n"
            text = text.replace(HOME, repository)
            (folder / edition / path.name).write_text(text, "utf-8")


def fetch(name, runtime, target, sha256=None):
    """One file of the runtime, from a folder or from its address, checked."""
    if runtime:
        data = (runtime / name).read_bytes()
    else:
        with urllib.request.urlopen(f"{PYODIDE}/{name}") as answer:
            data = answer.read()
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{name} is not what Pyodide's list says")
    (target / name).write_bytes(data)


def products(folder):
    """A copy of the package of matrix products, compiled; Zig is the compiler that pip brings."""
    shutil.copytree(HERE / "gemm", folder)
    zig = (sys.executable, "-m", "ziglang")
    run(
        *zig, "cc", "-target", "wasm32-emscripten", "-O3", "-msimd128", "-fPIC", "-c", "gemm.c",
        cwd=folder,
    )  # fmt: skip
    run(
        *zig, "wasm-ld", "-shared", "--experimental-pic", "--no-entry", "gemm.o",
        "-o", "minilora_gemm/gemm.so", cwd=folder,
    )  # fmt: skip
    return folder


def pyodide(target, work, runtime):
    """The Python of the browser with what notebooks import, minilora's own wheel among it."""
    target.mkdir(parents=True)
    for name in (
        "pyodide.js",
        "pyodide.mjs",
        "pyodide.asm.js",
        "pyodide.asm.wasm",
        "python_stdlib.zip",
    ):
        fetch(name, runtime, target)
    fetch("pyodide-lock.json", runtime, work)
    lock = json.loads((work / "pyodide-lock.json").read_text())
    waiting, packages = list(NEEDED), {}
    while waiting:
        name = waiting.pop().replace("_", "-")
        if name not in packages:
            packages[name] = found = lock["packages"][name]
            waiting.extend(found["depends"])
            fetch(found["file_name"], runtime, target, found["sha256"])
    wheels = work / "wheels"
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels,
        ROOT, products(work / "gemm"), "comm", "tqdm",
    )  # fmt: skip
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what setuptools leaves
    needs = {
        "minilora": ["numpy", "matplotlib", "tqdm", "minilora-gemm"],
        "minilora-gemm": ["numpy"],
    }
    for wheel in sorted(wheels.glob("*.whl")):
        module, version = wheel.name.split("-")[:2]
        name = module.replace("_", "-")
        packages[name] = {
            "name": name, "version": version, "file_name": wheel.name, "install_dir": "site",
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "package_type": "package",
            "imports": [module], "unvendored_tests": False,
            "depends": needs.get(name, []),
        }  # fmt: skip
        shutil.copy(wheel, target)
    lock["packages"] = packages
    (target / "pyodide-lock.json").write_text(json.dumps(lock))


def lite(work, out, runtime):
    """JupyterLite with the editions, and the runtime beside it."""
    config = work / "lite"
    config.mkdir()
    shutil.copy(HERE / "jupyter-lite.json", config)
    run(
        sys.executable, "-m", "jupyterlite_core", "build", "--lite-dir", config,
        "--contents", work / "content", "--output-dir", out / "lite", "--no-sourcemaps",
        "--apps", "notebooks", "--apps", "lab", cwd=config,
    )  # fmt: skip
    pyodide(out / "lite/static/pyodide", work, runtime)


# --- for a class -----------------------------------------------------------------------------


def gradable(notebook, made):
    """A copy that nbgrader takes as an assignment's source: it opens the gaps by their markers.

    Its checks help the reader and raise nothing, so that exercises are graded by a person.
    """
    notebook = made.blank(notebook)
    for i, cell in enumerate(notebook["cells"]):
        gap = "BEGIN SOLUTION" in cell["source"]
        mine, check, rest = cell["source"].partition("\n# check")
        if cell["cell_type"] != "code":
            cell["source"] = made.SOLUTION.sub("", cell["source"]).strip("\n")
        elif gap or check:
            cell["metadata"]["nbgrader"] = {
                "schema_version": 3, "grade_id": f"cell-{i}", "locked": False, "task": False,
                "solution": True, "grade": bool(check), **({"points": 5} if check else {}),
            }  # fmt: skip
        if cell["cell_type"] == "code" and check:  # else it would open the whole cell
            asked = re.sub(r"^", "# ", mine, flags=re.M)
            cell["source"] = f"{asked}\n### BEGIN SOLUTION\n{mine}\n### END SOLUTION{check}{rest}"
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"]]
    return notebook


def bundle(work, out):
    """The editions as one file for a learning platform, and the capstone for nbgrader."""
    with zipfile.ZipFile(out / "minilora-class.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for path in sorted((work / "content").rglob("*.ipynb")):
            made.write(path, path.relative_to(work / "content"))
        made.write(ROOT / "notebooks/LICENSE", "LICENSE")
        for path in sorted((ROOT / "notebooks").glob("*capstone.ipynb")):
            text = json.dumps(gradable(editions.read(path), editions), ensure_ascii=False, indent=1)
            made.writestr(f"nbgrader/source/capstone/{path.name}", text + "\n")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "_site")
    parser.add_argument("--runtime", type=Path, help=f"a folder with Pyodide; else from {PYODIDE}")
    parser.add_argument("--repository", default=os.environ.get("GITHUB_REPOSITORY", HOME))
    parser.add_argument("--only", nargs="+", metavar="NN", default=[""], help="these notebooks")
    parser.add_argument("--no-lite", action="store_true", help="only pages and slides, to look at")
    parser.add_argument("--headline", type=Path, help="only draw the README's figure, as SVG")
    parser.add_argument("--reach", action="store_true", help="only say whether Pyodide can be had")
    args = parser.parse_args()
    if args.headline:
        print(headline(args.headline))
        return
    if args.reach:
        try:
            urllib.request.urlopen(f"{PYODIDE}/pyodide-lock.json", timeout=20).close()
        except OSError as error:
            sys.exit(f"{PYODIDE}: {error}")
        return
    out, work = args.out.resolve(), args.out.resolve().with_name(args.out.name + ".work")
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()

    def told(what):
        print(f"{time.perf_counter() - start:6.1f} s  {what}", flush=True)

    paths = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    paths = [path for path in paths if path.name.startswith(tuple(args.only))]

    def read():
        found = {path.stem: nbformat.read(path, as_version=4) for path in paths}
        for cell in (cell for nb in found.values() for cell in nb.cells):
            if cell.cell_type == "markdown":  # what is no page is in the repository
                blob = f"https://github.com/{args.repository}/blob/main/"
                cell.source = cell.source.replace("](../", f"]({blob}")
        return found

    write_editions(work / "content", paths, args.repository)
    warnings = pages(work, out, read(), args.repository, {} if args.no_lite else EDITIONS)
    told(f"{len(paths)} pages, {len(warnings)} warnings")
    print(*warnings[:20], sep="\n")
    decks(out, read())
    told("slides")
    bundle(work, out)
    if not args.no_lite:
        lite(work, out, args.runtime)
        told("to run in the browser")
    (out / ".nojekyll").touch()  # GitHub must not leave out what starts with a line
    shutil.rmtree(work)
    sizes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    told(f"{out}: {sizes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
