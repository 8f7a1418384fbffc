"""Toy skills on strings of letters: `task letters > answer`, such as `sort dab > abd`.

A string is 8 letters out of 16. One token names the task, one each stands for a letter and
one for `>`. The base model is pre-trained on five skills; the others are new to it.
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
NEW_SKILLS = {
    "sort_descending": lambda x: np.sort(x, axis=1)[:, ::-1],  # the hard one
    "reverse_shift": lambda x: (x[:, ::-1] + 1) % len(LETTERS),  # the easy one: two known skills
}
TASKS = SKILLS | NEW_SKILLS

TOKENS = [*LETTERS, ">", *TASKS]
VOCAB_SIZE = len(TOKENS)
SEP = TOKENS.index(">")
PROMPT = LENGTH + 2  # the task, the letters and `>`
N_POSITIONS = PROMPT + LENGTH - 1  # the last letter of the answer is never an input


def check(task):
    """Raise a ValueError that lists the tasks if there is none of this name."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")


def sample(task, n, rng):
    """Draw `n` examples.

    Args:
        task: a name, or a list of names from which each example draws its own.
        n: how many. rng: a `numpy.random.Generator`.

    Returns:
        Token ids (n, 18): task, 8 letters, `>`, 8 letters.
    """
    names = [task] if isinstance(task, str) else list(task)
    for name in names:
        check(name)
    x = rng.integers(len(LETTERS), size=(n, LENGTH))
    which = rng.integers(len(names), size=n)
    answers = np.stack([TASKS[name](x) for name in names])[which, np.arange(n)]  # (n, LENGTH)
    first = np.array([TOKENS.index(name) for name in names])[which]
    return np.column_stack([first, x, np.full(n, SEP), answers])


def inputs_and_targets(ids, answers_only=True):
    """Split examples for next-token prediction.

    Args:
        ids: token ids (N, 18).
        answers_only: let only the letters of the answer count in the loss; the rest of the
            targets become -100, which `cross_entropy` ignores.

    Returns:
        Inputs and targets, each (N, 17).
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
    ids = []
    for word in text.split():
        for token in [word] if word in TOKENS else list(word):
            if token not in TOKENS:
                raise ValueError(f"text has {token!r}; expected a task, > or letters a to p")
            ids.append(TOKENS.index(token))
    return np.array(ids)
