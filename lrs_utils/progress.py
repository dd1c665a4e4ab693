"""Progress of long work: a tqdm bar if someone is watching, one line per step if there is only a log."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Counts units of work done out of `total`.

    Shows a bar in JupyterLab and on a terminal; elsewhere (papermill, CI, a log file) lines, at most one every two
    seconds. In a notebook nothing of it stays in the cell's output once the work is done.
    """

    def __init__(self, total: int, description: str) -> None:
        self.total, self.description, self.done = total, description, 0
        self._note = ""
        self._began = self._last_line = time.monotonic()
        self._depth = 0
        self._bar: Any = None

    @contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Show the progress inside the `with` block; blocks of the same progress may be nested."""
        if self._depth == 0 and not _headless():
            self._bar = tqdm(total=self.total, desc=self.description, leave=not _in_kernel())
        self._depth += 1
        try:
            yield self
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._finish()

    def advance(self, units: int, note: str | None = None) -> None:
        """Add `units` of work done; `note` is a short text shown behind the count from now on."""
        self.done += units
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(units)
        elif units and _headless() and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print()

    def part(self, weight: float) -> "Progress":
        """Progress of a part of the work, each unit of which is `weight` units of the whole."""
        return _Part(self, weight)

    def _print(self) -> None:
        elapsed = time.monotonic() - self._began
        meter = tqdm.format_meter(self.done, self.total, elapsed, prefix=self.description, ncols=0)
        print(f"{meter} {self._note}".rstrip(), flush=True)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif time.monotonic() - self._began > _SECONDS_BETWEEN_LINES:
            self._print()
            if _in_kernel():  # whoever follows the run has seen the lines; the saved notebook doesn't keep them
                from IPython.display import clear_output

                clear_output()  # type: ignore[no-untyped-call]


class _Part(Progress):
    """Counts into another progress, which shows it."""

    def __init__(self, whole: Progress, weight: float) -> None:
        super().__init__(0, "")
        self._whole, self._weight = whole, weight

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        with self._whole.shown():
            yield self

    def advance(self, units: int, note: str | None = None) -> None:
        self._whole.advance(round(units * self._weight), note)


class SilentProgress(Progress):
    """Progress of which nothing is shown: of a part that another bar or a status line stands for."""

    def __init__(self) -> None:
        super().__init__(0, "")

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        yield self

    def advance(self, units: int, note: str | None = None) -> None:
        self.done += units


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let transformers load and save without bars of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _in_kernel() -> bool:
    return "ipykernel" in sys.modules and type(sys.stdout).__module__.startswith("ipykernel")


def _headless() -> bool:
    if not _in_kernel():
        return not sys.stderr.isatty()
    # someone watches a kernel that a Jupyter server, Colab or VS Code started; papermill sets none of these
    return not any(name in os.environ for name in ("JPY_SESSION_NAME", "COLAB_RELEASE_TAG", "VSCODE_PID"))
