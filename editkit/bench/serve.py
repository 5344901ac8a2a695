"""Queries of a model with something beside its weights, against the same model without it.

Texts before a prompt cost tokens with every query; they are counted, too.

Every query is one prompt of CounterFact's length, short, so that what is added weighs most. Its
prefill and its cached generation are timed in turn: unedited, and with each editor's sides, for the
prompt of an edit and for one that the sides leave alone. GRACE's codebook has 10,000 entries.

Shape letters: N entries, I and O input and output width of a module.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from editkit.bench.base import (
    Comparison,
    Cost,
    Options,
    PairedTiming,
    Side,
    relative_difference,
    timed,
)
from editkit.bench.synthetic import model_of, requests_for
from editkit.config.compose import compose
from editkit.config.schema import Problems, construct
from editkit.editors.base import AbstractSideEditor, Step
from editkit.editors.codebook import Codebook
from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.editable import EditableModel
from editkit.model.generate import generate
from editkit.model.side_routes import context_tokens, routed
from editkit.model.side_value import AbstractBeside
from editkit.model.tokens import encode_prompts
from editkit.stats.store import Moments
from editkit.types import EditRequest, TensorState

ENTRIES = 10_000
ROUNDS = 3  # timings of each query for one of `repeats`
PROMPTS = 2  # that no edit is about
EDITS = 1
DEMONSTRATIONS = 4  # of IKE
NEW_TOKENS = 8
STEPS = 10  # of a search whose time is compared between a small and a large codebook
ATTENTION = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
# A line for each editor: what its yaml leaves to a recipe. {layer} is ROME's, {attention} are the
# matrices that LoRA's authors adapt.
SERVED: Mapping[str, tuple[str, ...]] = {
    "grace": ("editor.layers=[{layer}]", "editor.radius=1e-4", "editor.start=output"),
    "ice": (),
    "ike": (f"editor.demonstrations={DEMONSTRATIONS}",),
    "lora": ("editor.layers=null", "editor.targets=[{attention}]"),
    "memoe": ("editor.layers=[{layer}]",),
    "rag": (),
    # a threshold that the edit's own prompt reaches alone
    "serac": ("editor.pair=untrained", "editor.cosine=0.999"),
    "t_patcher": (),
    "wise": ("editor.layers=[{layer}]",),
}


@dataclass(frozen=True, kw_only=True)
class _Latency:
    """Seconds of one kind of query by turn, of the unedited model and with the sides."""

    plain: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of the ratios of two queries that were made one after the other."""
        pairs = zip(self.ours, self.plain, strict=True)
        return statistics.median(ours / plain for ours, plain in pairs)


def measure(options: Options) -> Comparison:
    """The table row is the prefill of a prompt that GRACE leaves alone. `served` has the latency of
    each editor, relative to the unedited model, and the tokens that it puts before a prompt, as a
    mean; `edit_growth` is the time of GRACE's edit beside
    10,000 entries over that beside none.
    """
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    requests = requests_for(options.shape, EDITS + PROMPTS + DEMONSTRATIONS)
    pool, requests = requests[EDITS + PROMPTS :], requests[: EDITS + PROMPTS]
    edited, others = requests[:EDITS], requests[EDITS:]
    room = NEW_TOKENS + max(map(len, _prompts(model, requests)))
    timing, served = PairedTiming(device=options.device), dict[str, dict[str, float]]()
    difference, growth = 0.0, 0.0
    for name in SERVED:
        editor = editor_of(name, model, options)
        if editor.context_tokens(model, edited, pool) > model.max_length - room:
            continue  # small shapes have no room for demonstrations
        state = edit(model, editor, edited, editor.init(model, Moments()), pool)
        sides = tuple(_filled(side) for side in editor.attach(model, state))
        served[name] = _latencies(model, sides, requests, options)
        if name == "grace":
            served[name] |= {"bytes an entry": sides[0].figures()["bytes"] / ENTRIES}
            difference = _compare(model, sides, _prompts(model, others), timing, options.repeats)
            growth = _growth(
                model, editor_of(name, model, options, steps=STEPS), others[0], sides[0], options
            )
    return timing.comparison(
        relative_difference=difference, served=served, edit_growth=growth, entries=ENTRIES
    )


def editor_of(
    name: str, model: EditableModel, options: Options, *, steps: int = 1
) -> AbstractSideEditor[Any]:
    """The editor with its default numbers, and few steps of training."""
    found = [module for module, _ in model.module(model.family.block(0)).named_modules()]
    attention = [module for module in found if module.endswith(ATTENTION)]
    values = {"layer": options.shape.rome_layer, "attention": ",".join(attention)}
    overrides = [f"editor={name}", *(line.format(**values) for line in SERVED[name])]
    problems = Problems()
    node = compose(overrides).config["editor"]
    if "steps" in node:
        node["steps"] = steps
    editor = construct(node, "editor", AbstractSideEditor, problems)
    if editor is None or (lacking := editor.lacks()):
        raise ConfigError(problems.messages or [f"editor.{each}" for each in lacking])
    return editor


def edit(
    model: EditableModel,
    editor: AbstractSideEditor[Any],
    requests: Sequence[EditRequest],
    state: TensorState,
    pool: Sequence[EditRequest] = (),
) -> TensorState:
    """The editor's state after one batch of edits. Nothing stands beside the model afterwards."""
    model.attach(*editor.attach(model, state))
    step = Step(model=model, requests=tuple(requests), state=state, pool=tuple(pool))
    state = editor.propose(step, editor.plan(step))
    model.attach()
    return state


def _latencies(
    model: EditableModel,
    sides: Sequence[AbstractBeside],
    requests: Sequence[EditRequest],
    options: Options,
) -> dict[str, float]:
    """The latencies relative to the unedited model's, by kind of query; on a CPU, of CPU time."""
    model.attach(*sides)
    prompts = _prompts(model, requests)
    touched = routed(model, prompts)
    found: dict[str, _Latency] = {}
    for kind, query in _queries(model).items():
        for _ in range(options.repeats * ROUNDS):
            for prompt, is_touched in zip(prompts, touched, strict=True):
                name = f"{kind} {'edited' if is_touched else 'other'}"
                latency = found.setdefault(name, _Latency())
                for attached, seconds in (((), latency.plain), (sides, latency.ours)):
                    model.attach(*attached)
                    cost, _result = timed(functools.partial(query, prompt), options.device)
                    seconds.append(_seconds(cost, options))
    model.attach(*sides)
    added = context_tokens(model, prompts)
    model.attach()
    ratios = {kind: latency.ratio for kind, latency in sorted(found.items())}
    return ratios | ({} if added is None else {"context tokens": statistics.fmean(added)})


def _seconds(cost: Cost, options: Options) -> float:
    """On a CPU the seconds of its threads, which other programs change less."""
    return cost.cpu_seconds if options.device_type == "cpu" else cost.seconds


def _queries(model: EditableModel) -> dict[str, Callable[[Sequence[int]], torch.Tensor]]:
    def prefill(prompt: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.tensor([prompt], device=model.device)
            logits: torch.Tensor = model.network(input_ids=ids, logits_to_keep=1).logits
        return logits

    def generation(prompt: Sequence[int]) -> torch.Tensor:
        [new] = generate(model, [prompt], max_new_tokens=NEW_TOKENS, ends=(), batch_size=1)
        return torch.tensor(new)

    return {"prefill": prefill, "generation": generation}


def _prompts(model: EditableModel, requests: Sequence[EditRequest]) -> list[tuple[int, ...]]:
    return encode_prompts(model.tokenizer, [request.full_prompt for request in requests])


def _filled(side: AbstractBeside) -> AbstractBeside:
    """A codebook with 10,000 entries, of which the first are those that it has; other sides as they
    are. The keys of the others have the length of its own.
    """
    if not isinstance(side, Codebook):
        return side
    more, generator = ENTRIES - len(side), torch.Generator().manual_seed(0)

    def noise_like(own_NX: torch.Tensor) -> torch.Tensor:
        noise_NX = torch.randn(more, own_NX.shape[1], generator=generator).to(own_NX)
        return torch.cat([own_NX, noise_NX * own_NX.square().mean().sqrt()])

    return replace(
        side,
        keys_NI=noise_like(side.keys_NI),
        values_NO=noise_like(side.values_NO),
        radii_N=torch.cat([side.radii_N, side.radii_N[:1].expand(more)]),
        labels_NL=torch.cat([side.labels_NL, side.labels_NL[:1].expand(more, -1)]),
    )


def _compare(
    model: EditableModel,
    sides: Sequence[AbstractBeside],
    prompts: Sequence[Sequence[int]],
    timing: PairedTiming,
    repeats: int,
) -> float:
    """Times the prefills of these prompts. Returns the relative difference between the logits with
    and without the sides.
    """
    query, found = _queries(model)["prefill"], dict[Side, torch.Tensor]()
    turns: tuple[tuple[Side, Sequence[AbstractBeside]], ...] = (("plain", ()), ("ours", sides))
    for _ in range(repeats):
        for name, attached in turns:
            model.attach(*attached)
            found[name] = timing.run(name, lambda: torch.cat([query(each) for each in prompts]))
    model.attach()
    return relative_difference(found["plain"], found["ours"])


def _growth(
    model: EditableModel,
    editor: AbstractSideEditor[Any],
    request: EditRequest,
    book: AbstractBeside,
    options: Options,
) -> float:
    """The time of an edit beside the entries of `book` over that beside none."""
    timing, empty = PairedTiming(device=options.device), editor.init(model, Moments())
    for _ in range(options.repeats + 1):  # the first one is a warm-up
        timing.run("plain", lambda: edit(model, editor, [request], empty))
        timing.run("ours", lambda: edit(model, editor, [request], book.state()))
    medians = [
        statistics.median(_seconds(cost, options) for cost in timing.costs[side][1:])
        for side in ("plain", "ours")
    ]
    return medians[1] / medians[0]
