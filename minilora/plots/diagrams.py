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
    d.text(455, 572, "q, k, v, o: 4 d² weights", 20, colour=GREY)
    d.text(905, 572, "up, down: 8 d² weights", 20, colour=GREY)
    d.text(640, 622, "the block, n_layer times", 24, bold=True)
    d.text(640, 672, "x = x + attn(norm1(x))     then     x = x + mlp(norm2(x))", 24)
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
    tags = [(300, 375, "LoRA"), (540, 375, "LoRA")]
    tags += [(420, 415, "IA³"), (540, 415, "IA³"), (825, 475, "IA³")]
    tags += [(420, 455, "prefix"), (540, 455, "prefix")]
    tags += [(695, 330, "adapter"), (990, 330, "adapter")]
    _flow(d, tags)
    d.box(40, 220, 130, 34, "prompt", "trained", 20)
    d.box(40, 270, 130, 34, "token rows", "trained", 20)
    lines = (
        ("full: everything trains", "BitFit: only the biases, in every grey box with weights"),
        ("LoRA: q and v here; any linear layer will do", "Houlsby's adapters train the norms too"),
    )
    for i, (left, right) in enumerate(lines):
        d.text(40, 625 + 42 * i, left, 22, "start")
        d.text(620, 625 + 42 * i, right, 22, "start")
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
    for x, words in (*heads, (990, "values"), (1180, "output")):
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
        d.text(800, y + 20, "0" if late else f"{weights[i]:.2f}"[1:], 26)
        if not late:
            d.box(800 - 90 * weights[i], y - 25, 180 * weights[i], 22, look="lit")
            d.arrow((1040, y), (1130, 300), colour=BLUE, width=2 + 12 * weights[i])
    d.box(250, 375, 100, 70, "q₃", "lit", 28, bold=True)
    d.arrow((160, 410), (250, 410))
    d.box(1130, 265, 110, 70, "Σ weight · v", "lit", 18)
    d.text(1180, 520, "masked:\nit comes later", 20, colour=GREY)
    d.text(300, 495, "scores: q₃ · k\nover √d_head", 20, colour=GREY)
    d.text(640, 620, "Each token makes its own three: q = Q x, k = K x, v = V x.", 24)
    d.text(640, 660, "Each head does this on its own share of the features.", 24)
    return d


# ------------------------------------------------------------------ LoRA


def bypass():
    """LoRA beside a frozen weight, and who gets a gradient at the first two steps."""
    d = Drawing(
        "LoRA: h = W x + (α/r) B A x",
        "x goes through the frozen W, and beside it through A, which narrows to r numbers, and B, "
        "which widens again, times α/r; both are added to h. At step 1 B is zero: B gets a "
        "gradient, A gets zero. From step 2 on both get one. W never does.",
        660,
    )
    d.box(40, 300, 70, 60, "x", "data", 30)
    d.arrow((110, 330), (160, 330), (160, 210), (240, 210))
    d.arrow((160, 330), (160, 480), (220, 480))
    d.box(240, 120, 260, 180, "W\nd_out × d_in\nfrozen", size=26)
    d.funnel(220, 480, 130, 180, 56, "A")
    d.funnel(410, 480, 130, 56, 180, "B")
    d.arrow((350, 480), (410, 480))
    d.text(380, 450, "r", 26)
    d.text(285, 595, "r × d_in", 22)
    d.text(475, 595, "d_out × r", 22)
    d.box(580, 450, 84, 60, "α/r", "data", 26)
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
        d.box(1045, y + 65, 80, 60, "B", "trained", 28)
        d.text(1215, y + 95, "∂h", 26, colour=RED)
        d.arrow((1190, y + 95), (1125, y + 95), colour=RED, width=4, dashed=True)
        if is_zero:
            d.arrow((1045, y + 95), (1015, y + 95), colour=GREY, width=4, dashed=True, head=False)
            d.arrow((1013, y + 77), (1013, y + 113), colour=GREY, width=5, head=False)
        else:
            d.arrow((1045, y + 95), (985, y + 95), colour=RED, width=4, dashed=True)
        d.text(900, y + 155, "∂B = (α/r) ∂h (A x)ᵀ  ≠ 0", 22, "start")
        d.text(900, y + 188, f"∂A = (α/r) Bᵀ ∂h xᵀ  {'= 0' if is_zero else '≠ 0'}", 22, "start")
        d.text(900, y + 221, "∂W: none, it is frozen", 22, "start", GREY)
    d.key(632, ("frozen", "frozen"), ("trained", "trains"), ("data", "data"), ("", "gradient"))
    return d


# ------------------------------------------------------------------ the tape

WALK = {  # node: words, value, place, and (parent, local derivative in words, its value)
    "loss": ("loss = d²", 64, (1060, 270), [("d", "2d = 16", 16)]),
    "d": ("d = c + a", 8, (730, 270), [("c", "1", 1), ("a", "1", 1)]),
    "c": ("c = a · b", 6, (400, 400), [("a", "b = 3", 3), ("b", "a = 2", 2)]),
    "b": ("b", 3, (60, 470), []),
    "a": ("a", 2, (60, 160), []),
}


def tape(step=None):
    """A small graph in which `a` is used twice, after `step` nodes of the backward walk; 5 is all.

    Step 0 is the forward pass alone.
    """
    step = len(WALK) if step is None else step
    walked = list(WALK)[:step]
    grads = {"loss": 1}
    for name in walked:
        for parent, _, factor in WALK[name][3]:
            grads[parent] = grads.get(parent, 0) + grads[name] * factor
    d = Drawing(
        "The tape is walked from the loss back to the leaves",
        "a = 2 and b = 3 make c = 6, d = c + a = 8 and the loss d² = 64. "
        + (f"{step} nodes are walked; gradients: " if step else "Nothing is walked yet")
        + ", ".join(f"∂{k} = {v}" for k, v in grads.items() if step)
        + ".",
        640,
    )
    for name, (_, _, (x, y), edges) in WALK.items():
        for parent, local, factor in edges:
            px, py = WALK[parent][2]
            start, end = (px + 170, py + 60), (x, y + 60)
            if name in walked:
                now = name == walked[-1]
                d.arrow(end, start, colour=RED, width=6 if now else 3, dashed=True)
                mid = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
                share = f"{grads[name]} × {factor}"
                d.text(mid[0], mid[1] - 34, share, 22, colour=RED)
            else:
                d.arrow(start, end, colour=GREY)
    for name, (words, value, (x, y), _) in WALK.items():
        look = "lit" if walked and name == walked[-1] else "done" if name in walked else "data"
        grad = f"∂ = {grads[name]}" if step and name in grads else "∂ = ?"
        d.box(x, y, 170, 120, f"{words}\n= {value}\n{grad}", look, 24)
        if name in walked:
            d.text(x + 85, y - 18, f"{walked.index(name) + 1}.", 22, bold=True)
    return d
