"""`editkit.Session`: one editor on one model, one call per batch of edits."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.api.composing import kept_generators
from editkit.api.keeping import SessionLedger, begin_ledger
from editkit.api.method import RestraintChoice, choose_method
from editkit.api.probing import (
    Measures,
    changed_probes,
    greedy_answers,
    measure,
    probabilities,
    require_probes,
    weight_figures,
)
from editkit.api.requests import batch_of, request_of
from editkit.api.result import EditResult
from editkit.api.state import SessionState
from editkit.api.unedited import require_none_beside, unedited
from editkit.editors.base import AbstractAnyEditor, AbstractEditor, Step
from editkit.errors import ConfigError, OptionError, keys_under, message
from editkit.lazy import torch
from editkit.linalg.spectral import extreme_singular_values
from editkit.linalg.total import Total
from editkit.resources.stopwatch import Stopwatch
from editkit.runner.card import session_card
from editkit.runner.checkpoint import generator_states, restore_generators
from editkit.runner.context_length import require_room
from editkit.runner.export import save_model
from editkit.runner.measure import corrections
from editkit.runner.routed import require_routed
from editkit.runner.self_check import check_editing, check_reading
from editkit.runner.step import (
    apply_batch,
    describe,
    first_states,
    next_states,
    restrain_totals,
    side_figures,
)
from editkit.stats.build import build as build_moments
from editkit.stats.store import Moments
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.corpus import StatsConfig

log = logging.getLogger(__name__)
# A text on which scoring and generation are compared with the network itself.
SAMPLE = "The first railway between the two cities was opened in 1830, and it is still in use."


class Session:
    """One editor with its restraints on one model, for several edits in sequence.

    The session keeps what a sequence needs: contexts, second moments, and the history of D4S and
    AlphaEdit. Edits continue on the weights as they are. After `model.undo()` the session continues
    from the state before the edit.

    Args:
        model: from `editkit.load`.
        editor: a name of `conf/editor` ("rome", "memit", "ft", ...) or an editor object.
        recipe: the model whose numbers the editor uses ("gpt2-xl"); by default the model's own
            name. `editkit ls recipe` lists them.
        restraint: a name of `conf/restraint`, a restraint object, or several of them.
        options: further options by dotted key: `{"target.lr": 0.5, "layers": [5]}`. Options of a
            restraint begin with its name: `{"restraint.prune.alpha": 1.5}`.
        second_moments: the text whose keys the editor preserves: a text file, a folder of .txt
            files, "hub" (Wikipedia), "world" (of the bundled models, and their default) or a
            StatsConfig. Results are cached in `~/.cache/editkit`.
        seed: of everything that is drawn.
        probes: prompts with answers on which `measure` compares the model with the unedited one.
        canaries: prompts with answers that no edit may change. They are asked after every edit; an
            edit after which the most probable tokens at an answer differ from the unedited model's
            is taken back, and `EditResult.broken` names them.

    Raises:
        ConfigError: an argument is invalid, or second moments are needed and have no source.
    """

    def __init__(
        self,
        model: EditableModel,
        editor: str | AbstractAnyEditor[Any] = "rome",
        *,
        recipe: str | None = None,
        restraint: RestraintChoice | None = None,
        options: Mapping[str, object] | None = None,
        second_moments: str | Path | StatsConfig | None = None,
        seed: int = 0,
        probes: Sequence[Probe] = (),
        canaries: Sequence[Probe] = (),
    ) -> None:
        self._probes = require_probes("probes", probes)
        self._canaries = require_probes("canaries", canaries)
        method = choose_method(
            model.name,
            editor=editor,
            recipe=recipe,
            restraint=restraint,
            options=options,
            second_moments=second_moments,
        )
        self.model, self.editor, self.restraints = model, method.editor, method.restraints
        if isinstance(self.editor, AbstractEditor):
            require_none_beside(model)
        if lacking := self.editor.lacks():
            raise ConfigError([f"editor.{problem}" for problem in lacking])
        if self.editor.needs_moments and method.stats is None:
            raise ConfigError(
                message(
                    "second_moments",
                    f"{type(self.editor).__name__} needs second moments of keys",
                    got=None,
                    expected="a text file, a folder of .txt files or 'hub'",
                    fix='pass second_moments="path/to/text"; '
                    'ROME also works without, with options={"covariance": None}',
                )
            )
        self._is_checked = False  # whether the editor's shortcuts were compared
        with kept_generators(), unedited(model):
            _warn(check_reading(model, SAMPLE))
            self._frozen = greedy_answers(model, [*self._probes, *self._canaries])
            with keys_under("editor"):
                self.modules = self.editor.modules(model)
                self._contexts = self.editor.contexts(model, torch.Generator().manual_seed(seed))
            if isinstance(self.editor, AbstractEditor):
                model.edit(self.modules)
            spectra = {
                module: extreme_singular_values(model.weight(module)) for module in self.modules
            }
            self._base_sigma_max = {name: value.sigma_max for name, value in spectra.items()}
            for name, total in self.restraints.totals.items():
                if problems := total.check(self._base_sigma_max):
                    raise OptionError(problems).under(f"restraint.{name}")
            self._moments = Moments()
            if method.stats is not None:
                wanted = self.editor.moment_modules(model)
                self._moments = build_moments(model, wanted, method.stats)
            self._moments = self._moments.solved_in(method.solve_dtype)
            torch.manual_seed(seed)
            editor_state, solve_state = first_states(
                model, self.editor, self.restraints, self._moments
            )
            start = SessionState(
                mark=None,
                editor=editor_state,
                solve=solve_state,
                spectra=spectra,
                generators=generator_states(),
            )
        self._history = [start]
        self._ledger: SessionLedger | None = None

    def keep_ledger(self, folder: str | Path, *, author: str | None = None) -> None:
        """Keeps every edit from now on in a new folder, for `editkit ledger`, beside its author.

        Raises:
            ConfigError: the folder is not empty, the editor edits no weights, or the model has
                edits already.
        """
        self._current()
        self._ledger = begin_ledger(
            folder, self.model, self.editor, self.restraints, self.modules, author=author
        )

    @property
    def num_edits(self) -> int:
        """The number of batches of this session that are in the model."""
        self._current()
        return len(self._history) - 1

    def edit(
        self,
        requests: EditRequest | Sequence[EditRequest] | None = None,
        *,
        prompt: str | None = None,
        subject: str | None = None,
        target: str | None = None,
        pool: Sequence[EditRequest] = (),
        note: str | None = None,
    ) -> EditResult:
        """Edits one batch of requests in, or one fact given by prompt, subject and target.

        An edit whose numbers are not finite is taken back; `EditResult.nonfinite` names them.

        Args:
            prompt: with "{}" in the place of the subject: "The capital of {} is".
            target: bare text without a leading blank.
            pool: other requests, of which IKE's demonstrations are made, and T-Patcher's memories.
            note: written beside the edit in the ledger.

        Raises:
            ConfigError: a request is invalid, longer than the model's context length, one of too
                many, or does not reach the edited expert.
        """
        model, state = self.model, self._current()
        if requests is None:
            requests = request_of(prompt=prompt, subject=subject, target=target)
        elif any(text is not None for text in (prompt, subject, target)):
            problem = "requests were given, and prompt, subject or target too"
            raise ConfigError(message("requests", problem, fix="leave one of the two out"))
        batch = batch_of(requests, self.editor)
        asked = {request.full_prompt for request in batch}
        others = batch_of(pool, self.editor, is_edited=False) if pool else ()
        others = tuple(each for each in others if each.full_prompt not in asked)
        room = self.editor.context_tokens(model, batch, others)
        require_room(model, batch, self._contexts, [()] * len(batch), before=room)
        require_routed(model, self.editor, batch)
        if not self._is_checked:
            _warn(check_editing(model, self.editor, batch[0]))
            self._is_checked = True
        before = probabilities(model, batch)
        step = Step(
            model=model,
            requests=batch,
            contexts=self._contexts,
            state=state.editor,
            moments=self._moments,
            pool=others,
            objective=self.restraints.objective,
            others=tuple(side for side in model.sides if side not in state.sides),
        )
        clock, mark = Stopwatch(model.device), model.mark()
        try:
            with kept_generators():
                restore_generators(state.generators)
                applied = apply_batch(
                    step,
                    self.editor,
                    self.restraints,
                    base_sigma_max=self._base_sigma_max,
                    solve_state=state.solve,
                    clock=clock,
                )
                nonfinite = applied.nonfinite
                if nonfinite is None and (module := model.nonfinite_module()):
                    nonfinite = f"weight of {module}"
                if nonfinite is None:
                    editor_state, solve_state = next_states(
                        step, self.editor, self.restraints, applied, state.solve
                    )
                    with clock.phase("restrain"):
                        self._restrain()
                    generators = generator_states()
        except BaseException:
            model.undo()  # a part of the batch may be written
            raise
        broken: tuple[Probe, ...] = ()
        if nonfinite is None:
            with clock.phase("canaries"):
                broken = changed_probes(model, self._canaries, self._frozen)
        if nonfinite is not None or broken:
            model.undo()
            return EditResult(
                requests=batch,
                probability_before=before,
                probability_after=before,
                seconds=clock.seconds,
                nonfinite=nonfinite,
                broken=broken,
            )
        kept = None
        if self._ledger is not None:
            updates = {module: update for module, (update, _) in applied.updates.items()}
            try:
                kept = self._ledger.keep(batch, updates, restrained=self._due(), note=note)
            except BaseException:
                model.undo()  # what is not in the ledger is not in the model
                raise
        with clock.phase("telemetry"):
            spectra = state.spectra
            if applied.side is None:
                spectra = {
                    module: extreme_singular_values(model.weight(module), spectrum)
                    for module, spectrum in state.spectra.items()
                }
            telemetry = describe(model, spectra, applied.updates)
        self._history.append(
            SessionState(
                mark=mark,
                editor=editor_state,
                solve=solve_state,
                spectra=spectra,
                generators=generators,
                sides=applied.sides,
                requests=batch,
                kept=kept,
            )
        )
        return EditResult(
            requests=batch,
            updates={module: update for module, (update, _) in applied.updates.items()},
            telemetry=telemetry,
            side=side_figures(applied.sides),
            probability_before=before,
            probability_after=probabilities(model, batch),
            seconds=clock.seconds,
        )

    def undo(self) -> None:
        """Takes the last edit back: the weights have the bits from before it.

        Raises:
            ConfigError: no edit of this session is in the model, or others edited it since.
        """
        state = self._current()
        if state.mark is None or self.model.marks[-1] != state.mark:
            problem = "the last edit of the model is not one of this session"
            raise ConfigError(message("undo", problem, fix="use model.undo()"))
        self.model.undo()
        self._current()

    def measure(self) -> Measures:
        """Efficacy of this session's edits that are in the model, generalization on the paraphrases
        of their requests, locality on the session's probes, and the state of the edited matrices.
        """
        state = self._current()
        requests = [request for kept in self._history for request in kept.requests]
        telemetry = {} if state.sides else weight_figures(self.model, state.spectra)
        return measure(self.model, requests, self._probes, self._frozen, telemetry)

    def save(self, to: str | Path) -> None:
        """Writes the model as it is as a folder that transformers loads, and `editkit.load_edited`
        with what stands beside the weights. The folder appears whole or not at all.

        Raises:
            ConfigError: the folder exists and is not empty, or cannot be written.
        """
        self._current()
        edits = [
            [{"prompt": request.full_prompt, "target": request.target} for request in kept.requests]
            for kept in self._history[1:]
        ]
        editor = type(self.editor).__name__
        about = {"editor": editor, "edits": edits}
        card = session_card(self.model, editor=editor, num_edits=len(edits))
        save_model(self.model, Path(to), about=about, card=card)

    @contextlib.contextmanager
    def restrained(self, name: str | None = None) -> Iterator[None]:
        """Inside, the model is the restrained view of a restraint on the total, as a run measures
        it (PRUNE): W_0 + F(D). Afterwards it is as before.

        Args:
            name: which restraint; not needed if there is one.

        Raises:
            ConfigError: the session has no such restraint.
        """
        totals = self.restraints.totals
        if name is None and len(totals) == 1:
            name = next(iter(totals))
        if name is None or name not in totals:
            expected = (
                f"one of {', '.join(totals)}" if totals else "a session with such a restraint"
            )
            problem = "no such restraint on the total"
            raise ConfigError(message("restrained", problem, got=name, expected=expected))
        correction = corrections(totals[name], self._totals(), self._base_sigma_max)
        with self.model.temporarily(correction):
            yield

    def _current(self) -> SessionState:
        """The state after the last edit that was not undone."""
        marks = set(self.model.marks)
        while self._history[-1].mark is not None and self._history[-1].mark not in marks:
            undone = self._history.pop()
            if self._ledger is not None and undone.kept is not None:
                self._ledger.undone(undone.kept)
        return self._history[-1]

    def _totals(self) -> dict[str, Total]:
        return {module: self.model.total(module) for module in self.modules}

    def _due(self) -> tuple[str, ...]:
        """The restraints on the total that act after the edit that is being made."""
        number, totals = len(self._history), self.restraints.totals
        return tuple(name for name, restraint in totals.items() if restraint.is_due(number))

    def _restrain(self) -> None:
        """Writes the restrained totals into the model, where that is due."""
        for name in self._due():
            restraint = self.restraints.totals[name]
            restrain_totals(self.model, restraint, self._totals(), self._base_sigma_max)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        log.warning("%s", warning)
