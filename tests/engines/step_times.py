"""Times steps of the engines in turn, on 2 and on 4 ranks of this machine, as multiples of DDP's on as many ranks:

    python -m tests.engines.step_times

A row has the best and the median step, and the best CPU time of rank 0, which other work on the machine changes less.
"""

import statistics
import time
from collections.abc import Iterator

import torch

from megagpt.config_file import build_config
from megagpt.engines.engine import Engine, build_engine
from megagpt.measure.cases import ENGINE_CASES, LR, Case, EngineCase, share_of
from megagpt.measure.processes import run_ranks
from megagpt.world import World, join

ROUNDS, WARM_UP = 17, 2
SEQUENCES = 8
MODEL = {"layers": 4, "width": 384, "heads": 4, "context": 128, "vocab_size": 2048}
RANKS = {
    2: ("ddp", "fsdp", "fsdp 1 x 2 tensor"),
    4: ("ddp", "fsdp", "fsdp hybrid 2 x 2", "fsdp 2 x 2 tensor", "fsdp 1 x 4 tensor"),
}


def built(case: EngineCase, world: World) -> Engine:
    tokens = SEQUENCES * MODEL["context"]
    shares = world.size // case.engine.get("tensor_ranks", 1)
    train = {"tokens": 100 * tokens, "batch_tokens": tokens, "micro_batch": SEQUENCES // shares, "precision": "fp32"}
    return build_engine(build_config({"model": MODEL, "engine": case.engine, "train": train}, case.name), world)


def measure(names: tuple[str, ...]) -> Iterator[dict[str, tuple[float, float, float]]]:
    """Seconds of each engine: best step, median step, best CPU time."""
    torch.set_num_threads(1)  # ranks share a machine here
    with join("cpu") as world:
        engines = {name: built(ENGINE_CASES[name], world) for name in names}
        data = torch.randint(2048, (SEQUENCES, 129), generator=torch.Generator().manual_seed(0))
        walls, cpus = {name: [] for name in names}, {name: [] for name in names}
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                batch = share_of(data, world.rank, Case(ENGINE_CASES[name].engine, world.size))
                world.barrier()
                start, used = time.perf_counter(), time.process_time()
                engine.train_step(batch, LR)
                walls[name].append(time.perf_counter() - start)
                cpus[name].append(time.process_time() - used)
        seconds = {name: (walls[name][WARM_UP:], cpus[name][WARM_UP:]) for name in names}
        yield {name: (min(wall), statistics.median(wall), min(cpu)) for name, (wall, cpu) in seconds.items()}


def main() -> None:
    print("| | best step | median step | CPU time |\n|---|---|---|---|")
    for ranks, names in RANKS.items():
        (found,) = run_ranks(ranks, measure, names)
        for name in names:
            ratios = [value / ddp for value, ddp in zip(found[name], found["ddp"], strict=True)]
            milliseconds = f" ({found[name][0] * 1e3:.0f} ms)" if name == "ddp" else ""
            best, median, cpu = (f"{ratio:.2f}" for ratio in ratios)
            print(f"| {name}, {ranks} ranks | {best}{milliseconds} | {median} | {cpu} |", flush=True)


if __name__ == "__main__":
    main()
