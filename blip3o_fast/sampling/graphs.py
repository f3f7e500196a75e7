"""The solver's step as a CUDA graph: captured once per shape, replayed at every step of every run of that shape.

    graphs = Graphs(network, max_graphs=8)
    step = graphs.stepper(rules, kept, x)          # None where steps are made one operation at a time, see `reason`
    x, slope = step(moment)                        # as `take_step(rules, kept, moment)`

A step of the default network is some 230 launches, each of which costs the host about ten microseconds, whatever the
batch. A graph is one launch. A graph reads and writes the same memory at every replay, so what a step reads is copied
into tensors that stay (`kept` once per run, a moment once per step), and what it returns is copied out: the caller's
own. The weights are read where they are: a weight changed in place is seen by the next replay, and where a weight has
moved, all graphs are captured anew.
"""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.models import BLIP3oDiT
from blip3o_fast.models.forward import untouched
from blip3o_fast.ops import debug_ops, use_attention, use_backend
from blip3o_fast.sampling.capture import Capture, CudaCapture
from blip3o_fast.sampling.prepared import PreparedModel
from blip3o_fast.sampling.steps import BOTH, Conditions, Kept, Moment, Rules, Slope, by_pass, take_step

log = logging.getLogger(__name__)

Step = Callable[[Moment], tuple[Tensor, Slope | None]]

# An estimate from published figures, not measured on a GPU here. Without a graph the host needs LAUNCH_SECONDS per
# launch (8.7 us for a Triton kernel, vllm-project/vllm#34838, and torch.library's dispatch); the device needs at least
# the products' FLOPs over PEAK_FLOPS (an H100's dense bf16). Where the second is more, the host is ahead of the device
# anyway, and a graph would save nothing but the memory that it does not take.
LAUNCHES_PER_BLOCK, LAUNCHES_AROUND = 9, 14
LAUNCH_SECONDS, PEAK_FLOPS = 10e-6, 989e12


def most_tokens(config: Any) -> int:
    """How many rows * tokens of a network call a graph pays for; 1122 for the default network, 8 guided samples."""
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.kv_heads * head_dim
    weights = hidden * (2 * queries + 2 * keys) + queries * hidden + 3 * hidden * config.ffn_dim
    launches = LAUNCHES_PER_BLOCK * config.num_layers + LAUNCHES_AROUND
    return int(launches * LAUNCH_SECONDS * PEAK_FLOPS / (2 * weights * config.num_layers))


# ---- trees of tensors ------------------------------------------------------------------------------------------------


def leaves(tree: Any) -> Iterator[Any]:
    """Tensors and everything else that has no parts, in a fixed order."""
    if isinstance(tree, tuple):
        parts: Any = tree
    elif isinstance(tree, dict):
        parts = tree.values()
    elif dataclasses.is_dataclass(tree):
        parts = vars(tree).values()
    else:
        yield tree
        return
    for part in parts:
        yield from leaves(part)


def mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with each tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(mapped(part, function) for part in tree)
    if isinstance(tree, dict):
        return {name: mapped(part, function) for name, part in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return type(tree)(**{name: mapped(part, function) for name, part in vars(tree).items()})
    return tree


def layout(tree: Any) -> tuple[Any, ...]:
    """Equal for trees whose tensors have the same shapes and dtypes."""
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves(tree))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _dense(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


class Static:
    """A tree of tensors that stay where they are. Values come in dtype by dtype, as PyTorch's fused copy wants them."""

    def __init__(self, tree: Any) -> None:
        with torch.inference_mode(False):  # in which a tensor is made unfit for runs outside of it
            self.tree = mapped(tree, _dense)
        self.tensors = _tensors(self.tree)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            by_dtype.setdefault(tensor.dtype, []).append(i)
        self._groups = list(by_dtype.values())

    def load(self, tree: Any) -> None:
        given = _tensors(tree)
        for group in self._groups:
            torch._foreach_copy_([self.tensors[i] for i in group], [given[i] for i in group])


# ---- what is captured ------------------------------------------------------------------------------------------------


class StepGraph:
    """The graph of one kind of step: of the same passes, with or without a slope before it."""

    def __init__(self, capture: Capture, rules: Rules, kept: Kept, moment: Moment) -> None:
        self._given = Static(moment)
        inside: Moment = self._given.tree
        with torch.inference_mode(False), torch.no_grad():
            self._result = result = Static(take_step(rules, kept, inside))

        def step() -> None:
            with torch.inference_mode(False), torch.no_grad():
                result.load(take_step(rules, kept, inside))

        self._replay = capture(step, moment.x.device)
        self.nbytes = self._given.nbytes + result.nbytes

    def __call__(self, moment: Moment) -> tuple[Tensor, Slope | None]:
        self._given.load(moment)
        self._replay()
        return mapped(self._result.tree, torch.clone)


class Shape:
    """The graphs of one shape of run, and the condition that they read. A run has one kind of step, or a few: where
    guidance has an interval, and in "ab2", whose first step has none before it."""

    def __init__(self, rules: Rules, kept: Kept) -> None:
        self._rules = rules
        whole, (condition, mask) = _whole(kept.conditions)
        self._static = Static((kept.guidance, condition, mask))
        guidance, condition, mask = self._static.tree
        self._kept = Kept(guidance, by_pass(whole, condition, mask))
        self._graphs: dict[tuple[Any, ...], StepGraph] = {}

    def load(self, kept: Kept) -> None:
        _, whole = _whole(kept.conditions)
        self._static.load((kept.guidance, *whole))

    def step(self, capture: Capture, moment: Moment) -> tuple[Tensor, Slope | None]:
        kind = layout(moment)
        if kind not in self._graphs:
            self._graphs[kind] = StepGraph(capture, self._rules, self._kept, moment)
        return self._graphs[kind](moment)

    @property
    def count(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        return self._static.nbytes + sum(graph.nbytes for graph in self._graphs.values())


def _whole(conditions: Conditions) -> tuple[str, tuple[Any, Tensor | None]]:
    """That of which the others are views."""
    name = BOTH if BOTH in conditions else next(iter(conditions))
    return name, conditions[name]


class Graphs:
    """The graphs of a sampler's steps; not for several threads at once, which is the sampler's care.

    network: what is sampled. max_graphs: shapes at most (a shape: rows, tokens, context, masked or not, passes, dtypes,
    solver), the least recently used is dropped; 0 makes no graphs. capture: the mechanism.
    `reason`: why the last run had no graphs; None where it had, or before the first. Logged once for each reason.
    `captures`: how many graphs were captured so far.
    """

    def __init__(self, network: Any, max_graphs: int = 8, capture: Capture | None = None) -> None:
        self.network, self.max_graphs = network, max_graphs
        self.capture: Capture = CudaCapture() if capture is None else capture
        self.reason: str | None = None
        self.captures = 0
        self._shapes: OrderedDict[tuple[Any, ...], Shape] = OrderedDict()
        self._failed: dict[tuple[Any, ...], str] = {}
        self._said: set[str] = set()
        self._weights: tuple[Any, ...] = ()

    def stepper(self, rules: Rules, kept: Kept, x: Tensor) -> Step | None:
        """What makes the steps of a run that starts at x; None where no graph can, or where none pays."""
        _, (condition, mask) = _whole(kept.conditions)
        rows = len(next(leaves(condition)))
        self.reason = self.refusal(x.device, rows)
        key = (rules.solver, rules.dtype, rules.truncate_time, *layout((x, kept)), tuple(kept.conditions))
        key = (*key, x.device, use_backend.state.active, use_attention.state.active)
        if self.reason is None:
            self._renew()
            self.reason = self._failed.get(key)
        if self.reason is not None:
            self._say(self.reason, logging.INFO)
            return None
        try:
            shape = self._shape(key, rules, kept)
        except Exception as error:  # no memory
            self._give_up(key, error)
            return None

        def step(moment: Moment) -> tuple[Tensor, Slope | None]:
            if key in self._failed:
                return take_step(rules, kept, moment)
            before = shape.count
            try:
                result = shape.step(self.capture, moment)
            except Exception as error:
                # Whatever went wrong, the step can still be made without a graph; an error of its own comes again.
                self._give_up(key, error)
                return take_step(rules, kept, moment)
            self.captures += shape.count - before
            return result

        return step

    def _shape(self, key: tuple[Any, ...], rules: Rules, kept: Kept) -> Shape:
        """Found or made, with the condition of this run in it."""
        if key in self._shapes:
            self._shapes.move_to_end(key)
        else:
            while len(self._shapes) >= self.max_graphs:
                self._shapes.popitem(last=False)
            self._shapes[key] = Shape(rules, kept)
        self._shapes[key].load(kept)
        return self._shapes[key]

    def _give_up(self, key: tuple[Any, ...], error: Exception) -> None:
        """This shape is not tried again until a weight moves."""
        self.reason = self._failed[key] = f"the capture failed: {type(error).__name__}: {error}"
        self._shapes.pop(key, None)
        self._say(self.reason, logging.WARNING)

    def refusal(self, device: torch.device, rows: int) -> str | None:
        """Why a run with so many rows in a network call has no graphs; None where it may have."""
        if self.max_graphs == 0:
            return "switched off by max_graphs=0"
        model = self.network.model if isinstance(self.network, PreparedModel) else self.network
        reason = self.capture.refusal(device)
        if reason is not None:
            return reason
        if type(model) is not BLIP3oDiT:
            return f"only a BLIP3oDiT is known to do the same at every call, got {type(model).__name__}"
        for name, module in model.named_modules():
            if not untouched(module):
                return f"{name or 'the model'} has a hook or a forward of its own, which a graph would not call"
        for name, parameter in model.named_parameters():
            if parameter.device != device:
                return f"the weights are not all on {device}: {name} is on {parameter.device}"
            if type(parameter) is not torch.nn.Parameter:
                return f"the weights are sharded or packed: {name} is a {type(parameter).__name__}"
        if torch.is_autocast_enabled(device.type):
            return "under torch.autocast the weights' casts would become a part of the graph"
        if debug_ops.state.active:
            return "debug_ops looks at every result"
        tokens, most = rows * model.config.num_tokens, most_tokens(model.config)
        if tokens > most:
            return f"a graph is estimated to save nothing for more than {most} tokens in a network call, got {tokens}"
        return None

    def describe(self) -> str:
        """One line: what there is, or why there is nothing."""
        held = sum(shape.count for shape in self._shapes.values())
        line = f"{held} CUDA graphs of {len(self._shapes)} shapes, {self.nbytes} bytes of static tensors"
        return line if self.reason is None else f"{line}; the last run had none: {self.reason}"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that stay between runs, without the graphs' own pool."""
        return sum(shape.nbytes for shape in self._shapes.values())

    def _renew(self) -> None:
        """Drop every graph where a weight has moved. One that changed in place is read where it is."""
        model = self.network.model if isinstance(self.network, PreparedModel) else self.network
        weights = (
            model.training,
            *((p.data_ptr(), p.dtype, p.shape, p.stride()) for p in (*model.parameters(), *model.buffers())),
        )
        if weights != self._weights:
            self._shapes.clear()
            self._failed.clear()
            self._weights = weights

    def _say(self, reason: str, level: int) -> None:
        if reason not in self._said:
            self._said.add(reason)
            log.log(level, "steps are made without CUDA graphs: %s", reason)
