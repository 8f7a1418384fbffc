"""Charts hold the numbers that they were given; diagrams and steppers are text that can be read."""

import functools
import itertools
import re
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgba

from minilora import Tensor, plots
from minilora.compress.factor import make_up
from minilora.plots.diagrams import WALK
from minilora.plots.drawing import LOOKS, shade
from surroundings import ROOT


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


# ------------------------------------------------------------------ diagrams

BARS = {"full": (32.1, 32.1, 64.2, 45), "LoRA, r = 4": (32.1, 0.3, 0.6, 32), "frozen": (4, 0, 0, 9)}
DIAGRAMS = {
    "adapter": plots.adapter,
    "attention": plots.attention,
    "block": plots.block,
    "bypass": plots.bypass,
    "gather": plots.gather,
    "gather of two": lambda: plots.gather((None, "a")),
    "gather of four": lambda: plots.gather(("reverse", "sort", "caesar", "upper")),
    "gptq": plots.gptq,
    "low_rank": plots.low_rank,
    "low_rank, wide": lambda: plots.low_rank(48, 192, 8),
    "low_rank, full": lambda: plots.low_rank(64, 64, 64),
    "low_rank, large": lambda: plots.low_rank(12288, 12288, 4),
    "memory": lambda: plots.memory(BARS, "MiB"),
    "methods": plots.methods,
    "prefix": plots.prefix,
    "prefix of 4": lambda: plots.prefix(4, 6),
    **{f"tape {i}": functools.partial(plots.tape, i) for i in range(6)},
}
STEPPERS = {
    "walk": plots.walk,
    "rank_steps": plots.rank_steps,
    "compress_steps": plots.compress_steps,
}
FRAMES = {
    f"{name} {i}": functools.partial(lambda make, i: make().frames[i], make, i)
    for name, make in STEPPERS.items()
    for i in range(5)
}
drawn = pytest.mark.parametrize("make", (DIAGRAMS | FRAMES).values(), ids=[*DIAGRAMS, *FRAMES])
moving = pytest.mark.parametrize("make", STEPPERS.values(), ids=STEPPERS)


def faults(svg):
    """What a reader would stumble on: words cut off, or on top of words, edges or arrows.

    No font is measured: a letter is taken to be .52 of its size wide, .55 if bold; in Arial these
    words come to .44 to .49.
    """
    root, rects, words, segments, ground = ElementTree.fromstring(svg), [], [], [], None
    height = float(root.get("viewBox").split()[3])
    for item in root:
        at, kind = item.attrib, item.tag.rpartition("}")[2]
        if kind == "rect":
            x, y, w, h = (
                (float(at[k]) for k in ("x", "y", "width", "height")) if "x" in at else 4 * (0,)
            )
            ground = (x, y, x + w, y + h)
            if "stroke" in at:
                rects.append(ground)
        elif kind == "circle":
            x, y, r = (float(at[k]) for k in ("cx", "cy", "r"))
            ground = (x - r, y - r, x + r, y + r)
        elif kind == "text":
            size, x, y = (float(at[k]) for k in ("font-size", "x", "y"))
            w = size * len(item.text) * (0.55 if "font-weight" in at else 0.52)
            x -= {"start": 0, "middle": w / 2, "end": w}[at["text-anchor"]]
            words.append((item.text, (x, y - 0.72 * size, x + w, y + 0.2 * size), ground))
        elif kind == "polyline":
            points = [tuple(map(float, p.split(","))) for p in at["points"].split()]
            segments += itertools.pairwise(points)
    everything = [(text, box) for text, box, _ in words] + [("a box", r) for r in rects]
    for text, (x0, y0, x1, y1) in everything:
        if x0 < 0 or y0 < 0 or x1 > 1280 or y1 > height:
            yield f"{text!r} leaves the sheet"
    for (text, box, _), (other, second, _) in itertools.combinations(words, 2):
        if meet(box, second):
            yield f"{text!r} lies on {other!r}"
    for first, second in itertools.combinations(rects, 2):
        if meet(first, second) and not inside(first, second) and not inside(second, first):
            yield f"boxes {first} and {second} overlap"
    for text, box, below in words:
        if any(meet(box, rect) and not inside(box, rect) for rect in rects):
            yield f"{text!r} crosses an edge"
        on_ground = below is not None and inside(box, below) and below not in rects
        if not on_ground and any(crosses(line, box) for line in segments):
            yield f"an arrow runs through {text!r}"


def meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def crosses(line, box):
    """Whether a line passes through a box, by points on it."""
    (x0, y0), (x1, y1) = line
    t = np.linspace(0, 1, 200)  # (200,)
    x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
    return bool(((box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])).any())


@drawn
def test_a_drawing_can_be_read(make):
    svg = make().svg()
    assert list(faults(svg)) == []
    sizes = [int(size) for size in re.findall(r'font-size="(\d+)"', svg)]
    assert min(sizes) >= 20  # 15 pixels where a page shows it 960 wide


@drawn
def test_a_drawing_is_light_text_with_a_ground_and_words_of_its_own(make):
    drawing = make()
    svg = drawing.svg()
    root = ElementTree.fromstring(svg)
    assert len(svg.encode()) < 60_000 and svg == make().svg()
    assert root.get("role") == "img" and root.get("aria-label") == drawing.alt == root[0].text
    assert len(drawing.alt) > 60 and drawing.alt.endswith(".")
    assert (root[1].get("fill"), root[1].get("width")) == ("#FFFFFF", "1280")
    # An id would be shared by all that stands on one page; a link would need the net.
    assert not re.search(r"\bid=|href|url\(|<script", svg)
    assert not re.search(r"\d\.\d\d+[\s\",]", re.sub(r"<text.*|<title.*|<svg.*", "", svg))


def test_the_reading_test_can_fail():
    def found(draw):
        d = plots.Drawing("", "nothing")
        draw(d)
        return " ".join(faults(d.svg()))

    assert found(lambda d: d.text(640, 360, "words")) == ""
    assert "leaves" in found(lambda d: d.text(10, 360, "words"))
    assert "leaves" in found(lambda d: d.box(1200, 10, 100, 50))
    assert "lies on" in found(lambda d: (d.text(640, 360, "one"), d.text(650, 365, "two")))
    assert "overlap" in found(lambda d: (d.box(10, 10, 90, 90), d.box(50, 50, 90, 90)))
    assert "edge" in found(lambda d: d.box(10, 10, 90, 90, "far too long for it"))
    assert "arrow" in found(lambda d: (d.text(640, 360, "words"), d.arrow((0, 360), (900, 360))))
    assert found(lambda d: (d.arrow((0, 360), (900, 360)), d.text(640, 360, "on", halo=True))) == ""


def test_drawings_are_the_same_letters_in_another_process():
    text = "p.methods().svg() + p.gptq().svg() + p.rank_steps().html() + p.gather().svg()"
    code = f"from minilora import plots as p; import zlib; print(zlib.crc32(({text}).encode()))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert int(run.stdout) == zlib.crc32(eval(text, {"p": plots}).encode())


def test_words_are_escaped_and_lines_stand_apart():
    d = plots.Drawing("a < b & c", 'say "a < b"')
    d.text(100, 100, "one\ntwo", 20)
    root = ElementTree.fromstring(d.svg())
    assert root.get("aria-label") == root[0].text == 'say "a < b"'
    (title, one, two) = root.iter("{http://www.w3.org/2000/svg}text")
    assert (title.text, one.text, two.text) == ("a < b & c", "one", "two")
    assert float(two.get("y")) - float(one.get("y")) == 24


def test_an_arrow_ends_in_its_head():
    d = plots.Drawing("", "an arrow")
    d.arrow((0, 0), (100, 0), width=3)
    line, head = d.parts
    assert 'points="0,0 86,0"' in line and 'points="100,0 86,7 86,-7"' in head


def test_heat_is_blue_below_white_at_and_orange_above_zero():
    assert (shade(-8), shade(0), shade(8)) == ("#0072B2", "#FFFFFF", "#C85000")
    d = plots.Drawing("", "a heat map")
    d.heat(10, 20, 100, [[-1, -1, 0], [0, 1, 9]], 1)
    assert 'transform="translate(10 20) scale(33)"' in d.parts[0]
    assert 'stroke="#0072B2" d="M0 0h2"' in d.parts[1]
    assert 'stroke="#FFFFFF" d="M2 0h1M0 1h1"' in d.parts[2]
    assert 'stroke="#C85000" d="M1 1h2"' in d.parts[3]  # 9 is cut off at the top


# ------------------------------------------------------------------ what diagrams say is true


def test_the_tape_shows_what_the_engine_computes():
    a, b = Tensor(2.0, requires_grad=True), Tensor(3.0, requires_grad=True)
    c = a * b
    d = c + a
    loss = d * d
    loss.backward()
    values = {"a": a, "b": b, "c": c, "d": d, "loss": loss}
    assert {name: entry[1] for name, entry in WALK.items()} == {
        k: v.item() for k, v in values.items()
    }
    assert f"∂a = {a.grad:.0f}, ∂b = {b.grad:.0f}." in plots.tape().alt
    told = {row[1]: row[2] for row in plots.walk().table[1:]}
    assert (told["a"], told["b"]) == (a.grad, b.grad)


def test_the_tape_gives_no_sum_away_before_it_is_walked():
    assert "used twice: " not in plots.tape(4).svg() and "16 + 48" in plots.tape(3).svg()
    assert "∂ = 64" not in plots.tape(4).svg() and "∂ = 64" in plots.tape(5).svg()


def test_gptq_shows_the_numbers_of_the_library():
    gram, seen = 0.2 * np.eye(4) + 0.8, []

    def settle(j, rest, u):
        seen.extend(rest[j:, 0])
        return np.rint(rest[j])

    found = make_up(np.array([[1.4, 0.4, -1.6, 2.4]]), gram, settle, damping=1e-12)
    told = [f"{x:.2f}" for x in seen]
    svg = plots.gptq().svg().replace("−", "-")
    assert re.findall(r">(-?\d\.\d\d)</text>", svg)[: len(told)] == told
    assert re.findall(r">(-?\d)</text>", svg)[-4:] == [f"{x:.0f}" for x in found[0]]


def test_gptq_is_the_better_of_the_two_in_its_own_example():
    plain, ours = map(float, re.findall(r"\d\.\d\d(?=[,.])", plots.gptq().alt)[-2:])
    assert ours < plain / 4


@pytest.mark.parametrize("make", [plots.gptq, plots.attention])
def test_printed_numbers_are_not_on_a_rounding_boundary(make, monkeypatch):
    before = make().svg()
    exp, cholesky = np.exp, np.linalg.cholesky
    monkeypatch.setattr(np, "exp", lambda x: exp(x) * (1 + 1e-9))
    monkeypatch.setattr(np.linalg, "cholesky", lambda x: cholesky(x * (1 + 1e-9)))
    assert make().svg() == before


def test_low_rank_counts():
    svg = plots.low_rank(48, 192, 8).svg()
    assert "8 · (48 + 192) = 1,920 numbers train: 20.8% of W" in svg
    assert "48 × 192 = 9,216" in svg and "= 38.4<" in svg


def test_memory_draws_its_bars_to_one_scale():
    d = plots.memory({"full": (10, 20, 40, 30), "none": (10, 0, 0, 5)}, "MB")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="44"', d.svg())]
    assert widths == [50, 100, 200, 150, 50, 25]
    assert ">100<" in d.svg() and ">15<" in d.svg()  # the sums


def test_a_gather_gives_each_sample_its_pair():
    svg = plots.gather(("b", None, "a")).svg()
    assert all(
        f">{words}<" in svg for words in ("B₁ A₁ x₁", "B₀ A₀ x₂", "B₂ A₂ x₃", "1  b", "2  a")
    )


def test_a_prefix_is_seen_by_every_query():
    svg = plots.prefix(3, 5).svg()
    fills = {look: svg.count(f'fill="{LOOKS[look][0]}" stroke="{LOOKS[look][1]}"') - 1
             for look in ("trained", "lit", "faint")}  # fmt: skip
    assert fills == {"trained": 3 * 5, "lit": 2 * 15, "faint": 2 * 10}


# ------------------------------------------------------------------ steppers


@moving
def test_a_stepper_is_light_well_formed_and_the_same_each_time(make):
    html = make().html()
    assert html == make().html() and len(html.encode()) < 300_000
    assert len(html.splitlines()) <= 60  # as for every output
    assert not re.search(r"\bid=|https?://(?!www.w3.org)|<script", html)
    root = ElementTree.fromstring(html)  # it happens to be XML too, so nothing is left open
    figures = list(root.iter("figure"))
    shown = ["display:none" not in f.get("style") for f in figures]
    assert shown == [True] + [False] * (len(figures) - 1)  # what is left without scripts
    assert root.get("role") == "group" and len(root.get("aria-label")) > 30
    slider = root.find(".//input")
    assert (slider.get("max"), slider.get("aria-label")) == (str(len(figures)), "step")
    names = ["".join(button.itertext()) for button in root.iter("button")]
    assert names == ["◀ previous", "next ▶"]


@moving
def test_a_stepper_says_in_a_table_what_its_frames_show(make):
    found = make()
    head, *rows = found.table
    assert rows and all(len(row) == len(head) for row in rows)
    table = ElementTree.fromstring(found.html()).find(".//details/table")
    cells = [[cell.text for cell in row] for row in table.iter("tr")]
    assert cells == [[str(cell) for cell in row] for row in found.table]


@pytest.mark.parametrize("make", [plots.rank_steps, plots.compress_steps])
def test_no_colour_or_number_is_on_a_rounding_boundary(make):
    moved = plots.picture() * (1 + 1e-9)
    if make is plots.rank_steps:
        moved += 1e-10 * np.random.default_rng(0).standard_normal(moved.shape)
    assert make(moved).html() == make().html()


def test_bars_of_memory_are_four_and_say_a_thousand_in_full():
    drawn = plots.memory({"full": (538.1, 1.843, 1076.1, 252)})
    assert "weights 538, gradients 1.84, optimiser state 1,076, activations 252." in drawn.alt
    for wrong in ((1, 2, 3), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="argument"):
            plots.memory({"full": wrong})


def test_a_stepper_wants_a_caption_for_each_frame():
    with pytest.raises(ValueError, match="captions has 1; expected one for each of 2 frames"):
        plots.stepper([plots.tape(0), plots.tape(1)], ["one"], [], "a walk")


def test_rank_steps_reach_the_share_of_the_svd():
    matrix = np.diag([3.0, 2.0, 1.0])
    rows = plots.rank_steps(matrix, ranks=(1, 2, 3), alpha=6).table[1:]
    assert [row[2] for row in rows] == ["64.3%", "92.9%", "100.0%"]
    assert [row[3] for row in rows] == ["6", "3", "2"] and rows[1][1] == "12 numbers"


def test_compress_steps_count_what_is_lost():
    matrix = np.array([[1.0, -1.0], [0.5, -0.2]])
    ((percent, size, cut, bits, coarse),) = plots.compress_steps(matrix, plan=((50, 1),)).table[1:]
    assert (percent, size, bits) == ("50%", "5.0", 1)
    assert cut == f"{100 * 0.29 / 2.29:.2f}%"  # .5 and -.2 are gone
    assert coarse == f"{100 * (0.25 + 0.64) / 2.29:.2f}%"  # and here they are 1 and -1
