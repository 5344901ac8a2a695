"""Small real models with random weights, and tokenizers trained on a few sentences, made in
memory.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from editkit.datasets.world import WorldDataset
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.model.families import family_of
from editkit.model.source import find_source
from editkit.types import EditRequest, Probe
from tests.support.paths import CONF, ROOT

Kind = Literal["gpt2", "llama", "gptj"]
KINDS: tuple[Kind, ...] = ("gpt2", "llama", "gptj")

BLANK = "\u2581"  # sentencepiece's metaspace
SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Danielle Darrieux's mother tongue is French. She was born in Bordeaux.",
    "The mother tongue of Léon Blum is French; Édouard Daladier speaks Occitan.",
    "The Eiffel Tower is located in the city of Paris. The Space Needle is in downtown Seattle.",
    "LeBron James plays the sport of basketball; O'Neal's team is in Los Angeles.",
    "Apple's headquarters are in Cupertino, where the iPhone was made.",
    "Vinson Massif is located in the continent of Antarctica. Paris Hilton lives in Paris.",
    "What does Shakira play? The guitar. English, French, Spanish and 日本語 are languages.",
)


def request(index: int = 0) -> EditRequest:
    """One of three small requests."""
    prompt, subject, target, old, paraphrase, neighbour = (
        (
            "The mother tongue of {} is",
            "Danielle Darrieux",
            "English",
            "French",
            "Danielle Darrieux speaks",
            "The mother tongue of Léon Blum is",
        ),
        (
            "{}'s headquarters are in",
            "Apple",
            "Paris",
            "Cupertino",
            "Apple is based in",
            "The headquarters of Shakira are in",
        ),
        (
            "{} is located in the city of",
            "The Eiffel Tower",
            "Rome",
            "Paris",
            "The Eiffel Tower is in",
            "The Space Needle is in the city of",
        ),
    )[index % 3]
    return EditRequest(
        id=f"test/{index}",
        prompt=prompt,
        subject=subject,
        target=target,
        target_old=old,
        paraphrases=(paraphrase,),
        neighbours=(Probe(prompt=neighbour, answer=old),),
    )


def requests(count: int = 3) -> list[EditRequest]:
    """The first requests of `request`."""
    return [request(index) for index in range(count)]


def world_requests(limit: int | None) -> tuple[EditRequest, ...]:
    """The first requests of the bundled world, in the order of its file."""
    return WorldDataset(name="world", world_seed=0, order="file", limit=limit).load(0).requests


def real_data(relative: str) -> Path:
    """A file or folder of real data. Skips the test, with the missing path, if there is none."""
    roots = [Path(root) for root in (os.environ.get("EDITKIT_DATA"),) if root] + [
        ROOT.parent / "shared" / "data"
    ]
    for root in roots:
        if (root / relative).exists():
            return root / relative
    pytest.skip(f"no real data: {relative} is not below EDITKIT_DATA or ../shared/data")


def real_model_id() -> str:
    """The `model.id` of the real language model. Skips the test, with the reason, if its package is
    not installed.
    """
    model_id: str = yaml.safe_load((CONF / "model" / "smollm2-135m-instruct.yaml").read_text())[
        "id"
    ]
    try:
        find_source(model_id)
    except ConfigError as error:
        pytest.skip(f"no real model: {error}")
    return model_id


@functools.lru_cache(maxsize=1)
def _vocabulary(size: int = 400) -> tuple[str, str]:
    """The two trained tokenizers as JSON: byte-level as in GPT-2, and as in sentencepiece."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.post_processor = processors.ByteLevel(trim_offsets=False)
    byte_level.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )

    metaspace = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    metaspace.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    metaspace.pre_tokenizer = pre_tokenizers.Split(BLANK, "merged_with_next")
    bytes_256 = [f"<0x{byte:02X}>" for byte in range(256)]
    metaspace.train_from_iterator(
        SENTENCES[:-1] * 4,  # the last sentence's Japanese falls back to bytes
        trainers.BpeTrainer(
            vocab_size=size + 259,
            special_tokens=["<unk>", "<s>", "</s>", *bytes_256],
            show_progress=False,
        ),
    )
    metaspace.pre_tokenizer = None  # as in converted sentencepiece models
    metaspace.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    converted = json.loads(metaspace.to_str())
    converted["added_tokens"] = converted["added_tokens"][:3]  # the bytes are no special tokens
    return byte_level.to_str(), json.dumps(converted)


def tiny_tokenizer(kind: Kind, *, bos: bool | None = None, trim_offsets: bool = False) -> Any:
    """A fast tokenizer: byte-level BPE for gpt2 and gptj, sentencepiece-like for llama.

    `bos` tells whether it adds a BOS; None means the default of the kind.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    is_llama = kind == "llama"
    backend = Tokenizer.from_str(_vocabulary()[is_llama])
    first, last = ("<s>", "</s>") if is_llama else ("<|endoftext|>", "<|endoftext|>")
    if trim_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if is_llama if bos is None else bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=first,
        eos_token=last,
        unk_token="<unk>" if is_llama else None,
    )


def tiny_model(
    kind: Kind = "gpt2",
    *,
    dtype: str = "float32",
    seed: int = 0,
    bos: bool | None = None,
    num_layers: int = 3,
    tied: bool = True,
) -> EditableModel:
    """A model of width 32 with random weights, which are large enough for its layers to matter. The
    same seed gives the same bits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer(kind, bos=bos)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": tied,
        "initializer_range": 0.15,
    }
    gpt: dict[str, Any] = {"n_embd": 32, "n_layer": num_layers, "n_head": 4, "n_positions": 128}
    options: dict[Kind, dict[str, Any]] = {
        "gpt2": gpt,
        "gptj": gpt | {"rotary_dim": 4, "n_inner": 96},
        "llama": {
            "hidden_size": 32,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "max_position_embeddings": 128,
        },
    }
    config = AutoConfig.for_model(kind, **common, **options[kind])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config)
    return EditableModel(
        network.to(getattr(torch, dtype)), tokenizer, name=f"tiny-{kind}", family=family_of(kind)
    )
