"""From conditions to features: `sample`; a model made ready for many calls: `prepare`."""

from blip3o_fast.sampling.prepared import PreparedModel, prepare
from blip3o_fast.sampling.sampler import sample

__all__ = ["PreparedModel", "prepare", "sample"]
