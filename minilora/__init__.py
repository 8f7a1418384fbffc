"""minilora: low-rank adaptation from scratch, to be read from top to bottom.

The table of contents, in reading order.
"""

from . import accounting, compress, ops, peft, safetensors, tasks
from .tensor import Node, Tensor, backward, no_grad, record
from .gradcheck import check_vjp
from .nn import MLP, Embedding, LayerNorm, Linear, Module, Parameter
from .transformer import Attention, Block, Transformer, attend, generate
from .optim import SGD, AdamW, constant, cosine
from .surgery import Wrapper, attach, count, detach, detached, freeze, merge, replace, unfreeze
from .peft import IA3, Adapter, DoRA, LoRA, LoRAEmbedding, PiSSA, Prefix, Prompt, TokenRows
from .peft import adapter, bitfit, fold, full, ia3, lora, lora_plus, prefix, prompt, token_rows
from .peft import choose, combine, many
from .io import load_adapter, load_base, load_eval, load_model, save_adapter, save_model
from .train import History, Score, evaluate, fit, task_batches
from .lecture import Prediction, check, digest, gap, number, show
