"""From conditions to features: `sample`."""

from blip3o_fast.sampling.sampler import sample

__all__ = ["sample"]
