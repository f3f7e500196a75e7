"""From conditions to features: `sample`; `Sampler`, made once for many runs; `prepare`, for many calls of a model."""

from blip3o_fast.sampling.engine import Sampler
from blip3o_fast.sampling.prepared import PreparedModel, prepare
from blip3o_fast.sampling.sampler import sample

__all__ = ["PreparedModel", "Sampler", "prepare", "sample"]
