"""Boxes, arrows and words on one sheet, written as SVG: the same letters on every machine.

No font is measured and no library draws, so a stored diagram can be compared to the letter.
"""

from html import escape
from math import hypot

import numpy as np

INK, GREY, BLUE, RED = "#1A1A1A", "#5F6B76", "#0072B2", "#B34700"
LOOKS = {  # what a box stands for: fill, edge, width of the edge, colour of its words
    "frozen": ("#E4E9EE", GREY, 2, INK),
    "trained": ("#FFE0A8", "#B86E00", 5, INK),
    "data": ("#FFFFFF", BLUE, 3, INK),
    "lit": (BLUE, BLUE, 3, "#FFFFFF"),
    "done": ("#FBE3D6", RED, 3, INK),
    "faint": ("#FFFFFF", "#C4CBD2", 2, "#6B7680"),
    "group": ("none", "#8A949E", 2, INK),
}


def n(x):
    """A coordinate, to a tenth."""
    return f"{round(float(x), 1):g}"


class Drawing:
    """A sheet of 1280 by `height` units, about a slide, that `lecture.show` takes.

    Args:
        title: the sentence on top; may be empty. alt: what it shows, for who cannot see it.
        height: 720 or less.
    """

    def __init__(self, title, alt, height=720):
        self.alt, self.height, self.parts = alt, height, []
        if title:
            self.text(40, 46, title, 32, "start", bold=True)

    def text(self, x, y, words, size=24, anchor="middle", colour=INK, bold=False, halo=False):
        """Words whose lines stand about (x, y); `halo` is for words on top of an arrow."""
        lines = words.split("\n")
        look = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
        look += ' font-weight="bold"' if bold else ""
        if halo:
            w, h = 0.56 * size * max(map(len, lines)) + 8, 1.2 * size * len(lines)
            at = f'x="{n(x - w / 2)}" y="{n(y - h / 2)}" width="{n(w)}" height="{n(h)}"'
            self.parts.append(f'<rect {at} fill="#FFFFFF"/>')
        for i, line in enumerate(lines):
            at = y + 1.2 * size * (i - (len(lines) - 1) / 2) + 0.35 * size
            self.parts.append(f'<text x="{n(x)}" y="{n(at)}" {look}>{escape(line)}</text>')

    def box(self, x, y, w, h, words="", look="frozen", size=24, *, bold=False, dashed=False):
        """A rectangle with words in its middle."""
        fill, edge, width, ink = LOOKS[look]
        dash = ' stroke-dasharray="10 7"' if dashed or look == "group" else ""
        self.parts.append(
            f'<rect x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}" rx="8" fill="{fill}" '
            f'stroke="{edge}" stroke-width="{width}"{dash}/>'
        )
        if words:
            self.text(x + w / 2, y + h / 2, words, size, colour=ink, bold=bold)

    def funnel(self, x, y, w, left, right, words, look="trained", size=26):
        """A matrix between a side of `left` and a side of `right` units, about the height y."""
        fill, edge, width, ink = LOOKS[look]
        corners = (
            (x, y - left / 2),
            (x + w, y - right / 2),
            (x + w, y + right / 2),
            (x, y + left / 2),
        )
        self.shape(corners, f'fill="{fill}" stroke="{edge}" stroke-width="{width}"')
        self.text(x + w / 2, y, words, size, colour=ink, bold=True)

    def shape(self, corners, look):
        """A polygon."""
        points = " ".join(f"{n(x)},{n(y)}" for x, y in corners)
        self.parts.append(f'<polygon points="{points}" {look}/>')

    def arrow(self, *points, colour=INK, width=3, dashed=False, head=True):
        """A line through the points, with a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        length = hypot(x - x0, y - y0)
        u, v = (x - x0) / length, (y - y0) / length  # where it points to
        size = 8 + 2 * width if head else 0
        points = [*points[:-1], (x - size * u, y - size * v)]
        dash = ' stroke-dasharray="9 7"' if dashed else ""
        line = " ".join(f"{n(a)},{n(b)}" for a, b in points)
        self.parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dash}/>'
        )
        if head:
            (a, b), half = points[-1], size / 2
            wings = (a - half * v, b + half * u), (a + half * v, b - half * u)
            self.shape([(x, y), *wings], f'fill="{colour}"')

    def plus(self, x, y, sign="+"):
        """A circle where two arrows meet."""
        self.parts.append(
            f'<circle cx="{n(x)}" cy="{n(y)}" r="20" fill="#FFFFFF" stroke="{INK}" '
            f'stroke-width="3"/>'
        )
        self.text(x, y, sign, 30, bold=True)

    def key(self, y, *looks):
        """What the looks mean, in one row: frozen, trained, data, gradient."""
        x = 40
        for look, words in looks:
            if look in LOOKS:
                self.box(x, y - 14, 44, 28, look=look)
            else:
                self.arrow((x, y), (x + 44, y), colour=RED, width=4, dashed=True)
            self.text(x + 56, y, words, 20, "start")
            x += 56 + 11.5 * len(words) + 30

    def heat(self, x, y, side, matrix, top):
        """A matrix as colours: blue below zero, white at zero, orange above; ±top at the ends.

        Each colour is one of 17, and runs of one colour are one stroke.
        """
        steps = np.clip(np.rint(8 * np.asarray(matrix) / top), -8, 8).astype(int)
        scale = side / max(steps.shape)
        rows, cols = steps.shape
        strokes = {}
        for i, row in enumerate(steps.tolist()):
            starts = [j for j in range(cols) if j == 0 or row[j] != row[j - 1]]
            for j, end in zip(starts, [*starts[1:], cols], strict=True):
                strokes.setdefault(row[j], []).append(f"M{j} {i}h{end - j}")
        self.parts.append(
            f'<g transform="translate({n(x)} {n(y)}) scale({n(scale)})" '
            f'shape-rendering="crispEdges">'
        )
        self.parts += [
            f'<path transform="translate(0 .5)" stroke="{shade(k)}" d="{"".join(strokes[k])}"/>'
            for k in sorted(strokes)
        ]
        self.parts.append("</g>")
        w, h = scale * cols, scale * rows
        self.parts.append(
            f'<rect x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}" fill="none" '
            f'stroke="{GREY}" stroke-width="2"/>'
        )

    def svg(self, alt=None):
        """The sheet as one string of SVG, on a light ground of its own."""
        alt = escape(alt or self.alt)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1280 {self.height}" '
            f'width="960" height="{n(0.75 * self.height)}" role="img" aria-label="{alt}" '
            f'font-family="Arial, Helvetica, sans-serif" style="max-width:100%;height:auto">'
        )
        ground = f'<rect width="1280" height="{self.height}" fill="#FFFFFF"/>'
        return "\n".join([head, f"<title>{alt}</title>", ground, *self.parts, "</svg>"])

    def data(self, alt=None):
        """What a notebook stores, by kind."""
        return {"image/svg+xml": self.svg(alt), "text/plain": f"Figure: {alt or self.alt}"}

    def _repr_mimebundle_(self, **_):
        return self.data()


def shade(k):
    """The colour of step k, from -8 to 8."""
    ends = (0, 114, 178) if k < 0 else (200, 80, 0)
    return "#" + "".join(f"{255 - (255 - c) * abs(k) // 8:02X}" for c in ends)
