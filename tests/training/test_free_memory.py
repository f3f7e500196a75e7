"""What a process may still take, by a made-up /proc and /sys."""

import torch

from blip3o_fast.training.free_memory import available_memory

CPU = torch.device("cpu")


def test_free_memory_is_the_least_that_any_limit_leaves(tmp_path, monkeypatch):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def free():
        return available_memory(CPU, tmp_path)

    assert free() is None
    write("proc/meminfo", "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    assert free() == 3000 * 1024
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert free() == 3000 * 1024
    write("sys/fs/cgroup/a/memory.max", "2000000\n")  # of the group above
    write("sys/fs/cgroup/a/memory.current", "700000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 200000\n")
    assert free() == 1_500_000
    write("proc/self/cgroup", "5:cpu:/x\n4:memory:/job\n")  # version 1, in a container
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "900000\n")
    assert free() == 900_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free() == 450_000
    assert available_memory(CPU) > 2**20
