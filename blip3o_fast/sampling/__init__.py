"""From conditions to features: `sample`; `Sampler`, made once for many runs; `prepare`, for many calls of a model;
`generate_from_dataset`, for a whole data set; `interpolate`, for what lies between two conditions; `SamplerSettings`,
what `blip3o-fast tune-sampler` found for a model.
"""

from blip3o_fast.sampling.generate import generate_from_dataset
from blip3o_fast.sampling.interpolate import interpolate
from blip3o_fast.sampling.prepared import PreparedModel, prepare
from blip3o_fast.sampling.sample import sample
from blip3o_fast.sampling.sampler import Sampler
from blip3o_fast.sampling.settings import SamplerSettings

__all__ = ["PreparedModel", "Sampler", "SamplerSettings", "generate_from_dataset", "interpolate", "prepare", "sample"]
