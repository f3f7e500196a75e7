"""What a step costs, written down: FLOPs, bytes, launches and all-reduced bytes from the configuration alone.

Assumptions. FLOPs are those of the matrix products (`blip3o_fast.models.flops`). Bytes are what each launch reads and
writes, whole tensors, nothing kept in a cache. The launches of ours are its kernels on a GPU, of the others the
operations that PyTorch dispatches and that compute. Time is that of a roofline: products at the machine's peak or their
weights at its bandwidth, whichever is slower, then the bytes of everything between the products at the bandwidth, then
the launches; nothing overlaps.
"""

from dataclasses import dataclass

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.flops import block_flops, model_flops
from blip3o_fast.models.modules import TIME_FREQUENCIES


@dataclass(frozen=True)
class Machine:
    """source: where the numbers are from. flops: of products, per second; bandwidth: bytes per second; launch: seconds
    each; network: bytes per second that one rank sends while as many come in."""

    name: str
    source: str
    flops: float
    bandwidth: float
    launch: float
    network: float


# No card was measured: these are what makers and authors print, and no run reaches the first two.
H100 = Machine(
    name="H100 SXM",
    source="specifications: 989 TFLOP/s dense bfloat16, 3.35 TB/s HBM3, a 400 Gbit/s network port per GPU; "
    "published: 1.3 us per kernel of a CUDA graph",
    flops=989e12,
    bandwidth=3.35e12,
    launch=1.3e-6,
    network=50e9,
)
NVLINK = 450e9  # bytes per second in each direction, specification; within one node of 8


@dataclass(frozen=True)
class Passes:
    """How often a block passes over its tensors: weights W (of products), tokens of width D and of F, context.

    between: of the passes of width D, F and the context's, those of launches that are no products. pairs: over
    [B, H, T, T + L], which are stock's masks.
    """

    weights: float
    tokens: float
    ffn: float
    context: float
    launches: int
    between: tuple[float, float, float]
    pairs: float = 0


# By hand, for the forward of ours, in passes over [B, T, D]: queries, keys and values by one product 1 + 4; their
# norms and rotation 3 + 3; both attentions 4 + 1; the projection 1 + 1; residual and next norm 2 + 2; gate and up 1;
# down 1; residual and next norm 2 + 2. Over [B, T, F]: 2, SwiGLU 2 + 1, 1. Over the context: norm 1 + 1, product 1 + 2,
# norm of the keys 1 + 1, attention 2. The others are fitted to the counts of `scripts/launch_report.py`, with which the
# tests compare them again.
# "both" is forward and backward.
PASSES = {
    ("ours", "forward", 4): Passes(1, 28, 6, 9, 13, (19, 3, 6)),
    ("ours", "both", 4): Passes(3, 93, 17, 34, 45, (66, 8, 25)),
    ("ours", "forward", 2): Passes(1, 28, 6, 9, 13, (19, 3, 6)),
    ("ours", "both", 2): Passes(3, 93, 17, 34, 45, (66, 8, 25)),
    ("eager", "forward", 4): Passes(1, 82.5, 8, 19, 77, (69.5, 5, 15), 1.25),
    ("eager", "both", 4): Passes(3, 280, 23, 64, 214, (241, 14, 52), 1.25),
    ("eager", "forward", 2): Passes(1, 146.5, 16, 29, 95, (133.5, 13, 25), 1.5),
    ("eager", "both", 2): Passes(3, 460, 40, 97, 255, (421, 31, 85), 1.5),
}
# Of at most 64 tokens and 64 of the context, in half precision, one launch goes back through both attentions.
SHORT, ONE_BACKWARD = 64, Passes(3, 83.5, 17, 34, 44, (56.5, 8, 25))
# The backward of ours sums the gradients of norms and modulation by parts, in fp32: so many vectors of D at each row,
# until there are as many parts as the kernels' grids have.
PARTS_PER_ROW, MOST_PARTS = 6.2, 5000
# Launches outside the blocks: embedders and head; with noise, loss and their backward.
REST = {"ours": {"forward": 41, "both": 80}, "eager": {"forward": 51, "both": 119}}


@dataclass(frozen=True)
class Cost:
    """between: those of `bytes` that launches without a product move; weights: those that are weights."""

    flops: int
    bytes: float
    weights: float
    between: float
    launches: int


def _keys(config: BLIP3oConfig) -> int:
    return config.kv_heads * config.head_dim


def block_weights(config: BLIP3oConfig) -> int:
    """Elements of a block's matrices."""
    dim, keys = config.hidden_size, _keys(config)
    attention = 3 * dim * dim + 2 * dim * keys + 2 * config.context_dim * keys
    return attention + 3 * dim * config.ffn_dim + 4 * dim * config.conditioning_dim


def block_parameters(config: BLIP3oConfig) -> int:
    dim, keys = config.hidden_size, _keys(config)
    norms = 4 * dim + config.context_dim + (2 * (2 * dim + 2 * keys) if config.qk_norm else 0)
    return block_weights(config) + 4 * dim + norms + config.num_attention_heads


def parameters(config: BLIP3oConfig) -> int:
    """Of the network, stock's unread `pad_token` included."""
    dim, given, read = config.hidden_size, config.cross_attention_dim, config.context_dim
    cond, pixels = config.conditioning_dim, config.patch_size**2
    projection = given * dim + dim * dim + 2 * dim if config.context_projection else dim
    patch = pixels * config.in_channels * dim + dim
    time = TIME_FREQUENCIES * cond + cond * cond + 2 * cond
    pooled = 2 * read + read * cond + cond
    head = cond * dim + dim + (dim + 1) * pixels * config.out_channels
    return projection + patch + time + pooled + head + config.num_layers * block_parameters(config)


def block_cost(config: BLIP3oConfig, batch: int, context: int, provider: str, mode: str, size: int) -> Cost:
    """provider: ours or eager; size: bytes of an element."""
    passes = PASSES[provider, mode, size]
    if (provider, mode, size) == ("ours", "both", 2) and max(config.num_tokens, context) <= SHORT:
        passes = ONE_BACKWARD
    widths = (batch * config.num_tokens * config.hidden_size, batch * config.num_tokens * config.ffn_dim)
    widths = (*widths, batch * context * config.context_dim)
    weights = size * passes.weights * block_weights(config)
    moved = (passes.tokens, passes.ffn, passes.context)
    activations, between = (size * sum(n * w for n, w in zip(p, widths, strict=True)) for p in (moved, passes.between))
    tokens = config.num_tokens
    pairs = size * passes.pairs * batch * config.num_attention_heads * tokens * (tokens + context)
    activations, between = activations + pairs, between + pairs
    if provider == "ours" and mode == "both":
        parts = 4 * config.hidden_size * min(PARTS_PER_ROW * batch * config.num_tokens, MOST_PARTS)
        activations, between = activations + parts, between + parts
    return Cost(block_flops(config, batch, context, mode), weights + activations, weights, between, passes.launches)


def model_cost(config: BLIP3oConfig, batch: int, context: int, provider: str, mode: str, size: int) -> Cost:
    """Of all blocks, and outside of them the products, their weights and the launches."""
    block = block_cost(config, batch, context, provider, mode, size)
    layers = config.num_layers
    outside = parameters(config) - layers * block_parameters(config)
    weights = size * outside * (3 if mode == "both" else 1)
    return Cost(
        model_flops(config, batch, context, mode),
        layers * block.bytes + weights,
        layers * block.weights + weights,
        layers * block.between,
        layers * block.launches + REST[provider][mode],
    )


def seconds(cost: Cost, machine: Machine, share: float = 1.0) -> float:
    """share: of the machine's peak and bandwidth that is reached; at 1 this is what no run undercuts from memory."""
    products = max(cost.flops / machine.flops, cost.weights / machine.bandwidth)
    return (products + cost.between / machine.bandwidth) / share + cost.launches * machine.launch


OPTIMIZER = 28  # bytes of AdamW for a weight: its value, gradient and two moments read, three of them written, in fp32


def most_mfu(config: BLIP3oConfig, per_gpu: int, provider: str, context: int = 64, machine: Machine = H100) -> float:
    """The share of the peak that the roofline allows a training step in half precision, communication left out."""
    cost = model_cost(config, per_gpu, context, provider, "both", 2)
    optimizer = OPTIMIZER * parameters(config) / machine.bandwidth
    return cost.flops / machine.flops / (seconds(cost, machine) + optimizer)


def all_reduce_bytes(payload: float, world: int) -> float:
    """That each rank sends in a ring: 2 (N - 1) / N of the payload."""
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world!r}")
    return 2 * (world - 1) / world * payload


@dataclass(frozen=True)
class Epoch:
    """A pass over the data. communication: the share of the time in which the all-reduce hides behind nothing; data:
    bytes per second that all GPUs read together."""

    steps: int
    hours: float
    gpu_hours: float
    communication: float
    data: float


def training_epoch(
    config: BLIP3oConfig, images: int, per_gpu: int, gpus: int, mfu: float, context: int = 64, machine: Machine = H100
) -> Epoch:
    """By a share of the peak for the products (mfu: forward, backward and all else but communication).

    Gradients are fp32 and the all-reduce is not hidden at all. Features of conditions and targets are stored in two
    bytes an element and read once; nothing that makes them is counted.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, got {mfu!r}")
    steps = -(-images // (per_gpu * gpus))
    compute = model_flops(config, per_gpu, context, "both") / (mfu * machine.flops)
    # Within a node over its links; beyond, the 8 ports of a node carry its ring together.
    network = NVLINK if gpus <= 8 else min(NVLINK, 8 * machine.network)
    communication = all_reduce_bytes(4 * parameters(config), gpus) / network
    sample = 2 * (config.num_tokens * config.in_channels + context * config.cross_attention_dim)
    step = compute + communication
    hours = steps * step / 3600
    return Epoch(steps, hours, gpus * hours, communication / step, per_gpu * gpus * sample / step)
