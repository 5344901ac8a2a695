"""Pretrains one of the tiny models that ship with editkit. They have known architectures, know the
facts of the bundled world and can do its tasks.

    python scripts/pretrain_tiny.py --model tiny-llama            # writes editkit/assets/tiny-llama

This takes about a quarter of an hour on one CPU core. The folder then contains the weights in
float16 (to be loaded with dtype=torch.float32), the tokenizer, and a card with all settings and
with figures measured on the stored weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from tiny_batches import batches
from tiny_models import Model, build_model, build_tokenizer
from transformers import PreTrainedTokenizerBase

from editkit.datasets.world import TASKS, generate_world, task_items
from editkit.datasets.world_words import World

ASSETS = Path(__file__).resolve().parent.parent / "editkit" / "assets"


# ---- measurement ----

Pair = tuple[str, str]  # prompt, and its continuation with the leading blank


def fact_pairs(world: World) -> tuple[list[Pair], list[Pair]]:
    """All facts in the wordings of the corpus, and in held-out wordings."""
    trained = [(prompt, f" {fact.object}.") for fact in world.facts for prompt in fact.trained]
    held_out = [(prompt, f" {fact.object}.") for fact in world.facts for prompt in fact.held_out]
    return trained, held_out


def task_pairs(world: World, task: str, *, n: int) -> list[Pair]:
    """Test items of a task. The newline is part of the answer, so a correct answer ends there."""
    return [
        (item.prompt, f" {item.answer}\n") for item in task_items(world, task, split="test", n=n)
    ]


@torch.no_grad()
def greedy_accuracy(
    model: Model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, batch_size: int = 64
) -> float:
    """The fraction of pairs that greedy decoding answers exactly: every token of the answer is the
    most probable one.
    """
    right = 0
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        prompt_lengths = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in chunk]
        rows = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in chunk]
        longest = max(map(len, rows))
        # A causal model does not attend to padding on the right.
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
    """Recall of facts (all, or a sample) and the score of each task."""
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
    """The Muon optimizer: steps along the orthogonalized momentum. torch's implementation uses
    bfloat16, which is slow on CPUs.
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
                # Entries are as large as in a step of AdamW, so both share one learning rate.
                weight.add_(direction, alpha=-0.2 * math.sqrt(max(weight.shape)) * group["lr"])


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """An approximation of U V^T of the SVD: five Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def train(
    model: Model, tokenizer: PreTrainedTokenizerBase, world: World, args: argparse.Namespace
) -> None:
    """Trains with Muon for the matrices of the blocks and AdamW for the rest, both with a cosine
    schedule after a warm-up.

    Muon learns the tasks in a fraction of AdamW's steps. There is no weight decay: it would make
    the MLP matrices smaller than the update of one edit.
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
    """Writes the model in float16 and its tokenizer. The configuration states float32, in which the
    model is to be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


CARD = """# {name}

A tiny language model of the bundled world (`editkit/datasets/world.py`), trained by
`scripts/pretrain_tiny.py --model {name}`.

## Training

{made}
## Evaluation

The stored float16 weights are evaluated in float32. Recall is the fraction of facts for which
greedy decoding generates the object and its full stop. It covers all facts in every wording:
wordings of the corpus ("trained") and other wordings ("held out"). The tasks use test items and
score exact match up to the newline. The summary task scores ROUGE-L.

{figures}"""


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
        help="the model to pretrain",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ASSETS,
        help="parent of the model's folder (default: the assets of the package)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of weights and corpus; the seed of the world is always 0 (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=1500, help="batches (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=12, help="rows per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=128, help="tokens per row (default: %(default)s)"
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
        help="fraction of documents that practise lookups; tiny-llama needs some",
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
    parser.add_argument("--checkpoints", type=Path, help="folder of the model at each measurement")
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
