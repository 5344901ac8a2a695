"""A GPU computes what the CPU does: updates, second moments and scores in float32, the same bits
twice, and bfloat16 near float32.

Nothing of this has run where editkit was written, for want of a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.bench.edit import target_settings
from editkit.bench.shapes import model_shapes
from editkit.bench.synthetic import model_of, moments_for, requests_for
from editkit.config.schedule import Schedule
from editkit.editors.base import AbstractEditor
from editkit.editors.memit import Memit
from editkit.editors.rome import Rome
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.linalg.spectral import extreme_singular_values
from editkit.restraints.base import Restraints
from editkit.restraints.d4s import D4S
from editkit.runner.loop import begin
from editkit.runner.plan import Trajectory
from editkit.runner.step import take_step
from editkit.stats.collect import Collector
from tests.support.methods import step

pytestmark = pytest.mark.gpu
SHAPE = model_shapes()["tiny-gpt2"]
NUM_EDITS = 3


def editor(name: str) -> AbstractEditor:
    common: dict[str, Any] = {
        "name": name,
        "context_lengths": ((4, 2),),
        "target": target_settings(),
    }
    if name == "rome":
        return Rome(layers=(SHAPE.rome_layer,), keys="averaged", covariance=True, **common)
    return Memit(layers=SHAPE.memit_layers, covariance_weight=100.0, spread="recomputed", **common)


def edited(name: str, device: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The totals after some edits, on the CPU. The contexts are the CPU's: sampling draws from
    other kernels.
    """
    model, method = model_of(SHAPE, "tiny", device=device, dtype=dtype), editor(name)
    job = Trajectory(
        model=model,
        editor=method,
        restraints=Restraints(solve=D4S() if name == "d4s" else None),
        requests=requests_for(SHAPE, NUM_EDITS),
        evaluators={},
        schedule=Schedule(
            edits=NUM_EDITS,
            batch_size=1,
            milestones=(),
            telemetry_every=1,
            checkpoint_every=NUM_EDITS,
        ),
        moments=moments_for(model, method.modules(model)),
        seed=0,
    )
    model.edit(method.modules(model))
    state = begin(job)
    object.__setattr__(state, "contexts", ("{}", "Then bada kefe. {}", "Mugo. {}"))
    for number in range(1, NUM_EDITS + 1):
        record, state = take_step(job, number, state)
        assert record.nonfinite is None
    return {module: total.dense().cpu() for module, total in model.totals().items()}


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).norm() / second[name].norm()) for name in second)


@pytest.mark.parametrize("name", ["rome", "memit", "d4s"])
def test_edits_are_those_of_the_cpu_in_float32(name: str, device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert distance(edited(name, device), edited(name, "cpu")) < 1e-2


@pytest.mark.parametrize("name", ["rome", "memit", "d4s"])
def test_the_same_run_gives_the_same_bits_twice(name: str, device: str) -> None:
    first, second = edited(name, device), edited(name, device)
    assert all(torch.equal(first[module], second[module]) for module in first)


def test_bfloat16_edits_stay_near_those_in_float32(device: str) -> None:
    assert distance(edited("rome", device, "bfloat16"), edited("rome", device)) < 0.5


def test_second_moments_scores_and_spectra_are_those_of_the_cpu(device: str) -> None:
    texts = ["bada kefe mugo", "kefe tada bida loma rana"] * 20
    found = []
    for place in ("cpu", device):
        model = model_of(SHAPE, "tiny", device=place, dtype="float32")
        modules = model.down_projections([1, 2])
        collector = Collector(model, modules, context_length=32, batch_tokens=256)
        total = collector.empty()
        collector.add_block(total, texts)
        moments = [total.sums[module].dense().cpu() for module in modules]
        probes = [probe for request in requests_for(SHAPE, 3) for probe in request.neighbours]
        scores = [
            each.mean_log_prob for each in score(model, probes, tokens_per_batch=512).values()
        ]
        found.append(
            (moments, scores, extreme_singular_values(model.weight(modules[0]), None).sigma_max)
        )
    (moments, scores, sigma), (on_gpu, gpu_scores, gpu_sigma) = found
    for mine, theirs in zip(moments, on_gpu, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4)
    assert gpu_scores == pytest.approx(scores, abs=1e-3) and gpu_sigma == pytest.approx(
        sigma, rel=1e-4
    )


def test_w0_on_the_cpu_changes_no_bit(device: str) -> None:
    found = []
    for base in (None, "cpu"):
        model = model_of(SHAPE, "tiny", device=device, dtype="bfloat16")
        (module,) = model.down_projections([1])
        model.edit([module], base_device=base)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            model.apply(module, 1e-3 * torch.randn(model.weight(module).shape, generator=generator))
        found.append(model.weight(module).cpu())
    assert torch.equal(*found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_model_over_two_gpus_edits_like_one_on_one(device: str) -> None:
    from accelerate import dispatch_model

    from editkit.model.editable import EditableModel
    from editkit.model.families import family_of

    whole = model_of(SHAPE, "tiny", device=device, dtype="float32")
    split = model_of(SHAPE, "tiny", device="cpu", dtype="float32")
    family = family_of("gpt2")
    places: dict[str, int | str] = {
        f"transformer.h.{layer}": int(layer >= 3) for layer in range(SHAPE.num_layers)
    }
    places |= {
        "transformer.wte": 0,
        "transformer.wpe": 0,
        "transformer.drop": 0,
        "transformer.ln_f": 1,
        "lm_head": 0,
    }
    network = dispatch_model(split.network, device_map=places)
    parted = EditableModel(network, split.tokenizer, name="split", family=family)
    request = requests_for(SHAPE, 1)[0]
    method = editor("rome")
    plans = [method.plan(step(model, [request], ("{}", "Mugo. {}"))) for model in (whole, parted)]
    torch.testing.assert_close(
        plans[1].target.vector_O.cpu(), plans[0].target.vector_O.cpu(), rtol=1e-3, atol=1e-4
    )  # type: ignore[attr-defined]
