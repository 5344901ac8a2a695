"""The scoring of PRUNE's evaluation script (mjy1111/PRUNE, test_tasks.py) with its peculiarities.
EAC's scripts have the same origin.

Published curves are comparable with these numbers only. `suite=paper` measures the same tasks with
correct scores. Differs from the authors' code: there is no sampling, which a checkpoint's
generation_config can request there without a seed; no padding to the tokenizer's maximum; no two
repetitions; and no end token in the text. There it is decoded, so that a last word with it
("paris<|endoftext|>", normalised "parisendoftext") matches no answer of NQ. Here it matches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from editkit.evaluation.tasks.scores import entailment_answer, normalise, sentiment_answer

Doc = Mapping[str, Any]
Scores = dict[str, Any]
END = len("<|endoftext|>")  # cut from every summary, whether the end token was generated or not


def gsm8k(doc: Doc, results: Sequence[str]) -> Scores:
    """The answer is a substring of the generation: 18 is found in 1180."""
    return {"solve_rate": float(doc["answer"].split("#### ")[1] in results[0])}


def rte(doc: Doc, results: Sequence[str]) -> Scores:
    """accuracy leaves out generations that are neither true nor false; total_accuracy does not."""
    return _two_way(results[0], right=entailment_answer(doc), choices=("True", "False"))


def sst2(doc: Doc, results: Sequence[str]) -> Scores:
    """As `rte`."""
    return _two_way(results[0], right=sentiment_answer(doc), choices=("positive", "negative"))


def _two_way(generation: str, *, right: str, choices: tuple[str, str]) -> Scores:
    text = generation.lower()
    is_right = float(right.lower() in text)
    is_valid = any(choice.lower() in text for choice in choices)
    return ({"accuracy": is_right} if is_valid else {}) | {"total_accuracy": is_right}


def nq(doc: Doc, results: Sequence[str]) -> Scores:
    """The words after the last "Answer:", and the answers, all normalised. `nq_count` scores all
    records together.

    Differs from the authors' code: there a generated end token is part of the last word, which then
    matches nothing.
    """
    text = normalise(results[0].split("Answer:")[-1].replace("\n", " "))
    return {"exact_match": (text.split(" "), [normalise(answer) for answer in doc["answer"]])}


def nq_count(items: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """The count of matching spans over the number of records.

    A record whose first or last word is an answer counts once. In the other records every single
    word that is an answer counts, and for each starting word the first longer span that is an
    answer. The first such span of all records sets a flag that is never reset: it ends its record,
    and every later record after its first starting word. Therefore a record may count several
    times, and later ones not at all.
    """
    count, flag = 0, False
    for words, answers in items:
        if words[0] in answers or words[-1] in answers:
            count += 1
            continue
        for start in range(len(words) - 1):
            if words[start] in answers:
                count += 1
                continue
            stops = range(start + 2, len(words) + 1)
            if any(" ".join(words[start:stop]) in answers for stop in stops):
                count += 1
                flag = True
            if flag:
                break
    return count / len(items)


def samsum(doc: Doc, results: Sequence[str]) -> Scores:
    """ROUGE of the package `rouge` (sets of n-grams; summary-level L) and BLEU-4, both of a text
    without its last 13 characters.

    Differs from the authors' code: there these characters are the end token if it was generated.
    """
    from nltk.translate.bleu_score import sentence_bleu
    from rouge import Rouge

    text = results[0].split("DR:")[-1][:-END]
    # The authors' code fails on a text of full stops alone.
    if len(text) <= 1 or not text.strip(". \n\t"):
        return {"rouge": 0.0, "bleu": 0.0}
    (measures,) = Rouge().get_scores(text, doc["summary"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no common 4-grams: 0, as there
        bleu = float(sentence_bleu([doc["summary"].split()], text.split()))
    return {
        "rouge": sum(measures[kind]["f"] for kind in ("rouge-1", "rouge-2", "rouge-l")) / 3,
        "bleu": bleu,
    }
