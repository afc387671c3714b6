"""checkpoint list, verify, show, bench: what a run has saved, and how fast."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.commands.options import Add, count
from megagpt.errors import ExitCode, ExpectedError, UserError

if TYPE_CHECKING:
    from megagpt.checkpoints.checkpoint import Checkpoint


def register(add: Add) -> None:
    parser = add("checkpoint", _list, "Look at a run's checkpoints.")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    sub = actions.add_parser("list", help="One line for each: position, size, who wrote it, whether it is whole.")
    sub.add_argument("run", metavar="RUN")
    sub.set_defaults(command=_list)

    sub = actions.add_parser("verify", help="Read every byte against its checksum; exit code 1 where one differs.")
    sub.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    sub.set_defaults(command=_verify)

    sub = actions.add_parser("show", help="What a checkpoint says of itself; a run's newest whole one.")
    sub.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    sub.add_argument("--tensors", action="store_true", help="every tensor with its shape")
    sub.set_defaults(command=_show)

    sub = actions.add_parser("bench", help="Save and load beside the disk's own speed. Works under torchrun too.")
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--in", dest="folder", required=True, metavar="DIR", help="a folder on the disk to measure")
    sub.add_argument("--rounds", type=count, default=3, help="the best of so many counts (3)")
    sub.set_defaults(command=_bench)


def _chosen(path: str) -> "list[Checkpoint]":
    """A checkpoint by its own folder, or all of a run's. Raises UserError where there is none."""
    from megagpt.checkpoints.checkpoint import Checkpoint
    from megagpt.checkpoints.folder import is_checkpoint, list_checkpoints

    if is_checkpoint(Path(path)):
        return [Checkpoint(Path(path).resolve())]
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder")
    found = list_checkpoints(Path(path))
    if not found:
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
        kind = "milestone" if meta.milestone else "interval"
        print(
            f"{checkpoint.tokens:17,} {meta.scalars['updates']:9,} {found.size / 1e9:8.3f}  "
            f"{f'{meta.engine} x {meta.world_size}':12} {meta.saved:25} {kind:9} complete"
        )
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
    from megagpt.config_file import load_config
    from megagpt.measure.disk import bench
    from megagpt.world import join

    config = load_config(arguments.config, arguments.overrides)
    with join(config.train.device) as world:
        bench(config, world, Path(arguments.folder), arguments.rounds)
    return 0
