"""Text to tokens and back, conversations, and batches of questions with their answers."""

import json
from pathlib import Path

import numpy as np

PLAIN = (  # for a model that has no template of its own
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Tokenizer:
    """A model's own tokenizer, by the `tokenizers` package, and its chat template.

    Args:
        core: a `tokenizers.Tokenizer`.
        stop: the tokens that end an answer, one or more ids.
        template: the chat template, in the language of jinja; None if the model has none.
        names: texts that the template may ask for, such as `bos_token`.
    """

    def __init__(self, core, stop=(), template=None, names=None):
        core.no_padding()
        core.no_truncation()
        self.core, self.stop, self.names = core, [int(i) for i in stop], names or {}
        self.template = template or PLAIN

    def encode(self, text, special=True):
        """The ids of a text, a list; with those that the model wants at its ends if `special`."""
        return self.core.encode(text, add_special_tokens=special).ids

    def decode(self, ids):
        """The text of some ids, without special tokens."""
        return self.core.decode([int(i) for i in np.asarray(ids).reshape(-1)])

    def batch(self, texts, pad=0, longest=128):
        """Texts as ids (B, T), cut to `longest` and filled up with `pad` at the end."""
        rows = [self.encode(text) for text in texts]
        rows = [row if len(row) <= longest else row[: longest - 1] + row[-1:] for row in rows]
        ids = np.full((len(rows), max(map(len, rows))), pad)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return ids

    def chat(self, messages):
        """The ids of a conversation, up to where the answer begins.

        Args:
            messages: a question, or a list of `{"role": "user", "content": "…"}`.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template comes from a file

        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        room.globals["raise_exception"] = _complain
        template = room.from_string(self.template)
        text = template.render(messages=messages, add_generation_prompt=True, **self.names)
        return self.encode(text, special=False)

    def pairs(self, pairs, ignore=-100):
        """Questions with answers as a batch for `fit`: inputs and targets, both (B, T).

        Only the answer and the token that ends it count.

        Args:
            pairs: (question, answer) each. ignore: the target of what does not count.
        """
        rows = []
        for question, answer in pairs:
            asked = self.chat(question)
            rows.append((asked, self.encode(answer, special=False) + self.stop[:1]))
        longest = max(len(asked) + len(answer) for asked, answer in rows)
        inputs = np.zeros((len(rows), longest - 1), int)
        targets = np.full_like(inputs, ignore)
        for i, (asked, answer) in enumerate(rows):
            row = asked + answer
            inputs[i, : len(row) - 1] = row[:-1]
            targets[i, len(asked) - 1 : len(row) - 1] = answer
        return inputs, targets


def _complain(message):
    raise ValueError(f"the chat template: {message}")


def from_folder(path):
    """The `Tokenizer` of a folder: `tokenizer.json`, and the template beside it."""
    import tokenizers

    path = Path(path)
    try:
        core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the package knows no other kind
        raise ValueError(f"tokenizer.json: {error}") from None
    config, ends = {}, []
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path / name).exists():
            config |= json.loads((path / name).read_text("utf-8"))
            ends += np.atleast_1d(config.get("eos_token_id") or []).tolist()
    names = {name: config.get(name) or "" for name in ("bos_token", "eos_token")}
    names = {n: t["content"] if isinstance(t, dict) else t for n, t in names.items()}
    if core.token_to_id(names["eos_token"]) is not None:
        ends.insert(0, core.token_to_id(names["eos_token"]))
    template, beside = config.get("chat_template"), path / "chat_template.jinja"
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if beside.exists():
        template = beside.read_text("utf-8")
    return Tokenizer(core, dict.fromkeys(ends), template, names)


# How the text is cut before pairs are merged, by the name that llama.cpp gives it.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_CUTS = {"llama-bpe": _APOSTROPHE + _WORDS % "{1,3}", "qwen2": _APOSTROPHE + _WORDS % ""}
_CUTS |= {"gpt-2": None, "default": None, "smollm": None}  # as ByteLevel has it


def from_gguf(fields):
    """The `Tokenizer` out of the fields of a GGUF file: byte-level pair encoding."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    def field(name, usual=None):
        return fields.get(f"tokenizer.ggml.{name}", usual)

    kind, pre = field("model"), field("pre", "default")
    if kind != "gpt2" or pre not in _CUTS:
        known = f"'gpt2', cut by {', '.join(_CUTS)}"
        raise ValueError(f"its tokenizer is {kind!r}, cut by {pre!r}; expected {known}")
    tokens, cut = field("tokens"), _CUTS[pre]
    merges = [tuple(pair.split(" ")) for pair in field("merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if cut:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(cut), "isolated"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    kinds = zip(tokens, field("token_type", []), strict=False)
    special = [token for token, kind in kinds if kind in (3, 4)]  # control, and the user's own
    core.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    ends = [field(f"{name}_token_id") for name in ("eos", "eot")]
    names = {f"{n}_token": tokens[field(f"{n}_token_id", 0)] for n in ("bos", "eos")}
    if field("add_bos_token", False):
        bos = names["bos_token"], field("bos_token_id")
        before = tokenizers.processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
        core.post_processor = before
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(core, [i for i in ends if i is not None], template, names)
