"""The public ops. Each lives in the file of its name: formula, reference, schemas, autograd, public function."""

from blip3o_fast.ops._backend import use_backend
from blip3o_fast.ops.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_ref

__all__ = ["rms_norm_modulate", "rms_norm_modulate_ref", "use_backend"]
