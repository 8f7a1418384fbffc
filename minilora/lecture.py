"""What every notebook uses: recorded predictions, numbers that are safe to print, figures."""

import io
import math
from numbers import Integral, Real


class Prediction:
    """A guess that is written down before the result is known.

    Args:
        what: the quantity, with its unit. guess: a number or a word.

    Example:
        >>> guess = Prediction("rank that suffices", 4)
        I predict: rank that suffices = 4
        >>> guess.score(1)
        rank that suffices: predicted 4, it is 1.
    """

    def __init__(self, what, guess):
        self.what, self.guess = what, guess
        print(f"I predict: {what} = {guess}")

    def score(self, result, digits=3):
        """Print the guess beside the result."""
        is_float = isinstance(result, Real) and not isinstance(result, Integral)
        told = "as it is"
        if self.guess != result:
            told = f"it is {number(result, digits) if is_float else result}"
        print(f"{self.what}: predicted {self.guess}, {told}.")


def check(answer, test, hint):
    """Tell a student whether an answer is right.

    Args:
        answer: what the student wrote, or `None` for nothing yet.
        test: takes the answer and returns whether it is right; an error counts as wrong.
        hint: a sentence for an answer that is wrong.
    """
    if answer is None:
        print("No answer yet: put yours in place of None, and run this cell again.")
        return
    try:
        right, why = bool(test(answer)), ""
    except Exception as error:
        right, why = False, f" ({type(error).__name__}: {error})"
    print("Right." if right else f"Not yet{why}. Hint: {hint}")


def number(x, digits=3, margin=1e-6):
    """`x` as text with `digits` significant digits, if these come out the same on every machine.

    Args:
        x: a number.
        digits: from 1 to 4.
        margin: how near, relative to x, a rounding boundary may be: more than what another
            machine's arithmetic can move x.

    Raises:
        ValueError: if x is not finite, or so near a boundary that its last digit is chance.
    """
    x = float(x)
    if not 1 <= digits <= 4:
        raise ValueError(f"digits is {digits}; expected 1 to 4")
    if not math.isfinite(x):
        raise ValueError(f"x is {x}; expected a finite number")
    text = f"{x:.{digits - 1}e}"
    if any(f"{x * (1 + sign * margin):.{digits - 1}e}" != text for sign in (-1, 1)):
        raise ValueError(f"x is {x!r}, on a rounding boundary at {digits} digits; print fewer")
    exponent = int(text.split("e")[1])
    if -5 < exponent < 7:
        return f"{float(text):,.{max(0, digits - 1 - exponent)}f}"
    return text


def show(fig, alt=None, dpi=144):
    """Show a figure with a text for those who cannot see it, and close it.

    Args:
        fig: a matplotlib figure, which becomes a PNG, since the last digits of an SVG of data
            differ between machines; or a drawing or a stepper of `plots`, which is text.
        alt: one sentence that says what the figure shows; a drawing brings its own.
        dpi: dots per inch of a PNG. An inch of it is shown as 96 pixels of the page.
    """
    from IPython.display import display  # only notebooks need it

    if hasattr(fig, "data"):
        display(fig.data(alt), raw=True)
        return
    if not alt:
        raise ValueError(f"alt is {alt!r}; expected a sentence that says what the figure shows")
    from matplotlib import pyplot

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(fig)
    png = buffer.getvalue()
    width, height = (int.from_bytes(png[i : i + 4], "big") * 96 // dpi for i in (16, 20))
    look = {"alt": alt, "width": width, "height": height}
    data = {"image/png": png, "text/plain": f"Figure: {alt}"}
    display(data, raw=True, metadata={"image/png": look})
