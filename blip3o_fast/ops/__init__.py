"""The public ops. Each lives in the file of its name: formula, reference, schemas, autograd, public function.

`ops.<op>` is the function, `ops.<op>_ref` its specification in plain PyTorch. The module behind a function has the
function's name: `importlib.import_module("blip3o_fast.ops.<op>")`.
"""

from blip3o_fast.ops._attention import attention_implementations, attention_rule, use_attention
from blip3o_fast.ops._backend import use_backend
from blip3o_fast.ops._cpu import use_isa
from blip3o_fast.ops._debug import debug_ops
from blip3o_fast.ops.dual_attention import dual_attention, dual_attention_ref
from blip3o_fast.ops.flash_attention import flash_attention, flash_attention_ref
from blip3o_fast.ops.flow_interpolate import flow_interpolate, flow_interpolate_ref
from blip3o_fast.ops.flow_matching_loss import flow_matching_loss, flow_matching_loss_ref
from blip3o_fast.ops.gated_residual import gated_residual, gated_residual_ref
from blip3o_fast.ops.gated_residual_modulate import gated_residual_modulate, gated_residual_modulate_ref
from blip3o_fast.ops.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_ref
from blip3o_fast.ops.merged_linear import merged_linear, merged_linear_ref
from blip3o_fast.ops.ode_step import ode_step, ode_step_ref
from blip3o_fast.ops.packed_linear import PackedWeights, packed_linear, packed_linear_ref
from blip3o_fast.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from blip3o_fast.ops.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_ref
from blip3o_fast.ops.rope_table import rope_table
from blip3o_fast.ops.swiglu import swiglu, swiglu_ref

__all__ = [
    "PackedWeights",
    "attention_implementations",
    "attention_rule",
    "debug_ops",
    "dual_attention",
    "dual_attention_ref",
    "flash_attention",
    "flash_attention_ref",
    "flow_interpolate",
    "flow_interpolate_ref",
    "flow_matching_loss",
    "flow_matching_loss_ref",
    "gated_residual",
    "gated_residual_modulate",
    "gated_residual_modulate_ref",
    "gated_residual_ref",
    "layer_norm_modulate",
    "layer_norm_modulate_ref",
    "merged_linear",
    "merged_linear_ref",
    "ode_step",
    "ode_step_ref",
    "packed_linear",
    "packed_linear_ref",
    "qk_norm_rope",
    "qk_norm_rope_ref",
    "rms_norm_modulate",
    "rms_norm_modulate_ref",
    "rope_table",
    "swiglu",
    "swiglu_ref",
    "use_attention",
    "use_backend",
    "use_isa",
]
