"""Paper: each notebook's page as a PDF by a Chromium, and a poster for the wall.

    python .github/site/papers.py _site          # into _site/paper/

Solutions stay folded, so a PDF can be handed out.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site."""

    def log_message(self, *args):
        pass


POSTER = """<!doctype html><html lang="en"><meta charset="utf-8"><title>minilora: a poster</title>
<style>
@page {{ size: 420mm 594mm; margin: 20mm }}
body {{ font: 19pt/1.4 "DejaVu Sans", Arial, sans-serif; margin: 0; color: #111 }}
h1 {{ font-size: 46pt; line-height: 1.15; margin: 0 0 8mm; color: #004b78 }}
h2 {{ font-size: 27pt; margin: 8mm 0 3mm; color: #004b78 }}
.formula {{ font: italic 56pt "DejaVu Serif", serif; text-align: center; margin: 8mm 0 }}
.formula i {{ color: #b34700; font-style: inherit }}
img {{ width: 100% }}
table {{ border-collapse: collapse; width: 100% }}
td {{ padding: 2mm 4mm; border-top: 1px solid #999; vertical-align: top }}
td:first-child {{ font-weight: bold; white-space: nowrap }}
</style>
<h1>A frozen weight and a low-rank bypass</h1>
<p class="formula">h = Wx + <i>(α/r) BAx</i></p>
<table>
<tr><td>W</td><td>what pre-training left, d<sub>out</sub> × d<sub>in</sub>; it never moves</td></tr>
<tr><td>A, B</td><td>r × d<sub>in</sub> and d<sub>out</sub> × r: all that trains.
A starts at random, B at zero, so training starts from the model as it was</td></tr>
<tr><td>W + (α/r) BA</td><td>after training: one matrix again, no product more</td></tr>
</table>
<h2>How far is the new task?</h2>
<img src="_images/{figure}" alt="{alt}">
<p>Eight letters, one small Transformer, 300 steps, five seeds.
Whatever is near, all ways learn; what must be built tells them apart. Run it yourself:
<b>pip install -r requirements.txt &amp;&amp; python -m minilora</b></p>
</html>"""


def poster(site):
    """A page that prints as one sheet of A2, with the front page's figure."""
    found = sorted((site / "_images").glob("headline*.svg"))
    if not found:
        sys.exit(f"{site}/_images has no headline*.svg; build the site first")
    alt = "Score of each way of fine-tuning by distance of the new task."
    (site / "poster.html").write_text(POSTER.format(figure=found[0].name, alt=alt), "utf-8")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NN", default=[""], help="these notebooks")
    args = parser.parse_args()
    site = args.site.resolve()
    poster(site)
    paper = site / "paper"
    paper.mkdir(exist_ok=True)
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [
        p.stem for p in sorted(site.glob("[0-9]*.html")) if p.name.startswith(tuple(args.only))
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(300_000)
        for name in ("poster", *names):
            page.goto(f"http://127.0.0.1:{server.server_port}/{name}.html", wait_until="load")
            page.wait_for_timeout(500)
            if name != "poster":
                page.evaluate("document.documentElement.dataset.theme = 'light'")
                page.evaluate("window.MathJax?.startup?.promise")
            sheet = {"format": "A4", "margin": dict.fromkeys(("top", "bottom"), "15mm")}
            own = {"prefer_css_page_size": True}
            page.pdf(path=paper / f"{name}.pdf", print_background=True,
                     **(own if name == "poster" else sheet))  # fmt: skip
            # now that it is there, pages lead to it
            at = site / ("index.html" if name == "poster" else f"{name}.html")
            link = f'<a href="paper/{name}.pdf">{"a poster" if name == "poster" else "PDF"}</a>'
            text = at.read_text("utf-8")
            if link not in text and name == "poster":
                text = text.replace("with solutions.", f"with solutions; {link} for the wall.")
            elif link not in text:
                text = text.replace(">Slides</a>", f">Slides</a>{link}")
            at.write_text(text, "utf-8")
            print(f"{name}: {(paper / f'{name}.pdf').stat().st_size / 1e3:.0f} kB", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
