"""Parameter-efficient fine-tuning. Each recipe freezes the model, then lets a little train.

method      where it sits               cost at training       at inference   merges  cannot
full        everywhere                  all gradients, state   nothing        -       share a base
lora        beside a layer or table     2 thin GEMMs a layer   0 once merged  yes     pass rank r
 DoRA       the same                    and V is formed        0 once merged  yes     be as cheap
 PiSSA      the same                    and a copy of W        0 once merged  yes     come off free
ia3         outputs, inputs of a layer  a scale a feature      0 once merged  yes     mix features
bitfit      the biases                  their gradients        nothing        -       mix features
token_rows  rows of the token table     a row a token          0 once merged  yes     reach others
adapter     after attention, MLP        2 thin GEMMs in series the same       no      be parallel
 parallel   beside attention, MLP       2 thin GEMMs           the same       no      be merged
prefix      keys, values of attention   m more keys a layer    the same       no      go past n - m
prompt      before the input            m more tokens          the same       no      go past n - m

n is `n_positions`: an input may have at most n - m tokens.

What holds for all of them: a recipe changes the model in place and returns it. It takes a model
that carries no adapter, and what it puts on has the model's training mode. If it raises an error,
because a pattern hits nothing, a weight is tied or a setting is bad, the model is as it was.
Targets are one pattern or several, as for `surgery.find`. `rng` is a `numpy.random.Generator`.
A wrapper holds the layer it wraps in `base`, and starts where that is unless it says otherwise.
"""

from .adapters import Adapter, Prefix, Prompt, TokensFirst, WithoutPrompt
from .adapters import adapter, fold, prefix, prompt
from .lora import DoRA, LoRA, LoRAEmbedding, PiSSA, lora, lora_plus
from .many import Many, choose, combine, many
from .scales import IA3, TokenRows, bitfit, full, ia3, token_rows

# what a file may ask for
KINDS = [LoRA, LoRAEmbedding, DoRA, PiSSA, IA3, TokenRows]
KINDS += [Adapter, Prefix, Prompt, WithoutPrompt, TokensFirst]
# which wrap a table and nothing else
TABLES = ("LoRAEmbedding", "TokenRows", "Prompt", "TokensFirst")
BLANK = (Adapter, Prefix)  # of any width: they can be made without drawing a start
WRAPPERS = {kind.__name__: kind for kind in KINDS}
