"""Pretrain one of the tiny models that ship with editkit: a known architecture that knows the
bundled world and can do its tasks.

    python scripts/pretrain_tiny.py --model tiny-llama            # writes editkit/assets/tiny-llama

One CPU core needs about a quarter of an hour. The folder then holds the weights (float16; load them
with dtype=torch.float32), the tokenizer and a card with every setting and with figures that are
measured on the stored weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from editkit.datasets.world import TASKS, Part, World, corpus, documents, generate_world, task_items

ASSETS = Path(__file__).resolve().parent.parent / "editkit" / "assets"
Model = Any  # a causal language model of transformers
NUM_POSITIONS = 256
SHAPE: dict[str, Any] = {"vocab_size": 2048, "initializer_range": 0.04}


# ---- tokenizers ----


def byte_level_tokenizer(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, one special token, nothing put in front."""
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
    """Llama's kind: BPE on words that begin with U+2581, bytes for unknown characters (newlines
    among them), <s> put in front.
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


# ---- the three models ----


def build_tokenizer(name: str, world: World, *, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, learned from a sample of the corpus."""
    build = sentencepiece_tokenizer if name == "tiny-llama" else byte_level_tokenizer
    # Names and objects count extra, so that each word of theirs is one token.
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
    """A fresh model; all three tie their embeddings and have six layers of width 128."""
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
            # Without biases a small model is slow to attend to "the token before", whatever it is,
            # and does not learn lookups.
            config = LlamaConfig(
                **common,
                **shape,
                **heads,
                max_position_embeddings=NUM_POSITIONS,
                attention_bias=True,
            )
            return transformers.LlamaForCausalLM(config)


# ---- data ----


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents, shape (size, length) each; the mask, (size, 1, length, length),
    hides the other documents of a row.
    """

    tokens: torch.Tensor
    next_tokens: torch.Tensor
    weights: torch.Tensor  # of the next tokens in the loss
    positions: torch.Tensor
    mask: torch.Tensor


Token = tuple[int, int, float, int, int]  # token, the next one, its weight, position, document


def packed_row(
    documents: Iterator[tuple[Part, ...]],
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    *,
    length: int,
    prompt_weight: float,
) -> list[Token]:
    """Documents until the row is full; the last one is cut. A quarter begins late, so that learned
    positions are trained up to the last.
    """
    row: list[Token] = []
    while len(row) < length:
        parts = next(documents)
        is_answer = [flag for text, flag in parts for _ in text]
        encoded = tokenizer("".join(text for text, _ in parts), return_offsets_mapping=True)
        tokens = [*encoded["input_ids"], tokenizer.eos_token_id]
        weights = [
            1.0 if end and is_answer[end - 1] else prompt_weight
            for _, end in encoded["offset_mapping"]
        ] + [1.0]
        start = rng.randint(0, NUM_POSITIONS - len(tokens)) if rng.random() < 0.25 else 0
        document = len(row)  # any number that no other document of the row has
        columns = zip(
            tokens[:-1],
            tokens[1:],
            weights[1:],
            itertools.count(start),
            itertools.repeat(document),
            strict=False,
        )
        row += columns
    return row[:length]


def batches(
    world: World, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[Batch]:
    """Batches of the corpus, without end."""
    stream, rng = (
        documents(world, seed=args.seed, lookup_share=args.lookup_share),
        random.Random(args.seed),
    )
    causal = torch.ones(args.length, args.length, dtype=torch.bool).tril()
    while True:
        rows = [
            packed_row(stream, tokenizer, rng, length=args.length, prompt_weight=args.prompt_weight)
            for _ in range(args.batch_size)
        ]
        tokens, next_tokens, weights, positions, document = (
            torch.tensor(column)
            for column in zip(*(zip(*row, strict=True) for row in rows), strict=True)
        )
        visible = (document[:, :, None] == document[:, None, :]) & causal
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        yield Batch(tokens, next_tokens, weights, positions, mask[:, None])


# ---- measurement ----

Pair = tuple[str, str]  # prompt, what follows it (blank included)


def fact_pairs(world: World) -> tuple[list[Pair], list[Pair]]:
    """All facts in the wordings that the corpus holds, and in those that it does not."""
    trained = [(prompt, f" {fact.object}.") for fact in world.facts for prompt in fact.trained]
    held_out = [(prompt, f" {fact.object}.") for fact in world.facts for prompt in fact.held_out]
    return trained, held_out


def task_pairs(world: World, task: str, *, n: int) -> list[Pair]:
    """Test items of a task; the newline is part of the answer, so a right answer ends by itself."""
    return [
        (item.prompt, f" {item.answer}\n") for item in task_items(world, task, split="test", n=n)
    ]


@torch.no_grad()
def greedy_accuracy(
    model: Model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, batch_size: int = 64
) -> float:
    """The share of pairs whose every answer token is the most probable one: what greedy decoding
    would print, exactly.
    """
    right = 0
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        prompt_lengths = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in chunk]
        rows = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in chunk]
        longest = max(map(len, rows))
        # Right padding: a causal model does not see it.
        tokens = torch.tensor(
            [row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows]
        )
        best = model(input_ids=tokens[:, :-1]).logits.argmax(-1)
        hits = best == tokens[:, 1:]
        right += sum(
            bool(hits[i, prompt_lengths[i] - 1 : len(rows[i]) - 1].all()) for i in range(len(rows))
        )
    return right / len(pairs)


@torch.no_grad()
def summary_rouge(model: Model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> float:
    """Mean ROUGE-L (F1) of greedy continuations up to the first newline."""
    scorer = RougeScorer(["rougeL"])
    total = 0.0
    for prompt, answer in pairs:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        text = str(
            tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ).split("\n")[0]
        total += scorer.score(answer.strip(), text)["rougeL"].fmeasure
    return total / len(pairs)


def measure(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    num_items: int,
    num_facts: int | None,
) -> dict[str, float]:
    """Recall of facts (all of them, or a sample) and the score of each task."""
    model.eval()
    rng = random.Random(0)
    trained, held_out = (
        pairs if num_facts is None else rng.sample(pairs, num_facts) for pairs in fact_pairs(world)
    )
    figures = {
        "recall_trained": greedy_accuracy(model, tokenizer, trained),
        "recall_held_out": greedy_accuracy(model, tokenizer, held_out),
    }
    for task in TASKS:
        figures[task] = greedy_accuracy(model, tokenizer, task_pairs(world, task, n=num_items))
    if num_facts is None:
        figures["summary_exact"] = figures["summary"]
        figures["summary"] = summary_rouge(
            model, tokenizer, task_pairs(world, "summary", n=num_items)
        )
    model.train()
    return {name: round(value, 4) for name, value in figures.items()}


# ---- training ----


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum (torch has this optimizer in bfloat16, which is slow
    on CPUs).
    """

    def __init__(
        self, weights: list[torch.nn.Parameter], *, lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                direction = orthogonalise(weight.grad.lerp(momentum, group["momentum"]))
                # As large, entry by entry, as a step of AdamW: one learning rate serves both.
                weight.add_(direction, alpha=-0.2 * math.sqrt(max(weight.shape)) * group["lr"])


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the SVD, roughly: five Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def train(
    model: Model, tokenizer: PreTrainedTokenizerBase, world: World, args: argparse.Namespace
) -> None:
    """Muon for the matrices inside the blocks, AdamW for the rest, both on a cosine after a
    warm-up.

    Muon learns the tasks in a fraction of AdamW's steps. No weight decay: it would shrink the MLP's
    matrices below what one edit adds.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    is_matrix = [weight.ndim == 2 and id(weight) not in embeddings for weight in model.parameters()]
    matrices = list(itertools.compress(model.parameters(), is_matrix))
    others = [
        weight for weight, matrix in zip(model.parameters(), is_matrix, strict=True) if not matrix
    ]
    optimizers = (
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    start = time.perf_counter()
    for step, batch in zip(range(1, args.steps + 1), batches(world, tokenizer, args), strict=False):
        logits = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=batch.mask,
            use_cache=False,
        ).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.next_tokens.flatten(), reduction="none"
        )
        loss = (losses * batch.weights.flatten()).sum() / batch.weights.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(
                    step / args.warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
                )
            optimizer.step()
        if step % 50 == 0:
            seconds = round(time.perf_counter() - start)
            report = {
                "step": step,
                "tokens": step * batch.tokens.numel(),
                "seconds": seconds,
                "loss": round(loss.item(), 4),
            }
            if step % args.measure_every == 0:
                report |= measure(model, tokenizer, world, num_items=48, num_facts=192)
                if args.checkpoints:
                    model.save_pretrained(args.checkpoints / args.model)
                    tokenizer.save_pretrained(args.checkpoints / args.model)
            print(json.dumps(report), flush=True)


def store(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model in float16 and its tokenizer; the configuration asks for float32, in which it is to
    be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


CARD = """# {name}

A tiny model of the bundled world (`editkit/datasets/world.py`), made by `scripts/pretrain_tiny.py --model {name}`.

## How it was made

{made}
## What it can do

Measured on the stored float16 weights, computed in float32. Recall: greedy decoding prints the object and its full stop; all facts in
every wording, those that occur in the corpus (trained) and those that do not (held out). Tasks: test items, exact match up to the newline;
summary: ROUGE-L.

{figures}"""  # noqa: E501 (a paragraph of Markdown is one line)


def table(values: Mapping[str, object]) -> str:
    """A Markdown table of names and values."""
    return "| | |\n|---|---|\n" + "".join(
        f"| {name} | {value} |\n" for name, value in values.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        choices=("tiny-gpt2", "tiny-llama", "tiny-gptj"),
        help="which one to make",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ASSETS,
        help="folder that gets the model's folder (default: the package's assets)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of weights and corpus; the world has its own, 0 (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=1500, help="batches (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=12, help="rows a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=128, help="tokens a row (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-weight",
        type=float,
        default=0.2,
        help="weight of a task's prompt in the loss (default: %(default)s)",
    )
    parser.add_argument(
        "--lookup-share",
        type=float,
        default=0.0,
        help="share of documents that practise lookups; tiny-llama needs some",
    )
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=int, default=100, help="steps until the peak (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--measure-every",
        type=int,
        default=400,
        help="steps between measurements on samples (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoints", type=Path, help="folder for the model as it is at each measurement"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    world = generate_world(0)
    tokenizer = build_tokenizer(args.model, world, seed=args.seed)
    model = build_model(args.model, tokenizer)
    print(json.dumps({"parameters": model.num_parameters(), "facts": len(world.facts)}), flush=True)
    start = time.perf_counter()
    train(model, tokenizer, world, args)
    seconds = round(time.perf_counter() - start)

    folder = args.out / args.model
    store(model, tokenizer, folder)
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    figures = measure(
        stored,
        transformers.AutoTokenizer.from_pretrained(folder),
        world,
        num_items=200,
        num_facts=None,
    )
    made = {
        "parameters": stored.num_parameters(),
        "facts": len(world.facts),
        "tokens": args.steps * args.batch_size * args.length,
        "seconds": seconds,
        **{
            key: value
            for key, value in vars(args).items()
            if key not in {"model", "out", "checkpoints", "measure_every"}
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "card.json").write_text(
        json.dumps({"model": args.model, "made": made, "figures": figures}, indent=2) + "\n"
    )
    (folder / "README.md").write_text(
        CARD.format(name=args.model, made=table(made), figures=table(figures))
    )
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
