"""Starts a generated program and follows it: a live view on a terminal, its own plain lines anywhere else.

The program gets a session of its own, so that each signal reaches it exactly once: through here. The first Ctrl-C or
SIGTERM lets it finish its step and save, the second ends it at once; its exit status is ours.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmgen import metrics
from llmgen.errors import UserError

_STEP = re.compile(rb"step (\d+)/(\d+) \| loss (\S+) \| norm (\S+) \| lr (\S+) \| (\S+) ms \| (\S+) tok/s\n")
SPARKS = 12  # blocks in the live view's curve of the losses
_VAL_LOSS = re.compile(rb"val loss (\S+)\n")


def run(program: str | Path, flags: Sequence[str], *, follow: bool = True) -> int:
    """Run a program to its end. Returns its exit status; 128 + N if signal N ended it.

    follow: on a terminal, show its steps as they come; else what it prints is left as it is.
    Raises UserError if it cannot be started, or if it crashed.
    """
    live = follow and sys.stdout.isatty() and sys.stderr.isatty()
    sys.stdout.flush()
    with _forwarding_signals() as started:
        try:
            child = subprocess.Popen(
                [os.path.abspath(program), *flags],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if live else None,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{program}: cannot be started: {error.strerror or error}") from None
        started(child)
        with child:
            if live:
                _show(child.stdout)
            status = child.wait()
    if status < 0:
        name = signal.Signals(-status).name
        if name == "SIGKILL":
            raise UserError(f"{program} was killed, perhaps for want of memory; `llmgen plan` shows what it needs")
        if name not in ("SIGINT", "SIGTERM"):
            raise UserError(f"{program} crashed ({name}); please report it with the command line")
        return 128 - status
    return status


def environment() -> dict[str, str]:
    """The environment for a program: gcc's OpenMP shall not wait by spinning for long, unless the user says how it waits.

    As it comes, a thread that waits spins through whole time slices. Beside one other busy process a step of gpt2-nano
    then takes 20 times as long as with this number.
    """
    given = dict(os.environ)
    if "OMP_WAIT_POLICY" not in given:
        given.setdefault("GOMP_SPINCOUNT", "1000")
    return given


@contextmanager
def _forwarding_signals() -> Iterator[Callable[[subprocess.Popen], None]]:
    """Signals go to the program; yields the function to call with it as soon as it runs."""
    children, early = [], []

    def started(child):
        children.append(child)
        for number in early:
            child.send_signal(number)

    def forward(number, _frame):
        number = signal.SIGTERM if number == signal.SIGHUP else number
        early.append(number)
        for child in children:
            child.send_signal(number)

    def pause(_number, _frame):  # Ctrl-Z
        for child in children:
            child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for child in children:
            child.send_signal(signal.SIGCONT)

    handlers = {signal.SIGINT: forward, signal.SIGTERM: forward, signal.SIGHUP: forward, signal.SIGTSTP: pause}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Progress:
    """What the live view's line shows."""

    started: float = 0.0  # when the first step was done
    first: int = 0  # that step
    step: int = 0
    steps: int = 0
    loss: str = ""
    val_loss: str = ""
    tokens_per_second: float = 0.0
    losses: list[float] = field(default_factory=list)  # means over `stride` steps, and the ones of the next
    pending: list[float] = field(default_factory=list)
    stride: int = 1

    def update(self, step: int, steps: int, loss: str, tokens_per_second: float) -> None:
        if not self.step:
            self.started, self.first = time.monotonic(), step
        self.step, self.steps, self.loss, self.tokens_per_second = step, steps, loss, tokens_per_second
        self.pending.append(float(loss))
        if len(self.pending) == self.stride:
            self.losses.append(sum(self.pending) / self.stride)
            self.pending.clear()
        if len(self.losses) == 4 * SPARKS:
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]
            self.stride *= 2

    def line(self, width: int) -> str:
        parts = [f"{self.step}/{self.steps}", f"loss {self.loss}"]
        if self.val_loss:
            parts.append(f"val loss {self.val_loss}")
        parts.append(f"{self.tokens_per_second:,.0f} tok/s")
        if self.step > self.first:
            left = (time.monotonic() - self.started) / (self.step - self.first) * (self.steps - self.step)
            parts.append(f"{_clock(left)} left")
        text = " | ".join(parts)
        if len(self.losses) > 1 and width > len(text) + SPARKS + 14 and _can_show("▁█"):
            text += f" | {metrics.sparkline(self.losses, SPARKS)}"
        room = min(width - len(text) - 4, 40)
        if room < 5:
            return text[: width - 1]
        done = room * self.step // max(self.steps, 1)
        return f"[{'#' * done}{'.' * (room - done)}] {text}"


def _show(stream) -> None:
    """The live view: steps move one line on stderr, everything else is printed above it."""
    progress = _Progress()
    for line in stream:
        if match := _STEP.fullmatch(line):
            progress.update(int(match[1]), int(match[2]), match[3].decode(), float(match[7]))
        else:
            if match := _VAL_LOSS.fullmatch(line):
                progress.val_loss = match[1].decode()
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()
        if progress.step:
            sys.stderr.write("\r\x1b[K" + progress.line(shutil.get_terminal_size().columns))
            sys.stderr.flush()
    if progress.step:
        sys.stderr.write("\n")


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
