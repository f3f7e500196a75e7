"""What the kernels are meant to reach on a GPU, and what of it a run has reached.

A fraction is the time that the least bytes take at the bandwidth of a plain copy, measured in the same run, over the
measured time. The small ones are microseconds of one call inside a CUDA graph, where a launch is what counts.
"""

from typing import Any

# op -> mode -> {batch: fraction} and {"in_graph_us": at batch 1}
GOALS: dict[str, dict[str, dict[str, float]]] = {
    "rms_norm_modulate": {
        "forward": {"32": 0.60, "256": 0.90, "in_graph_us": 2.0},
        "backward": {"32": 0.45, "256": 0.80},
    },
    "gated_residual_modulate": {
        "forward": {"32": 0.65, "256": 0.92, "in_graph_us": 2.5},
        "backward": {"32": 0.50, "256": 0.80},
    },
    "qk_norm_rope": {"forward": {"32": 0.60, "256": 0.85, "in_graph_us": 2.0}},
    "dual_attention": {
        "forward": {"32": 0.60, "256": 0.80, "in_graph_us": 4.0},
        "backward": {"32": 0.50, "256": 0.70},
    },
    "swiglu": {
        "forward": {"32": 0.75, "256": 0.92, "in_graph_us": 2.5},
        "backward": {"32": 0.75, "256": 0.92},
    },
    "flow_interpolate": {"forward": {"256": 0.85, "in_graph_us": 2.0}},
    "flow_matching_loss": {"forward": {"256": 0.85, "in_graph_us": 2.0}},
    "ode_step": {"forward": {"256": 0.85, "in_graph_us": 2.0}},
}


def reached(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal of GOALS with what our bf16 row reached; reached and met are None where no row tells."""
    found = {
        (row["suite"], row["mode"], str(row["case"]["batch"])): row
        for row in reversed(rows)  # the first row of a case counts: the plainest variant
        if row["provider"] == "ours" and row["case"]["dtype"] == "bfloat16"
    }
    result = []
    for op, by_mode in GOALS.items():
        for mode, goals in by_mode.items():
            for at, goal in goals.items():
                small = at == "in_graph_us"
                row = found.get((op, mode, "1" if small else at), {})
                value = row.get("in_graph_us" if small else "fraction_of_copy")
                met = None if value is None else bool(value <= goal if small else value >= goal)
                result.append({"op": op, "mode": mode, "at": at, "goal": goal, "reached": value, "met": met})
    return result
