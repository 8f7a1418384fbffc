"""Is the site good to a reader? Every page as a file, then in a Chromium, and notebooks run there.

    python tests/browser.py _site 06 16

It wants what .github/site/requirements.txt names; tests/browser.sh brings it. It is no part of
pytest, since few machines have a browser.
"""

import argparse
import functools
import http.server
import json
import shutil
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
AXE = ROOT / ".github/site/node_modules/axe-core/axe.min.js"
MOST = 1.5e6  # bytes of a page with its pictures
SMALLEST = 0.6  # a slide may be drawn at this scale, or words get too small for the last row
PARTS = ("files", "pages", "slides", "run", "gap")
HARMLESS = (200, 206, 304)
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}

problems = []


def wrong(where, what):
    """Note something to mend, and say it at once."""
    problems.append((where, what))
    print(f"   WRONG  {where}: {what}", flush=True)


def told(what):
    """One line of what was measured."""
    print(f"   {what}", flush=True)


# --- pages as files --------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page points to, what may be pointed to, and pictures without words."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.names, self.mute = [], [], set(), []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names.update(x for x in (given.get("id"), given.get("name")) if x)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "link", "iframe") and given.get("rel") not in (
            "canonical",
            "author",
        ):
            self.loads.extend(x for x in (given.get("src"), given.get("href")) if x)
        if tag == "img" and not (given.get("alt") or "").strip():
            self.mute.append(given.get("src"))


def check_files(site):
    """No broken link, no other host, a text for each picture, and pages that are light."""
    paths = [p for p in sorted(site.rglob("*.html")) if "lite" not in p.relative_to(site).parts]
    pages = {path: Page(path) for path in paths}
    links, heaviest = 0, (0, None)
    for path, page in pages.items():
        name, size = path.relative_to(site), path.stat().st_size
        for picture in page.mute:
            wrong(name, f"a picture without alternative text: {picture[:60]}")
        for url in page.loads:
            if urlsplit(url).netloc:
                wrong(name, f"asks another host: {url}")
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            links += 1
            if not target.exists():
                wrong(name, f"broken link: {url}")
            elif parts.fragment and target in pages and not parts.fragment.startswith("/"):
                if unquote(parts.fragment) not in pages[target].names:
                    wrong(name, f"no such place on the page: {url}")
            if "path=" in parts.query:
                notebook = site / "lite/files" / unquote(parts.query.partition("path=")[2])
                if not notebook.exists():
                    wrong(name, f"no such notebook: {url}")
        for url in set(page.loads):
            target = path.parent / unquote(urlsplit(url).path)
            if target.suffix in (".png", ".svg", ".jpg") and target.exists():
                size += target.stat().st_size
        heaviest = max(heaviest, (size, str(name)))
        if size > MOST:
            wrong(name, f"weighs {size / 1e6:.1f} MB")
    told(
        f"{len(pages)} pages, {links} links; "
        f"the heaviest is {heaviest[1]}, {heaviest[0] / 1e3:.0f} kB"
    )


# --- pages in the browser --------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, quietly, and counts bytes."""

    sent = 0

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        data = source.read()
        Handler.sent += len(data)
        outputfile.write(data)


def check_pages(context, url, names):
    """axe-core's rules in light and dark, and no sideways scrolling on a phone."""
    for name in names:
        page = context.new_page()
        page.goto(f"{url}/{name}.html", wait_until="networkidle")
        page.add_script_tag(path=str(AXE))
        for scheme in ("light", "dark"):
            page.evaluate("x => { document.documentElement.dataset.theme = x }", scheme)
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            found = page.evaluate("axe.run(document, {preload: false})")
            bad = found["violations"]
            share = len(found["passes"]) / (len(found["passes"]) + len(bad))
            rules = (
                ", ".join(f"{v['id']} ({v['impact']}, {len(v['nodes'])})" for v in bad) or "nothing"
            )
            told(f"axe {name} {scheme}: {share:.0%} of its rules; found {rules}")
            for v in bad:
                if v["impact"] in ("serious", "critical"):
                    wrong(name, f"{v['id']}: {v['help']}, as in {v['nodes'][0]['html'][:160]}")
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(300)
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > 391:
            wrong(name, f"is {wide} pixels wide on a phone of 390")
        page.close()


def check_slides(context, url, names):
    """Each slide fits 1280 × 720, at a size that can be read."""
    for name in names:
        page = context.new_page()
        page.set_viewport_size({"width": 1280, "height": 720})
        page.goto(f"{url}/slides/{name}.html", wait_until="networkidle")
        page.wait_for_function("window.Reveal && Reveal.isReady()")
        scales = []
        for i in range(page.evaluate("Reveal.getTotalSlides()")):
            scale, bottom, right, text = page.evaluate(
                """i => {
                const s = Reveal.getSlides()[i], {h, v} = Reveal.getIndices(s);
                Reveal.slide(h, v);
                const z = +s.dataset.scale;
                return [z, s.scrollHeight * z, s.scrollWidth * z, s.innerText.trim().slice(0, 40)];
                }""",
                i,
            )
            scales.append(scale)
            if bottom > 720 or right > 1281:
                wrong(
                    f"slides/{name}", f"slide {i + 1} is cut: {right:.0f} × {bottom:.0f}: {text!r}"
                )
            if scale < SMALLEST:
                wrong(f"slides/{name}", f"slide {i + 1} is drawn at {scale}: {text!r}")
        told(f"slides {name}: {len(scales)}, the smallest at {min(scales):.2f}")
        page.close()


# --- a notebook in the browser ---------------------------------------------------------------

STATE = """() => {
  const shown = window.jupyterapp?.shell.currentWidget, model = shown?.content?.model;
  if (!model) return null;
  const cells = [...Array(model.cells.length).keys()].map(i => model.cells.get(i).toJSON());
  return {cells, status: shown.sessionContext?.session?.kernel?.status ?? "none"};
}"""
READY = f"() => ({STATE})()?.status === 'idle'"
PROGRESS = """() => {
  const shown = window.jupyterapp.shell.currentWidget, model = shown.content.model;
  const code = [...Array(model.cells.length).keys()].map(i => model.cells.get(i))
    .filter(c => c.type === "code" && c.sharedModel.getSource().trim());
  return {all: code.length, done: code.filter(c => c.executionCount).length,
          status: shown.sessionContext?.session?.kernel?.status ?? "none"};
}"""  # the whole state holds all pictures, and is asked for once
PATIENCE = 900_000  # milliseconds; on a busy machine a start can take minutes


def text_of(cell):
    """What a cell has printed or shown, but for pictures."""
    texts = []
    for output in cell.get("outputs", []):
        shown = output.get("text", output.get("data", {}).get("text/plain", ""))
        texts.append(f"{output.get('ename', '')}{''.join(shown)}")
    return "".join(texts)


def cpu(browser):
    """Seconds of processor time that the browser has had: what is fair on a busy machine."""
    session = browser.new_browser_cdp_session()
    seconds = sum(p["cpuTime"] for p in session.send("SystemInfo.getProcessInfo")["processInfo"])
    session.detach()
    return seconds


def command(page, name):
    """Give a command of JupyterLab and do not wait until it is done, which for a run is long."""
    page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)


def wait_until_run(page, limit, start=None):
    """Until every cell has run, or for `limit` seconds of processor time; state and seconds."""
    browser = page.context.browser
    start = cpu(browser) if start is None else start
    seen, still = None, 0
    while (took := cpu(browser) - start) < limit:
        page.wait_for_timeout(1000)
        now = page.evaluate(PROGRESS)
        if now["status"] == "idle" and now["done"] == now["all"]:
            break
        # an error stops what comes after it
        still = still + 1 if now["status"] == "idle" and now["done"] == seen else 0
        seen = now["done"]
        if still == 30:
            break
    return page.evaluate(STATE), took


def check_run(context, url, path, limit):
    """From the front page to a notebook that runs; what it prints is what is stored."""
    page, browser = context.new_page(), context.browser
    Handler.sent, start, before = 0, time.perf_counter(), cpu(browser)
    page.goto(f"{url}/index.html")
    page.locator(".door").first.click()
    if path.stem not in page.url:
        page.locator(f'.bd-sidebar-primary a[href="{path.stem}.html"]').first.click()
    page.wait_for_url(f"**/{path.stem}.html*")
    button = page.locator(".ways a.run").last  # the edition that is filled in
    edition = button.get_attribute("href").partition("path=")[2]
    button.click()
    page.wait_for_function(READY, polling=1000, timeout=PATIENCE)
    command(page, "editmenu:clear-all")
    began = cpu(browser)
    command(page, "runmenu:run-all")
    page.wait_for_function(
        f"() => ({STATE})().cells.some(c => c.execution_count && c.outputs.length)",
        polling=1000,
        timeout=PATIENCE,
    )
    told(
        f"{path.stem}: first output {time.perf_counter() - start:.0f} s after the front page, "
        f"{cpu(browser) - before:.0f} s of processor time, {Handler.sent / 1e6:.0f} MB"
    )
    state, took = wait_until_run(page, limit, began)
    stored = json.loads(path.read_text("utf-8"))["cells"]
    shown = {"".join(c["source"]): text_of(c) for c in state["cells"] if c.get("execution_count")}
    same = 0
    for i, cell in enumerate(stored):
        source, tags = "".join(cell["source"]), set(cell["metadata"].get("tags", ()))
        if cell["cell_type"] != "code" or source not in shown:  # filled in, or not reached
            continue
        if tags & UNCOMPARED or text_of(cell) == shown[source]:
            same += 1
        else:
            told_here, there = text_of(cell)[-300:], shown[source][-300:]
            wrong(path.stem, f"cell {i} prints {there!r} in the browser; stored is {told_here!r}")
    done = sum(bool(c.get("execution_count")) for c in state["cells"])
    told(f"{edition}: {done} cells, {took:.0f} s of processor time, {same} as stored")
    for cell in state["cells"]:
        failed = [o for o in cell.get("outputs", ()) if o["output_type"] == "error"]
        if failed and "raises-exception" not in cell["metadata"].get("tags", ()):
            what = f"{failed[0]['ename']}: {failed[0]['evalue'][:200]}"
            wrong(path.stem, f"stops at {''.join(cell['source'])[:80]!r}: {what}")
    missing = sum(not c["execution_count"] for c in state["cells"] if c["cell_type"] == "code")
    if missing:
        wrong(path.stem, f"{missing} cells have not run")
    if took >= limit:
        wrong(path.stem, f"is not through after {limit:.0f} s of processor time")
    page.close()


def check_gap(context, url, path, limit):
    """A reader's lines in a gap get an answer: first none, then the right ones."""
    master = json.loads(path.read_text("utf-8"))["cells"]
    filled = ["".join(c["source"]) for c in master if "### BEGIN SOLUTION" in "".join(c["source"])]
    if not filled:
        told(f"{path.stem}: no gap")
        return
    page = context.new_page()
    page.goto(f"{url}/lite/notebooks/index.html?path=student/{path.name}")
    page.wait_for_function(READY, polling=1000, timeout=PATIENCE)
    command(page, "runmenu:run-all")
    state, _ = wait_until_run(page, limit)
    at = next(i for i, c in enumerate(state["cells"]) if "# your lines" in "".join(c["source"]))
    before = "".join(text_of(c) for c in state["cells"][at : at + 2])
    page.evaluate(
        """([at, source]) => { const w = window.jupyterapp.shell.currentWidget.content;
        w.model.cells.get(at).sharedModel.setSource(source); w.activeCellIndex = at; }""",
        [at, filled[0]],
    )
    command(page, "notebook:run-cell-and-select-next")
    command(page, "notebook:run-cell-and-select-next")
    page.wait_for_timeout(1000)
    state, _ = wait_until_run(page, limit)
    after = "".join(text_of(c) for c in state["cells"][at : at + 2])
    told(f"{path.stem}: the gap answers {before.strip()[:60]!r}, then {after.strip()[:60]!r}")
    if "Right" in before or "Right" not in after:
        wrong(path.stem, "the check does not tell an empty gap from a filled one")
    page.close()


def main():
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("run", nargs="*", metavar="NN", help="to run in the browser, or all")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--limit", type=float, default=240, help="processor seconds each may take")
    args = parser.parse_args()
    site = args.site.resolve()
    if "files" in args.parts:
        check_files(site)
    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    names = [path.stem for path in sorted(site.glob("[0-9]*.html"))]
    masters = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}

    def watch(request):
        if not request.url.startswith((url, "data:", "blob:")):
            wrong("a page", f"a request leaves: {request.url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )

        def visitor():
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.set_default_timeout(PATIENCE)
            context.on("request", watch)
            context.on(
                "response", lambda r: r.status in HARMLESS or wrong(r.url, f"status {r.status}")
            )
            return context

        context = visitor()
        context.on("weberror", lambda e: wrong(e.page.url, f"an error in a script: {e.error}"))
        if "pages" in args.parts:
            check_pages(context, url, ["index", *names[:: max(1, len(names) // 3)][:3]])
        if "slides" in args.parts:
            check_slides(context, url, names)
        context.close()
        run = [n for n in masters if n < "23"] if args.run == ["all"] else args.run
        for number in run if "run" in args.parts else ():
            context = visitor()  # each as on a first visit
            check_run(context, url, masters[number], args.limit)
            context.close()
        for number in run[:1] if "gap" in args.parts else ():
            context = visitor()
            check_gap(context, url, masters[number], args.limit)
            context.close()
        browser.close()
    print(f"{len(problems)} things are wrong" if problems else "all is well")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
