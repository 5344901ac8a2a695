"""What a session's edits did so far: which took, and which prompts now have another answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.linalg.telemetry import l1_norm_of
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.linalg.spectral import Spectrum
    from editkit.model.editable import EditableModel

TOKENS_PER_BATCH = 4096
Greedy = dict[Probe, tuple[int, ...]]  # the most probable tokens at each probe's answer


@dataclass(frozen=True, kw_only=True, repr=False)
class Measures:
    """The edits of a session that are in the model, measured as the protocol `argmax` does: an
    answer counts if each of its tokens is the most probable one.

    Shares are in [0, 1]; None: there is nothing to measure.
    """

    efficacy: float | None  # of the edits
    generalization: float | None  # of their paraphrases
    locality: float | None  # of the probes: the most probable tokens are the unedited model's
    changed: tuple[Probe, ...]  # the probes that are not
    # By module: condition_number and l1_norm of the edited matrices.
    telemetry: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        shares = {
            "efficacy": self.efficacy,
            "generalization": self.generalization,
            "locality": self.locality,
        }
        parts = [
            f"{name} {100 * value:.1f} %" for name, value in shares.items() if value is not None
        ]
        lines = [f"Measures: {', '.join(parts) or 'nothing to measure'}"]
        lines += [f"  changed: {probe.prompt} -> {probe.answer}" for probe in self.changed]
        for module, figures in self.telemetry.items():
            named = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()]
            lines.append(f"  {module}: {', '.join(named)}")
        return "\n".join(lines)


def require_probes(key: str, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """The probes, each once.

    Raises:
        ConfigError: one is no Probe, or its prompt or answer is blank.
    """
    problems = [
        message(f"{key}[{number}]", "not a probe with a prompt and an answer", got=probe)
        for number, probe in enumerate(probes)
        if not isinstance(probe, Probe) or not probe.prompt.strip() or not probe.answer.strip()
    ]
    if problems:
        raise ConfigError(problems)
    return tuple(dict.fromkeys(probes))


def greedy_answers(model: EditableModel, probes: Sequence[Probe]) -> Greedy:
    """The most probable tokens at each probe's answer, under teacher forcing."""
    if not probes:
        return {}
    scores = score(model, probes, tokens_per_batch=TOKENS_PER_BATCH)
    return {probe: tuple(scores[probe].greedy) for probe in probes}


def changed_probes(
    model: EditableModel, probes: Sequence[Probe], frozen: Greedy
) -> tuple[Probe, ...]:
    """The probes whose most probable tokens are not those that were frozen."""
    now = greedy_answers(model, probes)
    return tuple(probe for probe in probes if now[probe] != frozen[probe])


def probabilities(model: EditableModel, requests: Sequence[EditRequest]) -> tuple[float, ...]:
    """The probability of each request's target, the geometric mean over its tokens."""
    probes = [request.probe() for request in requests]
    scores = score(model, probes, tokens_per_batch=TOKENS_PER_BATCH)
    return tuple(scores[probe].probability for probe in probes)


def weight_figures(
    model: EditableModel, spectra: Mapping[str, Spectrum]
) -> dict[str, dict[str, float]]:
    """The condition number and the L1 norm of each edited matrix."""
    return {
        module: {
            "condition_number": spectrum.condition_number,
            "l1_norm": l1_norm_of(model.weight(module)),
        }
        for module, spectrum in spectra.items()
    }


def measure(
    model: EditableModel,
    requests: Sequence[EditRequest],
    probes: Sequence[Probe],
    frozen: Greedy,
    telemetry: Mapping[str, Mapping[str, float]],
) -> Measures:
    """The measures of these requests and standing probes."""
    changed = changed_probes(model, probes, frozen)
    edits = [request.probe() for request in requests]
    paraphrases = [
        [request.probe(prompt=prompt) for prompt in request.paraphrases] for request in requests
    ]
    scores = (
        score(
            model,
            [*edits, *(probe for own in paraphrases for probe in own)],
            tokens_per_batch=TOKENS_PER_BATCH,
        )
        if edits
        else {}
    )
    return Measures(
        efficacy=_mean([float(scores[probe].is_greedy) for probe in edits]),
        generalization=_mean(
            [sum(scores[probe].is_greedy for probe in own) / len(own) for own in paraphrases if own]
        ),
        locality=1 - len(changed) / len(probes) if probes else None,
        changed=changed,
        telemetry=telemetry,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
