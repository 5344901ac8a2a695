"""Scores of editkit's own tasks. The tasks' yamls name these functions as `process_results`: from a
record and the model's results to scores.

    normalise   lower case, without punctuation, articles and repeated blanks: SQuAD's (Rajpurkar
                et al. 2016, arXiv 1606.05250), used for open-domain questions by Chen et al. 2017
                (arXiv 1704.00051)
    ROUGE       F-measures (Lin 2004); `rouge` is the mean of ROUGE-1, -2 and -L
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]
Scores = dict[str, Any]


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(generation: str, answers: Iterable[str]) -> float:
    """1 if it is one of the answers after normalisation."""
    return float(normalise(generation) in map(normalise, answers))


def first_line(generation: str) -> str:
    """The first line that is not blank."""
    return next((line for line in generation.split("\n") if line.strip()), "")


def rouge_of(generation: str, reference: str) -> Scores:
    """F-measures: ROUGE-1, -2 and -L, and their mean `rouge`."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, generation)
    measures = {kind: float(score.fmeasure) for kind, score in scores.items()}
    return {"rouge": sum(measures.values()) / len(measures), **measures}


def is_most_likely(
    doc_choices: Sequence[str], answer: str, results: Sequence[tuple[float, bool]]
) -> float:
    """1 if the answer is the choice with the largest sum of log-probabilities; of equal ones the
    first counts.
    """
    log_probs = [log_prob for log_prob, _ in results]
    return float(doc_choices[log_probs.index(max(log_probs))] == answer)


# The bundled world and the suite `small`


def number(doc: Doc, results: Sequence[str]) -> Scores:
    """The generation is the number and nothing else, except for a full stop."""
    return {"solve_rate": float(results[0].strip().removesuffix(".") == doc["answer"])}


def choice(doc: Doc, results: Sequence[tuple[float, bool]]) -> Scores:
    """The answer is the most likely of the choices."""
    return {"accuracy_likelihood": is_most_likely(doc["choices"], doc["answer"], results)}


def premise(doc: Doc, results: Sequence[tuple[float, bool]]) -> Scores:
    """The conclusion is most likely after the right premise."""
    premises = doc["premises"]
    return {"accuracy_likelihood": is_most_likely(premises, premises[doc["answer"]], results)}


def world_entailment(doc: Doc, results: Sequence[str]) -> Scores:
    return {"accuracy": exact_match(results[0], [doc["answer"]])}


def world_passage(doc: Doc, results: Sequence[str]) -> Scores:
    return {"exact_match": exact_match(results[0], [doc["answer"]])}


def sentence(doc: Doc, results: Sequence[str]) -> Scores:
    measures = rouge_of(results[0], doc["answer"])
    return {"rougeL": measures["rougeL"], "rouge": measures["rouge"]}


# The papers' tasks


def gsm8k(doc: Doc, results: Sequence[str]) -> Scores:
    """The first number of the generation is the answer, without thousands' commas."""
    match = re.search(r"-?\d[\d,]*(?:\.\d+)?", results[0])
    gold = doc["answer"].rpartition("####")[2]
    return {"solve_rate": float(match is not None and _number(match[0]) == _number(gold))}


def _number(text: str) -> float:
    return float(text.replace(",", "").strip())


def entailment_answer(doc: Doc) -> str:
    """The right answer. The hub's labels are numbers, those of the file are words."""
    return "True" if doc["label"] in (0, "entailment") else "False"


def sentiment_answer(doc: Doc) -> str:
    return "positive" if int(doc["label"]) == 1 else "negative"


def rte(doc: Doc, results: Sequence[str]) -> Scores:
    """The generation's first word is the right one of the two. Any other word is wrong."""
    return {"accuracy": float(_first_word(results[0]) == normalise(entailment_answer(doc)))}


def sst2(doc: Doc, results: Sequence[str]) -> Scores:
    """As `rte`."""
    return {"accuracy": float(_first_word(results[0]) == sentiment_answer(doc))}


def rte_likelihood(doc: Doc, results: Sequence[tuple[float, bool]]) -> Scores:
    return {
        "accuracy_likelihood": is_most_likely(("True", "False"), entailment_answer(doc), results)
    }


def sst2_likelihood(doc: Doc, results: Sequence[tuple[float, bool]]) -> Scores:
    return {
        "accuracy_likelihood": is_most_likely(
            ("positive", "negative"), sentiment_answer(doc), results
        )
    }


def _first_word(generation: str) -> str:
    return next(iter(normalise(generation).split()), "")


def nq(doc: Doc, results: Sequence[str]) -> Scores:
    """The first line, without an "Answer:" at its beginning, is one of the answers. The prompt ends
    with the question, without an "Answer:".
    """
    line = first_line(results[0]).strip()
    return {"exact_match": exact_match(re.sub(r"(?i)^answer:", "", line), doc["answer"])}


def summary(doc: Doc, results: Sequence[str]) -> Scores:
    return rouge_of(results[0], doc["summary"])


# CoNLL-2003

ENTITY_KINDS = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
# The hub numbers the tags in this order.
CONLL_TAGS = (
    *("O", "B-PER", "I-PER", "B-ORG", "I-ORG"),
    *("B-LOC", "I-LOC", "B-MISC", "I-MISC"),
)


def entity_questions(sentences: Any) -> Any:
    """A question for each sentence and kind of entity. Sentences have `tokens` and `ner_tags`."""
    import datasets

    return datasets.Dataset.from_list(
        [
            {
                "text": " ".join(row["tokens"]),
                "kind": ENTITY_KINDS[kind],
                "entities": entities(row["tokens"], row["ner_tags"], kind),
            }
            for row in sentences
            for kind in ENTITY_KINDS
        ]
    )


def entities(tokens: Sequence[str], tags: Sequence[int | str], kind: str) -> list[str]:
    """The spans of that kind."""
    spans: list[list[str]] = []
    inside = False
    for token, tag in zip(tokens, tags, strict=True):
        name = CONLL_TAGS[tag] if isinstance(tag, int) else tag
        if name == f"B-{kind}" or (name == f"I-{kind}" and not inside):
            spans.append([token])
        elif name == f"I-{kind}":
            spans[-1].append(token)
        inside = name in (f"B-{kind}", f"I-{kind}")
    return [" ".join(span) for span in spans]


def conll03(doc: Doc, results: Sequence[str]) -> Scores:
    """Counts of one question: correctly named entities, named entities, and all entities."""
    named = Counter(normalise(part) for part in re.split(r"[,;\n]", results[0]) if normalise(part))
    gold = Counter(map(normalise, doc["entities"]))
    return {"entity_f1": ((named & gold).total(), named.total(), gold.total())}


def entity_f1(counts: Sequence[tuple[int, int, int]]) -> float:
    """F1 over all entities of all questions; 1 if there is none and none was named."""
    right, named, gold = (sum(column) for column in zip(*counts, strict=True))
    return 2 * right / (named + gold) if named + gold else 1.0
