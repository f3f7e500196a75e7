"""How many bytes a run needs, from the configuration alone: what the ops keep for the backward, counted."""

from typing import Any

import torch


def parse_dtype(dtype: torch.dtype | str | None, default: torch.dtype) -> torch.dtype:
    """A torch dtype from one, from its name ("bfloat16" or "torch.bfloat16"), or the default from None or "auto"."""
    if dtype is None or dtype == "auto":
        return default
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"torch_dtype must be a floating dtype or its name, got {dtype!r}")
        dtype = found
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"torch_dtype must be a floating dtype or its name, got {dtype!r}")
    return dtype


def kept_values_per_token(config: Any) -> int:
    """Activation values of one block and one token that the backward reads, without gradient checkpointing.

    D each: h before and after the attention, the four normed or projected tensors around the attention and the MLP
    (n, attention's out, its projection, u), and the MLP's result; the packed projections and their normed queries and
    keys; the packed gate and up columns and their product.
    """
    dim, head_dim = config.hidden_size, config.head_dim
    queries = config.num_attention_heads * head_dim
    keys = config.kv_heads * head_dim
    projections = 2 * queries + 2 * keys
    return 6 * dim + queries + projections + (2 * queries + keys) + 3 * config.ffn_dim


def products_per_token(config: Any) -> int:
    """Of those, what the matrix products and the attention returned: what selective checkpointing keeps."""
    queries, keys = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
    return (2 * queries + 2 * keys) + queries + 2 * config.hidden_size + 2 * config.ffn_dim


def memory_bytes(
    model: Any,
    batch: int,
    *,
    training: bool = False,
    dtype: torch.dtype | str | None = None,
    context: int | None = None,
) -> int:
    """Bytes for weights and activations of a forward pass, or of a training step with AdamW.

    batch: B. dtype: of weights and activations; None: the model's own. context: L; None: as many as there are tokens.
    Training adds a gradient and AdamW's two moments per weight (in dtype) and the activations kept for the backward:
    of every block, or with gradient checkpointing the input of every block (selective: and what its products and its
    attention returned) and the insides of one. Not counted: workspaces of the libraries, the allocator's slack, an EMA
    copy.
    """
    if not isinstance(batch, int) or batch < 0:
        raise ValueError(f"batch must be a whole number of samples, got {batch!r}")
    config = model.config
    size = parse_dtype(dtype, model.dtype).itemsize
    tokens = config.num_tokens
    context = tokens if context is None else context
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    keys = config.kv_heads * config.head_dim
    per_context_token = config.context_dim + 3 * keys  # its norm, k2 and v2, k2 normed
    block = tokens * kept_values_per_token(config) + context * per_context_token + 4 * config.hidden_size
    given = tokens * (config.in_channels + config.out_channels) * config.patch_size**2
    given += context * (config.cross_attention_dim + config.context_dim)
    if not training:
        # The widest moment of a block: h, u and the packed gate and up columns with their product.
        live = tokens * (2 * config.hidden_size + 3 * config.ffn_dim)
        return size * (parameters + batch * (given + live))
    if model.gradient_checkpointing:
        each = tokens * config.hidden_size
        if model.checkpointing_mode == "selective":
            each += tokens * products_per_token(config) + context * 2 * keys + 4 * config.hidden_size
        kept = config.num_layers * each + block
    else:
        kept = config.num_layers * block
    if config.context_projection:
        given += 2 * context * config.hidden_size  # before and after the gelu
    given += 2 * tokens * config.hidden_size  # the head
    return size * (parameters + 3 * trainable + batch * (given + kept))
