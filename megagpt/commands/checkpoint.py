"""checkpoint list, verify, show, bench: a run's checkpoints, and the speed of saving and loading."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.commands.options import Add, add_actions, add_config, config_of, count
from megagpt.errors import ExitCode, ExpectedError, UserError

if TYPE_CHECKING:
    from megagpt.checkpoints.checkpoint import Checkpoint


def register(add: Add) -> None:
    actions = add_actions(add("checkpoint", _list, "Look at a run's checkpoints."))

    sub = actions("list", _list, "One line per checkpoint: position, size, writer, time, kind, complete or not.")
    sub.add_argument("run", metavar="RUN")

    sub = actions("verify", _verify, "Read every byte against its checksum; exit code 1 if one differs.")
    sub.add_argument("run", metavar="RUN_OR_CHECKPOINT")

    sub = actions("show", _show, "Show the description of a checkpoint, or of a run's newest complete one.")
    sub.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    sub.add_argument("--tensors", action="store_true", help="every tensor with its shape")

    sub = actions("bench", _bench, "Compare saving and loading with the disk's own speed. Works under torchrun too.")
    add_config(sub)
    sub.add_argument("--in", dest="folder", required=True, metavar="DIR", help="a folder on the disk to measure")
    sub.add_argument("--rounds", type=count, default=3, help="number of rounds; the fastest is reported (default 3)")


def _chosen(path: str) -> "list[Checkpoint]":
    """A checkpoint by its own folder, or all of a run's. Raises UserError if there is none."""
    from megagpt.checkpoints.checkpoint import Checkpoint
    from megagpt.checkpoints.folder import is_checkpoint, list_checkpoints

    if is_checkpoint(Path(path)):
        return [Checkpoint(Path(path).resolve())]
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder")
    if not (found := list_checkpoints(Path(path))):
        raise UserError(f"{path}: holds no checkpoints")
    return found


def _list(arguments: argparse.Namespace) -> int:
    checkpoints = _chosen(arguments.run)
    print(f"{'tokens':>17} {'updates':>9} {'GB':>8}  {'written by':12} {'saved':25} {'kind':9} state")
    for checkpoint in checkpoints:
        try:
            found = checkpoint.open()
        except (ExpectedError, OSError) as error:
            print(f"{checkpoint.tokens:17,} {'':>9} {'':>8}  {'':12} {'':25} {'':9} incomplete: {error}")
            continue
        meta = found.meta
        writer, kind = f"{meta.engine} x {meta.world_size}", "milestone" if meta.milestone else "interval"
        sizes = f"{checkpoint.tokens:17,} {meta.scalars['updates']:9,} {found.size / 1e9:8.3f}"
        state = "complete" if checkpoint.is_proven else "complete, unproven: no later step was finite yet"
        print(f"{sizes}  {writer:12} {meta.saved:25} {kind:9} {state}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    corrupt = 0
    for checkpoint in _chosen(arguments.run):
        total = None
        with contextlib.suppress(ExpectedError, OSError):
            total = checkpoint.open().size
        with tqdm(total=total, unit="B", unit_scale=True, desc=checkpoint.path.name, disable=None, leave=False) as bar:
            problems = checkpoint.verify(bar.update)
        corrupt += bool(problems)
        print("\n".join(problems) if problems else f"{checkpoint.path}: every byte as it was written")
    return ExitCode.DIFFERENT if corrupt else ExitCode.DONE


def _show(arguments: argparse.Namespace) -> int:
    from megagpt.checkpoints.folder import find_checkpoint
    from megagpt.checkpoints.loading import tensor_shapes

    found = find_checkpoint(Path(arguments.run))
    print(f"# {found.path}: {len(found.sums)} files, {found.size:,} bytes")
    print(found.meta.to_json().decode())
    if arguments.tensors:
        for name, shape in tensor_shapes(found).items():
            print(f"{name}: {' x '.join(map(str, shape))}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from megagpt.measure.disk import bench
    from megagpt.world import join

    config = config_of(arguments)
    with join(config.train.device) as world:
        bench(config, world, Path(arguments.folder), arguments.rounds)
    return 0
