"""Flow matching: the path, the noise levels, the loss, the solvers and the loss's yardstick."""

from blip3o_fast.flow.loss import FlowMatchingLoss, velocity_from_model
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.solvers import integrate, sigma_grid
from blip3o_fast.flow.timesteps import draw_sigma, drop_condition, network_time
from blip3o_fast.flow.yardstick import Yardstick, yardstick

__all__ = [
    "FlowMatchingLoss",
    "FlowPath",
    "Yardstick",
    "draw_sigma",
    "drop_condition",
    "integrate",
    "network_time",
    "sigma_grid",
    "velocity_from_model",
    "yardstick",
]
