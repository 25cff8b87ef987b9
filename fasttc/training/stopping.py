"""How a training ends before its time: Ctrl-C between two steps, a loss that diverges."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training. ``step`` steps are done; ``checkpoint`` resumes there, or is None."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        kept = f"; {checkpoint} resumes there" if checkpoint else "; nothing was saved (no out= was given)"
        super().__init__(f"interrupted after step {step}{kept}")
        self.step = step
        self.checkpoint = checkpoint


class Diverged(ValueError):
    """The loss became infinite, not a number, or rose far above its lowest; there are no good weights to go back to.

    Attributes:
        step: where that was seen.
        reason: the message, less that nothing was kept.
    """

    def __init__(self, step: int, loss: float, lowest: float) -> None:
        self.step = step
        self.reason = (
            f"training diverged at step {step}: loss {loss:.4g}, lowest before {lowest:.4g}; "
            "try a lower learning rate"
        )
        super().__init__(
            f"{self.reason}; nothing was kept (no good checkpoint, no look at held-out tokens before that)"
        )


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C is remembered instead of raised, so that no step is cut in two. A second one is raised.

    Outside the main thread signals cannot be caught; there the interrupt is raised where it falls.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    hits: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, _frame: Any) -> None:
        hits.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    replaceable = before is signal.default_int_handler
    if replaceable:
        signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(hits)
    finally:
        if replaceable:
            signal.signal(signal.SIGINT, before)
