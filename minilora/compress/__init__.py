"""Neural-network compression: make the *model* small, where `peft` makes the *update* small.

Pure array functions first, then thin layers that `surgery.replace` puts in place. What holds for
all: `w` is a weight (d_out, d_in); `gram` is the mean of x xᵀ over what its layer is given,
(d_in, d_in), as `observe` finds it. A recipe takes a model first. It changes it in place and
returns it, wants it plain (no adapter on, and what it compresses neither tied nor compressed
before), and leaves it as it was on an error. New layers train where the old ones did. Its
`targets` are one pattern or several for linear layers, and `grams` what `observe` gave. For
sequential calibration, token ids (N, T) as `in_turn` take the place of `grams`: each block is
then made for what the new blocks before it make of these.

family         granularity        saves in a file      saves time      afterwards
low rank       a matrix           mn -> r (m + n)      if r is small   train the factors
Tucker         a stack of them    more, if they are    if ranks are    train the shared factors
                                  alike                small
quantisation   a weight           32 -> 8 ... 1 bits   not in NumPy    LoRA beside it, or straight
                                                                       through
connections    a weight           zeros, by a bitmap   no              train what is left
neurons, heads a row or column    their share          their share     train what is left
blocks         a layer            their share          their share     train what is left
"""

from .observe import observe
from .factor import rank_for_budget, rank_for_energy, truncated_svd, weighted_svd
from .factor import Tucker, hosvd, tensor_train, tt_dense, tucker
from .lowrank import LowRankLinear, TuckerLinear, low_rank, tucker_layers
from .quantise import kmeans_levels, nf4_levels, pack, unpack
from .quantise import Quantised, dequantise, gptq, kmeans, quantise
from .quantlinear import QuantLinear, StraightThrough, loftq, quantise_aware, quantise_model
from .prune import Masked, magnitude_mask, rewind, sparse_gpt, sparsify, wanda_mask
from .prune import block_similarity, drop_blocks, prune_heads, prune_neurons
from .prune import break_even_sparsity, from_bitmap, from_indices, to_bitmap, to_indices

# layers that a file may hold
LAYERS = {kind.__name__: kind for kind in (LowRankLinear, QuantLinear)}
