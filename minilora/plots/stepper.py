"""Something that moves, with no kernel behind it: frames, two buttons, a slider, a table."""

from html import escape

import numpy as np

from .diagrams import WALK, tape
from .drawing import GREY, Drawing

# Each control finds its own stepper, so that many can stand on one page and no name is global.
GO = (
    "const s=this.closest('.stepper');"
    "s.querySelectorAll('figure').forEach((f,i)=>f.style.display=i==this.value-1?'':'none');"
    "this.setAttribute('aria-valuetext','step '+this.value+' of '+this.max)"
)
MOVE = "const r=this.parentNode.querySelector('input');r.step{}();r.oninput()"
LIGHT = "background:#FFFFFF;color:#1A1A1A"


class Stepper:
    """Frames to step through, which `lecture.show` takes; see `stepper`."""

    def __init__(self, frames, captions, table, alt):
        self.frames, self.captions, self.table, self.alt = frames, captions, table, alt

    def html(self, alt=None):
        """The stepper as one string of HTML; without scripts its first frame and table remain."""
        n = len(self.frames)
        figures = [
            f'<figure style="margin:0{";display:none" if i else ""}">{frame.svg()}'
            f'<figcaption style="min-height:3em"><b>Step {i + 1} of {n}.</b> {escape(caption)}'
            f"</figcaption></figure>"
            for i, (frame, caption) in enumerate(zip(self.frames, self.captions, strict=True))
        ]
        head, *rows = self.table
        cell = f'style="{LIGHT};padding:2px 12px;text-align:left"'
        lines = ["".join(f'<th scope="col" {cell}>{escape(str(c))}</th>' for c in head)]
        lines += ["".join(f"<td {cell}>{escape(str(c))}</td>" for c in row) for row in rows]
        table = "\n".join(f'<tr style="{LIGHT}">{line}</tr>' for line in lines)
        button = (
            '<button type="button" style="font-size:1em;padding:4px 14px" onclick="{}">{}</button>'
        )
        return "\n".join(
            [
                f'<div class="stepper" role="group" aria-label="{escape(alt or self.alt)}" '
                f'data-lm-suppress-shortcuts="true" onkeydown="event.stopPropagation()" '
                f'style="{LIGHT};max-width:960px;padding:12px;font-family:Arial,sans-serif">',
                '<div aria-live="polite">',
                *figures,
                "</div>",
                '<div style="display:flex;gap:12px;align-items:center;margin:8px 0">',
                button.format(MOVE.format("Down"), "◀ previous"),
                f'<input type="range" min="1" max="{n}" value="1" aria-label="step" '
                f'aria-valuetext="step 1 of {n}" style="flex:1" oninput="{GO}">',
                button.format(MOVE.format("Up"), "next ▶"),
                "</div>",
                "<details><summary>The same as a table</summary>",
                f"<table>{table}</table>",
                "</details></div>",
            ]
        )

    def data(self, alt=None):
        """What a notebook stores, by kind."""
        return {"text/html": self.html(alt), "text/plain": f"Figure: {alt or self.alt}"}

    def _repr_mimebundle_(self, **_):
        return self.data()


def stepper(frames, captions, table, alt):
    """Drawings that a reader steps through by buttons, slider or arrow keys.

    Args:
        frames: `Drawing`s of one height. captions: a sentence for each.
        table: rows of cells that say the same in words, the first of them the heads.
        alt: what the whole shows.

    Raises:
        ValueError: if there is not one caption a frame.
    """
    if len(frames) != len(captions) or not frames:
        raise ValueError(
            f"captions has {len(captions)}; expected one for each of {len(frames)} frames"
        )
    return Stepper(list(frames), list(captions), list(table), alt)


def walk():
    """The backward walk over `diagrams.tape`, a node a step."""
    frames = [tape(step) for step in range(len(WALK) + 1)]
    captions = ["The forward pass has run. Each edge kept what its share will need."]
    table, grads = [("step", "node", "its gradient", "what it hands on")], {"loss": 1}
    for i, (name, (_, _, _, edges)) in enumerate(WALK.items(), 1):
        g, shares = grads[name], []
        for parent, local, factor in edges:
            grads[parent] = grads.get(parent, 0) + g * factor
            shares.append(f"{g} × ({local}) = {g * factor} to {parent}")
        told = " and ".join(shares) or "nothing: a leaf keeps its gradient"
        captions.append(f"Node {name} has ∂ = {g}. It hands on {told}.")
        table.append((i, name, g, told))
    alt = "The backward walk over a small graph, a node a step: loss, d, c, b, a."
    return stepper(frames, captions, table, alt)


# ------------------------------------------------------------------ on a picture


def picture(size=32):
    """A landscape of size × size numbers from -1 to 1: a sky, a sun, two hills and a house."""
    y, x = np.mgrid[:size, :size] * 32 / size
    image = 0.9 - y / 22  # the sky pales towards the ground
    image[(x - 24) ** 2 + (y - 7) ** 2 < 16] = 1.0  # the sun
    image[y > 14 + abs(x - 9) * 0.8] = -0.35
    image[y > 18 + (x - 25) ** 2 / 30] = -0.6
    image[y > 27] = -0.85
    image[(abs(x - 15) < 4) & (y > 20) & (y < 28)] = 0.45  # the house
    image[(abs(x - 15) < 0.9 * (y - 14)) & (y > 14) & (y <= 20)] = 0.8  # its roof
    image[(abs(x - 15) < 1.2) & (y > 23) & (y < 28)] = -0.9  # its door
    return image


def rank_steps(matrix=None, ranks=(1, 2, 4, 8, 16), alpha=8):
    """An update of rank r, as r grows, and what α/r and α/√r do to its size.

    Args:
        matrix: what the update should become, up to 48 × 48; `picture()` if not given.
        ranks: a frame each. alpha: of the scalings.

    The best B A of rank r is the cut SVD (Eckart & Young 1936). If the entries of A and B have
    variance 1, an entry of B A has size √r, so of α/r · B A it has α/√r.
    """
    matrix = picture() if matrix is None else np.asarray(matrix, float)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    top, (rows, cols) = np.abs(matrix).max(), matrix.shape
    frames, captions, table = [], [], [("r", "numbers", "share of the whole", "α/r", "α/√r")]
    for r in ranks:
        best = (u[:, :r] * s[:r]) @ vt[:r]  # (rows, r) @ (r, cols)
        share = 100 * (s[:r] ** 2).sum() / (s**2).sum()
        told = f"{r * (rows + cols):,} numbers"
        d = Drawing(
            f"An update of rank {r}",
            f"The best B A of rank {r} beside the {rows * cols:,} that it should be: {told}, "
            f"{share:.1f}% of the squares. α/r is {alpha / r:.3g}.",
            600,
        )
        d.heat(40, 110, 360, best, top)
        d.heat(460, 110, 360, matrix, top)
        d.text(220, 500, f"B A,  r = {r}", 26, bold=True)
        d.text(220, 540, told, 22)
        d.text(220, 570, f"{share:.1f}% of the squares reached", 22)
        d.text(640, 500, "what it should be", 26, bold=True)
        d.text(640, 540, f"{rows * cols:,} numbers", 22)
        d.text(1060, 110, f"size of an entry at α = {alpha}", 24, bold=True)
        d.text(1060, 142, "A and B random, of size 1", 20, colour=GREY)
        for i, (name, size) in enumerate((("α/r · B A", r**-0.5), ("α/√r · B A", 1.0))):
            y = 205 + 150 * i
            d.text(900, y, name, 24, "start")
            d.box(900, y + 24, 320 * size, 40, look="trained" if i == 0 else "frozen")
            d.text(900, y + 92, f"{alpha * size:.3g}", 24, "start")
        frames.append(d)
        captions.append(
            f"At rank {r} the best B A reaches {share:.1f}% with {told}. "
            f"α/r is {alpha / r:.3g}: more columns, each with a smaller say."
        )
        table.append((r, told, f"{share:.1f}%", f"{alpha / r:.3g}", f"{alpha / r**0.5:.3g}"))
    return stepper(frames, captions, table, "An update of growing rank, drawn as a picture.")


def compress_steps(matrix=None, plan=((0, 8), (50, 5), (62, 4), (75, 3), (88, 2))):
    """A picture pruned, and beside it the same picture in fewer bits.

    Args:
        matrix: up to 48 × 48; `picture()` if not given.
        plan: (percent of the numbers set to zero, bits of each number) for each frame; as given,
            both sides take about as many bytes.

    Pruning drops the smallest and keeps 8 bits of the others, with a mask of 1 bit a number. The
    levels are evenly spaced from the least number to the greatest.
    """
    matrix = picture() if matrix is None else np.asarray(matrix, float)
    top, low, high = np.abs(matrix).max(), matrix.min(), matrix.max()
    order = np.argsort(np.abs(matrix), axis=None, kind="stable")

    def rounded(bits):
        step = (high - low) / (2**bits - 1)
        return low + step * np.rint((matrix - low) / step)

    frames, captions = [], []
    table = [("zeros", "bits a number", "error", "bits, all kept", "error")]
    for percent, bits in plan:
        cut, coarse = rounded(8), rounded(bits)
        cut.flat[order[: matrix.size * percent // 100]] = 0
        lost = [100 * ((m - matrix) ** 2).sum() / (matrix**2).sum() for m in (cut, coarse)]
        size = f"{0.08 * (100 - percent) + bool(percent):.1f}"
        told = (
            f"With {percent}% at zero: {size} bits a number, error {lost[0]:.2f}%. "
            f"With all numbers kept in {bits} bits: error {lost[1]:.2f}%."
        )
        d = Drawing("Fewer numbers, or fewer bits for each", told, 640)
        for x, m, words, error in (
            (130, cut, f"{percent}% pruned: {size} bits a number", lost[0]),
            (730, coarse, f"all kept: {bits} bits a number", lost[1]),
        ):
            d.heat(x, 90, 420, m, top)
            d.text(x + 210, 550, words, 26, bold=True)
            d.text(x + 210, 592, f"error {error:.2f}% of the squares", 24)
        frames.append(d)
        captions.append(told)
        table.append((f"{percent}%", size, f"{lost[0]:.2f}%", bits, f"{lost[1]:.2f}%"))
    return stepper(frames, captions, table, "A picture pruned, and rounded to few bits.")
