"""What every notebook uses: predictions that wait, gaps to fill, safe numbers, figures."""

import hashlib
import io
import json
import logging
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from .tensor import Tensor

if sys.platform == "emscripten":  # there matplotlib is new each time, and would say so in a cell
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


class Prediction:
    """A guess that the reader writes down before the result is known.

    Args:
        what: the quantity, with its unit, in words that no other prediction uses.
        guess: a number or a word; without one the prediction waits, and the notebook runs on.

    The first guess that met its result is kept in a file, so that running the notebook again
    brings it back and a later one does not take its place; `Prediction.forget()` clears it. The
    file is `.minilora-guesses.json` in the reader's home, or what MINILORA_GUESSES names; with
    that set to nothing, or where nothing can be written, no guess is kept.

    Example:
        >>> guess = Prediction("rank that suffices", 4)
        I predict: rank that suffices = 4
        >>> guess.score(1)
        rank that suffices: predicted 4, it is 1: 4 times too high.
    """

    def __init__(self, what, guess=None):
        self.what = what
        self.guess = _kept().get(what) if guess is None else _plain(guess)
        if self.guess is None:
            print(f"{what}: your guess goes in as a second argument. Then run this cell again.")
        else:
            print(f"I predict: {what} = {_told(self.guess)}")

    def score(self, result, digits=3):
        """Say what it is, and how far off the guess was."""
        result = _plain(result)
        if self.guess is None:
            print(f"{self.what}: no prediction yet; it is {_shown(result, digits)}.")
            return
        first = _keep(self.what, self.guess)
        now = "" if first == self.guess else f" at first (now {_told(self.guess)})"
        said, shown = _told(first), _shown(result, digits)
        printed = float(shown.replace(",", "")) if isinstance(result, float) else result
        same = first in (result, printed) or said.strip().lower() == _told(result).lower()
        found = "as it is" if same else f"it is {shown}{_off(first, result)}"
        print(f"{self.what}: predicted {said}{now}, {found}.")

    @staticmethod
    def forget():
        """Forget every guess that was kept."""
        if _guesses():
            _guesses().unlink(missing_ok=True)


def _shown(value, digits):
    """A value as it is printed: a float to so many digits."""
    return number(value, digits) if isinstance(value, float) else _told(value)


def _guesses():
    """The file that keeps guesses, or None."""
    name = os.environ.get("MINILORA_GUESSES", str(Path("~/.minilora-guesses.json").expanduser()))
    return Path(name) if name else None


def _kept():
    """The guesses that were kept: what to guess."""
    try:
        kept = json.loads(_guesses().read_text("utf-8")) if _guesses() else {}
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}


def _keep(what, guess):
    """Keep this guess, unless there is an earlier one, and return the first."""
    kept = _kept()
    if what not in kept and _guesses():
        kept[what] = guess
        with suppress(OSError):  # a folder that can only be read
            _guesses().write_text(json.dumps(kept, ensure_ascii=False, indent=1), "utf-8")
    return kept.get(what, guess)


def _plain(x):
    """x as JSON gives it back, so that a kept guess compares like a new one."""
    return json.loads(json.dumps(x, default=lambda y: getattr(y, "tolist", y.__str__)()))


def _told(x):
    """A guess or a result in words."""
    return f"{x:,}" if isinstance(x, (int, float)) and not isinstance(x, bool) else str(x)


def _off(guess, result):
    """How far a guess is from the result, both plain, if they are numbers."""
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (guess, result)):
        return ""
    side = "high" if guess > result else "low"
    factor = max(guess / result, result / guess) if guess * result > 0 else 1
    if factor >= 2:
        return f": {factor:,.3g} times too {side}"
    return f": too {side} by {abs(guess - result):,.3g}"


def gap(mine, right, use, hint=""):
    """Try lines that a reader wrote, say what is off, and return the function to go on with.

    Args:
        mine: the reader's function. It returns None as long as nothing is written.
        right: a function that does the same.
        use: takes either and returns what to compare: numbers, arrays, tensors, words, modules,
            and lists and dictionaries of them. It must leave no trace, since it is called twice.
        hint: a sentence for lines that are wrong.

    Returns:
        `mine` if it does what `right` does, to 1e-6 of the largest number, and else `right`.

    Example:
        >>> double = gap(lambda x: x + x, lambda x: 2 * x, lambda f: f(np.ones(3)))
        Right.
    """
    nothing = []

    def watched(*args, **kwargs):
        result = mine(*args, **kwargs)
        nothing.append(result is None)
        return result

    want = dict(_leaves(use(right)))
    try:
        wrong = _difference(dict(_leaves(use(watched))), want)
    except Exception as error:  # whatever the reader wrote
        wrong = f"{type(error).__name__}: {error}"
        nothing.append(isinstance(error, NotImplementedError))
    if not wrong:
        print("Right.")
        return mine
    if any(nothing):
        print("No answer yet: your lines go in place of the dots, and end on a return.")
    else:
        print(f"Not yet: {wrong}." + (f" Hint: {hint}" if hint else ""))
    print("What follows goes on with a right one.")
    return right


def _leaves(x, where=""):
    """(place, array) for every value in what a function returned."""
    if hasattr(x, "named_parameters"):
        x = dict(x.named_parameters())
    if isinstance(x, (list, tuple)):
        x = dict(enumerate(x))
    if isinstance(x, dict):
        for key, value in x.items():
            yield from _leaves(value, f"{where}[{key}]" if where else str(key))
    else:
        yield where, np.asarray(x.data if isinstance(x, Tensor) else x)


def _difference(got, want):
    """What is off, in words: the shape, or how far at most and where; empty if nothing is."""
    if set(got) != set(want):
        return f"it returns {len(got)} values; expected {len(want)}"
    for place, right in want.items():
        mine, named = got[place], f"{place}: " if place else ""
        if mine.shape != right.shape:
            return f"{named}the shape is {mine.shape}; expected {right.shape}"
        if right.dtype.kind not in "biuf" or mine.dtype.kind not in "biuf":
            if not np.array_equal(mine, right):
                return f"{named}it is {mine}; expected something else"
            continue
        mine, right = mine.astype(float), right.astype(float)
        same = (mine == right) | np.isnan(mine) & np.isnan(right)  # two infinities, too
        off = np.where(same, 0, np.abs(np.where(same, 0, mine) - np.where(same, 0, right)))
        off = np.where(np.isnan(off), np.inf, off)
        far = off > 1e-6 * np.abs(right[np.isfinite(right)]).max(initial=0)
        if far.any() and not far.ndim:
            return f"{named}it is off by {off.max():.2g}"
        if far.any():
            at = [int(i) for i in np.unravel_index(off.argmax(), off.shape)]
            return (
                f"{named}{far.sum():,} of {far.size:,} numbers differ; "
                f"the largest difference is {off.max():.2g}, at {at}"
            )
    return ""


def digest(answer):
    """Eight letters that stand for an answer, so that a check need not show it.

    Args:
        answer: a whole number, a word, a truth, a number that counts to three digits, or a list
            or tuple of these.

    Raises:
        ValueError: if a number is on a rounding boundary.
    """
    return hashlib.sha256(_spelled(answer).encode()).hexdigest()[:8]


def _spelled(x):
    """An answer in one spelling: 3 and 3.0 are the same, and so are "B" and " b"."""
    x = _plain(x)
    if isinstance(x, list):
        return f"[{', '.join(map(_spelled, x))}]"
    if isinstance(x, float):
        return str(int(x)) if x.is_integer() else number(x)
    return str(x).strip().lower()


def check(answer, test, hint):
    """Tell a student whether an answer is right.

    Args:
        answer: what the student wrote, or `None` for nothing yet.
        test: takes the answer and returns whether it is right, where an error counts as wrong; or
            the `digest` of the right answer.
        hint: a sentence for an answer that is wrong.
    """
    if answer is None:
        print("No answer yet: put yours in place of None, and run this cell again.")
        return
    try:
        right, why = digest(answer) == test if isinstance(test, str) else bool(test(answer)), ""
    except Exception as error:
        right, why = False, f" ({type(error).__name__}: {error})"
    print("Right." if right else f"Not yet{why}. Hint: {hint}")


def number(x, digits=3, margin=1e-6):
    """`x` as text with `digits` significant digits, if these come out the same on every machine.

    Args:
        x: a number. digits: from 1 to 4.
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
