"""A training with the files of a run (config, provenance, steps, evals, state, DONE or FAILED), and
its hypernetwork or pair of models. The same command resumes an interrupted training to the same
bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from editkit.editors.serac import Serac
from editkit.hypernet.learning import AbstractLearning, Diverged, Event, LearningState
from editkit.hypernet.store import HYPERNETWORK, PAIR, RIDGE, save_hypernetwork, save_trained
from editkit.records.tracker import RunInfo
from editkit.records.writer import EVALS
from editkit.runner.base import AbstractSession, AbstractWork, Loaded, load_model
from editkit.runner.checkpoint import Checkpoint
from editkit.runner.folder import Collapsed
from editkit.runner.provenance import describe, peak_memory_bytes
from editkit.training.build import Training
from editkit.training.figures import draw_training
from editkit.training.serac import PairLearning

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# options of the editor that describe a training, in the header of its result
TRAINED = ("layers", "matrices", "layers_of", "train", "trajectory")
GROUPS = ("network", "adam", "chains", "best")  # of tensors in a checkpoint


def train(training: Training) -> int:
    """Trains to the end, or resumes the training where it was interrupted. Returns the exit code of
    a run. Raises ConfigError for what the user can fix.
    """
    return TrainingSession(training).run()


class TrainingSession(AbstractSession[Training, LearningState]):
    """The session of a training."""

    results = (HYPERNETWORK.file, PAIR.file)

    def state(self, checkpoint: Checkpoint) -> LearningState:
        return learning_state(checkpoint)

    def prepare(
        self, *, should_stop: Callable[[], bool], began_with: Mapping[str, str] | None
    ) -> TrainingWork:
        training = self.settings
        loaded = load_model(training, began_with, should_stop=should_stop, training=training.editor)
        if loaded.data.known_only:
            training = training.of(loaded.data)
        learning = learning_of(training, loaded.model, should_stop)
        return TrainingWork(training, learning, loaded)

    def already_done(self) -> str:
        file = self.settings.folder / self.settings.kind.file
        return f"already trained: {file} (resume=never trains anew)"


def learning_of(
    training: Training, model: EditableModel, should_stop: Callable[[], bool]
) -> AbstractLearning[Any] | PairLearning:
    """The training on a loaded model."""
    editor, seed = training.editor, training.settings.seed
    every = training.settings.checkpoint.every
    if isinstance(editor, Serac):
        editor.require(model)
        return PairLearning(
            model=model,
            editor=editor,
            split=training.split,
            seed=seed,
            checkpoint_every=every,
            should_stop=should_stop,
        )
    return editor.learning(
        model, training.split, seed=seed, checkpoint_every=every, should_stop=should_stop
    )


class TrainingWork(AbstractWork[LearningState]):
    """A training whose model is loaded."""

    def __init__(
        self, training: Training, learning: AbstractLearning[Any] | PairLearning, loaded: Loaded
    ) -> None:
        self.training, self.learning, self.loaded = training, learning, loaded
        self.outcome: LearningState | None = None  # of the newest checkpoint

    def info(self) -> RunInfo:
        training = self.training
        return RunInfo(
            name=training.name,
            folder=training.folder,
            edits=training.editor.train.steps,
            batch_size=1,
            views=("unrestrained",),
            config=training.config,
            unit="steps",
        )

    def events(self, state: LearningState | None) -> Iterator[Event]:
        return self.learning.run(state)

    def checkpoint(self, state: LearningState, record_bytes: Mapping[str, int]) -> Checkpoint:
        return checkpoint_of(state, record_bytes, inputs=self.loaded.inputs)

    def reached(self, state: LearningState) -> bool:
        self.outcome, options = state.outcome(), self.learning.options
        return state.step >= options.steps or state.step - state.best_step >= options.patience

    def collapsed(self, error: Exception) -> Collapsed | None:
        if not isinstance(error, Diverged):
            return None
        warning = f"the loss is not finite: {error}"
        return Collapsed(kind="diverged", step=error.record.step, warning=warning)

    def save_results(self) -> None:
        """Writes the best network so far, also if the training is resumed later."""
        training, outcome = self.training, self.outcome
        if outcome is None or not outcome.best:
            return
        options = training.config["editor"]
        facts: dict[str, Any] = {
            "steps": outcome.step,
            "best_step": outcome.best_step,
            "validation_loss": outcome.best_loss,
            "held_apart": training.split.num_held_apart,
            "train": {key: options[key] for key in options if key in TRAINED},
            "dataset": training.data.label,
            "seed": training.settings.seed,
            "validation": self._validation(outcome.best_step),
            "chat_template": chat.label if (chat := self.loaded.model.chat) else None,
        }
        if training.kind is RIDGE:
            facts["editor"] = RIDGE.editor
        about: dict[str, Any] = {
            "model": self.loaded.model.name,
            "fingerprint": self.loaded.model.fingerprint,
            "dataset": training.data.digest,
            "trained": training.split.used,
            "facts": facts,
        }
        path, learning = training.folder / training.kind.file, self.learning
        if isinstance(learning, PairLearning):
            save_trained(path, outcome.best, modules={}, network=learning.config(), **about)
        else:
            network = outcome.best_of(learning.network)
            save_hypernetwork(path, network, **about)

    def _validation(self, step: int) -> dict[str, float | None]:
        """The validation results of a step."""
        path = self.training.folder / EVALS
        records = (json.loads(line) for line in path.read_bytes().splitlines())
        return {
            f"{record['kind']}/{record['metric']}": record.get("value")
            for record in records
            if record["step"] == step
        }

    def provenance(self) -> dict[str, Any]:
        training, split = self.training, self.training.split
        return describe(self.loaded.model, training.data) | {
            "split": {
                "held_apart": split.num_held_apart,
                "train": len(split.train),
                "validation": [request.id for request in split.validation],
                "left_out": split.left_out,
            },
            "seed": training.settings.seed,
        }

    def measured(self) -> dict[str, Any]:
        peaks = self.loaded.peaks.bytes
        return {"peak_memory_bytes": peak_memory_bytes(self.loaded.model.device, peaks)}

    def draw(self) -> None:
        draw_training(self.training.folder)


def checkpoint_of(
    state: LearningState, record_bytes: Mapping[str, int], *, inputs: Mapping[str, str]
) -> Checkpoint:
    """The state as the content of a checkpoint."""
    return Checkpoint(
        step=state.step,
        groups={group: getattr(state, group) for group in GROUPS},
        facts={
            "best_step": state.best_step,
            "best_loss": state.best_loss,
            "inputs": dict(inputs),
        },
        record_bytes=record_bytes,
    )


def learning_state(checkpoint: Checkpoint) -> LearningState:
    """The inverse of `checkpoint_of`."""
    return LearningState(
        step=checkpoint.step,
        best_step=checkpoint.facts["best_step"],
        best_loss=checkpoint.facts["best_loss"],
        **{group: checkpoint.groups.get(group, {}) for group in GROUPS},
    )
