"""One picture for each idea: grey is frozen, orange with a thick edge trains, blue is data."""

import numpy as np

from .drawing import BLUE, GREY, RED, Drawing

# ------------------------------------------------------------------ a block, and what goes there

BOXES = {  # x, y, w, h, words
    "tokens": (30, 110, 150, 80, "tokens +\npositions"),
    "norm1": (245, 200, 110, 50, "norm1"),
    "q": (250, 285, 100, 55, "q"),
    "k": (370, 285, 100, 55, "k"),
    "v": (490, 285, 100, 55, "v"),
    "attend": (250, 480, 340, 70, "attend (n_head heads)"),
    "o": (650, 482, 90, 66, "o"),
    "norm2": (770, 200, 110, 50, "norm2"),
    "up": (770, 285, 110, 55, "up"),
    "gelu": (770, 385, 110, 50, "GELU"),
    "down": (940, 482, 100, 66, "down"),
    "head": (1100, 110, 150, 80, "norm, head"),
}
PLAIN = "attend", "gelu"  # no weights in them


def _flow(d, tags=()):
    """Draw the block; `tags` are (x, y, words) of boxes that stand on an arrow or beside one."""
    d.box(215, 90, 850, 500, look="group")
    d.arrow((180, 150), (1100, 150), width=6)
    d.text(640, 116, "the residual stream x: (B, T, d)", 22)
    for name, (x, y, w, h, words) in BOXES.items():
        d.box(x, y, w, h, words, "data" if name in PLAIN else "frozen")
    on = [(x - 50, y - 15, 100, 30, words) for x, y, words in tags]

    def down(x, y0, y1, head=True):
        """A vertical arrow that the tags on it interrupt."""
        sign = 1 if y1 > y0 else -1
        for _, y, _, h, _ in sorted((t for t in on if t[0] == x - 50), key=lambda t: sign * t[1]):
            if min(y0, y1) < y < max(y0, y1):
                edges = (y, y + h)[::sign]
                d.arrow((x, y0), (x, edges[0]), head=False)
                y0 = edges[1]
        d.arrow((x, y0), (x, y1), head=head)

    for x in (300, 825):
        down(x, 150, 200)
        down(x, 250, 285)
    for x in (420, 540):
        d.arrow((300, 267), (x, 267), (x, 285))
    for x in (300, 420, 540):
        down(x, 340, 480)
    down(825, 340, 385)
    down(825, 435, 515, head=False)
    d.arrow((825, 515), (940, 515))
    d.arrow((590, 515), (650, 515))
    for x in (695, 990):
        down(x, 482, 170)
        d.plus(x, 150)
    for x, y, w, h, words in on:
        d.box(x, y, w, h, words, "trained", 20)


def block():
    """A Transformer block between the tokens and the logits, with its weights counted."""
    d = Drawing(
        "A Transformer block reads the stream twice, and adds to it twice",
        "Tokens and positions make the residual stream, a line from left to right. In a block, "
        "norm1 reads it; q, k and v feed attention; o adds the result to the stream. Then norm2 "
        "reads it, up, GELU and down follow, and the result is added. A last norm and the head "
        "make logits. Attention holds 4 d² weights, the MLP 8 d².",
    )
    _flow(d)
    d.text(105, 262, "ids (B, T)", 22)
    d.arrow((105, 242), (105, 190))
    d.arrow((1175, 190), (1175, 242))
    d.text(1175, 275, "logits\n(B, T, vocab)", 22)
    for x, words in (300, "queries"), (420, "keys"), (540, "values"):
        d.text(x + 10, 410, words, 20, "start", GREY)
    d.text(890, 410, "4 d wide", 20, "start", GREY)
    d.text(455, 572, "q, k, v, o: 4 d² weights", 20, colour=GREY)
    d.text(905, 572, "up, down: 8 d² weights", 20, colour=GREY)
    d.text(640, 622, "the block, n_layer times", 24, bold=True)
    d.text(455, 672, "x + attn(norm1(x))", 24)
    d.text(640, 672, "and then", 24, colour=GREY)
    d.text(825, 672, "x + mlp(norm2(x))", 24)
    return d


def methods():
    """Where each method of fine-tuning touches a block."""
    d = Drawing(
        "Every method has its place: orange is added and trains, grey stays",
        "The same block with labels. LoRA at q and v; IA3 scales behind k and v and between GELU "
        "and down; a prefix before the keys and values; adapters after o and after down; prompt "
        "and token rows at the tokens. BitFit trains the biases of all grey boxes, full "
        "fine-tuning everything.",
    )
    tags = [(300, 364, "LoRA"), (540, 364, "LoRA")]
    tags += [(420, 401, "IA³"), (540, 401, "IA³"), (825, 475, "IA³")]
    tags += [(420, 438, "prefix"), (540, 438, "prefix")]
    tags += [(695, 330, "adapter"), (990, 330, "adapter")]
    _flow(d, tags)
    d.box(40, 220, 130, 34, "prompt", "trained", 20)
    d.box(40, 270, 130, 34, "token rows", "trained", 20)
    lines = (
        (
            "full: everything trains; BitFit: the biases only",
            "adapter: a bottleneck inside the branch",
        ),
        ("LoRA: B A beside a weight, of any linear layer", "prefix: learned keys and values"),
        ("IA³: a scale for each feature", "prompt: learned inputs; token rows: a few rows"),
    )
    for i, (left, right) in enumerate(lines):
        d.text(40, 620 + 35 * i, left, 21, "start")
        d.text(660, 620 + 35 * i, right, 21, "start")
    return d


def attention():
    """One query against all keys, and the values that it mixes."""
    scores = np.array([0.0, 1.0, 2.0])
    weights = np.exp(scores) / np.exp(scores).sum()
    d = Drawing(
        "Attention: token 3 asks, the tokens up to it answer",
        "Four tokens in rows. The query of token 3 meets keys 1, 2 and 3 with scores 0, 1 and 2; "
        "key 4 is masked, as it comes later. A softmax makes weights .09, .24 and .67, and the "
        "output of token 3 is the sum of values 1, 2 and 3 in these shares.",
        700,
    )
    heads = (110, "input"), (300, "query"), (510, "keys"), (650, "scores"), (800, "softmax")
    for x, words in (*heads, (990, "values"), (1185, "output")):
        d.text(x, 112, words, 24, bold=True)
    ys = 190, 300, 410, 520
    for i, y in enumerate(ys):
        late = i == 3
        sub = "₁₂₃₄"[i]
        d.box(60, y - 35, 100, 70, f"x{sub}", "data", 28)
        d.box(460, y - 35, 100, 70, f"k{sub}", "faint" if late else "data", 28)
        d.box(940, y - 35, 100, 70, f"v{sub}", "faint" if late else "data", 28)
        d.arrow((350, 410), (460, y), colour="#8A949E" if late else BLUE, dashed=late)
        d.text(650, y, "−∞" if late else f"{scores[i]:.0f}", 28)
        if late:
            d.text(720, y, "0", 26, "start")
            continue
        d.box(720, y - 16, 160 * weights[i], 32, look="lit")
        d.text(732 + 160 * weights[i], y, f"{weights[i]:.2f}"[1:], 26, "start")
        end = (1130, 300 + 24 * (i - 1))
        d.arrow((1040, y), end, colour=BLUE, width=2 + 10 * weights[i])
    d.box(250, 375, 100, 70, "q₃", "lit", 28, bold=True)
    d.arrow((160, 410), (250, 410))
    d.box(1130, 255, 110, 90, "out₃", "lit", 28, bold=True)
    shares = [f"{w:.2f}"[1:] for w in weights]
    d.text(1185, 400, "= {} v₁\n+ {} v₂\n+ {} v₃".format(*shares), 22)
    d.text(1185, 520, "masked:\nit comes later", 20, colour=GREY)
    d.text(300, 495, "scores: q₃ · k\nover √d_head", 20, colour=GREY)
    d.text(640, 620, "Each token makes its own three: q = Q x, k = K x, v = V x.", 24)
    d.text(640, 660, "Each head does this on its own share of the features.", 24)
    return d


# ------------------------------------------------------------------ LoRA


def bypass():
    """LoRA beside a frozen weight, and who gets a gradient at the first two steps."""
    d = Drawing(
        "LoRA: h = W x + (α/r) B A x, with W frozen",
        "x goes through the frozen W, and beside it through A, which narrows to r numbers, and B, "
        "which widens again, times α/r; both are added to h. At step 1 B is zero: B gets a "
        "gradient, A gets zero. From step 2 on both get one. W never does.",
        660,
    )
    d.box(40, 300, 70, 60, "x", "data", 30)
    d.arrow((110, 330), (160, 330), (160, 210), (240, 210))
    d.arrow((160, 330), (160, 480), (220, 480))
    d.box(240, 120, 260, 180)
    d.text(370, 195, "W", 34, bold=True)
    d.text(370, 240, "d_out × d_in", 22)
    d.funnel(220, 480, 130, 180, 56, "A")
    d.funnel(410, 480, 130, 56, 180, "B")
    d.arrow((350, 480), (410, 480))
    d.text(380, 450, "r", 26)
    d.text(285, 592, "r × d_in", 22)
    d.text(475, 592, "d_out × r", 22)
    d.box(580, 450, 84, 60, "α/r", "frozen", 26)
    d.arrow((540, 480), (580, 480))
    d.arrow((500, 210), (720, 210), (720, 310))
    d.arrow((664, 480), (720, 480), (720, 350))
    d.plus(720, 330)
    d.arrow((740, 330), (780, 330))
    d.box(780, 300, 60, 60, "h", "data", 30)
    for y, step, is_zero in ((90, "step 1:  B = 0", True), (355, "step 2:  B ≠ 0", False)):
        d.box(880, y, 370, 245, look="group")
        d.text(1065, y + 30, step, 24, bold=True)
        d.box(905, y + 65, 80, 60, "A", "trained", 28)
        d.box(1065, y + 65, 80, 60, "B", "trained", 28)
        d.text(1220, y + 95, "∂h", 26, colour=RED)
        d.arrow((1198, y + 95), (1145, y + 95), colour=RED, width=4, dashed=True)
        d.arrow(
            (1065, y + 95), (985, y + 95), colour=GREY if is_zero else RED, width=4, dashed=True
        )
        d.text(1025, y + 72, "0" if is_zero else "≠ 0", 22, colour=GREY if is_zero else RED)
        d.text(900, y + 155, "∂B = (α/r) ∂h (A x)ᵀ  ≠ 0", 22, "start")
        d.text(900, y + 188, f"∂A = (α/r) Bᵀ ∂h xᵀ  {'= 0' if is_zero else '≠ 0'}", 22, "start")
        d.text(900, y + 221, "∂W: none, it is frozen", 22, "start", GREY)
    d.key(634, ("frozen", "frozen"), ("trained", "trains"), ("data", "data"), ("", "gradient"))
    return d


# ------------------------------------------------------------------ the tape

WALK = {  # node: words, value, place, and (parent, local derivative in words, its value)
    "loss": ("loss = d²", 64, (1060, 220), [("d", "2 d = 16", 16)]),
    "d": ("d = c + a", 8, (690, 220), [("c", "1", 1), ("a", "1", 1)]),
    "c": ("c = a · b", 6, (390, 400), [("a", "b = 3", 3), ("b", "a = 2", 2)]),
    "b": ("b", 3, (50, 450), []),
    "a": ("a", 2, (50, 110), []),
}


def tape(step=None):
    """A small graph in which `a` is used twice, after `step` nodes of the backward walk; 5 is all.

    Step 0 is the forward pass alone.
    """
    step = len(WALK) if step is None else step
    walked = list(WALK)[:step]
    shares = {"loss": [1]}  # what has come to each node
    for name in walked:
        for parent, _, factor in WALK[name][3]:
            shares.setdefault(parent, []).append(sum(shares[name]) * factor)
    d = Drawing(
        "The tape is walked from the loss back to the leaves",
        "a = 2 and b = 3 make c = 6, d = c + a = 8 and the loss d² = 64. "
        + (f"{step} nodes are walked; gradients: " if step else "Nothing is walked yet")
        + ", ".join(f"∂{k} = {sum(v)}" for k, v in shares.items() if step)
        + ".",
        640,
    )
    for name, (_, _, (x, y), edges) in WALK.items():
        for parent, local, factor in edges:
            px, py = WALK[parent][2]
            lean = max(-38, min(38, 0.2 * (y - py)))  # arrows at one box part from each other
            start, end = (px + 190, py + 65 + lean), (x, y + 65 - lean)
            middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
            if name in walked:
                width = 7 if name == walked[-1] else 3
                d.arrow(end, start, colour=RED, width=width, dashed=True)
                share = f"{sum(shares[name])} × {factor}"
                d.text(*middle, share, 24, colour=RED, bold=width == 7, halo=True)
            else:
                d.arrow(start, end, colour=GREY)
                d.text(*middle, f"× {local}", 22, colour=GREY, halo=True)
    for name, (words, value, (x, y), _) in WALK.items():
        look = "lit" if walked and name == walked[-1] else "done" if name in walked else "data"
        here = shares.get(name, "?") if step else "?"
        grad = "∂ = " + (str(sum(here)) if name in walked else " + ".join(map(str, here)))
        d.box(x, y, 190, 130, f"{words}\n= {value}\n{grad}", look, 26)
        if name in walked:
            d.text(x + 95, y - 20, f"{walked.index(name) + 1}.", 22, bold=True)
    d.text(905, 440, "A share is the gradient that arrives\ntimes the edge's own derivative.", 24)
    if step == len(WALK):
        d.text(905, 520, "a is used twice: its shares add up.", 24)
    d.key(615, ("data", "waits"), ("lit", "is walked"), ("done", "was walked"), ("", "share"))
    return d


# ------------------------------------------------------------------ memory


def memory(rows, unit="MB", title="Where the memory goes"):
    """The four bars of memory for each way to train, all at one scale.

    Args:
        rows: name to (weights, gradients, optimiser state, activations), numbers in `unit`;
            one to six names.
        unit: of the numbers. title: a sentence.
    """
    heads = "weights", "gradients", "optimiser state", "activations"
    looks = "frozen", "done", "lit", "data"
    top = max(max(row) for row in rows.values())
    s = {n: [f"{v:,{'.3g' if v < 1e3 else '.0f'}}" for v in (*r, sum(r))] for n, r in rows.items()}
    told = [
        f"{n}: " + ", ".join(map(" ".join, zip(heads, v[:-1], strict=True))) for n, v in s.items()
    ]
    d = Drawing(title, f"Bars of memory in {unit}. {'; '.join(told)}.", 150 + 95 * len(rows))
    for i, head in enumerate(heads):
        d.text(230 + 230 * i, 105, head, 22, "start", bold=True)
    d.text(1250, 105, f"sum, {unit}", 22, "end", bold=True)
    for j, (name, row) in enumerate(rows.items()):
        y = 140 + 95 * j
        d.text(40, y + 22, name, 24, "start", bold=True)
        for i, value in enumerate(row):
            if value:
                d.box(230 + 230 * i, y, max(4, 200 * value / top), 44, look=looks[i])
            d.text(230 + 230 * i, y + 64, s[name][i], 22, "start")
        d.text(1250, y + 22, s[name][-1], 26, "end", bold=True)
    return d


# ------------------------------------------------------------------ adapters and prefixes


def adapter():
    """A bottleneck in series after attention or the MLP, and in parallel beside it."""
    d = Drawing(
        "An adapter stands inside the branch, before the stream takes the sum",
        "Two wirings. In series: norm, attention or MLP, then h goes straight on and also through "
        "down, GELU and up, and both are added before the stream takes them. In parallel: down "
        "takes what attention or the MLP takes. The norms train with Houlsby's adapters only.",
    )
    wirings = (140, "in series: after both branches (Houlsby), or the MLP's (Pfeiffer)"), (445, "")
    for y, series in wirings:
        row, low = y + 85, y + 180  # the branch, and the adapter under it
        d.text(
            40,
            y - 38,
            series or "in parallel: down reads what attention reads (He et al.)",
            24,
            "start",
        )
        d.arrow((40, y), (1250, y), width=6)
        d.arrow((85, y), (85, row), (120, row))
        d.box(120, row - 30, 110, 60, "norm", "trained" if series else "frozen")
        d.arrow((230, row), (290, row))
        d.box(290, row - 38, 190, 76, "attention\nor MLP")
        d.arrow((480, row), (1060, row))
        d.text(520, row - 20, "h", 24)
        start = 540 if series else 260
        d.arrow((start, row), (start, low), (600, low))
        d.funnel(600, low, 120, 90, 40, "down")
        d.text(810, low - 46, "r wide", 20, colour=GREY)
        d.arrow((720, low), (760, low))
        d.box(760, low - 25, 100, 50, "GELU", "data")
        d.arrow((860, low), (900, low))
        d.funnel(900, low, 120, 40, 90, "up")
        d.arrow((1020, low), (1080, low), (1080, row + 20))
        d.plus(1080, row)
        d.arrow((1100, row), (1180, row), (1180, y + 20))
        d.plus(1180, y)
    d.text(175, 290, "trains too\n(Houlsby)", 20, colour=GREY)
    d.key(690, ("frozen", "frozen"), ("trained", "trains"), ("data", "no weights"))
    return d


def prefix(m=2, tokens=4):
    """Who sees whom in attention, without and with `m` learned keys before the real ones."""
    d = Drawing(
        f"A prefix: {m} learned keys and values that every query sees",
        f"Two grids of queries by keys. Without a prefix each of {tokens} queries sees the keys "
        f"up to its own. With one, {m} learned columns stand before them and every query sees "
        f"those too; the rest is as it was.",
        620,
    )
    side = min(84, 360 // tokens, 600 // (m + tokens))
    for left, learned, words in ((130, 0, "without"), (610, m, f"with a prefix of {m}")):
        d.text(left, 105, words, 24, "start", bold=True)
        for j in range(learned + tokens):
            name = f"p{sub(j + 1)}" if j < learned else f"k{sub(j - learned + 1)}"
            d.text(left + side * (j + 0.5), 145, name, 24, bold=j < learned)
            for i in range(tokens):
                look = "trained" if j < learned else "lit" if j - learned <= i else "faint"
                d.box(left + side * j + 4, 170 + side * i + 4, side - 8, side - 8, look=look)
        for i in range(tokens):
            d.text(left - 30, 170 + side * (i + 0.5), f"q{sub(i + 1)}", 24)
    d.text(640, 545, f"The tokens keep their mask and places; n_positions − {m} of them fit.", 24)
    d.key(595, ("trained", "learned, seen"), ("lit", "seen"), ("faint", "masked"))
    return d


def sub(i):
    """A number as a subscript."""
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(c)] for c in str(i))


# ------------------------------------------------------------------ compression


def gptq(weights=(1.4, 0.4, -1.6, 2.4), correlation=0.8):
    """A row of weights, rounded one after another; each error moves to those on the right.

    Args:
        weights: four of them, rounded to whole numbers. correlation: of any two inputs, 0 to 1.

    Source: Frantar et al. 2022, arXiv 2210.17323, with U the upper factor of H⁻¹ = Uᵀ U.
    """
    w, n = np.array(weights, float), len(weights)
    h = np.full((n, n), float(correlation)) + (1 - correlation) * np.eye(n)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    rows, plain = [w.copy()], np.rint(w) - w
    for j in range(n):
        error = (w[j] - np.rint(w[j])) / u[j, j]
        w[j:] -= error * u[j, j:]
        rows.append(w.copy())
    ours = w - rows[0]
    losses = float(plain @ h @ plain), float(ours @ h @ ours)
    d = Drawing(
        "GPTQ: round a column, and let those on its right make up for it",
        f"Weights {', '.join(f'{x:.2f}' for x in rows[0])}. They are rounded from left to right; "
        f"each error changes the weights that still wait. Squared error of the output: plain "
        f"rounding {losses[0]:.2f}, GPTQ {losses[1]:.2f}.",
    )
    for i, row in enumerate(rows):
        y = 90 + 114 * i
        d.text(40, y + 30, f"w{sub(i)} rounded" if i else "start", 24, "start")
        for j, x in enumerate(row):
            look = "lit" if j == i else "frozen" if j < i else "data"
            words = (f"{x:.0f}" if j < i else f"{x:.2f}").replace("-", "−")
            d.box(220 + 180 * j, y, 130, 60, words, look, 26)
            if j > i:
                start, end = 285 + 180 * i + 14 * (j - i - 1), 275 + 180 * j
                d.arrow((start, y + 62), (end, y + 112), colour=RED, dashed=True)
    d.text(990, 160, "error of the output", 24, "start", bold=True)
    for y, words, loss in ((210, "plain rounding", losses[0]), (310, "GPTQ", losses[1])):
        d.text(990, y, words, 24, "start")
        d.box(990, y + 22, 170 * loss / max(losses), 36, look="done" if y == 210 else "lit")
        d.text(1002 + 170 * loss / max(losses), y + 40, f"{loss:.2f}", 24, "start")
    d.text(
        990,
        480,
        "Each error moves on to\nthe weights that wait,\nas far as their inputs\nare alike.",
        22,
        "start",
    )
    d.key(690, ("lit", "next"), ("data", "waits"), ("frozen", "rounded, stays"), ("", "error"))
    return d


def low_rank(d_out=64, d_in=64, r=4):
    """W and its update as boxes, drawn to scale, with their numbers counted."""
    full, small, side = d_out * d_in, r * (d_out + d_in), 390 / (max(d_out, d_in) + r)
    h, w, thin = d_out * side, d_in * side, max(10, r * side)
    d = Drawing(
        f"An update of rank {r} is two thin matrices",
        f"W, a box of {d_out} by {d_in}, {full:,} numbers, plus α/r times B, {d_out} by {r}, "
        f"times A, {r} by {d_in}: {small:,} numbers together.",
        690,
    )
    top, left = 118 + thin, 565 - w - thin / 2 - 90  # of the large boxes
    d.box(left, top, w, h, "W", "frozen", 40)
    d.text(left + w / 2, top + h + 30, f"{d_out} × {d_in} = {full:,}", 24)
    d.text(left + w + 80, top + h / 2, "+ α/r ·", 36)
    x = left + w + 165  # of B
    d.box(x, top, thin, h, look="trained")
    d.text(x + thin / 2, top + h + 30, f"B: {d_out} × {r}", 24, bold=True)
    x += thin + 24
    d.box(x, top, w, h, "ΔW = B A", "group", 30)
    d.box(x, top - 24 - thin, w, thin, look="trained")
    d.text(x + w + 24, top - 24 - thin / 2, f"A: {r} × {d_in}", 24, "start", bold=True)
    d.text(x + w + 24, top + h / 2, "not stored", 24, "start", GREY)
    told = f"{r} · ({d_out} + {d_in}) = {small:,} numbers train: {100 * small / full:.3g}% of W"
    d.text(640, 615, told, 28, bold=True)
    limit = full / (d_out + d_in)
    words = f"as many as W at r = d_out · d_in / (d_out + d_in) = {limit:.3g}"
    d.text(640, 660, words, 24, colour=GREY)
    return d


def gather(names=("sort", None, "reverse", "sort")):
    """A batch in which each sample takes its own adapter: one product with W, a gather of A and B.

    Args:
        names: the adapter of each of up to four samples; `None` for the base alone.
    """
    known = [None, *dict.fromkeys(n for n in names if n)]
    most = max(len(names), len(known))
    which = [known.index(n) for n in names]
    say = [n or "none: zeros" for n in known]
    d = Drawing(
        "Many adapters in one batch: share W, gather A and B",
        f"Samples ask for {', '.join(n or 'none' for n in names)}. One product with W serves all. "
        f"From a store of {len(known)} pairs A and B, where pair 0 is zeros, each sample gathers "
        f"its own; both results are added.",
        285 + 100 * most,
    )
    for x, words in (
        (110, "batch"),
        (250, "which"),
        (510, "store"),
        (885, "gathered"),
        (1165, "out"),
    ):
        d.text(x, 105, words, 24, bold=True)
    tops, places = (
        [150 + 100 * i + 50 * (most - len(rows)) for i in range(len(rows))]
        for rows in (names, known)
    )
    bottom = 135 + 100 * most
    for x in (45, 1095):
        d.box(x, 135, 140, bottom - 135, look="group")
    for k, y in enumerate(places):
        d.box(360, y, 300, 70, look="trained" if k else "frozen")
        d.text(380, y + 35, f"{k}  {say[k]}", 24, "start")
        d.text(640, y + 35, f"B{sub(k)} A{sub(k)}", 26, "end", bold=True)
    for i, (y, k) in enumerate(zip(tops, which, strict=True)):
        colour = [GREY, BLUE, RED, "#007A5A", "#1A1A1A"][k]
        d.arrow((662, places[k] + 35), (780, y + 35), colour=colour, width=4)
        d.box(60, y, 110, 70, f"x{sub(i + 1)}", "data", 28)
        d.arrow((170, y + 35), (220, y + 35))
        d.box(220, y + 10, 60, 50, f"{k}", "lit" if k else "frozen", 26)
        d.box(
            780, y, 210, 70, f"B{sub(k)} A{sub(k)} x{sub(i + 1)}", "trained" if k else "frozen", 28
        )
        d.arrow((990, y + 35), (1110, y + 35))
        d.box(1110, y, 110, 70, f"h{sub(i + 1)}", "data", 28)
    d.box(220, bottom + 25, 780, 60, "W x: one product for the whole batch", "frozen", 26)
    d.arrow((115, bottom), (115, bottom + 55), (220, bottom + 55))
    d.arrow((1000, bottom + 55), (1165, bottom + 55), (1165, bottom))
    d.text(640, bottom + 125, "h = W x + B[which] A[which] x", 28, bold=True)
    return d
