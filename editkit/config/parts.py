"""The parts of a composed configuration, constructed one by one while problems are collected.

There is no registry: the `_target_` of a node names its class, and the fields of that class are its
options. torch is not needed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from editkit.config.compose import plain
from editkit.config.experiment import Measuring, Settings
from editkit.config.identity import TARGET
from editkit.config.loads import Loads
from editkit.config.schema import Problems, construct, resolve, unknown_option
from editkit.datasets.base import AbstractDataset, LoadedDataset, loaded, without_subjects
from editkit.datasets.groups import without_split_groups
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError, OptionError, message
from editkit.evaluation.base import AbstractEvaluator
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.base import SHIPPED, AbstractProtocol, unknown_protocols
from editkit.model.load import ModelConfig
from editkit.records.tracker import AbstractTracker
from editkit.resources.runtime import Runtime
from editkit.restraints.base import AbstractRestraint, Restraints, conflicts, unsupported
from editkit.stats.corpus import StatsConfig

T = TypeVar("T")

# The class of every node at the root. `restraint` maps names to nodes. `recipe` documents the
# source of the numbers and is not constructed.
PARTS: dict[str, type] = {
    "model": ModelConfig,
    "editor": AbstractAnyEditor,
    "restraint": AbstractRestraint,
    "dataset": AbstractDataset,
    "suite": AbstractEvaluator,
    "tracker": AbstractTracker,
    "stats": StatsConfig,
    "runtime": Runtime,
}
EVALUATION, RECIPE, KNOWN_ONLY = "evaluation", "recipe", "known_only"
UNNEEDED = "unneeded"  # a subject, to some editors


class Parts:
    """A resolved configuration and the problems of its parts.

    Args:
        config: an OmegaConf configuration or plain values; not modified.
        choices: the chosen option by group, for messages only.
        loads: datasets and suites that other configurations have read.
    """

    def __init__(
        self,
        config: Any,
        choices: Mapping[str, Any] | None = None,
        loads: Loads | None = None,
    ) -> None:
        self.config: dict[str, Any] = {"restraint": {}} | plain(config)
        self.problems = Problems()
        self.loads = loads or Loads()
        self._choices = choices or {}

    def one(self, key: str, expected: type[T]) -> T | None:
        """The object at a root key."""
        return construct(self.config.get(key), key, expected, self.problems)

    def settings(self) -> Settings | None:
        """The values at the root. Unknown keys at the root are reported here."""
        fields = Settings.__dataclass_fields__
        names = {*fields, *PARTS, EVALUATION, RECIPE}
        for key in self.config.keys() - names:
            self.problems.add(unknown_option(key, "the configuration", names))
        known = {key: value for key, value in self.config.items() if key in fields}
        settings = construct(known, "", Settings, self.problems)
        if settings is not None:
            self.problems.add_all(settings.problems())
        return settings

    def evaluation(self) -> tuple[EditingEvaluator | None, Measuring | None]:
        """The evaluator of edits with the protocols of the user's own, and the runner's options.

        A node below `evaluation` that names a class and is no option of the evaluator is a
        protocol.
        """
        node = self.config.get(EVALUATION)
        if not isinstance(node, Mapping):
            return construct(node, EVALUATION, EditingEvaluator, self.problems), None
        plan = {name: node[name] for name in Measuring.__dataclass_fields__ if name in node}
        own_nodes = {
            name: value
            for name, value in node.items()
            if name not in EditingEvaluator.__dataclass_fields__
            and isinstance(value, Mapping)
            and TARGET in value
        }
        constructed = {
            name: construct(value, f"{EVALUATION}.{name}", AbstractProtocol, self.problems)
            for name, value in own_nodes.items()
        }
        own = tuple(protocol for protocol in constructed.values() if protocol is not None)
        for name, protocol in constructed.items():
            if protocol is not None and protocol.name != name:
                key, problem = f"{EVALUATION}.{name}", "the protocol has another name"
                self.problems.add(message(key, problem, got=protocol.name, expected=name))
        rest = {name: value for name, value in node.items() if name not in plan | own_nodes}
        if "own" in rest:  # a field of values, not an option
            options = {*EditingEvaluator.__dataclass_fields__, *Measuring.__dataclass_fields__}
            owner = EditingEvaluator.__name__
            self.problems.add(unknown_option(f"{EVALUATION}.own", owner, options - {"own"}))
            del rest["own"]
        names = rest.get("protocols")
        if isinstance(names, list):
            unknown = unknown_protocols(names, own)
            self.problems.add_all(f"{EVALUATION}.{problem}" for problem in unknown)
            # The user's own protocols are added below, as objects.
            rest["protocols"] = [name for name in names if name in SHIPPED]
        evaluator = construct(rest, EVALUATION, EditingEvaluator, self.problems)
        if evaluator is not None and own:
            try:
                evaluator = replace(evaluator, protocols=tuple(names or ()), own=own)
            except OptionError as error:
                self.problems.add_all(error.under(EVALUATION).problems)
        return evaluator, construct(plan, EVALUATION, Measuring, self.problems)

    def editor_class(self) -> type[AbstractAnyEditor[Any]] | None:
        """The class of the editor, which states its limits even if an option is invalid."""
        node = self.config.get("editor")
        if not (isinstance(node, Mapping) and TARGET in node):
            return None
        editor = resolve(node[TARGET], "editor", AbstractAnyEditor, self.problems)
        return None if editor is None or inspect.isabstract(editor) else editor

    def restraints(self) -> Restraints | None:
        """The restraints by place. A restraint that the editor does not support is a problem."""
        nodes = self.config["restraint"]
        if TARGET in nodes:
            self.problems.add(
                message(
                    "restraint",
                    "the values of a restraint are not under its name, so restraints cannot stack",
                    expected=f"restraint.<name>.{TARGET}",
                    fix="move the values under the name of the restraint in its file",
                )
            )
            return None
        chosen = {
            name: node
            for name, node in nodes.items()
            if not isinstance(node, Mapping) or TARGET in node
        }
        for name in nodes.keys() - chosen.keys():
            stack = ",".join([*chosen, name])
            problem = "a value is set, but the restraint is not chosen"
            fix = f"choose it with restraint=[{stack}]"
            self.problems.add(message(f"restraint.{name}", problem, fix=fix))
        constructed = {
            name: construct(node, f"restraint.{name}", AbstractRestraint, self.problems)
            for name, node in chosen.items()
        }
        restraints = {name: part for name, part in constructed.items() if part is not None}
        if editor := self.editor_class():
            name = f"editor={self.name_of('editor')}"
            self.problems.add_all(unsupported(restraints, editor.places, editor=name))
        self.problems.add_all(conflicts(restraints))
        return Restraints.by_place(restraints)

    def load(
        self, dataset: AbstractDataset | None, settings: Settings | None
    ) -> LoadedDataset | None:
        """The edit requests. A dataset that cannot be read or is too small is a problem. With
        `known_only`, the runner selects from them and leaves out questions about split groups.
        """
        if dataset is None or settings is None:
            return None
        kind = self.editor_class()
        if kind is not None and not kind.needs_subject:
            dataset = without_subjects(dataset)
        elif getattr(dataset, "subject", None) == UNNEEDED:
            problem = f"editor={self.name_of('editor')} edits at the subject"
            expected = "required or last_token"
            self.problems.add(message("dataset.subject", problem, got=UNNEEDED, expected=expected))
        try:
            lacks = getattr(dataset, "subject", None)
            key = ["dataset", self.config["dataset"], lacks, settings.seed]
            data = self.loads.get(key, lambda: loaded(dataset, settings.seed))
        except ConfigError as error:
            self.problems.add_all(error.problems)
            return None
        if settings.edits > (available := len(data.requests)):
            problem = f"dataset={self.name_of('dataset')} has {available} requests"
            expected = f"at most {available}"
            self.problems.add(message("edits", problem, got=settings.edits, expected=expected))
        if dataset.known_only:
            return replace(data, known_only=True, variant={**data.variant, KNOWN_ONLY: "true"})
        if settings.rollback:
            return without_split_groups(data, batch_size=settings.batch_size)
        return data

    def name_of(self, group: str) -> str:
        """The name of an option: as it was chosen, or as its node states it."""
        node = self.config.get(group) or {}
        return str(
            self._choices.get(group)
            or node.get("name")
            or node.get(TARGET, "?").rpartition(".")[2].lower()
        )

    def finish(self) -> None:
        """Ends the collection of problems.

        Raises:
            ConfigError: with all problems, if there are any.
        """
        unset = self.problems.unset
        numbers = [key for key in unset if key.startswith("editor.")]
        missing = []
        if numbers and RECIPE not in self.config:
            unset = [key for key in unset if key not in numbers]
            missing.append(self._missing_recipe(numbers))
        missing += [
            message(key, "mandatory value is not set", fix=f"set {key}=<value>") for key in unset
        ]
        if problems := missing + self.problems.messages:
            raise ConfigError(problems)

    def _missing_recipe(self, keys: Iterable[str]) -> str:
        editor, model = self.name_of("editor"), self.name_of("model")
        chosen = self._choices.get(RECIPE)
        wanted = f"for editor={editor}, model={model}"
        if chosen and chosen != f"{editor}/{model}":
            wanted = str(chosen)
        return message(
            RECIPE,
            f"no recipe {wanted}",
            fix=f"set {', '.join(keys)}, or use the numbers of another model with "
            "recipe=<editor>/<model>",
        )
