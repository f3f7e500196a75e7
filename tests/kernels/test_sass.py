"""Every kernel, compiled for every GPU: no spills, 128-bit accesses, tensor cores, shared memory within the limit.

What is asserted are the rows of `scripts/sass_report.py`, which runs in a process of its own: kernels that were loaded
for the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from scripts.sass_report import ARCHITECTURES, CASES, count

ROOT = Path(__file__).resolve().parents[2]
# Bytes that one program may ask for: NVIDIA's CUDA programming guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes of stack that are allowed, and reported: fp32 attention; and one kernel that no model of ours launches, at
# grouped heads of 72 on sm_100 (8 bytes in half precision).
FP32_ATTENTION_SPILLS = 64
SPILLS = {("flash_attention_bwd_queries", 100): 8}
# Finishing launches of attention: sums of one number per sample and head.
NO_PRODUCTS = ("dual_attention_bwd_gate",)


def compiled(folder: Path, *flags: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "scripts/sass_report.py", "--json", str(folder / "rows.json"), *flags]
    # The workers of a parallel test run share two cores: one process each.
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "rows.json").read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The model as it is trained, in bf16, for every architecture; the other dtypes, and the op that it does not call,
    for fewer."""
    folder = tmp_path_factory.mktemp("sass")
    found = compiled(folder, "--case", "blip3o", "--dtype", "bfloat16", "--processes", "1")
    others = ("--dtype", "float16", "--dtype", "float32", "--dtype", "autocast")
    found += compiled(folder, "--case", "blip3o", "--arch", "90", *others, "--processes", "1")
    flash = ("--dtype", "bfloat16", "--dtype", "float32", "--arch", "90", "--arch", "120")
    return found + compiled(folder, "--case", "flash_attention", *flash, "--processes", "1")


def described(row: dict) -> str:
    return f"{row['case']} {row['kernel']} {row['dtype']} sm_{row['arch']}"


def is_attention(row: dict) -> bool:
    return "attention" in row["op"]


def check(rows: list[dict]) -> None:
    assert rows
    wrong = []
    for row in rows:
        fp32_attention = is_attention(row) and row["dtype"] == "float32"
        allowed = FP32_ATTENTION_SPILLS if fp32_attention else SPILLS.get((row["kernel"], row["arch"]), 0)
        if row["stack"] > allowed or row["local"] > allowed // 2:  # a spilled word is stored and loaded
            wrong.append(f"{described(row)}: {row['stack']} bytes of stack, {row['local']} accesses of local memory")
        if row["shared"] > SHARED_LIMIT[row["arch"]]:
            wrong.append(f"{described(row)}: {row['shared']} bytes of shared memory")
        if is_attention(row) and row["kernel"] not in NO_PRODUCTS:
            if fp32_attention and (row["tf32"] or row["mma"] or not row["ffma"]):
                wrong.append(f"{described(row)}: fp32 must be FFMA, found {row['mma']} MMA, {row['tf32']} of them TF32")
            if row["dtype"] in ("bfloat16", "float16") and not row["mma"]:
                wrong.append(f"{described(row)}: no tensor core instructions")
    assert not wrong, "\n".join(wrong)


def test_no_kernel_spills_and_attention_uses_the_right_units(rows):
    check(rows)


def test_every_op_was_compiled_for_every_architecture(rows):
    ops = {row["op"] for row in rows}
    expected = ["rms_norm_modulate", "gated_residual", "gated_residual_modulate", "layer_norm_modulate", "swiglu"]
    expected += ["qk_norm_rope", "dual_attention", "flash_attention", "flow_matching_loss"]
    for op in expected:
        assert {f"{op}_fwd", f"{op}_bwd"} <= ops
    assert {"flow_interpolate_fwd", "ode_step_fwd"} <= ops
    seen = defaultdict(set)
    for row in rows:
        if row["dtype"] == "bfloat16":
            seen[row["kernel"]].add(row["arch"])
    assert {"rms_norm_modulate_fwd"} <= {k for k, archs in seen.items() if archs == set(ARCHITECTURES)}


# Kernels whose whole work is one stream from memory to memory; of the others the small vectors are narrower.
STREAMS = (
    "rms_norm_modulate_fwd", "rms_norm_modulate_bwd", "gated_residual_fwd", "gated_residual_bwd",
    "gated_residual_modulate_fwd", "gated_residual_modulate_bwd", "layer_norm_modulate_fwd", "layer_norm_modulate_bwd",
    "swiglu_fwd", "swiglu_bwd", "qk_norm_rope_fwd", "qk_norm_rope_bwd", "flow_interpolate_fwd", "ode_step_fwd",
    "flow_matching_loss_fwd", "flow_matching_loss_bwd",
)  # fmt: skip
# Accesses of one number: rstd, mean, sigma, seed, guidance; each row or program has a few.
SCALARS = 8


@pytest.mark.parametrize("kernel", STREAMS)
def test_streams_are_read_and_written_128_bits_at_a_time(rows, kernel):
    found = [row for row in rows if row["kernel"] == kernel and row["dtype"] != "autocast"]
    assert found, f"{kernel} was not compiled"
    for row in found:
        assert row["loads_128"] >= 1 and row["stores_128"] >= 1, described(row)
        assert row["loads"] - row["loads_128"] <= SCALARS, described(row)
        assert row["stores"] - row["stores_128"] <= SCALARS, described(row)


def test_a_call_moves_little_more_than_it_must(rows):
    """Scratch included, at batch 32. The most is the norm of the context's keys: 256 programs, two fp32 rows of each.

    Partial rows are written and read again at once, so most of these bytes never leave the L2 cache.
    """
    for row in rows:
        if row["dtype"] == "bfloat16" and row["case"] == "blip3o":
            assert row["bytes"] <= 1.34 * row["minimum"], f"{described(row)}: {row['bytes']} of {row['minimum']}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_dtype_on_every_architecture(case, tmp_path):
    check(compiled(tmp_path, "--case", case))


def test_the_disassembly_is_read_right():
    sass = """
        /*0070*/                   LDG.E.128 R4, [R2.64] ;                  /* 0x0 */
        /*0080*/              @!P0 LDG.E.U16 R4, [R2.64] ;                  /* 0x0 */
        /*0090*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;      /* 0x0 */
        /*00a0*/                   STG.E.128 [R2.64], R4 ;                  /* 0x0 */
        /*00b0*/                   STG.E [R2.64], R4 ;                      /* 0x0 */
        /*00c0*/                   HMMA.1688.F32.TF32 R4, R8, R6, R4 ;      /* 0x0 */
        /*00d0*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;     /* 0x0 */
        /*00e0*/                   STL [R1], R4 ;                           /* 0x0 */
        /*00f0*/                   FFMA R4, R5, R6, R7 ;                    /* 0x0 */
    """
    counts = count(sass)
    expected = {"loads": 3, "loads_128": 2, "stores": 2, "stores_128": 1, "mma": 2, "tf32": 1, "local": 1, "ffma": 1}
    assert {name: counts[name] for name in expected} == expected
    assert counts["instructions"] == 9
