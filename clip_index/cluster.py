"""Which part of the work this process has, told by whatever started it on a cluster.

1. Inside a job: torchrun, then MPI, then a Slurm step (`srun`) number their processes.
2. Around it: a Slurm array numbers its jobs. The two multiply.

The batch script of a Slurm job is one process whatever `SLURM_NTASKS` says, so only the variables of a step count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clip_index.types import UsageError

_LAUNCHERS = (
    # (rank, processes, rank within the node, processes on the node)
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Rank:
    """Process `rank` of `world`; `local` of `local_world` on its machine, where that is known."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    def devices(self, cuda_devices: int) -> str:
        """The CUDA devices that this process may take, as `--devices` spells them, so that no two share one idly."""
        if self.local_world == 1 or not cuda_devices:
            return "auto"
        mine = range(self.local % self.local_world, cuda_devices, self.local_world)
        return ",".join(f"cuda:{number}" for number in mine) or f"cuda:{self.local % cuda_devices}"


def find_rank(rank: int | None, world: int | None, environ: Mapping[str, str]) -> Rank:
    """The rank asked for, else the one that the environment tells, else the only one. Raises UsageError."""
    if rank is None and world is None:
        return _detect(environ)
    if rank is None or world is None:
        raise UsageError(f"give both --rank and --world, not only --{'rank' if world is None else 'world'}")
    if world < 1 or not 0 <= rank < world:
        raise UsageError(f"--rank {rank} --world {world}: ranks count from 0, and there are --world of them")
    return Rank(rank, world)


def _detect(environ: Mapping[str, str]) -> Rank:
    inner, (index, count) = _launched(environ), _array(environ)
    return Rank(index * inner.world + inner.rank, count * inner.world, inner.local, inner.local_world)


def _launched(environ: Mapping[str, str]) -> Rank:
    for rank, world, local, local_world in _LAUNCHERS:
        if rank in environ and world in environ:
            return Rank(
                _number(environ, rank),
                _number(environ, world),
                _number(environ, local, 0),
                _number(environ, local_world, 1),
            )
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        world = _number(environ, "SLURM_STEP_NUM_TASKS")
        # `4` or `4(x2),3`: only where every node has as many is it known what this one has
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
        local = _number(environ, "SLURM_LOCALID", 0)
        return Rank(_number(environ, "SLURM_PROCID"), world, local, int(per_node) if per_node.isdigit() else 1)
    return Rank()


def _array(environ: Mapping[str, str]) -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return 0, 1
    task, first, last = (_number(environ, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX"))
    count = _number(environ, "SLURM_ARRAY_TASK_COUNT")
    step = (last - first) // max(1, count - 1) or 1
    if first + step * (count - 1) != last or (task - first) % step:
        raise UsageError(
            f"this Slurm array has gaps (job {task} of {count} from {first} to {last}): give --rank and --world, "
            "or number the array from 0 without gaps"
        )
    return (task - first) // step, count


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, "" if default is None else str(default))
    if not value.isdigit():
        raise UsageError(f"the environment says {name}={value!r}, which is no number: give --rank and --world")
    return int(value)
