"""Slides of a notebook, for a browser: shown offline, cut so that each fits the screen."""

import base64
import copy
import functools
import hashlib
import html
import math
import re

import nbformat
from nbconvert import SlidesExporter
from traitlets.config import Config

ROOM = 620  # pixels of height that a slide has below its margin, of 720
LEFT_OUT = re.compile(r"#+ (Exercise|Where the paper)")
FOLDED = re.compile(r"<details.*?</details>", re.S)


def tagged(nb):
    """Whether somebody has chosen by hand what a slide is."""
    return any(cell.metadata.get("slideshow", {}).get("slide_type") for cell in nb.cells)


def picture(output):
    """The bytes of an output's picture and their file's ending, or None."""
    data = output.get("data", {})
    if "image/svg+xml" in data:
        return "\n".join("".join(data["image/svg+xml"]).splitlines()).encode(), "svg"
    if "image/png" in data:
        return base64.b64decode(data["image/png"]), "png"
    return None


def alt(output):
    """The words that go with a picture."""
    given = output.get("metadata", {}).get("image/png", {}).get("alt")
    words = given or "".join(output["data"].get("text/plain", "")).removeprefix("Figure: ")
    return " ".join(words.split())


def height(cell):
    """About how many pixels a cell takes, and of these its outputs."""
    if cell.cell_type != "code":
        lines = [line for line in cell.source.split("\n") if line.strip()]
        text = sum(math.ceil(len(line) / 105) for line in lines) * 33 + 16 * cell.source.count(
            "\n\n"
        )
        return text + 60 * cell.source.count("$$") // 2, 0
    below = 0
    for output in cell.outputs:
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        below += 500 if picture(output) else 22 * (text.count("\n") + 1)
    return 22 * (cell.source.count("\n") + 1) + 16 + below, below


def pieces(cell):
    """A cell as parts that may stand on different slides: paragraphs, code, outputs."""
    if cell.cell_type != "code":
        fences = re.split(
            r"(^```.*?^```$|^\$\$.*?\$\$)", FOLDED.sub("", cell.source), flags=re.M | re.S
        )
        for i, part in enumerate(fences):
            for text in [part] if i % 2 else re.split(r"\n\n+", part):
                # a heading has its own part, since it starts a slide
                for line in re.split(r"(?m)^(#{1,3} .*)$", text):
                    if line.strip():
                        yield nbformat.v4.new_markdown_cell(line.strip())
        return
    total, below = height(cell)
    if total <= ROOM or not below:
        yield cell
        return
    code, found = copy.deepcopy(cell), copy.deepcopy(cell)
    code.outputs, found.metadata["tags"] = [], ["hide-input"]
    yield code
    yield found


def cut(nb):
    """A copy in which each heading starts a slide, and what has no room on it the next."""
    made, room, skipping, title = nbformat.v4.new_notebook(metadata=nb.metadata), 0, False, None
    for part in (part for cell in nb.cells for part in pieces(cell)):
        heading = part.cell_type == "markdown" and part.source.startswith("#")
        if heading:
            skipping = bool(LEFT_OUT.match(part.source))
        if skipping or part.source.lstrip().startswith("<"):
            continue
        needs = (
            height(part)[1] if "hide-input" in part.metadata.get("tags", ()) else height(part)[0]
        )
        kind = "slide" if heading or needs > room else "-"
        if kind == "slide":
            # two headings in a row share a slide
            if heading and title is made.cells[-1:] and title:
                kind = "-"
            else:
                room = ROOM
        room -= needs
        part.metadata["slideshow"] = {"slide_type": kind}
        made.cells.append(part)
    return made


@functools.cache
def exporter(template):
    """nbconvert's slides by our template."""
    config = Config(
        TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-input"}},
        SlidesExporter={"reveal_url_prefix": "reveal", "exclude_anchor_links": True},
    )
    return SlidesExporter(
        config=config, template_name=template.name, extra_template_basedirs=[str(template.parent)]
    )


def slides(nb, title, template):
    """The page, as text; it takes its pictures from the notebook's page.

    Args:
        nb: a notebook with its outputs. title: of the page. template: the folder of ours.
    """
    nb = copy.deepcopy(nb) if tagged(nb) else cut(nb)
    nb.metadata["title"] = title
    for i, cell in enumerate(nb.cells):
        cell.id = f"s{i}"
        for output in cell.get("outputs", []):
            if found := picture(output):
                name = f"{hashlib.sha256(found[0]).hexdigest()}.{found[1]}"
                words = html.escape(alt(output))
                output.data = {"text/html": f'<img alt="{words}" src="../_images/{name}">'}
    page = exporter(template).from_notebook_node(nb)[0]
    page = re.sub(r'<link[^>]* id="theme"[^>]*>', "", page)  # ours is enough
    return page.replace("reveal/dist/", "reveal/")
