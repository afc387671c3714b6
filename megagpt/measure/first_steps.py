"""Profiles a config's first steps, as `megagpt train` would take them, without a run: nothing is saved or logged."""

import contextlib

from megagpt.config import Config
from megagpt.console import say
from megagpt.data.builtin import prepare_builtin
from megagpt.data.loader import open_corpus, placed, read_ahead, train_batches
from megagpt.engines.engine import seed_dropout
from megagpt.profiling.profiler import StepProfiler, profile_folder
from megagpt.profiling.rates import find_rates
from megagpt.schedule import learning_rate
from megagpt.training.run import check_vocabulary
from megagpt.training.run_folder import holds_run, run_folder
from megagpt.training.sizing import build_sized, size_run
from megagpt.world import World

# Steps before the profiled ones, by device: the first compiles, and a GPU's clock falls under full load.
_WARMUP_STEPS = {"cpu": 2, "cuda": 5}


def profile_first_steps(config: Config, world: World, steps: int) -> None:
    """Take full batches from the config's data and profile the last `steps` of them; a batch ramp is left out. Raises
    UserError for what cannot run here and if the profile fails; OSError if its folder cannot be made."""
    folder = run_folder(config)
    sizing = size_run(config, world)
    config = sizing.config
    check_vocabulary(config, holds_run(folder))
    place = profile_folder(folder, "standalone")
    world.from_main(lambda: place.mkdir(parents=True, exist_ok=True))
    say("reading data")
    data = prepare_builtin(config.data, world)
    corpus = open_corpus(data, "train", config.model.context, config.run.seed)
    rates = world.from_main(lambda: find_rates(config, world.device))
    say("building the model")
    config, engine = build_sized(sizing, world)
    engine.initialize()
    say(f"{config.run.name}: {config.model.parameters:,} parameters, {engine.describe()}")
    warmup = _WARMUP_STEPS[world.device.type]
    numbers = range(warmup + 1, warmup + steps + 1)
    profiler = StepProfiler(engine, numbers, place, rates, must_succeed=True)
    size, share = config.batch_sequences, engine.share
    batches = read_ahead(placed(train_batches(corpus, 0, numbers.stop * size, lambda seen: size, share), world.device))
    with contextlib.closing(profiler), contextlib.closing(batches):
        say(f"warming up for {warmup} steps, then profiling {steps}")
        for step in range(1, numbers.stop):
            profiler.begin(step)
            batch = next(batches)
            if config.model.dropout:
                seed_dropout(config, step * size, world.rank)
            engine.train_step(batch, learning_rate(config, step * batch.tokens))
            profiler.end(step, batch.sequences)
        profiler.write()
