"""Small tokenizers in the styles of well-known ones, trained in memory on a few sentences."""

from __future__ import annotations

import functools
import json
from typing import Any, Literal

from tests.support.helpers import BLANK, SENTENCES

Style = Literal["prefix-space", "unigram", "llama3", "qwen", "gemma"]
STYLES: tuple[Style, ...] = ("prefix-space", "unigram", "llama3", "qwen", "gemma")
# Where words are cut before byte-level BPE in Llama 3 and Qwen.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES: dict[Style, dict[str, str]] = {  # the special tokens
    "prefix-space": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "unigram": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma": {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    },
}


@functools.cache
def _trained(style: Style) -> str:
    """The tokenizer as JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    special = list(NAMES[style].values())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=style == "prefix-space", use_regex=False)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if style == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="always")
        made.decoder = decoders.Metaspace(replacement=BLANK, prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=360,
            special_tokens=special,
            unk_token="<unk>",
            initial_alphabet=[chr(code) for code in range(33, 127)],
            show_progress=False,
        )
    elif style == "gemma":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Replace(" ", BLANK)
        made.pre_tokenizer = pre_tokenizers.Split(BLANK, "merged_with_next")
        made.decoder = decoders.Sequence(
            [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_256 = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=660, special_tokens=[*special, *bytes_256], show_progress=False
        )
    else:
        made = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
        if style == "qwen":
            made.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
        if style == "prefix-space":
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
    made.train_from_iterator(SENTENCES * 4, trainer)
    first = NAMES[style].get("bos_token")
    if first is not None and style != "prefix-space":
        made.post_processor = TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, made.token_to_id(first))]
        )
    if style == "unigram":  # as in T5, it ends every text
        made.post_processor = TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
        )
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are no special tokens
    return json.dumps(content)


def styled_tokenizer(style: Style) -> Any:
    """A fast tokenizer of this style."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained(style))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES[style])
