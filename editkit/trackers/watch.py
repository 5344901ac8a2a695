"""Warning signs of a run: a condition number or a loss that grows without bound."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator

from editkit.types import StepRecord

MIN_LOSSES = 5  # fewer give no useful median
REPEAT = 10.0  # the next warning comes when the value is this many times worse


class Watch:
    """Watches the steps of one run in order.

    It warns of a matrix whose condition number exceeds `condition_ratio` times that of step 0, and
    of a loss above `loss_ratio` times the median of the last `loss_window` losses. It repeats a
    warning when the value is ten times worse, so that a run of thousands of edits has few warnings.
    It warns of numbers that are not finite at the 1st, 10th, 100th... step that has them.
    """

    def __init__(self, *, condition_ratio: float, loss_ratio: float, loss_window: int) -> None:
        self._condition_ratio = condition_ratio
        self._loss_ratio = loss_ratio
        self._losses: deque[float] = deque(maxlen=loss_window)
        self._unedited: dict[str, float] = {}  # condition number at step 0, by module
        self._silent_until: dict[str, float] = {}  # by what is watched
        self.num_nonfinite = 0

    def look(self, record: StepRecord) -> Iterator[str]:
        """The warnings of this step."""
        if record.step == 0:
            self._unedited = {
                module: figures["condition_number"]
                for module, figures in record.modules.items()
                if "condition_number" in figures
            }
            return
        yield from self._nonfinite(record)
        for module, figures in record.modules.items():
            before, now = (
                self._unedited.get(module, math.nan),
                figures.get("condition_number", math.nan),
            )
            if self._is_news(f"condition of {module}", now, self._condition_ratio * before):
                yield (
                    f"step {record.step}: condition number of {module} {now:.3g}, "
                    f"{now / before:.3g} times the unedited {before:.3g}"
                )
        loss = record.target.get("loss", math.nan)
        if len(self._losses) >= MIN_LOSSES:
            median = statistics.median(self._losses)
            if self._is_news("loss", loss, self._loss_ratio * median):
                yield (
                    f"step {record.step}: loss {loss:.3g}, {loss / median:.3g} times the median "
                    f"{median:.3g} of those before"
                )
        if math.isfinite(loss):
            self._losses.append(loss)

    def _nonfinite(self, record: StepRecord) -> Iterator[str]:
        lost = [
            module
            for module, figures in record.modules.items()
            if not math.isfinite(figures.get("condition_number", 0.0))
        ]
        where = record.nonfinite
        if where is None and not math.isfinite(record.target.get("loss", 0.0)):
            where = "loss"
        if where is None and lost:
            where = f"condition number of {lost[0]}"
        if where is not None:
            self.num_nonfinite += 1
            if math.log10(self.num_nonfinite).is_integer():
                again = f" (the {self.num_nonfinite}th such step)" if self.num_nonfinite > 1 else ""
                requests = ", ".join(record.requests)
                yield f"step {record.step}: {where} is not finite{again}; requests {requests}"

    def _is_news(self, name: str, value: float, limit: float) -> bool:
        if not (
            math.isfinite(value)
            and value > max(limit, self._silent_until.get(name, 0.0))
            and limit > 0
        ):
            return False
        self._silent_until[name] = REPEAT * value
        return True
