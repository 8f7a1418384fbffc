"""What nbval does not look at: the rules that every notebook keeps, each a function of its JSON.

A rule takes a notebook (as `nbformat` reads it) and yields one line per problem, in words that
tell the author what to do. `RULES` holds them all by name. How long a notebook is, and how many
minutes that makes:

    python tests/notebook_lint.py 06
"""

import ast
import base64
import re
import sys

from minilora import editions

RULES = {}
# The sheet of formulas and terms is no lesson: the rules that make one, in LESSON, spare it.
SHEET = "28"
LESSON = set("length opening honest_time slides ending exercises breaks_something".split())

OPENING = ("The question.", "You will do.", "You will learn.", "You need.", "Time.")
ENDING = ("Exercises", "Summary", "Where the paper says it")
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
# A tag that nbval does not know is silently no tag at all.
NBVAL_TAGS = UNCOMPARED | {"raises-exception"}
PICTURES = ("image/png", "image/svg+xml", "text/html")  # a chart, a drawing, a stepper
MAX_PICTURE_BYTES = 150_000
DOTS_PER_METRE = [round(dpi / 0.0254) for dpi in (72, 144)]
SLIDES = {"slide", "subslide", "fragment", "skip", "notes"}
FOLDED = {"slideshow": {"slide_type": "fragment"}, "jupyter": {"source_hidden": True}}


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
    """All prose of the notebook in one string, without what is for who teaches."""
    cells = [c for c in nb["cells"] if c["cell_type"] == "markdown" and not editions.is_note(c)]
    return "\n\n".join(map(prose, cells))


def number(nb):
    """The two digits that its title begins with, or nothing."""
    found = re.match(r"# (\d\d) ·", nb["cells"][0]["source"])
    return found[1] if found else ""


def teaches_a_method(nb):
    """Whether it belongs to parts I to IV, the tour and the capstone apart."""
    return "01" <= number(nb) <= "21"


def lines(source):
    """How many lines are not blank."""
    return sum(bool(line.strip()) for line in source.splitlines())


def size(nb):
    """Words that a student reads, lines of code, and the minutes that both take."""
    words = len(editions.SOLUTION.sub("", markdown(nb)).split())
    code = sum(lines(cell["source"]) for _, cell in code_cells(nb))
    return words, code, words / 130 + code / 12


def slide_type(cell):
    """What a cell is in the slides."""
    return cell["metadata"].get("slideshow", {}).get("slide_type")


def before(nb, i):
    """The text of the Markdown cell above cell i, or nothing."""
    above = [cell for cell in nb["cells"][:i] if not editions.is_note(cell)]
    return above[-1]["source"] if above and above[-1]["cell_type"] == "markdown" else ""


def texts_of(output):
    """Every text in an output, pictures apart."""
    if output["output_type"] == "stream":
        yield output["text"]
    elif output["output_type"] == "error":
        yield from (output["evalue"], *output["traceback"])
    else:
        data = output["data"]
        yield from (v for k, v in data.items() if k.startswith("text/") and k not in PICTURES)


def pictures(nb):
    """(position, output, bytes) of every picture."""
    for i, _, output in outputs(nb):
        for kind in PICTURES:
            if kind in output.get("data", {}):
                data = output["data"][kind]
                yield i, output, base64.b64decode(data) if kind == "image/png" else data.encode()


def parsed(source):
    """The grammar of a cell, without magics; empty if the cell breaks it on purpose."""
    try:
        return ast.parse(re.sub(r"^[%!].*", "", source, flags=re.M))
    except SyntaxError:
        return ast.Module([], [])


def called(node):
    """The name that a call calls, without what stands before the dot."""
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def calls(source, name):
    """How often a cell surely calls `name(…)` or `….name(…)`: not inside a def, if or try."""
    waiting = list(parsed(source).body)
    found = 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.Try)):
            continue
        found += isinstance(node, ast.Call) and called(node) == name
        waiting.extend(ast.iter_child_nodes(node))
    return found


def seconds_to_run(nb):
    """How long the notebook says that it runs, in seconds; the longest, if it does not say."""
    found = re.search(r"(\d+) seconds to run", "".join(cell["source"] for cell in nb["cells"]))
    return int(found[1]) if found else 120


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
        images = sum(any(k in o.get("data", {}) for k in PICTURES) for o in cell["outputs"])
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
        if set(cell["metadata"]) - {"tags", *FOLDED}:
            yield f"cell {i}: metadata holds {sorted(cell['metadata'])}"
        if cell.get("attachments"):
            yield f"cell {i}: an attached file has no size limit; draw it or leave it out"
    for i, _, output in outputs(nb):
        if set(output.get("metadata", {})) - set(PICTURES):
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
    for i, output, data in pictures(nb):
        text = output["data"].get("text/plain", "")
        alt = output["metadata"].get("image/png", {}).get("alt", "")
        if "image/png" not in output["data"]:  # what is text brings its own
            alt = text.removeprefix("Figure: ") if b"aria-label=" in data else ""
        if not (text.startswith("Figure: ") and len(text) > 30):
            yield f"cell {i}: its figure needs a description; use show(fig, alt)"
        elif alt != text.removeprefix("Figure: "):
            yield f"cell {i}: the alt text in the figure's metadata is not the text beside it"


@rule
def figures_are_light(nb):
    """Each picture stays below 150 kB: text, or a PNG at 72 or 144 dots per inch."""
    for i, _, data in pictures(nb):
        if len(data) >= MAX_PICTURE_BYTES:
            yield f"cell {i}: its figure has {len(data) // 1000} kB; at most 150 kB"
        at = data.find(b"pHYs")
        if data.startswith(b"\x89PNG") and (
            at < 0 or int.from_bytes(data[at + 4 : at + 8], "big") not in DOTS_PER_METRE
        ):
            yield f"cell {i}: its figure is not drawn at 72 or 144 dpi"


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
    """25 to 60 cells, notes for who teaches apart."""
    cells = sum(not editions.is_note(cell) for cell in nb["cells"])
    if not 25 <= cells <= 60:
        yield f"{cells} cells; 25 to 60 make a lesson"


@rule
def code_and_words(nb):
    """No more than 450 lines of code (250 in 01) and 3,000 words; no cell above 35 lines."""
    words, code, _ = size(nb)
    most = 250 if number(nb) == "01" else 450
    if code > most:
        yield f"{code} lines of code; at most {most}"
    if words > 3000:
        yield f"{words} words; at most 3,000"
    for i, cell in code_cells(nb):
        if lines(cell["source"]) > 35:
            yield f"cell {i}: {lines(cell['source'])} lines of code; at most 35"


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
def honest_time(nb):
    """The minutes to read are words / 130 + lines of code / 12, within 3 or 15%."""
    minutes = size(nb)[2]
    said = re.search(r"\*\*Time\.\*\* About (\d+) minutes to read and do", markdown(nb))
    if not said:
        said = "About N minutes to read and do, exercises apart, about S seconds to run."
        yield f"write: **Time.** {said}"
    elif abs(int(said[1]) - minutes) > max(3, 0.15 * minutes):
        yield f"it says {said[1]} minutes, and takes about {minutes:.0f}"


@rule
def predicts(nb):
    """At least two predictions, in parts I to IV; each empty, announced, and answered."""
    found, scored = [], set()
    for i, cell in code_cells(nb):
        for node in ast.walk(parsed(cell["source"])):
            if not isinstance(node, ast.Call):
                continue
            if called(node) == "Prediction":
                found.append(ast.unparse(node))
                if len(node.args) != 1 or node.keywords:
                    yield f"cell {i}: the prediction is not empty"
                if "**Predict.**" not in before(nb, i):
                    yield f"cell {i}: the Markdown cell above has no **Predict.**"
            if called(node) == "score" and isinstance(node.func, ast.Attribute):
                scored.add(ast.unparse(node.func.value))
    if teaches_a_method(nb) and len(found) < 2:
        yield f"{len(found)} predictions; at least 2"
    if len(scored) < len(found):
        yield f"{len(found)} predictions, and {len(scored)} of them scored"


@rule
def gaps(nb):
    """At least one gap, in parts I to IV: 3 to 8 lines that end a function; tried by `gap`."""
    found = 0
    for i, cell in code_cells(nb):
        source = cell["source"]
        if source.count("### BEGIN SOLUTION") != len(editions.GAP.findall(source)):
            yield f"cell {i}: a gap is not closed by ### END SOLUTION"
        for region in editions.GAP.finditer(source):
            found += 1
            if not 3 <= lines(region[2]) <= 8:
                yield f"cell {i}: the gap has {lines(region[2])} lines; 3 to 8 are a gap"
            below = source[region.end() :].lstrip("\n").partition("\n")[0]
            if not region[1] or below.startswith(region[1]):
                yield f"cell {i}: the gap is not the end of a function"
            if "<summary>Hint" not in before(nb, i):
                yield f"cell {i}: the Markdown cell above has no hint in a <details> block"
        names = [n for n in ast.walk(parsed(source)) if isinstance(n, ast.Assign)]
        tried = [n for n in names if isinstance(n.value, ast.Call) and called(n.value) == "gap"]
        if "### BEGIN SOLUTION" in source and not tried:
            yield f"cell {i}: does not go on with what gap(…) returns"
        for node in tried:
            if ast.unparse(node.targets[0]) == ast.unparse(node.value.args[0]):
                yield f"cell {i}: give what gap(…) returns another name than the reader's function"
    if teaches_a_method(nb) and not found:
        yield "no gap: the heart of the method is for the reader to write"


@rule
def no_answer_to_read(nb):
    """A check holds no answer: it works the value out, or compares a digest."""
    for i, cell in code_cells(nb):
        for node in ast.walk(parsed(cell["source"].partition("# check")[2])):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
                for side in (node.left, *node.comparators):
                    kinds = {type(n) for n in ast.walk(side)}
                    if ast.Constant in kinds and not kinds & {ast.Name, ast.Call, ast.Tuple}:
                        yield f"cell {i}: its answer can be read: {ast.unparse(side)}; use digest"


@rule
def slides(nb):
    """Each cell says what it is in the slides; a section is a slide, with its minutes in notes."""
    sections, totals = 0, [0, 0]
    for i, cell in enumerate(nb["cells"]):
        kind = slide_type(cell)
        if kind not in SLIDES:
            yield f"cell {i}: slide_type is {kind}; expected one of {', '.join(sorted(SLIDES))}"
        if kind == "notes":
            found = re.match(r"45 minutes: (\d+)\. 90 minutes: (\d+)\.", cell["source"])
            if not found or cell["cell_type"] != "markdown":
                yield f"cell {i}: notes start with: 45 minutes: N. 90 minutes: M."
            else:
                totals = [a + int(b) for a, b in zip(totals, found.groups(), strict=True)]
                sections -= 1
        if cell["cell_type"] == "markdown":
            heads = [match.start() for match in re.finditer(r"^##? \S", prose(cell), re.M)]
            talk = heads and kind != "skip"
            if talk and (heads != [0] or kind != "slide"):
                yield f"cell {i}: a heading begins a cell, and the cell is a slide"
            sections += bool(talk)
    if sections:
        yield "each section that is a slide has one notes cell"
    if not (35 <= totals[0] <= 45 and 70 <= totals[1] <= 90):
        yield f"the notes make {totals[0]} and {totals[1]} minutes; expected 35-45, 70-90"


@rule
def figures_are_folded(nb):
    """The code of a figure is folded away, and a cell that is folded draws or helps."""
    for i, cell in code_cells(nb):
        folded = cell["metadata"].get("jupyter", {}) == {"source_hidden": True}
        if folded != ("hide-input" in tags(cell)):
            yield f"cell {i}: the tag hide-input and jupyter.source_hidden go together"
        if calls(cell["source"], "show") and not folded:
            yield f"cell {i}: draws a figure and is not folded"


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
    if len(list(editions.solved(nb))) != markdown(nb).count("<summary>Solution"):
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
    """The reader is told what a claim rests on, by one of four labels."""
    label = r"(?<![*_])[*_](paper|real model|exact here|toy evidence)[.,:]?[*_](?![*_])"
    if not re.search(label, markdown(nb), flags=re.I):
        yield "no claim is labelled *paper*, *real model*, *exact here* or *toy evidence*"


if __name__ == "__main__":
    for path in sorted(editions.MASTERS.glob("[0-9]*.ipynb")):
        if path.name.startswith(tuple(sys.argv[1:])) or not sys.argv[1:]:
            told = "{:6,} words {:5} lines of code: about {:.0f} minutes"
            print(f"{path.name:30}", told.format(*size(editions.read(path))))
