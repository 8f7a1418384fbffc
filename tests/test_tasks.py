"""The toy skills against plain Python on text, and the layout of an example."""

import numpy as np
import pytest

from minilora import tasks

NEXT = dict(zip(tasks.LETTERS, tasks.LETTERS[1:] + tasks.LETTERS[:1], strict=True))
PLAIN = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "shift": lambda s: "".join(NEXT[c] for c in s),
    "swap": lambda s: "".join(s[i + 1] + s[i] for i in range(0, 8, 2)),
    "unnamed_sort": lambda s: "".join(sorted(s)),
    "unnamed_reverse": lambda s: s[::-1],
    "reverse_shift": lambda s: "".join(NEXT[c] for c in reversed(s)),
    "swap_shift": lambda s: "".join(NEXT[s[i + 1]] + NEXT[s[i]] for i in range(0, 8, 2)),
    "sort_descending": lambda s: "".join(sorted(s, reverse=True)),
    "interleave": lambda s: "".join(a + b for a, b in zip(s[:4], s[4:], strict=True)),
}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_skill_is_the_plain_one(task):
    for ids in tasks.sample(task, 50, rng()):
        name, letters, mark, answer = tasks.decode(ids).split()
        assert (name, mark) == (task if task in tasks.SKILLS else "?", ">")
        assert answer == PLAIN[task](letters)
        assert len(letters) == 8 and set(letters) <= set(tasks.LETTERS)


def test_no_skill_changes_what_it_is_given():
    x = rng().integers(16, size=(3, 8))
    before = x.copy()
    for skill in tasks.TASKS.values():
        skill(x)
    np.testing.assert_array_equal(x, before)


def test_the_vocabulary_is_letters_a_mark_skills_and_a_name_for_all_else():
    assert list(tasks.TASKS) == [*tasks.SKILLS, *tasks.NEW_SKILLS] == list(PLAIN)
    assert len(set(tasks.TOKENS)) == tasks.VOCAB_SIZE == 16 + 1 + 5 + 2
    assert (tasks.TOKENS[tasks.SEP], tasks.TOKENS[tasks.UNNAMED]) == (">", "?")
    assert (tasks.PROMPT, tasks.N_POSITIONS) == (10, 17)


def test_each_new_skill_is_at_one_distance():
    assert [name for names in tasks.DISTANCES.values() for name in names] == list(tasks.NEW_SKILLS)
    assert min(map(len, tasks.DISTANCES.values())) >= 2


def test_sample_is_seeded_and_draws_afresh():
    np.testing.assert_array_equal(tasks.sample("sort", 5, rng(1)), tasks.sample("sort", 5, rng(1)))
    shared = rng(1)
    assert (tasks.sample("sort", 5, shared) != tasks.sample("sort", 5, shared)).any()
    assert tasks.sample("copy", 0, rng()).shape == (0, 18)


def test_letters_are_drawn_evenly():
    letters = tasks.sample("copy", 2000, rng())[:, 1:9]
    counts = np.bincount(letters.ravel(), minlength=16)
    assert len(counts) == 16 and counts.min() > 850 and counts.max() < 1150


def test_a_list_of_tasks_is_mixed_evenly_and_each_gets_its_own_answer():
    ids = tasks.sample(["copy", "reverse", "shift"], 300, rng())
    names = [tasks.TOKENS[i] for i in ids[:, 0]]
    for task in ("copy", "reverse", "shift"):
        assert 70 < names.count(task) < 130
    for row in ids:
        name, letters, _, answer = tasks.decode(row).split()
        assert answer == PLAIN[name](letters)


def test_inputs_and_targets_are_one_token_apart():
    ids = tasks.sample("sort", 4, rng())
    before = ids.copy()
    inputs, targets = tasks.inputs_and_targets(ids)
    np.testing.assert_array_equal(inputs, ids[:, :17])
    np.testing.assert_array_equal(targets[:, :9], -100)  # up to and with `>`
    np.testing.assert_array_equal(targets[:, 9:], ids[:, 10:])  # the answer
    _, every = tasks.inputs_and_targets(ids, answers_only=False)
    np.testing.assert_array_equal(every, ids[:, 1:])
    np.testing.assert_array_equal(ids, before)


def test_decode_and_encode_are_inverse():
    text = "? dabcpabc > pdccbbaa"
    ids = tasks.encode(text)
    assert tasks.decode(ids) == text
    assert ids.dtype.kind == "i" and len(ids) == 18
    for row in tasks.sample(list(tasks.TASKS), 20, rng()):
        np.testing.assert_array_equal(tasks.encode(tasks.decode(row)), row)
    np.testing.assert_array_equal(tasks.encode("swap ab >"), [tasks.TOKENS.index("swap"), 0, 1, 16])


def test_text_of_other_letters_is_refused():
    with pytest.raises(ValueError, match="'z'"):
        tasks.encode("sort abz >")


@pytest.mark.parametrize("task", ["srot", ["sort", "srot"]])
def test_an_unknown_task_is_refused_with_the_list(task):
    with pytest.raises(ValueError, match="task is 'srot'; expected one of copy, .*, interleave"):
        tasks.sample(task, 1, rng())
