"""The schedule of a run: milestones, telemetry and checkpoints. Steps count batches; milestones
count edits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The schedule of `edits` edits with `batch_size` per step. Step 0 is the unedited model."""

    edits: int
    batch_size: int
    milestones: tuple[int, ...]  # in edits; every configured run includes 0, the unedited model
    telemetry_every: int
    checkpoint_every: int
    measures_last: bool = False  # the last step is measured even if it is not a milestone

    @property
    def last_step(self) -> int:
        return self.step_of(self.edits)

    def step_of(self, edits: int) -> int:
        """The first step after which the model has at least this many edits."""
        return -(-edits // self.batch_size)

    def edits_at(self, step: int) -> int:
        """The number of edits in the model after a step."""
        return min(step * self.batch_size, self.edits)

    def is_milestone(self, step: int) -> bool:
        return step in {self.step_of(edits) for edits in self.milestones}

    def is_measured(self, step: int) -> bool:
        return self.is_milestone(step) or (self.measures_last and step == self.last_step)

    def is_every(self, step: int, every: int) -> bool:
        """Whether a step is among every `every`-th milestone. The first and the last milestone
        always are.
        """
        steps = sorted({self.step_of(edits) for edits in self.milestones})
        return step not in steps or steps.index(step) % every == 0 or step == steps[-1]

    def has_telemetry(self, step: int) -> bool:
        return step % self.telemetry_every == 0 or step == self.last_step or self.is_milestone(step)

    def has_checkpoint(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.last_step
