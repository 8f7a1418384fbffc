"""What the notebooks lean on: predictions, answers, safe numbers, figures with a text."""

import math

import numpy as np
import pytest
from matplotlib import pyplot

from minilora import Prediction, check, number, plots, show

# ------------------------------------------------------------------ number


@pytest.mark.parametrize(
    "x, digits, text",
    [
        (0.123456, 3, "0.123"),
        (0.123456, 1, "0.1"),
        (0.123456, 4, "0.1235"),
        (-1.23456, 3, "-1.23"),
        (9.9996, 3, "10.0"),
        (1234.567, 3, "1,230"),
        (1234.567, 4, "1,235"),
        (1234567, 3, "1,230,000"),
        (12345678, 3, "1.23e+07"),
        (0.000123456, 3, "0.000123"),
        (0.0000123456, 3, "1.23e-05"),
        (0, 3, "0.00"),
        (3, 2, "3.0"),
        (np.float32(0.3333333), 3, "0.333"),
        (np.int64(7), 1, "7"),
    ],
)
def test_a_number_shows_its_digits(x, digits, text):
    assert number(x, digits) == text


def test_three_digits_unless_told():
    assert number(math.pi) == "3.14"


@pytest.mark.parametrize(
    "x, digits",
    [(0.125, 2), (2.5, 1), (0.9995, 3), (99.95, 3), (-0.125, 2), (1.2345, 4), (1.2345000001, 4)],
)
def test_a_number_on_a_rounding_boundary_is_refused(x, digits):
    with pytest.raises(ValueError, match="boundary"):
        number(x, digits)


def test_the_margin_is_relative_and_can_be_widened():
    assert number(1.2345 * (1 + 3e-6), 4) == "1.235"
    assert number(1.2345 * (1 - 3e-6), 4) == "1.234"
    for side in (1 + 3e-6, 1 - 3e-6):
        with pytest.raises(ValueError, match="boundary"):
            number(1.2345 * side, 4, margin=1e-5)


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(x):
    with pytest.raises(ValueError, match="finite"):
        number(x)


@pytest.mark.parametrize("digits", [0, 5])
def test_digits_run_from_one_to_four(digits):
    with pytest.raises(ValueError, match="digits"):
        number(1.5, digits)


# ------------------------------------------------------------------ Prediction


def test_a_prediction_is_told_before_and_compared_after(capsys):
    guess = Prediction("rank that suffices", 4)
    assert capsys.readouterr().out == "I predict: rank that suffices = 4\n"
    guess.score(1)
    assert capsys.readouterr().out == "rank that suffices: predicted 4, it is 1.\n"
    guess.score(4)
    assert capsys.readouterr().out == "rank that suffices: predicted 4, as it is.\n"


@pytest.mark.parametrize("result", [1 / 3, np.float64(1 / 3), np.float32(1 / 3)])
def test_a_result_that_is_a_float_is_printed_safely(capsys, result):
    guess = Prediction("share", 0.5)
    guess.score(result)
    guess.score(result, digits=2)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "share: predicted 0.5, it is 0.333.",
        "share: predicted 0.5, it is 0.33.",
    ]
    with pytest.raises(ValueError, match="boundary"):
        guess.score(type(result)(0.125), digits=2)


def test_a_result_may_be_a_word(capsys):
    Prediction("which falls first", "the loss").score("the accuracy")
    told = capsys.readouterr().out.splitlines()[1]
    assert told == "which falls first: predicted the loss, it is the accuracy."


# ------------------------------------------------------------------ check


@pytest.mark.parametrize(
    "answer, told",
    [
        (None, "No answer yet: put yours in place of None, and run this cell again."),
        (4, "Right."),
        (5, "Not yet. Hint: count the rows."),
        (
            "x",
            'Not yet (TypeError: can only concatenate str (not "int") to str). '
            "Hint: count the rows.",
        ),
    ],
)
def test_a_student_is_told_whether_the_answer_is_right(capsys, answer, told):
    check(answer, lambda n: n + 0 == 4, "count the rows.")
    assert capsys.readouterr().out == told + "\n"


# ------------------------------------------------------------------ show


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, as (data, settings) pairs."""
    seen = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **settings: seen.append((data, settings))
    )
    return seen


def test_show_displays_a_png_with_its_text_and_closes_the_figure(shown):
    fig, ax = pyplot.subplots()
    ax.plot([1, 2])
    assert show(fig, "a line that rises") is None
    ((data, settings),) = shown
    assert data["image/png"].startswith(b"\x89PNG\r\n")
    assert data["text/plain"] == "Figure: a line that rises"
    look = settings["metadata"]["image/png"]
    assert settings["raw"] and look["alt"] == "a line that rises"
    wide, high = (int.from_bytes(data["image/png"][i : i + 4], "big") for i in (16, 20))
    assert (look["width"], look["height"]) == (wide * 96 // 144, high * 96 // 144)
    assert not pyplot.fignum_exists(fig.number)


def test_the_same_figure_gives_the_same_bytes_and_dpi_counts(shown):
    for dpi in (72, 72, 144):
        fig, ax = pyplot.subplots(figsize=(2, 1))
        ax.plot([1, 2])
        show(fig, "a line", dpi=dpi)
    first, second, large = (data["image/png"] for data, _ in shown)
    assert first == second
    widths = [int.from_bytes(png[16:20], "big") for png in (first, large)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=3)
    assert b"Software" not in first  # the version of matplotlib stays out of the file


def test_a_figure_of_numbers_needs_words():
    with pytest.raises(ValueError, match="alt is None; expected a sentence"):
        show(pyplot.figure())
    pyplot.close("all")


@pytest.mark.parametrize("own", [True, False])
def test_show_takes_a_drawing_with_its_own_words_or_with_others(shown, own):
    drawing = plots.bypass()
    show(*[drawing, "the bypass"][: 1 if own else 2])
    ((data, settings),) = shown
    words = drawing.alt if own else "the bypass"
    assert data == {"image/svg+xml": drawing.svg(words), "text/plain": f"Figure: {words}"}
    assert settings == {"raw": True} and f"<title>{words}</title>" in data["image/svg+xml"]


def test_show_takes_a_stepper(shown):
    show(plots.walk())
    ((data, _),) = shown
    assert data["text/html"].startswith('<div class="stepper"')
    assert data["text/plain"].startswith("Figure: The backward walk")
