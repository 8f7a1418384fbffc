"""Each shared figure holds the numbers that it was given, with labels and units."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgba

from minilora import plots


@pytest.fixture(autouse=True)
def closed():
    """No window opens, and no figure outlives its test."""
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def lines(ax):
    return [line.get_xydata().tolist() for line in ax.lines]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_style_holds_for_what_is_drawn():
    fig, ax = plots.new()
    (line,) = ax.plot([1, 2], label="one")
    box = ax.legend()
    assert list(fig.get_size_inches()) == [8, 4.5]
    assert to_rgba(line.get_color()) == to_rgba(plots.COLOURS[0])
    assert (line.get_linewidth(), box.get_frame_on()) == (2.2, False)
    assert not ax.spines["top"].get_visible() and not ax.spines["right"].get_visible()
    assert ax.xaxis.label.get_size() == mpl.rcParams["font.size"] == 14


def test_new_takes_a_grid_a_size_and_the_arguments_of_subplots():
    fig, axes = plots.new(2, 3, size=(9, 6), sharex=True)
    assert axes.shape == (2, 3) and list(fig.get_size_inches()) == [9, 6]
    axes[0, 0].set_xlim(3, 7)
    assert axes[1, 0].get_xlim() == (3, 7)


def test_colours_and_markers_are_all_different():
    assert len(set(plots.COLOURS)) == len(set(plots.MARKERS)) == 7


def test_fan_draws_a_line_through_the_means_a_dot_a_seed_and_names_that_stand_apart():
    scores = {
        "full": {"near": [1.0, 0.9], "far": [0.8, 1.0]},
        "bias": {"near": [0.5, 0.7], "far": [0.0, 0.02]},
        "row": {"near": 0.4, "far": 0.0},
    }
    fig = plots.fan(scores, "a title")
    (ax,) = fig.axes
    np.testing.assert_allclose(
        lines(ax), [[[0, 95], [1, 90]], [[0, 60], [1, 1]], [[0, 40], [1, 0]]]
    )
    dots = [tuple(at) for c in ax.collections for at in c.get_offsets().tolist()]
    assert (1, 80) in dots and (1, 100) in dots and len(dots) == 4 + 4 + 2
    assert [t.get_text() for t in ax.get_xticklabels()] == ["near", "far"]
    names = {t.get_text(): t.xyann[1] for t in ax.texts}
    assert list(names) == ["row", "bias", "full"]  # from the lowest
    assert names["full"] == 90 and names["bias"] - names["row"] >= 6
    assert (ax.get_ylabel(), ax.get_title()) == ("exact match (%)", "a title")


def test_accuracy_puts_each_method_at_its_place():
    rows = [("full", 104256, 0.93), ("lora", 9216, 0.85), ("bitfit", 1152, 0.0)]
    fig = plots.accuracy(rows, "a title")
    (ax,) = fig.axes
    np.testing.assert_allclose(lines(ax), [[[104256, 93]], [[9216, 85]], [[1152, 0]]])
    assert len({line.get_color() for line in ax.lines}) == 3
    assert len({line.get_marker() for line in ax.lines}) == 3
    labels = {t.get_text(): t.xy for t in ax.texts}
    assert labels.keys() == {"full\n104,256", "lora\n9,216", "bitfit\n1,152"}
    assert labels["lora\n9,216"] == (9216, 85)
    assert ax.get_xscale() == "log"
    assert ax.get_xlim() == (1152 / 4, 104256 * 4) and ax.get_ylim() == (-5, 105)
    assert ax.get_xlabel() == "trainable parameters (log scale)"
    assert (ax.get_ylabel(), ax.get_title()) == ("exact match (%)", "a title")


def test_accuracy_takes_more_methods_than_there_are_colours():
    fig = plots.accuracy([(f"m{i}", 1000 + i, i / 10) for i in range(9)])
    (ax,) = fig.axes
    assert len({(line.get_marker(), line.get_color()) for line in ax.lines}) == 9
    assert not ax.texts  # they would cover one another: a legend in their place
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == [f"m{i} ({1000 + i:,})" for i in range(9)]


def test_accuracy_may_be_against_something_else():
    fig = plots.accuracy([(f"m{i}", 10 + i, 0.5) for i in range(5)], unit="bytes of the file")
    assert fig.axes[0].get_xlabel() == "bytes of the file (log scale)"
    assert fig.legends[0].get_title().get_text() == "method (bytes)"


def test_losses_are_running_means_at_the_last_step_of_their_window():
    (ax,) = plots.losses({"full": [4.0, 2.0, 0.0, 6.0], "lora": [1.0] * 3}, window=2).axes
    assert lines(ax) == [[[2, 3], [3, 1], [4, 3]], [[2, 1], [3, 1]]]
    assert legend(ax) == ["full", "lora"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (nats per token)")


def test_losses_average_over_ten_steps_unless_told():
    (ax,) = plots.losses({"a": list(range(20))}, title="a title").axes
    np.testing.assert_allclose(lines(ax), [[[10 + i, 4.5 + i] for i in range(11)]])
    assert ax.get_title() == "a title"


def test_a_floor_is_a_dashed_line_with_a_label():
    (ax,) = plots.losses({"a": [1.0, 1.0]}, floor=("chance", 2.77), window=1).axes
    floor = ax.lines[-1]
    assert list(floor.get_ydata()) == [2.77, 2.77] and floor.get_linestyle() == "--"
    assert legend(ax) == ["a", "chance"]


def test_a_run_shorter_than_the_window_shows_nothing_that_is_no_mean():
    (ax,) = plots.losses({"a": [4.0, 4.0, 4.0]}, window=10).axes
    assert all(y == pytest.approx(4) for _, y in lines(ax)[0])


@pytest.mark.parametrize("log, scale", [(True, "log"), (False, "linear")])
def test_spectra_count_from_one(log, scale):
    (ax,) = plots.spectra({"W": np.array([3.0, 2.0, 1.0]), "noise": [5.0, 4.0]}, "t", log).axes
    assert lines(ax) == [[[1, 3], [2, 2], [3, 1]], [[1, 5], [2, 4]]]
    assert ax.get_yscale() == scale and legend(ax) == ["W", "noise"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("index i", "singular value σᵢ")
    assert ax.get_title() == "t"


@pytest.mark.parametrize(
    "symmetric, cmap, limits", [(False, "viridis", (-3, 2)), (True, "RdBu_r", (-3, 3))]
)
def test_heat_shows_a_matrix_with_a_colour_bar(symmetric, cmap, limits):
    fig, ax = plots.new()
    matrix = np.array([[1.0, -3.0, 0.0], [2.0, 0.0, 1.0]])
    image = plots.heat(ax, matrix, "t", "column", "row", symmetric)
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.get_cmap().name == cmap and image.get_clim() == limits
    assert len(fig.axes) == 2 and image.colorbar is not None
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("t", "column", "row")


def test_heat_of_zeros_has_limits():
    _, ax = plots.new()
    assert plots.heat(ax, np.zeros((2, 2)), symmetric=True).get_clim() == (-1, 1)
