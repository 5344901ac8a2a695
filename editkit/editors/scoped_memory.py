"""SERAC's memory: edits as texts, a classifier of their scope, and the model that answers in it.

A prompt's features are compared with those of the edits' prompts; the most similar edit is the one
in whose scope the prompt may be.

    features     the mean of the counterfactual model's input embeddings over the prompt's tokens,
                 or a sentence encoder's embedding; of length 1
    similarity   exp(-|A f_q - A f_c|^2) with a trained head A; else the cosine

Shape letters: N edits, P prompts, F width of the features, W width of the head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from editkit.editors.text_memory import packed, unpacked
from editkit.lazy import torch
from editkit.model.kinds import auto_class
from editkit.model.retrieval import Retriever
from editkit.model.stand_in import AbstractStandIn, Answered, Ids
from editkit.types import TensorState

Mixture = Literal["hard", "soft"]
EMBEDDINGS = "embeddings"  # the encoder that is the counterfactual model's own
NETWORK = "network."  # before the names of its tensors
LEAST_SHARE = 1e-6  # of a soft mixture; below, a prompt is left alone


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit as texts and tokens."""

    prompt: str  # by which it is found
    fact: str
    before: Ids  # the fact's tokens, as the counterfactual model reads them


@dataclass(frozen=True, eq=False, kw_only=True)
class ScopedMemory(AbstractStandIn):
    """Some edits, the oldest first."""

    network: Any
    encoder: str
    threshold: float
    mixture: Mixture
    head_WF: torch.Tensor  # (0, 0): the cosine
    edits: tuple[Edit, ...]
    keys_NF: torch.Tensor

    def answers(self, prompts: Sequence[Ids], tokenizer: Any) -> list[Answered | None]:
        """Hard: the counterfactual model alone, where the similarity reaches the threshold. Soft:
        as large a share as the similarity, of the most similar edit.
        """
        if not self.edits or not prompts:
            return [None] * len(prompts)
        features_PF = self.features(prompts, tokenizer)
        shares_P, edits_P = self.similarities(features_PF).max(dim=1)
        found: list[Answered | None] = []
        for share, edit in zip(shares_P.tolist(), edits_P.tolist(), strict=True):
            is_hard = self.mixture == "hard"
            is_own = share >= (self.threshold if is_hard else LEAST_SHARE)
            size = 1.0 if is_hard else min(share, 1.0)
            found.append(Answered(self.edits[edit].before, size) if is_own else None)
        return found

    def features(self, prompts: Sequence[Ids], tokenizer: Any) -> torch.Tensor:
        """(P, F) float32, of length 1."""
        if self.encoder != EMBEDDINGS:
            texts = [
                tokenizer.decode(
                    list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                for ids in prompts
            ]
            return self._retriever.embed(texts).to(self.keys_NF)
        return mean_embeddings(self.network, prompts)

    def similarities(self, features_PF: torch.Tensor) -> torch.Tensor:
        """(P, N)."""
        return similarities(features_PF.to(self.keys_NF), self.keys_NF, self.head_WF)

    def with_edits(self, new: Sequence[Edit], features_NF: torch.Tensor) -> ScopedMemory:
        """The memory with further edits. A later edit of the same prompt takes the place of an
        earlier one.
        """
        latest = {edit.prompt: place for place, edit in enumerate(new)}
        kept = [place for place, edit in enumerate(self.edits) if edit.prompt not in latest]
        places = list(latest.values())
        return replace(
            self,
            edits=(*(self.edits[place] for place in kept), *(new[place] for place in places)),
            keys_NF=torch.cat([self.keys_NF[kept], features_NF[places].to(self.keys_NF)]),
        )

    @cached_property
    def _retriever(self) -> Retriever:
        return Retriever(name=self.encoder)

    # As a value

    def options(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder,
            "threshold": self.threshold,
            "mixture": self.mixture,
            "network": json.loads(self.network.config.to_json_string(use_diff=False)),
        }

    def memory_state(self) -> TensorState:
        """What edits change."""
        columns = {
            "prompt": packed([edit.prompt for edit in self.edits]),
            "fact": packed([edit.fact for edit in self.edits]),
        }
        tensors = {
            f"{name}_{part}": value
            for name, parts in columns.items()
            for part, value in parts.items()
        }
        lengths = torch.tensor([len(edit.before) for edit in self.edits], dtype=torch.int64)
        tokens = [token for edit in self.edits for token in edit.before]
        before = {
            "before_ids": torch.tensor(tokens, dtype=torch.int64),
            "before_ends": lengths.cumsum(0),
        }
        return {**tensors, **before, "keys": self.keys_NF}

    def state(self) -> TensorState:
        network = {
            f"{NETWORK}{name}": tensor.detach() for name, tensor in self.network.named_parameters()
        }
        return {**self.memory_state(), "head": self.head_WF, **network}

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        tensors = {
            name.removeprefix(NETWORK): tensor
            for name, tensor in state.items()
            if name.startswith(NETWORK)
        }
        return cls(
            network=network_of(options["network"], tensors),
            encoder=options["encoder"],
            threshold=options["threshold"],
            mixture=options["mixture"],
            head_WF=state["head"],
            edits=edits_of(state),
            keys_NF=state["keys"],
        )

    def figures(self) -> dict[str, float]:
        sizes = [tensor.numel() for tensor in self.network.parameters()]
        return {
            "entries": float(len(self.edits)),
            "parameters": float(sum(sizes) + self.head_WF.numel()),
            "bytes": float(sum(tensor.nbytes for tensor in self.state().values())),
            "norm": float(self.keys_NF.double().norm()),
        }


def mean_embeddings(network: Any, prompts: Sequence[Ids]) -> torch.Tensor:
    """(P, F) float32 of length 1: the mean input embedding of each prompt's tokens."""
    embeddings_VF = network.get_input_embeddings().weight
    means_PF = torch.stack(
        [embeddings_VF[torch.tensor(ids)].detach().float().mean(0) for ids in prompts]
    )
    return torch.nn.functional.normalize(means_PF, dim=1)


def similarities(
    features_PF: torch.Tensor, keys_NF: torch.Tensor, head_WF: torch.Tensor
) -> torch.Tensor:
    """(P, N): exp(-|A f - A k|^2), or the cosine without a head. Gradients flow."""
    if not head_WF.numel():
        return features_PF @ keys_NF.T
    return (-distances(features_PF, keys_NF, head_WF)).exp()


def distances(
    features_PF: torch.Tensor, keys_NF: torch.Tensor, head_WF: torch.Tensor
) -> torch.Tensor:
    """(P, N): |A f - A k|^2. Gradients flow."""
    return ((features_PF[:, None] - keys_NF) @ head_WF.T).square().sum(-1)


def edits_of(state: TensorState) -> tuple[Edit, ...]:
    """The edits of a memory's tensors."""
    texts = [unpacked(state[f"{name}_bytes"], state[f"{name}_ends"]) for name in ("prompt", "fact")]
    ids, ends = state["before_ids"].tolist(), state["before_ends"].tolist()
    read_first = [tuple(ids[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=False)]
    return tuple(
        Edit(prompt=prompt, fact=fact, before=before)
        for prompt, fact, before in zip(*texts, read_first, strict=True)
    )


def network_of(config: Mapping[str, Any], tensors: TensorState) -> Any:
    """A causal language model of this configuration with these tensors, in their dtype and on their
    device, ready to read. The states of the global random generators do not change.
    """
    from transformers import AutoConfig

    facts = {key: value for key, value in config.items() if key != "model_type"}
    built = AutoConfig.for_model(config["model_type"], **facts)
    one = next(iter(tensors.values()))
    with torch.random.fork_rng(devices=[]):
        network = auto_class(built).from_config(built, dtype=one.dtype)
    _missing, unknown = network.load_state_dict(dict(tensors), strict=False)
    if unknown:
        raise KeyError(unknown[0])
    network.tie_weights()
    return network.to(one.device).eval().requires_grad_(False)


def copy_of(network: Any) -> Any:
    """The same model once more, without its hooks."""
    config = json.loads(network.config.to_json_string(use_diff=False))
    return network_of(config, {name: each.detach() for name, each in network.named_parameters()})
