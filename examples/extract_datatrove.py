"""Extraction on the executors of datatrove, an optional engine: `pip install datatrove`.

    python examples/extract_datatrove.py tars runs/embeddings --tasks 4 --workers 2
    python examples/extract_datatrove.py tars runs/embeddings --tasks 64 --partition gpu --time 24:00:00

The first line runs the tasks on this machine, the second submits them to Slurm as a job array. Each task is one
process of the extraction and takes its share of the tars; datatrove starts them, keeps their logs and runs those that
failed again when the same line is given. The shards do not depend on any of it.
"""

import argparse
import os
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep


class Extract(PipelineStep):
    """One task: `extract` as process ``rank`` of ``world_size``; settings are those of `data.extract.extract`."""

    name = "extract"
    type = "blip3o_fast"

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        # datatrove's own array is counted in its rank already; left there, it would multiply the processes
        for name in [name for name in os.environ if name.startswith("SLURM_ARRAY_")]:
            del os.environ[name]
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        from blip3o_fast.data.extract import extract

        print(extract(**self.settings))
        yield from ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("output_dir")
    parser.add_argument("--condition_encoder", default="efficientnet-lite0")
    parser.add_argument("--target_encoder", default="efficientnet-lite2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="tasks at a time on this machine")
    parser.add_argument("--partition", help="of Slurm; without it the tasks run on this machine")
    parser.add_argument("--time", default="24:00:00", help="of Slurm, for each task")
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in ("images", "output_dir", "condition_encoder", "target_encoder")}
    pipeline = [Extract(**settings, dtype=given.dtype, quiet=True, yes=True)]
    # what is done stands in the manifest: a task that has nothing left to do ends at once
    common = {"logging_dir": given.output_dir.rstrip("/") + ".logs", "skip_completed": False}
    if given.partition is None:
        executor = LocalPipelineExecutor(pipeline, tasks=given.tasks, workers=given.workers, **common)
    else:
        executor = SlurmPipelineExecutor(
            pipeline,
            job_name="extract",
            tasks=given.tasks,
            time=given.time,
            partition=given.partition,
            sbatch_args={"gpus-per-task": 1},
            **common,
        )
    executor.run()


if __name__ == "__main__":
    main()
