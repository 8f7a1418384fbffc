"""Toy skills on strings of letters: `task letters > answer`, such as `sort dab > abd`.

A string is 8 letters out of 16. One token names the task, one each stands for a letter and
one for `>`. The base model is pre-trained on five skills. In a part of its examples `?` stands in
place of the name, so `?` is the name of whatever comes next, and each new task is asked under it.
"""

import numpy as np

LENGTH = 8
LETTERS = "abcdefghijklmnop"

# x is (N, LENGTH), letters as numbers from 0; each returns the answers, (N, LENGTH).
SKILLS = {
    "copy": lambda x: x,
    "reverse": lambda x: x[:, ::-1],
    "sort": lambda x: np.sort(x, axis=1),
    "shift": lambda x: (x + 1) % len(LETTERS),
    "swap": lambda x: x.reshape(-1, LENGTH // 2, 2)[:, :, ::-1].reshape(-1, LENGTH),
}
NEW_SKILLS = {  # each is asked under `?`
    "unnamed_sort": SKILLS["sort"],
    "unnamed_reverse": SKILLS["reverse"],
    "reverse_shift": lambda x: SKILLS["shift"](SKILLS["reverse"](x)),
    "swap_shift": lambda x: SKILLS["shift"](SKILLS["swap"](x)),
    "sort_descending": lambda x: np.sort(x, axis=1)[:, ::-1],
    "interleave": lambda x: x.reshape(-1, 2, LENGTH // 2).swapaxes(1, 2).reshape(-1, LENGTH),
}
DISTANCES = {  # from what the base can do to a new task
    "elicit": ("unnamed_sort", "unnamed_reverse"),  # a skill that it has
    "compose": ("reverse_shift", "swap_shift"),  # two that it has, in turn for each letter
    "build": ("sort_descending", "interleave"),  # one that it lacks
}
TASKS = SKILLS | NEW_SKILLS

# `unused` is never trained: a trap for whoever gives a new task a name of its own
TOKENS = [*LETTERS, ">", *SKILLS, "?", "unused"]
VOCAB_SIZE = len(TOKENS)
SEP, UNNAMED = TOKENS.index(">"), TOKENS.index("?")
PROMPT = LENGTH + 2  # the task, the letters and `>`
N_POSITIONS = PROMPT + LENGTH - 1  # the last letter of the answer is never an input


def check(task):
    """Raise a ValueError that lists the tasks if there is none of this name."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")


def sample(task, n, rng):
    """Draw `n` examples of a task, or of a list of tasks from which each draws its own.

    Returns token ids (n, 18): the task's name, or `?` for a new one, 8 letters, `>`, 8 letters.
    """
    names = [task] if isinstance(task, str) else list(task)
    for name in names:
        check(name)
    x = rng.integers(len(LETTERS), size=(n, LENGTH))
    which = rng.integers(len(names), size=n)
    answers = np.stack([TASKS[name](x) for name in names])[which, np.arange(n)]  # (n, LENGTH)
    first = np.array([TOKENS.index(name if name in SKILLS else "?") for name in names])[which]
    return np.column_stack([first, x, np.full(n, SEP), answers])


def inputs_and_targets(ids, answers_only=True):
    """Split examples (N, 18) for next-token prediction: inputs and targets, each (N, 17).

    If `answers_only`, the letters of the answer alone count in the loss: the other targets become
    -100, which `cross_entropy` ignores.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:].copy()  # (N, 18) -> (N, 17) twice
    if answers_only:
        targets[:, : PROMPT - 1] = -100
    return inputs, targets


def decode(ids):
    """Token ids (T,) as text: `sort dabc… > abcd…`."""
    words = [TOKENS[i] for i in ids]
    return "".join(w if w in LETTERS else f" {w} " for w in words).strip()


def encode(text):
    """Text such as `sort dabcdabc >` as token ids (T,); the inverse of `decode`."""
    words = ([word] if word in TOKENS else list(word) for word in text.split())
    return np.array([TOKENS.index(token) for word in words for token in word])
