"""SERAC: edits are kept as texts, and another model answers in their scope (Mitchell et al. 2022,
arXiv 2206.06520).

    p(x) = counterfactual(z, x)    if the classifier says that x is in the scope of an edit z
           the unedited model(x)   otherwise

The weights stay as they are. `editkit train editor=serac` trains the classifier's head and the
counterfactual model (section 3.2, `editkit.training.serac`); `pair` is their file. With
`pair=untrained` the classifier is a cosine, and the counterfactual model is as it was loaded.

The counterfactual model reads the edit as a text, then the prompt and the answer so far. It has the
tokenizer of the edited model. The published classifier is DistilBERT's first state with the
similarity exp(-s |e_q - e_c|^2); here the features are a sentence encoder's, or the mean of the
counterfactual model's input embeddings.

Routing is hard by default, in generation and in scoring alike. The published code mixes logits
softly where it scores, and routes hard where it generates; `mixture=soft` mixes the two
distributions in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.datasets.separators import joined
from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.ft import log_probabilities
from editkit.editors.scoped_memory import (
    EMBEDDINGS,
    NETWORK,
    Edit,
    Mixture,
    ScopedMemory,
    copy_of,
    edits_of,
    mean_embeddings,
    network_of,
)
from editkit.editors.text_memory import put
from editkit.editors.trained import (
    changed_problem,
    header_problems,
    model_problems,
    request_problems,
    trained_provenance,
)
from editkit.errors import ConfigError, OptionError, message
from editkit.files import file_digest
from editkit.hypernet.store import PAIR, read_header, read_tensors, resolve
from editkit.lazy import torch
from editkit.model.load import ModelConfig
from editkit.model.retrieval import BM25, Retriever
from editkit.model.stand_in import Ids
from editkit.model.standing import standing
from editkit.model.tokens import PLACE, encode, encode_prompts
from editkit.resources.workload import REQUEST, EditorMemory, TrainingMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside
    from editkit.stats.store import Moments

TEXT_BYTES = 300  # of an edit: its texts and tokens
UNTRAINED = "untrained"  # in place of a file
MISSING = message(
    "pair",
    "not set, and SERAC needs a trained one",
    fix="train one with `editkit train editor=serac model=... dataset=...`, which prints its "
    f"folder, or set pair={UNTRAINED}",
)
HEAD = "head"  # the name of the classifier's head in a pair's file


@dataclass(frozen=True, kw_only=True)
class ScopeOptions:
    """The options for training the pair: `editor.train` in the configuration.

    Raises:
        OptionError: an option is out of range.
    """

    width: int  # of the head
    head_scale: float  # of its first entries
    steps: int
    lr: float  # of the counterfactual model
    lr_head: float
    edit_weight: float
    locality_weight: float  # of the classifier's loss
    accumulate: int  # edits of a step
    clip: float
    validate_every: int
    patience: int
    validation: int
    held_apart: int
    locality_texts: int

    def __post_init__(self) -> None:
        least = dict.fromkeys(AT_LEAST_ONE, 1) | {"held_apart": 0}
        problems = [
            message(name, "out of range", got=getattr(self, name), expected=f"at least {limit}")
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        problems += [
            message(name, "must be positive and finite", got=getattr(self, name))
            for name in ("head_scale", "lr", "lr_head", "edit_weight", "locality_weight", "clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        if problems:
            raise OptionError(problems)


AT_LEAST_ONE = (
    *("width", "steps", "accumulate", "validate_every", "patience", "validation"),
    "locality_texts",
)


@dataclass(frozen=True, kw_only=True)
class SeracPlan(Plan):
    """The memory with the batch's edits."""

    memory: ScopedMemory


@dataclass(frozen=True, kw_only=True)
class Serac(AbstractSideEditor[SeracPlan]):
    """A scope classifier and a counterfactual model. The options are documented in
    `conf/editor/serac.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    pair: str | None
    counterfactual: str | None
    encoder: str
    threshold: float
    cosine: float
    mixture: Mixture
    fact: str
    train: ScopeOptions
    # The two models by the file's digest, the edited model's fingerprint and the device: every edit
    # needs them.
    _loaded: dict[tuple[str, str, str], tuple[Any, torch.Tensor]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        problems = [
            message(name, "not finite", got=getattr(self, name), expected="a number")
            for name in ("threshold", "cosine")
            if not math.isfinite(getattr(self, name))
        ]
        if self.fact.count(PLACE) != 1:
            expected = f"exactly one {PLACE}"
            problems.append(
                message("fact", "the text is malformed", got=self.fact, expected=expected)
            )
        if self.encoder == BM25:
            problem, fix = "bm25 has no embedding", f"set encoder={EMBEDDINGS}"
            problems.append(message("encoder", problem, got=self.encoder, fix=fix))
        if problems:
            raise OptionError(problems)

    def lacks(self) -> list[str]:
        """A sentence encoder, and a file that can be read."""
        problems: list[str] = []
        if self.encoder != EMBEDDINGS:
            found = Retriever(name=self.encoder).problems()
            problems += [f"encoder{problem.removeprefix('retriever')}" for problem in found]
        if self.pair is None:
            problems.append(MISSING)
        elif self._file is not None:
            problems += header_problems(self._file, PAIR)
        return problems

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """Refuses a damaged pair, and one that was trained on some of these requests."""
        if (lacking := self.lacks()) or self._file is None:
            return lacking
        return request_problems(self._file, PAIR, data, requests)

    def provenance(self) -> Mapping[str, object]:
        return trained_provenance(self._file, PAIR)

    @property
    def _file(self) -> str | None:
        """The pair's file; None without one."""
        return None if self.pair == UNTRAINED else self.pair

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """None: it stands at the head."""
        return ()

    def memory(self, work: Workload) -> EditorMemory:
        return EditorMemory(
            working=work.forward(2 * REQUEST, 2 * REQUEST) + work.logits(REQUEST),
            # A counterfactual model of the edited model's size, unless a smaller one is named.
            beside=work.weight_bytes * work.architecture.num_parameters
            + work.edits * (TEXT_BYTES + 4.0 * work.architecture.width),
            columns_per_edit=0,
        )

    def training_memory(self, work: Workload, *, is_gpu: bool, reading: float) -> TrainingMemory:
        """What `editkit train` takes: the counterfactual model in float32 with its gradient and
        Adam's moments; its copies for a checkpoint and of the best one.
        """
        network, tokens = (
            4.0 * work.architecture.num_parameters,
            2 * REQUEST * self.train.accumulate,
        )
        gradient = work.kept(2 * tokens, work.architecture.num_layers) + work.logits(tokens)
        return TrainingMemory(
            kept=4 * network,
            on_host=network,
            copied=4 * network,
            phases={"training": gradient},
            saving={"training": "a lower editor.train.accumulate"},
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No edits.

        Raises:
            ConfigError: the counterfactual model has another tokenizer, or logits are more than the
                head's product, or prompts are put by a chat template.
            OptionError: the pair belongs to another model, or was trained with other options.
        """
        if self.pair is None:
            raise OptionError(MISSING)
        self.require(model)
        digest = torch.tensor(list(bytes.fromhex(self._digest())), dtype=torch.uint8)
        return {"pair": digest, **self._empty(model, self._digest()).memory_state()}

    def require(self, model: EditableModel) -> None:
        """Raises ConfigError for a model at whose head nothing can stand, or with a chat
        template.
        """
        problems = []
        if not model.head_is_matrix:
            problem = f"the logits of {model.name} are more than its head's product"
            expected = "a model whose logits are neither capped nor scaled"
            problems.append(message("editor", problem, got="serac", expected=expected))
        if model.chat is not None:
            problem = "the counterfactual model reads prompts as they are"
            got, expected = model.chat.label, "null"
            problems.append(message("model.chat_template", problem, got=got, expected=expected))
        if problems:
            raise ConfigError(problems)

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractBeside, ...]:
        return (self._memory(model, state),)

    def plan(self, step: Step) -> SeracPlan:
        """Nothing is searched: the probabilities are those without and with the batch's edits.

        Raises:
            ConfigError: an edit and its prompt exceed the counterfactual model's context length.
        """
        model = step.model
        before = self._memory(model, step.state)
        new = [self._edit(model, request) for request in step.requests]
        prompts = encode_prompts(model.tokenizer, [edit.prompt for edit in new])
        self._require_room(before, step.requests, new, prompts)
        after = before.with_edits(new, before.features(prompts, model.tokenizer))
        others = [side for side in model.sides if not isinstance(side, ScopedMemory)]
        run, found = log_probabilities(model, step.requests, "target"), list[float]()
        for memory in (before, after):
            with torch.no_grad(), standing(model, [*others, memory]):
                found.append(float(run().exp().mean()))
        return SeracPlan(
            summary={"probability_before": found[0], "probability_after": found[1]},
            nonfinite=None if math.isfinite(found[1]) else "probability",
            memory=after,
        )

    def propose(self, step: Step, plan: SeracPlan) -> TensorState:
        return {"pair": step.state["pair"], **plan.memory.memory_state()}

    def _edit(self, model: EditableModel, request: EditRequest) -> Edit:
        fact = joined(request.probe())
        return Edit(prompt=request.full_prompt, fact=fact, before=self.read(model, fact))

    def read(self, model: EditableModel, fact: str) -> Ids:
        """The tokens of an edit, as the counterfactual model reads them."""
        [encoded] = encode(model.tokenizer, [put(self.fact, fact)])
        return encoded.ids

    def _require_room(
        self,
        memory: ScopedMemory,
        requests: Sequence[EditRequest],
        new: Sequence[Edit],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        problems = [
            message(
                request.id,
                "the edit and its prompt exceed the counterfactual model's context length",
                got=f"{2 * len(edit.before) + len(ids)} tokens",
                expected=f"at most {memory.max_length}",
            )
            for request, edit, ids in zip(requests, new, prompts, strict=True)
            # a prompt, and an answer that the fact contains
            if 2 * len(edit.before) + len(ids) > memory.max_length
        ]
        if problems:
            raise ConfigError(problems)

    def _memory(self, model: EditableModel, state: TensorState) -> ScopedMemory:
        empty = self._empty(model, bytes(state["pair"].tolist()).hex())
        return empty.with_edits(edits_of(state), state["keys"].to(empty.keys_NF))

    def _empty(self, model: EditableModel, digest: str) -> ScopedMemory:
        network, head_WF = self._models(model, digest)
        if self.encoder == EMBEDDINGS:
            width = mean_embeddings(network, [(0,)]).shape[1]
        else:
            width = Retriever(name=self.encoder).embed(["."]).shape[1]
        return ScopedMemory(
            network=network,
            encoder=self.encoder,
            threshold=self.cosine if self._file is None else self.threshold,
            mixture=self.mixture,
            head_WF=head_WF,
            edits=(),
            keys_NF=torch.zeros(0, width, device=model.device),
        )

    def _digest(self) -> str:
        """Of the pair's file; empty without one."""
        if self._file is None:
            return ""
        read_header(self._file, PAIR)  # reports what is wrong with the file
        return file_digest(resolve(self._file, PAIR))

    def _models(self, model: EditableModel, digest: str) -> tuple[Any, torch.Tensor]:
        """The counterfactual model and the classifier's head, of the file with this digest."""
        key = (digest, model.fingerprint, str(model.device))
        if key not in self._loaded:
            self._loaded.clear()
            self._loaded[key] = self._pair(model, digest)
        return self._loaded[key]

    def _pair(self, model: EditableModel, digest: str) -> tuple[Any, torch.Tensor]:
        if (file := self._file) is None:
            none = torch.zeros(0, 0, device=model.device)
            return counterfactual_of(model, self.counterfactual), none
        if (now := self._digest()) != digest:
            raise OptionError(changed_problem(file, PAIR, now=now, then=digest))
        header, tensors = read_header(file, PAIR), read_tensors(file, PAIR)
        problems = model_problems(file, PAIR, header, model)
        problems += [
            message(
                name,
                f"{file} was trained with another one",
                got=getattr(self, name),
                expected=repr(header.network[name]),
            )
            for name in ("encoder", "fact")
            if getattr(self, name) != header.network[name]
        ]
        if problems:
            raise OptionError(problems)
        own = {
            name.removeprefix(NETWORK): tensor.to(model.device, model.dtype)
            for name, tensor in tensors.items()
            if name.startswith(NETWORK)
        }
        return network_of(header.network["config"], own), tensors[HEAD].to(model.device)


def counterfactual_of(model: EditableModel, name: str | None) -> Any:
    """The network of that name in the model's dtype and on its device; None: a copy of the model.

    Raises:
        ConfigError: it cannot be loaded, or has another tokenizer.
    """
    if name is None:
        return copy_of(model.network)
    dtype: Any = str(model.dtype).removeprefix("torch.")
    other = ModelConfig(id=name, dtype=dtype).load(str(model.device))
    if other.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        problem = "the counterfactual model has another tokenizer than the edited one"
        expected = f"a model with the tokenizer of {model.name}"
        raise ConfigError(message("editor.counterfactual", problem, got=name, expected=expected))
    return other.network
