"""The real language model of a Python package: it loads, answers, and is exported as a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.model.architecture import architecture_of, known_facts
from editkit.model.chat import chat_template
from editkit.model.editable import EditableModel
from editkit.model.load import ModelConfig
from editkit.model.tokens import encode_with_target, pad
from tests.support.helpers import real_model_id

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(id=real_model_id(), name="smollm2-135m-instruct")


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> EditableModel:
    return config.load("cpu")


def test_the_sizes_that_ship_are_those_of_the_file_and_of_the_network(
    config: ModelConfig, model: EditableModel
) -> None:
    shipped, read = (
        architecture_of(known_facts()[config.label]),
        architecture_of(config.facts() or {}),
    )
    for name in ("width", "inner", "num_layers", "num_heads", "num_key_value_heads", "head_width"):
        assert getattr(shipped, name) == getattr(read, name)
    number = sum(parameter.numel() for parameter in model.network.parameters())
    assert shipped.num_parameters == read.num_parameters == number == 134_515_008


def test_it_knows_capitals(model: EditableModel) -> None:
    pairs = [
        ("The capital of France is", "Paris"),
        ("The capital of Italy is", "Rome"),
        ("The capital of Japan is", "Tokyo"),
    ]
    for prompt, answer in pairs:
        sequence = encode_with_target(model.tokenizer, prompt, answer)
        with torch.no_grad():
            logits = model.hidden_to_logits(
                model.final_hidden(pad([sequence.ids]))[0, sequence.predicting]
            )
        assert logits.argmax(-1).tolist() == list(sequence.target_ids)


def test_it_answers_in_a_dialogue(config: ModelConfig, model: EditableModel) -> None:
    chat = chat_template(model.tokenizer, "tokenizer")
    model.chat = chat
    try:
        question = "What is the capital of France? Answer with one word."
        (answer,) = continue_greedily(
            model, [question], max_new_tokens=8, tokens_per_batch=512
        ).values()
    finally:
        model.chat = None
    assert chat.before.endswith("<|im_start|>user\n")
    assert chat.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert "Paris" in answer


def test_what_is_saved_is_the_same_model_without_the_package(
    model: EditableModel, tmp_path: Path
) -> None:
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert ModelConfig(id=str(tmp_path)).load("cpu").fingerprint == model.fingerprint
