"""A run's TensorBoard events: scalars by panel, and texts. They continue across incarnations as one curve."""

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

# Panel -> the values that it shows; all other values are shown under "speed".
_PANELS = {
    "loss": ("loss", "validation_loss", "unigram_loss"),
    "optimizer": ("lr", "gradient_norm", "batch_tokens", "skipped_updates", "loss_scale"),
    "progress": ("tokens_seen", "sequences_seen", "incarnation"),
    "ranks": (
        "ranks_compute_median", "ranks_compute_slowest", "ranks_slowest_rank", "ranks_data_wait_longest",
        "ranks_communication_wait_median",
    ),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in _PANELS.items() for name in names}


class Board:
    """Writes the events. Only the main rank has one."""

    def __init__(self, run: Path, step: int, resumed: bool) -> None:
        """Events past `step` are purged if the run resumes: they will be written again."""
        self._writer = SummaryWriter(str(run), purge_step=step + 1 if resumed else None)
        self._usual_hook = threading.excepthook
        threading.excepthook = self._hook

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the values that are numbers. Raises OSError."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{_PANEL_OF.get(name, 'speed')}/{name}", value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text, which is shown as Markdown."""
        self._writer.add_text(name, text, step)

    def flush(self) -> None:
        """Put on the disk what a checkpoint's position claims to be there."""
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # its error was reported when it was written
            self._writer.close()
        threading.excepthook = self._usual_hook

    def _hook(self, arguments: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread raises its disk error again in the next writer's thread: no traceback before that."""
        is_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            self._usual_hook(arguments)
