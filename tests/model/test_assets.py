"""The bundled models load offline in float32 and reach the figures of their cards on the world's
facts and tasks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import editkit
from editkit.datasets.world import TASKS, generate_world, task_items
from editkit.datasets.world_words import World

ASSETS = Path(editkit.__file__).parent / "assets"
MODELS = sorted(path.parent.name for path in ASSETS.glob("*/card.json"))
LEAST = {"recall_trained": 0.95, "recall_held_out": 0.85} | dict.fromkeys(TASKS, 0.85)
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def world() -> World:
    return generate_world()


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return ASSETS / request.param


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def _accuracy(loaded: Loaded, pairs: list[tuple[str, str]]) -> float:
    """The share of (prompt, continuation) pairs whose continuation is greedy, token by token."""
    model, tokenizer = loaded
    hits = 0
    for prompt, continuation in pairs:
        start = len(tokenizer(prompt)["input_ids"])
        tokens = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
        hits += torch.equal(
            model(tokens[:, :-1]).logits.argmax(-1)[0, start - 1 :], tokens[0, start:]
        )
    return hits / len(pairs)


def _figures(loaded: Loaded, world: World, *, every: int, num_items: int) -> dict[str, float]:
    facts = world.facts
    trained = [(prompt, f" {fact.object}.") for fact in facts for prompt in fact.trained][::every]
    held_out = [(prompt, f" {fact.object}.") for fact in facts for prompt in fact.held_out][
        :: max(1, every // 8)
    ]
    figures = {
        "recall_trained": _accuracy(loaded, trained),
        "recall_held_out": _accuracy(loaded, held_out),
    }
    for task in TASKS:
        items = task_items(world, task, split="test", n=num_items)
        figures[task] = _accuracy(loaded, [(item.prompt, f" {item.answer}\n") for item in items])
    return figures


def test_its_card_meets_the_bar(folder: Path) -> None:
    figures = json.loads((folder / "card.json").read_text())["figures"]
    assert {name: figures[name] for name in LEAST if figures[name] < LEAST[name]} == {}


def test_its_files_are_small_and_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert (
        names
        == {"README.md", "card.json", "config.json", "generation_config.json", "model.safetensors"}
        | tokenizer
    )
    assert (folder / "model.safetensors").stat().st_size <= 9_000_000


def test_a_sample_of_its_facts_and_tasks_meets_the_bar(
    loaded: Loaded, world: World, folder: Path
) -> None:
    figures = _figures(loaded, world, every=120, num_items=24)
    # A sample may fall short of the bar by its own noise.
    assert {name: value for name, value in figures.items() if value < LEAST[name] - 0.1} == {}


@pytest.mark.slow
def test_its_figures_are_those_of_the_card(loaded: Loaded, world: World, folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())["figures"]
    figures = _figures(loaded, world, every=1, num_items=200)
    card["summary"] = card.get("summary_exact", card["summary"])
    assert figures == pytest.approx({name: card[name] for name in figures}, abs=0.01)


def test_its_tokenizer_gives_back_every_text(loaded: Loaded, world: World) -> None:
    _, tokenizer = loaded
    for task in TASKS:
        text = task_items(world, task, n=1)[0].text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_names_end_in_one_token_and_some_objects_are_several(loaded: Loaded, world: World) -> None:
    _, tokenizer = loaded

    def num_tokens(name: str) -> int:
        return len(tokenizer("a " + name)["input_ids"]) - len(tokenizer("a")["input_ids"])

    people = {fact.subject for fact in world.facts if fact.relation.subjects == "person"}
    assert all(num_tokens(name) == 2 for name in people)
    lengths = [num_tokens(name) for relation in world.relations for name in relation.objects]
    assert 0.6 < sum(length == 1 for length in lengths) / len(lengths) < 0.9


def test_only_llamas_tokenizer_puts_a_token_in_front(loaded: Loaded, folder: Path) -> None:
    _, tokenizer = loaded
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == (
        folder.name == "tiny-llama"
    )
