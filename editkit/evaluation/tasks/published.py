"""PRUNE's evaluation script (mjy1111/PRUNE, test_tasks.py; EAC's are copies of the same ancestors),
with what is odd about it.

Published curves can be compared with these numbers, and with nothing else; `suite=paper` asks the
same and scores it rightly. Not reproduced: sampling where a checkpoint's generation_config asks for
it (unseeded there), padding to the tokenizer's maximum, the two repetitions, and the end token in
the text: it is decoded there, so that a last word with it behind ("paris<|endoftext|>", normalised
"parisendoftext") matches no answer of NQ; here it does.
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
    """The answer's characters occur among the generated ones: 18 is found in 1180."""
    return {"solve_rate": float(doc["answer"].split("#### ")[1] in results[0])}


def rte(doc: Doc, results: Sequence[str]) -> Scores:
    """accuracy leaves out what is neither true nor false, total_accuracy does not."""
    return _two_way(results[0], right=entailment_answer(doc), choices=("True", "False"))


def sst2(doc: Doc, results: Sequence[str]) -> Scores:
    """As `rte`."""
    return _two_way(results[0], right=sentiment_answer(doc), choices=("positive", "negative"))


def _two_way(generation: str, *, right: str, choices: tuple[str, str]) -> Scores:
    said = generation.lower()
    is_right = float(right.lower() in said)
    is_valid = any(choice.lower() in said for choice in choices)
    return ({"accuracy": is_right} if is_valid else {}) | {"total_accuracy": is_right}


def nq(doc: Doc, results: Sequence[str]) -> Scores:
    """The words said behind the last "Answer:", and the answers, all normalised; `nq_count` scores
    all records together.

    Differs from the authors' code: there an end token, where it was generated, is part of the last
    word, which then matches nothing.
    """
    said = normalise(results[0].split("Answer:")[-1].replace("\n", " "))
    return {"exact_match": (said.split(" "), [normalise(answer) for answer in doc["answer"]])}


def nq_count(items: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """The count of matching spans over the number of records.

    A record whose first or last word is an answer counts once. Of the others every single word that
    is an answer counts, and so does the first longer span that is one from each starting word. The
    first such span of all records raises a flag that is never lowered: it ends its record, and
    every later one after its first starting word. So a record may count several times, or later
    ones not at all.
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
    """ROUGE by the package `rouge` (sets of n-grams; summary-level L) and BLEU-4, both of a text
    without its last 13 characters.

    Differs from the authors' code: there the end token, where it was generated, takes the place of
    these characters.
    """
    from nltk.translate.bleu_score import sentence_bleu
    from rouge import Rouge

    said = results[0].split("DR:")[-1][:-END]
    if len(said) <= 1 or not said.strip(
        ". \n\t"
    ):  # the authors' code fails on one of full stops alone
        return {"rouge": 0.0, "bleu": 0.0}
    (found,) = Rouge().get_scores(said, doc["summary"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no common 4-grams: 0, as there
        bleu = float(sentence_bleu([doc["summary"].split()], said.split()))
    return {
        "rouge": sum(found[kind]["f"] for kind in ("rouge-1", "rouge-2", "rouge-l")) / 3,
        "bleu": bleu,
    }
