"""FLOPs of the network's matrix products, from the configuration alone: two per multiply-add.

A backward does each product twice, but for the inputs that need no gradient. What gradient checkpointing computes again
is not counted: these are the FLOPs that the training needs, so that a share of the peak (MFU) compares implementations.
"""

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.modules import TIME_FREQUENCIES


def block_flops(config: BLIP3oConfig, batch: int, context: int, mode: str = "forward") -> int:
    """One block. Context: tokens of the condition. mode: forward, or both (every input of a block gets a gradient)."""
    dim, keys, tokens = config.hidden_size, config.kv_heads * config.head_dim, config.num_tokens
    per_token = 3 * dim * dim + 2 * dim * keys + 3 * dim * config.ffn_dim
    per_sample = 2 * context * config.context_dim * keys + 4 * dim * config.conditioning_dim
    attention = 2 * tokens * dim * (tokens + context)
    return 2 * batch * (tokens * per_token + per_sample + attention) * (3 if mode == "both" else 1)


def model_flops(config: BLIP3oConfig, batch: int, context: int, mode: str = "forward") -> int:
    """both: forward and backward of a training step, in which neither x_t, the time nor the context gets a gradient."""
    dim, cond, tokens = config.hidden_size, config.conditioning_dim, config.num_tokens
    pixels = config.patch_size**2
    # whose input gets no gradient, and the rest
    first = tokens * pixels * config.in_channels * dim + TIME_FREQUENCIES * cond
    rest = cond * cond + config.context_dim * cond + cond * dim + tokens * dim * pixels * config.out_channels
    if config.context_projection:
        first += context * config.cross_attention_dim * dim
        rest += context * dim * dim
    outside = 2 * batch * (2 * first + 3 * rest if mode == "both" else first + rest)
    return outside + config.num_layers * block_flops(config, batch, context, mode)
