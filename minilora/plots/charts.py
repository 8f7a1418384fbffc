"""The figures that several notebooks share: large, calm, safe for the colour-blind."""

import matplotlib.pyplot as plt
import numpy as np

# Okabe & Ito's palette, which stays apart for every common kind of colour blindness
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
# once, for every figure that is drawn after the import
plt.rc("figure", figsize=(8, 4.5))
plt.rc("font", size=14)
plt.rc("axes", titlesize=15, grid=True, prop_cycle=plt.cycler(color=COLOURS))
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.3)
plt.rc("lines", linewidth=2.2, markersize=8)
plt.rc("legend", frameon=False)
plt.rc("image", cmap="viridis")


def new(rows=1, cols=1, *, size=None, **kwargs):
    """A figure and its axes; `size` in inches, other arguments as for `subplots`."""
    return plt.subplots(rows, cols, figsize=size, layout="constrained", **kwargs)


def accuracy(rows, title="", unit="trainable parameters"):
    """Exact match against trainable parameters, on a logarithmic axis.

    Args:
        rows: (method, trainable parameters, exact match from 0 to 1) for each point.
        title: a sentence. unit: of the second number, if it is another.

    Returns:
        The figure.
    """
    fig, ax = new()
    for i, (method, trainable, exact) in enumerate(rows):
        marker, label = MARKERS[(i + i // 7) % 7], f"{method} ({trainable:,})"
        ax.plot(trainable, 100 * exact, marker, color=COLOURS[i % 7], ms=13, label=label)
        if len(rows) > 4:
            continue  # labels beside the points would cover one another
        side, shift = ("top", -14) if exact > 0.3 else ("bottom", 14)  # where there is room
        look = {"textcoords": "offset points", "ha": "center", "va": side}
        ax.annotate(f"{method}\n{trainable:,}", (trainable, 100 * exact), (0, shift), **look)
    if len(rows) > 4:
        fig.legend(loc="outside right center", title=f"method ({unit.split()[0]})")
    ax.set_xscale("log")
    ax.set_xlim(min(r[1] for r in rows) / 4, max(r[1] for r in rows) * 4)
    ax.set_ylim(-5, 105)
    ax.set_yticks(range(0, 101, 20))
    ax.set(xlabel=f"{unit} (log scale)", ylabel="exact match (%)", title=title)
    return fig


def fan(scores, title="", ylabel="exact match (%)"):
    """How each method's score falls from one place to the next: a line through the means.

    Args:
        scores: method to {place: scores from 0 to 1, one for each seed}; the same places for all.
        title: a sentence. ylabel: of the axis.

    Returns:
        The figure. Each seed is a dot; the names stand where the lines end.
    """
    fig, ax = new(size=(10, 6))
    places = list(next(iter(scores.values())))
    ends = []
    for i, (method, found) in enumerate(scores.items()):
        look = {"color": COLOURS[i % 7], "marker": MARKERS[(i + i // 7) % 7]}
        means = [100 * np.mean(found[place]) for place in places]
        ax.plot(means, ls="-" if i < 7 else "--", **look)
        for x, place in enumerate(places):
            seeds = 100 * np.atleast_1d(found[place])
            ax.scatter([x] * len(seeds), seeds, s=22, alpha=0.45, **look)
        ends.append((means[-1], method, look["color"]))
    lowest = -np.inf
    for end, method, colour in sorted(ends):  # names that would cover one another move up
        lowest = max(end, lowest + 6)
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.8}
        at = {"xytext": (len(places) - 0.9, lowest), "va": "center", "color": colour}
        ax.annotate(method, (len(places) - 1, end), arrowprops=arrow, **at)
    ax.set_xlim(-0.1, len(places) - 0.5)
    ax.set_ylim(-5, max(105, lowest + 5))
    ax.set_xticks(range(len(places)), places)
    ax.set_yticks(range(0, 101, 20))
    ax.set(ylabel=ylabel, title=title)
    return fig


def losses(runs, floor=None, title="", window=10):
    """The loss by step, smoothed.

    Args:
        runs: label to list of losses in nats. floor: (label, value) of a line to draw.
        title: a sentence. window: steps in the running mean.

    Returns:
        The figure.
    """
    fig, ax = new()
    for label, loss in runs.items():
        n = min(window, len(loss))
        smooth = np.convolve(loss, np.ones(n) / n, "valid")
        ax.plot(np.arange(len(smooth)) + n, smooth, label=label)
    if floor:
        ax.axhline(floor[1], ls="--", color="0.4", label=floor[0])
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    ax.legend()
    return fig


def spectra(values, title="", log=True):
    """Singular values in falling order.

    Args:
        values: label to array of singular values. title: a sentence. log: the vertical axis.

    Returns:
        The figure.
    """
    fig, ax = new()
    for i, (label, s) in enumerate(values.items()):
        ax.plot(np.arange(1, len(s) + 1), s, MARKERS[i % 7] + "-", ms=4, label=label)
    if log:
        ax.set_yscale("log")
    ax.set(xlabel="index i", ylabel="singular value σᵢ", title=title)
    ax.legend()
    return fig


def heat(ax, matrix, title="", xlabel="", ylabel="", symmetric=False):
    """A matrix as colours on given axes, with a colour bar; `symmetric` puts 0 in the middle."""
    most = np.abs(matrix).max() or 1
    look = {"cmap": "RdBu_r", "vmin": -most, "vmax": most} if symmetric else {}
    image = ax.imshow(matrix, aspect="auto", **look)
    ax.grid(False)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.figure.colorbar(image, ax=ax)
    return image
