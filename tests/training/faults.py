"""Runs a small training again and again in forked children, hurts them, and prints what became of it as JSON.

    python tests/training/faults.py EMBEDDINGS FOLDER KILLS SEED [RANKS]

One process imports everything once; each child is a whole `train(settings)`. A child counts *events*: the beginning of
each step, and each file that is opened for writing, renamed or removed below the run's folder. So a kill at a random
event falls on steps, logs, evaluations, every part of a save, the deletion of old checkpoints and the final model.
"""

import hashlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors import safe_open

torch.set_num_threads(1)

from blip3o_fast.training import checkpoints, run  # noqa: E402
from blip3o_fast.training import trainer as _loaded_once  # noqa: E402, F401
from blip3o_fast.training.arguments import TrainSettings  # noqa: E402
from blip3o_fast.training.clock import MEASURED  # noqa: E402
from blip3o_fast.training.saving import INTERRUPTED  # noqa: E402

STEPS, SAVE, BATCH = 12, 3, 4
SIZES = {"model_dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "normalize": "standardize"}

POISONED = set()  # samples of the run whose loss is NaN


def settings(embeddings, output, **changes):
    fields = {
        "batch_size": BATCH, "learning_rate": 1e-2, "max_steps": STEPS, "save_steps": SAVE, "logging_steps": 1,
        "eval_steps": SAVE, "eval_generation_samples": 0, "save_total_limit": 2, "no_wandb": True, "device": "cpu",
        "progress": False, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    return TrainSettings(embeddings, output, **SIZES | fields | changes)


class Events:
    """Counts and names the events of one child and lets ``fault`` strike at number ``at``."""

    def __init__(self, output, at, fault):
        self.output, self.at, self.fault, self.names = str(output), at, fault, []

    def happened(self, name):
        self.names.append(name)
        if len(self.names) == self.at:
            self.fault(self.output, name)

    def audit(self, event, args):
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            paths = [args[0]] if writes else []
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"):
            paths = [args[1] if event == "os.rename" else args[0]]
        else:
            return
        for path in paths:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.output):
                self.happened(f"{event} {os.path.relpath(os.fspath(path), self.output)}")


def kill(output, event):
    Path(f"{output}.kills").open("a").write(event + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(output, event):
    os.kill(os.getpid(), signal.SIGTERM)


def full_disk(output, event):
    """No file may grow beyond what the small ones need: as a full disk, but only for this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def child(embeddings, output, at, fault, changes):
    events = Events(output, at, fault)
    sys.addaudithook(events.audit)
    original = run._flow_loss

    def counted(*args):
        loss = original(*args)

        def call(model, data, *inner, **kwargs):
            if model.training:
                with open(f"{output}.seen", "a") as seen:
                    seen.write(f"{kwargs['sample_index']} {len(data)}\n")
                events.happened(f"step {kwargs['sample_index'] // BATCH + 1}")
            value, metrics = loss(model, data, *inner, **kwargs)
            here = range(kwargs["sample_index"], kwargs["sample_index"] + len(data))
            return (value * float("nan") if POISONED.intersection(here) else value), metrics

        return call

    run._flow_loss = counted
    try:
        run.train(settings(embeddings, output, **changes))
        status = 0
    except KeyboardInterrupt:
        status = 3
    except Exception as error:
        traceback.print_exc()
        Path(f"{output}.error").write_text(f"{type(error).__name__}: {error}")
        status = 1
    if os.environ.get("RANK", "0") == "0":
        Path(f"{output}.events").write_text(json.dumps(events.names))
    sys.stdout.flush()
    os._exit(status)


def fork(embeddings, output, at=0, fault=kill, **changes):
    process = os.fork()
    if process == 0:
        with open(f"{output}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        child(embeddings, output, at, fault, changes)
    return process


def meaning(status):
    """Of a child's end: "finished", "killed", "interrupted" or "failed"."""
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return "killed"
    return {0: "finished", 1: "failed", 3: "interrupted"}[os.WEXITSTATUS(status)]


def attempt(embeddings, output, at=0, fault=kill, after=None, **changes):
    """One child from start to its end. after: seconds to a kill from outside."""
    process = fork(embeddings, output, at, fault, **changes)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    return meaning(os.waitpid(process, 0)[1])


def attempt_of_two(embeddings, output, victim=0, at=0):
    """Two ranks, of which one may be killed; the other follows, as under torchrun. What became of the victim."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        processes.append(fork(embeddings, output, at if rank == victim else 0, batch_size=BATCH // 2))
    first, status = os.wait()
    processes.remove(first)
    if meaning(status) == "killed":
        os.kill(processes[0], signal.SIGKILL)
    other = meaning(os.waitpid(processes[0], 0)[1])
    return max(meaning(status), other)  # "killed" comes after "finished", "failed" and "interrupted"


def outcome(output):
    """Everything that must not depend on what happened on the way: weights, average, optimizer, record."""
    last = output / f"checkpoint-{STEPS}"
    digests = {}
    for path in (output / "model.safetensors", last / "ema.safetensors"):
        with safe_open(path, framework="pt") as file:
            values = [file.get_tensor(name) for name in sorted(file.keys())]
            digests[path.name] = _digest(values), file.metadata()
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    digests["optimizer"] = _digest([value for state in optimizer.values() for value in state.values()])
    digests["scheduler"] = torch.load(last / "scheduler.pt", weights_only=True)
    entries = checkpoints.read_metrics(output / "metrics.jsonl")
    digests["metrics"] = [{name: entry[name] for name in entry if name not in MEASURED} for entry in entries]
    digests["checkpoints"] = [path.name for path in checkpoints.checkpoints(output)]
    return digests


def _digest(values):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def samples_lost(output):
    """Of the run's samples, those that no child has trained on."""
    seen = set()
    for line in Path(f"{output}.seen").read_text().splitlines():
        first, count = map(int, line.split())
        seen |= set(range(first, first + count))
    return len(set(range(STEPS * BATCH)) - seen)


class Report(dict):
    """Counts of what was done, and what came out otherwise than in the undisturbed run."""

    def __init__(self, expected, events):
        super().__init__(kills=0, kills_in_a_save=0, kills_from_outside=0, runs=0, samples_lost=0)
        self |= {"differences": [], "unexpected": [], "events": len(events)}
        self.expected, self.events = expected, events

    def number(self, name):
        return self.events.index(name) + 1

    def count_kill(self, output):
        self["kills"] += 1
        self["kills_in_a_save"] += "checkpoint-" in Path(f"{output}.kills").read_text().splitlines()[-1]

    def compare(self, output, status):
        if status != "finished":
            self["unexpected"].append([output.name, status, Path(f"{output}.log").read_text()[-2000:]])
            return
        self["runs"] += 1
        self["samples_lost"] += samples_lost(output)
        found, expected = outcome(output), self.expected
        names = [name for name in expected if found[name] != expected[name]]
        self["differences"] += [[output.name, name, found[name], expected[name]] for name in names]


def undisturbed(run_once, output):
    status = run_once(output)
    assert status == "finished", Path(f"{output}.log").read_text()
    return Report(outcome(output), json.loads(Path(f"{output}.events").read_text()))


def one_process(embeddings, folder, kills, seed):
    report = undisturbed(lambda output: attempt(embeddings, output), folder / "undisturbed")
    saves = [i + 1 for i, name in enumerate(report.events) if f"checkpoint-{2 * SAVE}" in name]
    report["events_of_a_save"] = len(saves)

    # Kills at random events; the first of all in the middle of a save. A run is killed up to three times.
    chance, number = random.Random(seed), 0
    while report["kills"] < kills:
        output, number = folder / f"killed-{number}", number + 1
        for _ in range(min(3, kills - report["kills"])):
            if report["kills"] % 4 == 3:  # from outside, at any instruction
                status = attempt(embeddings, output, after=chance.uniform(0.05, 1.0))
                if status == "killed":
                    report["kills"] += 1
                    report["kills_from_outside"] += 1
            else:
                at = saves[len(saves) // 2] if not report["kills"] else chance.randrange(1, len(report.events) // 2)
                status = attempt(embeddings, output, at)
                if status == "killed":
                    report.count_kill(output)
            if status != "killed":
                break
        report.compare(output, status if status == "finished" else attempt(embeddings, output))

    # A full disk in the second save: the first checkpoint stays, the half one goes, the run goes on from there.
    output, soon = folder / "full", report.number(f"step {SAVE + 2}")
    report["full_disk"] = attempt(embeddings, output, soon, full_disk), Path(f"{output}.error").read_text()
    report["full_disk_left"] = [path.name for path in checkpoints.checkpoints(output)]
    report["full_disk_whole"] = checkpoints.last_whole(output).name
    report.compare(output, attempt(embeddings, output))

    # SIGTERM: a whole checkpoint under the original's name, from which the run goes on.
    output = folder / "terminated"
    report["sigterm"] = attempt(embeddings, output, soon, terminate)
    report["interrupted_checkpoint"] = os.readlink(output / INTERRUPTED)
    report.compare(output, attempt(embeddings, output, resume_from_checkpoint=str(output / INTERRUPTED)))
    report["link_is_gone"] = not (output / INTERRUPTED).is_symlink()
    return report


def two_processes(embeddings, folder, kills, seed):
    """Which rank writes how much differs, so a kill is at a random event of a random rank."""
    report = undisturbed(lambda output: attempt_of_two(embeddings, output), folder / "undisturbed")
    chance, number = random.Random(seed), 0
    while report["kills"] < kills:
        output, number = folder / f"killed-{number}", number + 1
        for _ in range(min(2, kills - report["kills"])):
            victim = chance.randrange(2)
            # Rank 1 writes little but its steps.
            at = chance.randrange(1, len(report.events) // 2 if victim == 0 else STEPS // 2)
            status = attempt_of_two(embeddings, output, victim, at)
            if status != "killed":
                break
            report.count_kill(output)
        report.compare(output, status if status == "finished" else attempt_of_two(embeddings, output))

    # One sample in each of three steps is bad, all on rank 1: no rank takes those steps, both stop with the reason.
    output = folder / "poisoned"
    POISONED.update(BATCH * (step - 1) + 3 for step in (5, 6, 7))
    report["poisoned"] = attempt_of_two(embeddings, output), Path(f"{output}.error").read_text()
    report["poisoned_whole"] = checkpoints.last_whole(output).name
    return report


if __name__ == "__main__":
    ways = {1: one_process, 2: two_processes}
    way = ways[int(sys.argv[5]) if len(sys.argv) > 5 else 1]
    print(json.dumps(way(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
