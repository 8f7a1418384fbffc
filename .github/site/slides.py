"""Slides of a notebook, for a browser: shown offline, cut so that each fits the screen."""

import base64
import copy
import functools
import hashlib
import html
import itertools
import math
import re

import nbformat
from nbconvert import SlidesExporter
from traitlets.config import Config

ROOM = 670  # pixels of height that a slide has below its margin, of 720
FOLDED = re.compile(r"<details.*?</details>", re.S)


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
    """About how many pixels a cell takes."""
    if cell.cell_type != "code":
        lines = [line for line in cell.source.split("\n") if line.strip()]
        rows = sum(math.ceil(len(line) / 105) for line in lines)
        return 33 * rows + 16 * (cell.source.count("\n\n") + 1) + 30 * cell.source.count("$$")
    pixels = 0 if folded(cell) else 24 * (cell.source.count("\n") + 1) + 24
    for output in cell.outputs:
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        if picture(output):
            pixels += 470  # slides.css keeps 440, so that what is said of it has room below
        elif "text/html" in output.get("data", {}):
            pixels += 600  # a stepper
        else:
            pixels += 24 * (text.count("\n") + 1)
    return pixels


def folded(cell):
    """Whether only what a code cell puts out is shown."""
    return "hide-input" in cell.metadata.get("tags", ())


def pieces(cell):
    """A cell as parts that may stand on different slides: paragraphs; code and its outputs."""
    if cell.cell_type != "code":
        fences = re.split(
            r"(^```.*?^```$|^\$\$.*?\$\$)", FOLDED.sub("", cell.source), flags=re.M | re.S
        )
        for i, part in enumerate(fences):
            for text in [part] if i % 2 else re.split(r"\n\n+", part):
                if text.strip():
                    yield nbformat.v4.new_markdown_cell(text.strip())
    elif folded(cell) or not cell.outputs or height(cell) <= ROOM:
        yield cell
    else:
        code, found = copy.deepcopy(cell), copy.deepcopy(cell)
        code.outputs, found.metadata["tags"] = [], ["hide-input"]
        yield from (code, found)


def kind_of(cell):
    """What the master says that a cell is in the slides."""
    return cell.metadata.get("slideshow", {}).get("slide_type")


def cut(nb):
    """A copy in which what has no room on a section's slide goes on below it, under its heading.

    The masters say where a slide begins, what is shown step by step and what is left out. The
    speaker notes of a section come with each of its slides.
    """
    made = nbformat.v4.new_notebook(metadata=nb.metadata)
    title = notes = None

    def add(cell, kind):
        made.cells.append(copy.deepcopy(cell))
        made.cells[-1].metadata["slideshow"] = {"slide_type": kind}

    def begin(heading, kind):
        add(heading, kind)
        if notes:
            add(notes, "notes")

    room, bare = ROOM, True  # bare: nothing but its heading is on the slide
    for cell, after in itertools.zip_longest(nb.cells, nb.cells[1:]):
        kind = kind_of(cell)
        if kind in ("skip", "notes"):
            continue
        for part in pieces(cell):
            if kind == "slide":
                heading = part.source.partition("\n")[0].lstrip("# ")
                title = nbformat.v4.new_markdown_cell(f"###### {heading}")
                notes = after if after and kind_of(after) == "notes" else None
                begin(part, "slide")
                room, bare = ROOM, "\n" not in part.source
            else:
                if kind == "subslide" or (height(part) > room and not bare):
                    begin(title, "subslide")
                    room, kind = ROOM - height(title), "-"
                add(part, kind)
                bare = False
            room -= height(part)
            kind = "-"
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
    nb = cut(nb)
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
