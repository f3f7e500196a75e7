"""How many bytes a sampling run allocates, from the configuration alone."""

from typing import Any

import torch

from blip3o_fast.models.memory import kept_values_per_token
from blip3o_fast.models.step_modulations import step_bytes
from blip3o_fast.models.workspace import Widths, Workspace


def run_bytes(
    config: Any,
    *,
    rows: int,
    batch: int,
    calls: int,
    context: int,
    dtype: torch.dtype,
    in_workspace: bool,
    modulation_bytes: int,
) -> int:
    """The largest sum of what is alive at once in a run of `batch` samples.

    rows: of the network's batch, twice the samples with guidance. calls: of the network. context: L. in_workspace:
    whether packed blocks run in a `Workspace`. modulation_bytes: at most so much for modulations.
    """
    size, tokens, hidden = dtype.itemsize, config.num_tokens, config.hidden_size
    pixels = config.sample_size**2
    keys = config.kv_heads * config.head_dim
    given = (rows + batch) * context * config.cross_attention_dim  # with the null half, and before it was added

    # Kept for the run: the context and per block k2 and, as a part of one buffer with k2 before its norm, v2.
    condition = rows * context * (config.context_dim + 3 * keys * config.num_layers)
    making = given + rows * context * config.context_dim
    state = 4 if dtype != torch.float64 else 8
    start = batch * pixels * config.in_channels * state

    made_for = min(calls, modulation_bytes // step_bytes(config, rows, dtype))
    modulations = made_for * step_bytes(config, rows, dtype)

    # A call: x_t, h as it comes to the blocks, the blocks, the head's norm and its result; around it the state twice.
    blocks = tokens * kept_values_per_token(config)
    call = rows * (pixels * (config.in_channels + config.out_channels) + tokens * 2 * hidden)
    if in_workspace:
        widths = Widths(hidden, config.num_attention_heads, config.kv_heads, config.head_dim, config.ffn_dim)
        working = Workspace.bytes_for(widths, rows, tokens, dtype)
    else:
        working = rows * blocks * size
    stepping = modulations + call * size + working + 2 * start
    return start + condition * size + max(making * size, stepping)


def graph_bytes(
    config: Any, *, rows: int, batch: int, context: int, dtype: torch.dtype, solver: str, modulation_bytes: int
) -> int:
    """The tensors that stay for the graphs of one shape of run, beside what the run itself needs.

    They are copies of the condition as it is prepared, and for each kind of step of its state before and after, of the
    modulations of its calls and, for "ab2", whose first step is of another kind, of the slopes.
    """
    size, state = dtype.itemsize, 8 if dtype == torch.float64 else 4
    keys = config.kv_heads * config.head_dim
    condition = rows * (context * (config.context_dim + 2 * keys * config.num_layers) + config.context_dim) * size
    one = step_bytes(config, rows, dtype)
    modulations = one * (2 if solver in ("midpoint", "heun") else 1) if modulation_bytes >= one else 0
    pixels = config.sample_size**2 * config.in_channels
    step = 2 * batch * pixels * state + modulations
    slope = rows * pixels * size
    return condition + (2 * step + 3 * slope if solver == "ab2" else step)
