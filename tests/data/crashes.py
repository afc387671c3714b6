"""A process that dies at a chosen change to the file system."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """Passes every `except Exception`, as no handler runs when a process is killed."""


class CrashPoints:
    """Makes the process "die" before or after the k-th change to the file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.after = -1, False
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Killed
            result = original(*arguments, **options)
            if self.left == 0:
                raise Killed
            return result

        return call

    def survives(self, action: Callable[[], object], left: int, after: bool) -> bool:
        self.left, self.after = left, after
        try:
            action()
        except Killed:
            return False
        finally:
            self.left = -1
        return True
