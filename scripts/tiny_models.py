"""The tokenizers and networks of the tiny models, before pretraining."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from editkit.datasets.world import corpus
from editkit.datasets.world_words import World

Model = Any  # a causal language model of transformers
NUM_POSITIONS = 256
SHAPE: dict[str, Any] = {"vocab_size": 2048, "initializer_range": 0.04}


def byte_level_tokenizer(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE with one special token and no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=NUM_POSITIONS,
    )


def sentencepiece_tokenizer(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Llama's kind: BPE on words that begin with U+2581, bytes for unknown characters such as
    newlines, and <s> as BOS.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.Split(Regex(r"[\n.,:;?]"), "isolated")]
    )
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - len(special), show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = [
        piece for piece in sorted(learned["vocab"], key=learned["vocab"].get) if piece != "\n"
    ]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {piece: index for index, piece in enumerate([*special, *pieces])}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=NUM_POSITIONS,
    )


def build_tokenizer(name: str, world: World, *, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, trained on a sample of the corpus."""
    build = sentencepiece_tokenizer if name == "tiny-llama" else byte_level_tokenizer
    # Names and objects are repeated, so that each of their words becomes one token.
    numbers = {str(number) for number in range(20)}
    words = {
        word
        for fact in world.facts
        for thing in (fact.subject, fact.object)
        for word in thing.split()
    }
    extra = [f"{word} {word}" for word in sorted(words | numbers | set(world.first_names))] * 150
    sample = corpus(world, seed=seed, num_documents=20_000)
    return build(itertools.chain(sample, extra), vocab_size=SHAPE["vocab_size"])


def build_model(name: str, tokenizer: PreTrainedTokenizerBase) -> Model:
    """A model with random weights. All three have tied embeddings and six layers of width 128."""
    common = SHAPE | {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    gpt: dict[str, Any] = common | {
        "n_positions": NUM_POSITIONS,
        "n_embd": 128,
        "n_layer": 6,
        "n_head": 4,
        "n_inner": 512,
    }
    no_dropout: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    match name:
        case "tiny-gpt2":
            return transformers.GPT2LMHeadModel(GPT2Config(**gpt, **no_dropout))
        case "tiny-gptj":
            return transformers.GPTJForCausalLM(GPTJConfig(**gpt, **no_dropout, rotary_dim=16))
        case _:
            shape: dict[str, Any] = {
                "hidden_size": 128,
                "intermediate_size": 432,
                "num_hidden_layers": 6,
            }
            heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
            # Without biases a small model is slow to learn attention to the previous token, and
            # does not learn lookups.
            config = LlamaConfig(
                **common,
                **shape,
                **heads,
                max_position_embeddings=NUM_POSITIONS,
                attention_bias=True,
            )
            return transformers.LlamaForCausalLM(config)
