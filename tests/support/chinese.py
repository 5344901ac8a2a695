"""A tokenizer that spells Chinese, whose tokens cross the border of prompt and target, and a small
model with it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from editkit.model.editable import EditableModel
from editkit.model.families import family_of
from editkit.model.tokens import encode_with_targets, pad
from editkit.types import EditRequest, Probe

TEXTS = (
    "首都:法国,德国,意大利,日本," * 4,
    "柏林,巴黎,罗马,東京," * 4,
    "法国柏林," * 3,  # a token for the prompt's end and the target's beginning
    "日本の首都は東京です。The capital of France is Paris, and Rome is in Italy.",
)
CAPITALS = (("法国", "巴黎"), ("德国", "柏林"), ("意大利", "罗马"), ("日本", "東京"))
REQUEST = EditRequest(
    id="zh/0",
    prompt="首都:{}",
    subject="法国",
    target="柏林",
    target_old="巴黎",
    paraphrases=("法国首都",),
    neighbours=(Probe(prompt="首都:意大利", answer="罗马"),),
)


@functools.cache
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made.to_str()


def chinese_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained())
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    """What 150 steps on a few facts make of random weights."""
    model = _untrained()
    network = model.network.train().requires_grad_(True)
    pairs = [Probe(prompt=f"首都:{country}", answer=f"{city}。") for country, city in CAPITALS]
    sequences = encode_with_targets(model.tokenizer, pairs)
    adam = torch.optim.Adam(network.parameters(), lr=3e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(150):
            batch = pad([sequence.ids for sequence in sequences])
            logits_BTV = network(**batch.arguments).logits
            is_text_BT = batch.mask_BT[:, 1:].bool()
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1][is_text_BT], batch.ids_BT[:, 1:][is_text_BT]
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def chinese_model() -> EditableModel:
    """GPT-2 of width 32, which knows four capitals."""
    model = _untrained()
    model.network.load_state_dict(_weights())
    return EditableModel(
        model.network, model.tokenizer, name="tiny-chinese", family=family_of("gpt2")
    )


def _untrained() -> EditableModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = chinese_tokenizer()
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
    return EditableModel(network, tokenizer, name="tiny-chinese", family=family_of("gpt2"))
