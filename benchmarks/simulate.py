"""What a large run would take: a simulation of workers that take shards, fed with measured rates.

    python benchmarks/simulate.py [--rate 20000] [--pairs 5e9] [--bytes_per_pair 30000] [--gigabytes_per_s 40] ...
    python benchmarks/simulate.py --check

Prints hours, the share of the time that GPUs stood idle, and the share of the work that was lost, for 1 to 1,024 GPUs:
with workers that take the next shard when they have room (`--devices`, Spark), with every world-th shard (a rank a
GPU), and with ten times as many ranks as GPUs, of which a scheduler starts the next one when one has ended (a Slurm
array with `%`, a Kubernetes job of more completions than it runs at once). A rank takes a while to start. Some GPUs
are slower than others, each is preempted now and then and comes back after a while, and storage gives no more than so
many bytes a second to all of them together.

`--check` runs two worker processes of the package on tasks that take a known time, one worker three times slower, and
compares the simulation with the clock.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from clip_index import executors
from clip_index.types import Task


@dataclass(frozen=True)
class Cluster:
    """Seconds a shard takes on a GPU of full speed, and what goes wrong."""

    gpus: int
    shard_s: float
    slow_share: float = 0.0
    slow_factor: float = 1.0
    preempted_every_s: float = float("inf")
    back_after_s: float = 0.0
    start_s: float = 0.0

    def speeds(self) -> list[float]:
        """How many times longer than the fastest each GPU takes."""
        slow = round(self.slow_share * self.gpus)
        return [self.slow_factor if number < slow else 1.0 for number in range(self.gpus)]


@dataclass(frozen=True)
class Outcome:
    """Of a run: its length, and the shares of all GPUs' time that were idle (away included) or thrown away."""

    seconds: float
    idle: float
    lost: float


def simulate(cluster: Cluster, shards: int, *, ranks: int = 0, seed: int = 0) -> Outcome:
    """Shards one by one, from one queue or split among so many ranks for each GPU.

    A GPU that is preempted loses what it had of its shard, which is done again.
    """
    rng = random.Random(seed)
    speeds = cluster.speeds()
    often = 1 / cluster.preempted_every_s
    fails = [rng.expovariate(often) if often else float("inf") for _ in speeds]
    world = ranks * cluster.gpus
    waiting = deque(deque(range(number, shards, world)) for number in range(world))
    own = [waiting.popleft() if ranks else shared for shared in [deque(range(shards))] * cluster.gpus]
    free = [(cluster.start_s, number) for number in range(cluster.gpus)]
    useful = lost = end = 0.0
    while free:
        now, gpu = heapq.heappop(free)
        if not own[gpu]:
            if waiting:
                own[gpu] = waiting.popleft()
                heapq.heappush(free, (now + cluster.start_s, gpu))
            continue
        shard = own[gpu].popleft()
        needed = cluster.shard_s * speeds[gpu]
        if now + needed <= fails[gpu]:
            useful += needed
            end = max(end, now + needed)
            heapq.heappush(free, (now + needed, gpu))
            continue
        lost += max(0.0, fails[gpu] - now)
        own[gpu].appendleft(shard)
        back = max(now, fails[gpu]) + cluster.back_after_s + cluster.start_s
        fails[gpu] = back + rng.expovariate(often)
        heapq.heappush(free, (back, gpu))
    total = end * cluster.gpus
    return Outcome(end, max(0.0, 1 - (useful + lost) / total), lost / total)


class Sleeper:
    """A job with a device that does one task at a time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, task: Task, report: executors.Report) -> int:
        with _device:
            time.sleep(self.seconds)
        return task.id


_device = threading.Lock()


def check(shards: int = 60, shard_s: float = 0.2) -> float:
    """How far the simulation of two workers, one of them slow, is from a run of them."""
    tasks = [Task(number, ((number,),)) for number in range(shards)]
    warm = [Task(shards + number, ((number,),)) for number in range(8)]
    jobs = [Sleeper(3 * shard_s), Sleeper(shard_s)]
    times: list[float] = []
    for done in executors.run_in_processes([*warm, *tasks], jobs, lambda rows, failed: None):
        times.append(time.perf_counter())
        assert isinstance(done, int)
    measured = times[-1] - times[len(warm) - 1]
    cluster = Cluster(gpus=2, shard_s=shard_s, slow_share=0.5, slow_factor=3.0)
    simulated = simulate(cluster, shards).seconds
    print(f"{shards} shards, 2 workers, one 3x slower: measured {measured:.2f} s, simulated {simulated:.2f} s")
    return abs(simulated / measured - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20_000, help="pairs a second of one GPU")
    parser.add_argument("--pairs", type=float, default=5e9)
    parser.add_argument("--rows_per_shard", type=float, default=10_000)
    parser.add_argument("--bytes_per_pair", type=float, default=30_000)
    parser.add_argument("--gigabytes_per_s", type=float, default=100, help="what storage gives to all GPUs together")
    parser.add_argument("--slow_share", type=float, default=0.05, help="GPUs that are slower")
    parser.add_argument("--slow_factor", type=float, default=2.0, help="how many times longer they take")
    parser.add_argument("--hours_between_preemptions", type=float, default=24.0, help="of one GPU")
    parser.add_argument("--minutes_away", type=float, default=10.0, help="until a preempted GPU is back at work")
    parser.add_argument("--seconds_to_start", type=float, default=30.0, help="of a rank, until its first batch")
    parser.add_argument("--check", action="store_true", help="compare with a run of two workers; status 1 above 15%%")
    options = parser.parse_args()
    if options.check:
        return int(check() > 0.15)
    cluster = Cluster(
        gpus=1,
        shard_s=0,
        slow_share=options.slow_share,
        slow_factor=options.slow_factor,
        preempted_every_s=3600 * options.hours_between_preemptions,
        back_after_s=60 * options.minutes_away,
        start_s=options.seconds_to_start,
    )
    shards = round(options.pairs / options.rows_per_shard)
    print(f"{shards:,} shards of {options.rows_per_shard:,.0f} pairs, {options.rate:,.0f} pairs/s a GPU")
    print(f"{'GPUs':>6} |" + "".join(f" {name:^28}  |" for name in ("shared queue", "a rank a GPU", "ten ranks a GPU")))
    print(f"{'':>6} |" + f" {'hours':>10} {'idle':>8} {'lost':>8}  |" * 3)
    for gpus in (1, 2, 8, 32, 128, 512, 1024):
        most = options.gigabytes_per_s * 1e9 / options.bytes_per_pair / gpus
        now = replace(cluster, gpus=gpus, shard_s=options.rows_per_shard / min(options.rate, most))
        line = f"{gpus:>6} |"
        for ranks in (0, 1, 10):
            told = simulate(now, shards, ranks=ranks)
            line += f" {told.seconds / 3600:>10.2f} {told.idle:>8.1%} {told.lost:>8.2%}  |"
        print(line + (" held back by storage" if most < options.rate else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
