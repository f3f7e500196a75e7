"""What the compiler makes of every kernel, read from the machine code, for any GPU, without one.

    python scripts/sass_report.py                        every architecture and dtype, as a table
    python scripts/sass_report.py --arch 90 --dtype bfloat16
    python scripts/sass_report.py --json rows.json       the same rows as data

The launches are those that the model makes (`blip3o_fast/models/launches.py`); each is compiled exactly as a launch
on that GPU would compile it. Registers and memory are the resource report's, instructions are counted in the SASS.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32", "autocast")  # autocast: fp32 weights under bf16 autocast
ARCHITECTURES = (80, 89, 90, 100, 120)
REPORTED = (75,)  # compiled to look at: the package itself asks for 8.0
# The model as it is trained, the op that it does not call, and the stock class's defaults (heads of 72, a masked
# context) at a smaller width.
CASES: dict[str, dict[str, Any]] = {
    "blip3o": {},
    "flash_attention": {},
    "lumina": {
        "hidden_size": 576, "num_attention_heads": 8, "num_kv_heads": 4, "sample_size": 24, "in_channels": 16,
        "patch_size": 2, "cross_attention_dim": 512, "context_projection": False,
    },
}  # fmt: skip

# Instructions by class; the widths of global accesses are told apart below.
_CLASSES = {
    "mma": r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|OMMA|QMMA)\b",
    "ffma": r"\b(?:FFMA|FMUL|FADD|FFMA2|FADD2|FMUL2)\b",
    "mufu": r"\bMUFU\b",
    "barrier": r"\b(?:BAR|WARPSYNC|SYNCS)\b",
    "local": r"\b(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. bytes, minimum: of the op's whole call, per element of its largest tensor."""

    case: str
    dtype: str
    arch: int
    op: str
    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    loads: int
    loads_128: int
    stores: int
    stores_128: int
    mma: int
    ffma: int
    mufu: int
    barrier: int
    local: int
    tf32: int
    instructions: int
    bytes: float
    minimum: float


def disassemble(cubin: bytes) -> str:
    """Resource report and SASS, by the tool that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def count(sass: str) -> dict[str, int]:
    """Instructions by class, and global accesses by width."""
    code = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    text = "\n".join(code)
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _CLASSES.items()}
    for name, opcode in (("loads", r"(?:LDG|LDGSTS|UBLKCP)"), ("stores", "STG")):
        accesses = re.findall(rf"\b{opcode}\.[^;]*", text)
        counts[name] = len(accesses)
        counts[f"{name}_128"] = sum(".128" in access.split()[0] or "UBLKCP" in access for access in accesses)
    counts["tf32"] = len(re.findall(r"MMA[^;]*TF32", text))
    return counts | {"instructions": len(code)}


def attention_calls(dtype: Any, arch: int) -> list[Any]:
    """`flash_attention`, which the model does not call: one tile; other lengths, grouped heads of 72 and a mask."""
    import torch

    from blip3o_fast import ops
    from blip3o_fast.kernels._launch import assumed_capability, recording_calls

    with torch.device("meta"), recording_calls() as calls, assumed_capability(arch), ops.use_backend("triton"):
        for tokens, context, heads, key_heads, dim, masked in ((64, 64, 28, 28, 64, False), (300, 257, 8, 2, 72, True)):
            q = torch.empty(32, tokens, heads, dim, dtype=dtype, requires_grad=True)
            k, v = (torch.empty(32, context, key_heads, dim, dtype=dtype, requires_grad=True) for _ in range(2))
            out = ops.flash_attention(q, k, v, mask=torch.empty(32, context, dtype=torch.bool) if masked else None)
            out.backward(torch.empty_like(out))
    return calls


def rows_of(case: str, dtype: str, arch: int) -> list[Row]:
    """Every distinct kernel of a case, compiled."""
    from blip3o_fast.kernels._compile import compile_launch, specialisation
    from blip3o_fast.models.config import BLIP3oConfig
    from blip3o_fast.models.launches import PRECISIONS, model_calls

    weights, autocast = PRECISIONS[dtype]
    if case == "flash_attention" and autocast is not None:
        return []  # under autocast it would be given what the other dtypes are
    if case == "flash_attention":
        calls = attention_calls(weights, arch)
    else:
        calls = model_calls(
            BLIP3oConfig(num_layers=2, **CASES[case]), batch=32, dtype=weights, autocast=autocast,
            masked=case == "lumina", capability=arch,
        )  # fmt: skip
    rows: dict[str, Row] = {}
    for call in calls:
        largest = max((a.numel() for launch in call.launches for a in launch.args if hasattr(a, "numel")), default=1)
        for launch in call.launches:
            key = specialisation(launch, arch)
            if key in rows:
                continue
            compiled = compile_launch(launch, arch)
            text = disassemble(compiled.asm["cubin"])
            found = re.search(r"REG:(\d+) STACK:(\d+)", text)
            assert found is not None, text
            rows[key] = Row(
                case, dtype, arch, call.op, launch.name, launch.options["num_warps"],
                registers=int(found[1]), stack=int(found[2]), shared=compiled.metadata.shared, **count(text),
                bytes=call.moved_bytes / largest, minimum=call.minimum_bytes / largest,
            )  # fmt: skip
    return list(rows.values())


def _task(task: tuple[str, str, int]) -> list[Row]:
    return rows_of(*task)


def all_rows(cases: list[str], dtypes: list[str], archs: list[int], processes: int) -> Iterator[list[Row]]:
    tasks = [(case, dtype, arch) for case in cases for dtype in dtypes for arch in archs]
    # Started afresh and not forked: a fork would copy PyTorch's thread pools without their threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_task, tasks)


def table(rows: list[Row]) -> str:
    head = (
        f"{'op':30} {'kernel':32} {'dtype':9} {'sm':>4} {'warps':>5} {'regs':>5} {'stack':>5} {'smem':>6} "
        f"{'ld128/ld':>9} {'st128/st':>9} {'mma':>4} {'fp32':>5} {'mufu':>4} {'bar':>4} {'instr':>6} "
        f"{'B/elem':>7} {'min':>6}"
    )
    lines, case = [], None
    for r in sorted(rows, key=lambda r: (r.case, r.op, r.kernel, r.dtype, r.arch)):
        if r.case != case:
            case = r.case
            lines += [f"\n{case}", head]
        lines.append(
            f"{r.op:30} {r.kernel:32} {r.dtype:9} {r.arch:>4} {r.warps:>5} {r.registers:>5} {r.stack:>5} {r.shared:>6} "
            f"{f'{r.loads_128}/{r.loads}':>9} {f'{r.stores_128}/{r.stores}':>9} {r.mma:>4} {r.ffma:>5} {r.mufu:>4} "
            f"{r.barrier:>4} {r.instructions:>6} {r.bytes:>7.2f} {r.minimum:>6.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES + REPORTED, help="90 is sm_90")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of the weights, or autocast")
    parser.add_argument("--case", action="append", choices=tuple(CASES))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, so there is nothing to compile; unset it")
    rows: list[Row] = []
    archs = options.arch or list(ARCHITECTURES)
    for found in all_rows(options.case or list(CASES), options.dtype or list(DTYPES), archs, options.processes):
        rows += found
        print(f"{len(rows)} kernels compiled", end="\r", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        partial.replace(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
