"""What nbval does not look at: the rules that every notebook keeps, each a function of its JSON.

A rule takes a notebook (as `nbformat` reads it) and yields one line per problem, in words that
tell the author what to do. `RULES` holds them all by name.
"""

import ast
import base64
import re

from nbformat.v4 import new_code_cell

RULES = {}

OPENING = ("The question.", "You will do.", "You will learn.", "You need.", "Time.")
ENDING = ("Exercises", "Summary", "Where the paper says it")
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
# A tag that nbval does not know is silently no tag at all.
NBVAL_TAGS = UNCOMPARED | {"raises-exception"}
MAX_PNG_BYTES = 100_000
DOTS_PER_METRE = round(72 / 0.0254)


def rule(check):
    """Enter `check` into `RULES`."""
    RULES[check.__name__] = check
    return check


# --- what the rules look through -------------------------------------------------------------


def tags(cell):
    """The set of a cell's tags."""
    return set(cell["metadata"].get("tags", []))


def code_cells(nb):
    """(position, cell) of every code cell that holds something."""
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "code" and cell["source"].strip():
            yield i, cell


def outputs(nb):
    """(position, cell, output) of every output."""
    for i, cell in code_cells(nb):
        for output in cell["outputs"]:
            yield i, cell, output


def prose(cell):
    """A Markdown cell's text without its fenced code, whose comments look like headings."""
    return re.sub(r"^```.*?^```", "", cell["source"], flags=re.M | re.S)


def markdown(nb):
    """All prose of the notebook in one string."""
    return "\n\n".join(prose(cell) for cell in nb["cells"] if cell["cell_type"] == "markdown")


def texts_of(output):
    """Every text in an output, pictures apart."""
    if output["output_type"] == "stream":
        yield output["text"]
    elif output["output_type"] == "error":
        yield from (output["evalue"], *output["traceback"])
    else:
        yield from (v for kind, v in output["data"].items() if kind.startswith("text/"))


def pngs(nb):
    """(position, output, bytes) of every picture."""
    for i, _, output in outputs(nb):
        if "image/png" in output.get("data", {}):
            yield i, output, base64.b64decode(output["data"]["image/png"])


def calls(source, name):
    """How often a cell surely calls `name(…)` or `….name(…)`: not inside a def, if or try."""
    source = re.sub(r"^[%!].*", "", source, flags=re.M)
    try:
        waiting = list(ast.parse(source).body)
    except SyntaxError:  # a cell may break the grammar on purpose
        return 0
    found = 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.Try)):
            continue
        if isinstance(node, ast.Call):
            function = node.func
            found += name == getattr(function, "attr", getattr(function, "id", None))
        waiting.extend(ast.iter_child_nodes(node))
    return found


def seconds_to_run(nb):
    """How long the notebook says that it runs, in seconds; the longest, if it does not say."""
    found = re.search(r"(\d+) seconds to run", "".join(cell["source"] for cell in nb["cells"]))
    return int(found[1]) if found else 120


def solved(nb):
    """For each exercise, a cell with its solution and then its check."""
    block = r"<details>.*?```python\n(.*?)```.*?</details>"
    source = ""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            source = cell["source"]
        for code in re.findall(block, cell["source"], flags=re.S):
            yield new_code_cell(f"{code}\n{source.partition('# check')[2]}")


# --- it ran ----------------------------------------------------------------------------------


@rule
def executed_in_order(nb):
    """Every code cell has run once, from the top, in a fresh kernel."""
    for expected, (i, cell) in enumerate(code_cells(nb), 1):
        if cell["execution_count"] != expected:
            yield f"cell {i}: execution count {cell['execution_count']}, expected {expected}"


@rule
def outputs_present(nb):
    """A cell that prints or shows something holds what it printed and showed."""
    for i, cell in code_cells(nb):
        if "raises-exception" in tags(cell):  # it may have stopped before it came to that
            continue
        images = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        if images < calls(cell["source"], "show"):
            yield f"cell {i}: shows a figure, but holds none"
        printed = any(output["output_type"] == "stream" for output in cell["outputs"])
        if calls(cell["source"], "print") and not printed:
            yield f"cell {i}: prints, but holds no text"


@rule
def errors_are_meant(nb):
    """An error is stored where `raises-exception` announces one, and nowhere else."""
    for i, cell in code_cells(nb):
        raised = any(output["output_type"] == "error" for output in cell["outputs"])
        if raised and "raises-exception" not in tags(cell):
            yield f"cell {i}: holds an error, but has no tag raises-exception"
        if not raised and "raises-exception" in tags(cell):
            yield f"cell {i}: is tagged raises-exception, but raised nothing"


@rule
def no_stderr(nb):
    """Warnings and progress on stderr differ between machines."""
    for i, cell, output in outputs(nb):
        if output.get("name") == "stderr" and "nbval-ignore-output" not in tags(cell):
            yield f"cell {i}: wrote to stderr: {output['text'][:60]!r}"


# --- it comes out the same on every machine --------------------------------------------------


@rule
def few_ignored_outputs(nb):
    """At most three cells escape comparison, and each says why."""
    ignored = [(i, cell) for i, cell in code_cells(nb) if tags(cell) & UNCOMPARED]
    if len(ignored) > 3:
        yield f"{len(ignored)} cells are not compared; at most 3 may be"
    for i, cell in ignored:
        if not re.search(r"^# ignored: \S.{9,}", cell["source"], flags=re.M):
            yield f"cell {i}: is not compared, but has no comment `# ignored: reason`"


@rule
def tags_are_known(nb):
    """A misspelt tag does nothing, and nbval's comments would hide from these rules."""
    for i, cell in enumerate(nb["cells"]):
        for tag in sorted(tags(cell)):
            if tag.startswith(("nbval", "raises")) and tag not in NBVAL_TAGS:
                yield f"cell {i}: unknown tag {tag}; there are {', '.join(sorted(NBVAL_TAGS))}"
        if re.search(r"^\s*#\s*(NBVAL|PYTEST)_[A-Z_]+\s*$", cell["source"], flags=re.M):
            yield f"cell {i}: use a tag, not a comment, to steer nbval"


@rule
def outputs_are_portable(nb):
    """No NumPy scalar (NumPy 1 prints it otherwise) and no memory address."""
    for i, cell, output in outputs(nb):
        if tags(cell) & UNCOMPARED:
            continue
        for text in texts_of(output):
            found = re.search(r"\bnp\.(float|int|uint|bool|str)\w*\(|\b0x[0-9a-f]{8,}", text)
            if found:
                yield f"cell {i}: {found[0]!r} in its output is not the same everywhere"


@rule
def metadata_is_clean(nb):
    """Nothing of the machine, the editor or the clock: what refresh_notebooks.py leaves."""
    if (nb["nbformat"], nb["nbformat_minor"]) != (4, 5):
        yield f"notebook format {nb['nbformat']}.{nb['nbformat_minor']}, expected 4.5"
    if set(nb["metadata"]) != {"kernelspec", "language_info"}:
        yield f"notebook metadata holds {sorted(nb['metadata'])}"
    else:
        if nb["metadata"]["kernelspec"].get("name") != "python3":
            yield "the kernel is not called python3"
        if nb["metadata"]["language_info"] != {"name": "python"}:
            yield "language_info holds more than the name python"
    for i, cell in enumerate(nb["cells"]):
        if cell["id"] != f"cell-{i:02d}":
            yield f"cell {i}: its id is {cell['id']}"
        if set(cell["metadata"]) - {"tags"}:
            yield f"cell {i}: metadata holds {sorted(cell['metadata'])}"
        if cell.get("attachments"):
            yield f"cell {i}: an attached file has no size limit; draw it or leave it out"
    for i, _, output in outputs(nb):
        if set(output.get("metadata", {})) - {"image/png"}:
            yield f"cell {i}: output metadata holds {sorted(output['metadata'])}"
        if any("widget" in kind for kind in output.get("data", {})):
            yield f"cell {i}: holds a widget, which shows nothing without a kernel"


@rule
def no_paths_of_a_machine(nb):
    """No text names a folder of the author's machine."""
    path = re.compile(r"(?<![\w./:-])/(home|root|work|Users|tmp)(?=/|\b)|\bC:\\")
    texts = [(i, cell["source"]) for i, cell in enumerate(nb["cells"])]
    texts += [(i, text) for i, _, output in outputs(nb) for text in texts_of(output)]
    for i, text in texts:
        if found := path.search(text):
            yield f"cell {i}: names a path of one machine: {text[found.start() :][:40]!r}"


# --- its figures and texts can be read -------------------------------------------------------


@rule
def figures_have_alt_text(nb):
    """Every figure is described in words for who cannot see it: `show(fig, alt)`."""
    for i, output, _ in pngs(nb):
        text = output["data"].get("text/plain", "")
        if not (text.startswith("Figure: ") and len(text) > 30):
            yield f"cell {i}: its figure needs a description; use show(fig, alt)"
        elif text != "Figure: " + output["metadata"].get("image/png", {}).get("alt", ""):
            yield f"cell {i}: the alt text in the figure's metadata is not the text beside it"


@rule
def figures_are_light(nb):
    """Each picture stays below 100 kB, at the 72 dots per inch that notebooks are drawn in."""
    for i, _, png in pngs(nb):
        if len(png) >= MAX_PNG_BYTES:
            yield f"cell {i}: its figure has {len(png) // 1000} kB; at most 100 kB"
        at = png.find(b"pHYs")
        if at < 0 or int.from_bytes(png[at + 4 : at + 8], "big") != DOTS_PER_METRE:
            yield f"cell {i}: its figure is not drawn at 72 dpi"


@rule
def outputs_are_short(nb):
    """Nobody reads more than 60 lines of output."""
    for i, _, output in outputs(nb):
        for text in texts_of(output):
            if len(text.splitlines()) > 60:
                yield f"cell {i}: prints {len(text.splitlines())} lines; at most 60"


# --- it teaches in the agreed order ----------------------------------------------------------


@rule
def length(nb):
    """25 to 50 cells."""
    if not 25 <= len(nb["cells"]) <= 50:
        yield f"{len(nb['cells'])} cells; 25 to 50 make a lesson"


@rule
def opening(nb):
    """Title, question, what you will do, learn and need, the time to read and to run."""
    first_code = next(code_cells(nb), (len(nb["cells"]), None))[0]
    if not first_code or not re.match(r"# \S", nb["cells"][0]["source"]):
        yield "the first cell is not a Markdown cell with a `# ` title"
    text = "\n\n".join(prose(cell) for cell in nb["cells"][:first_code])
    for words in OPENING:
        if f"**{words}**" not in text:
            yield f"before the first code, the opening lacks **{words}**"
    stated = text.partition("**Time.**")[2].partition("\n\n")[0]
    times = re.findall(r"\d\s*(?:minutes?|seconds?|min|s)\b", stated)
    if len(times) < 2 or "read" not in stated or "run" not in stated:
        yield "**Time.** must say how many minutes to read and how many seconds to run"


@rule
def predicts(nb):
    """The student commits to an answer before running."""
    if not re.search(r"^## Predict\b", markdown(nb), flags=re.M):
        yield "there is no section `## Predict`"


@rule
def ending(nb):
    """Exercises, summary, and where the paper says it: in this order, and nothing after."""
    headings = re.findall(r"^## (.+?)\s*$", markdown(nb), flags=re.M)
    if tuple(headings[-len(ENDING) :]) != ENDING:
        yield f"the last sections are not {', '.join(ENDING)}, but {', '.join(headings[-3:])}"


@rule
def exercises(nb):
    """Each states its time, has a check that the student runs, and one collapsed solution."""
    pieces = [prose(c) if c["cell_type"] == "markdown" else "<code cell>" for c in nb["cells"]]
    text = "\n".join(pieces)
    text = text.partition("\n## Exercises")[2].partition("\n## Summary")[0]
    parts = re.split(r"^### Exercise", text, flags=re.M)[1:]
    if not parts:
        yield "there is no `### Exercise` under `## Exercises`"
    if len(list(solved(nb))) != markdown(nb).count("<details"):
        yield "a solution holds no ```python block, or more than one"
    for number, part in enumerate(parts, 1):
        solutions = len(re.findall(r"<details>\s*<summary>.+?</summary>.+?</details>", part, re.S))
        if solutions != 1 or part.count("<details") != 1:
            yield f"exercise {number}: needs exactly one solution in a closed <details> block"
        if "<code cell>" not in part:
            yield f"exercise {number}: needs a code cell with a check that the student can run"
        if not re.search(r"\d\s*min(utes?)?\b", part):
            yield f"exercise {number}: does not say how many minutes it takes"


@rule
def breaks_something(nb):
    """A common mistake is made on purpose."""
    if not any("break-it" in tags(cell) for _, cell in code_cells(nb)):
        yield "no code cell is tagged break-it"


@rule
def claims_are_labelled(nb):
    """The reader is told what a claim rests on: *paper*, *exact here* or *toy evidence*."""
    label = r"(?<![*_])[*_](paper|exact here|toy evidence)[.,:]?[*_](?![*_])"
    if not re.search(label, markdown(nb), flags=re.I):
        yield "no claim is labelled *paper*, *exact here* or *toy evidence*"
