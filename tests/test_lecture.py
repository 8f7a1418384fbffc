"""What the notebooks lean on: predictions, answers, safe numbers, figures with a text."""

import json
import math
import os

import numpy as np
import pytest
from matplotlib import pyplot

from minilora import Linear, Prediction, Tensor, check, digest, gap, number, plots, show

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


@pytest.fixture
def says(capsys):
    """What has been printed since it was last asked."""
    return lambda: capsys.readouterr().out


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file in which a reader's guesses are kept; the tests otherwise keep none."""
    monkeypatch.setenv("MINILORA_GUESSES", str(tmp_path / "guesses.json"))
    return tmp_path / "guesses.json"


def test_a_prediction_waits_and_gives_nothing_away(says):
    guess = Prediction("rank that suffices")
    assert "rank that suffices: your guess goes in" in says()
    guess.score(3)
    assert says() == "rank that suffices: no prediction yet; it is 3.\n"
    guess.score(1 / 3, digits=2)
    assert says() == "rank that suffices: no prediction yet; it is 0.33.\n"


@pytest.mark.parametrize(
    "guess, result, told",
    [
        (4, 4, "predicted 4, as it is."),
        (4, 4.0, "predicted 4, as it is."),
        (0.25, 0.25004, "predicted 0.25, as it is."),
        (50, 50.004, "predicted 50, as it is."),
        (1300, 1300.4, "predicted 1,300, as it is."),
        (0.1235, 0.247, "predicted 0.1235, it is 0.247: 2 times too low."),  # a guess may be a tie
        (4, 1, "predicted 4, it is 1: 4 times too high."),
        (10, 104256, "predicted 10, it is 104,256: 1.04e+04 times too low."),
        (0.5, np.float32(0.4), "predicted 0.5, it is 0.400: too high by 0.1."),
        (3, np.int64(4), "predicted 3, it is 4: too low by 1."),
        (-1, 2, "predicted -1, it is 2: too low by 3."),
        (1, 0, "predicted 1, it is 0: too high by 1."),
        ("A", "B", "predicted A, it is B."),
        (" b", "B", "predicted  b, as it is."),
        (True, False, "predicted True, it is False."),
        ((0, 1), [0, 1], "predicted [0, 1], as it is."),
        ("4", 5, "predicted 4, it is 5."),
    ],
)
def test_a_guess_is_told_before_and_how_far_off_it_was_after(says, guess, result, told):
    prediction = Prediction("it", guess)
    assert says().startswith("I predict: it = ")
    prediction.score(result)
    assert says() == f"it: {told}\n"


def test_a_result_near_a_rounding_boundary_is_refused():
    with pytest.raises(ValueError, match="boundary"):
        Prediction("share", 0.5).score(0.125, digits=2)


def test_the_first_guess_that_met_its_result_is_kept(says, kept):
    Prediction("it", 5)  # corrected before the result is out
    Prediction("it", 4).score(1)
    says()
    Prediction("it", 1).score(1)
    assert says().endswith("it: predicted 4 at first (now 1), it is 1: 4 times too high.\n")
    Prediction("it").score(1)  # the notebook, fetched anew
    assert says() == "I predict: it = 4\nit: predicted 4, it is 1: 4 times too high.\n"
    Prediction("another").score(1)
    assert "no prediction yet" in says()
    Prediction.forget()
    assert not kept.exists()
    Prediction.forget()
    Prediction("it").score(1)
    assert "no prediction yet" in says()


def test_where_no_guess_can_be_kept_all_runs_on(says, kept):
    kept.mkdir()
    Prediction("it", 4).score(1)
    Prediction("it", 3).score(1)
    assert says().endswith("it: predicted 3, it is 1: 3 times too high.\n")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_file_that_holds_no_guesses_is_written_anew(says, kept, text):
    kept.write_bytes(text.encode("latin-1"))
    Prediction("it", 4).score(1)
    assert json.loads(kept.read_text("utf-8")) == {"it": 4}


def test_tests_keep_no_guess():
    assert os.environ["MINILORA_GUESSES"] == ""


# ------------------------------------------------------------------ gap

X = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "mine, told",
    [
        (lambda x: x + x, "Right."),
        (lambda x: Tensor(x + x * (1 + 1e-9)), "Right."),
        (lambda x: None, "No answer yet: your lines go in place of the dots"),
        (lambda x: x.T, "Not yet: the shape is (3, 2); expected (2, 3). Hint: add."),
        (
            lambda x: x + x - (x == 4),
            "Not yet: 1 of 6 numbers differ; the largest difference is 1, at [1, 1]. Hint: add.",
        ),
        (lambda x: x * np.nan, "Not yet: 6 of 6 numbers differ; the largest difference is inf"),
        (lambda x: [x, x], "Not yet: it returns 2 values; expected 1"),
        (lambda x: x.no, "Not yet: AttributeError: 'numpy.ndarray' object has no attribute 'no'"),
        (lambda x: "word", "Not yet: the shape is (); expected (2, 3)"),
    ],
)
def test_a_gap_says_what_is_off_and_gives_the_function_to_go_on_with(says, mine, told):
    def right(x):
        return x + x

    found = gap(mine, right, lambda f: f(X), "add.")
    assert says().startswith(told)
    assert found is (mine if told == "Right." else right)


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f(X).sum(),
        lambda f: {"sum": [f(X).sum()], "word": "same"},
        lambda f: (f(X) > 4, [np.inf, np.nan, -np.inf]),
        lambda f: Linear(3, 2, rng=np.random.default_rng(int(f(X).sum()))),
    ],
)
def test_a_gap_compares_whatever_use_makes_of_it(says, use):
    assert gap(np.positive, np.positive, use) is np.positive
    assert gap(np.negative, np.abs, use) is np.abs
    assert gap(lambda x: None, np.abs, use) is np.abs  # whatever becomes of the None
    first, second, _, third, _ = says().splitlines()
    assert first == "Right." and second.startswith("Not yet: ")
    assert third.startswith("No answer yet")


def test_a_single_value_is_named_and_told_by_how_much(says):
    gap(lambda: 1.0, lambda: 3.0, lambda f: {"loss": f()})
    gap(lambda: "a", lambda: "b", lambda f: {"word": f()})
    told = says()
    assert "Not yet: loss: it is off by 2.\n" in told
    assert "Not yet: word: it is a; expected something else.\n" in told


def test_what_nbgrader_leaves_is_no_answer_yet(says):
    def mine():
        raise NotImplementedError

    gap(mine, int, lambda f: f())
    assert says().startswith("No answer yet")


def test_an_error_of_the_author_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        gap(int, int, lambda f: 1 / f())


# ------------------------------------------------------------------ digest


@pytest.mark.parametrize(
    "one, other",
    [
        (3, 3.0),
        (3, np.int64(3)),
        ("B", " b "),
        (1 / 3, 0.333333),
        (1 / 3, 0.333),
        ([1, "q"], (1.0, "Q")),
        (np.arange(3), [0, 1, 2]),
    ],
)
def test_the_same_answer_has_the_same_digest(one, other):
    assert digest(one) == digest(other)
    assert len(digest(one)) == 8


def test_other_answers_have_other_digests():
    answers = [3, 4, 2560, 2561, 0.333, 0.334, "A", "B", True, [1, 2], [2, 1], 12]
    assert len({digest(answer) for answer in answers}) == len(answers)
    with pytest.raises(ValueError, match="boundary"):
        digest(0.1235)


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


@pytest.mark.parametrize(
    "answer, told",
    [(None, "No answer yet"), (4, "Right."), (4.0, "Right."), (5, "Not yet."), ([4], "Not yet.")],
)
def test_an_answer_may_be_checked_by_its_digest(capsys, answer, told):
    check(answer, digest(4), "count the rows.")
    assert capsys.readouterr().out.startswith(told)


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
