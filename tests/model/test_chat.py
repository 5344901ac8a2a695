"""A chat template puts every prompt into the user's turn, for edits, measurements and suites alike,
and the tokens are those of transformers' own `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import editkit
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.identity import config_hash
from editkit.errors import ConfigError
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.chat import chat_template
from editkit.model.editable import EditableModel
from editkit.model.load import ModelConfig
from editkit.model.tokens import encode_prompts, encode_with_targets, fill, pad, subject_position
from editkit.runner.session import run
from editkit.targets.sequences import locate
from editkit.types import Probe
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model

TEMPLATES = {
    # as ChatML: turns end in tokens of their own, and a system text comes first
    "lines": "{% for m in messages %}{% if loop.first %}<|endoftext|>system\nAnswer.\n{% endif %}"
    "<|endoftext|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}",
    # as Llama 2: a BOS that the template writes, and a blank before the answer
    "brackets": "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] }}{% endif %}"
    "{% endfor %}",
}
PROMPTS = ("The capital of France is", "Danielle Darrieux speaks", "x", "A line\nand another ")


def chat_model(tmp_path: Path, kind: Kind, name: str) -> EditableModel:
    model = tiny_model(kind)
    file = tmp_path / f"{name}.jinja"
    file.write_text(TEMPLATES[name])
    model.chat = chat_template(model.tokenizer, str(file))
    return model


def rendered(model: EditableModel, prompt: str, answer: str | None = None) -> list[int]:
    """The ids of transformers: of a question, or of a whole dialogue."""
    assert model.chat is not None
    turns = [{"role": "user", "content": prompt.rstrip(" ")}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    ids: list[int] = model.tokenizer.apply_chat_template(
        turns,
        chat_template=model.chat.jinja,
        add_generation_prompt=answer is None,
        return_dict=False,
    )
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers_and_the_targets_begin_the_answer(
    tmp_path: Path, kind: Kind, name: str
) -> None:
    model = chat_model(tmp_path, kind, name)
    questions = encode_prompts(model.tokenizer, PROMPTS, chat=model.chat)
    probes = [Probe(prompt=prompt, answer=" Paris and Rome") for prompt in PROMPTS]
    sequences = encode_with_targets(model.tokenizer, probes, chat=model.chat)
    for prompt, ids, sequence in zip(PROMPTS, questions, sequences, strict=True):
        assert list(ids) == rendered(model, prompt)
        dialogue = rendered(model, prompt, "Paris and Rome")
        assert list(sequence.ids) == dialogue[: len(sequence.ids)]
        assert list(sequence.ids[: sequence.start]) == list(ids)
        assert model.tokenizer.decode(list(sequence.target_ids)).strip() == "Paris and Rome"
    assert len(encode_prompts(model.tokenizer, PROMPTS)[0]) < len(questions[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_subjects_position_is_its_last_token_inside_the_users_turn(
    tmp_path: Path, kind: Kind, name: str
) -> None:
    model = chat_model(tmp_path, kind, name)
    for each in requests(3):
        contexts = ("{}", "Paris and Rome. {}")
        encoded, sites = locate(model, each, contexts)
        for context, sequence, site in zip(contexts, encoded, sites, strict=True):
            text = fill(each.prompt, each.subject, context=context)
            assert list(sequence.ids[: sequence.start]) == rendered(model, text.text)
            read = model.tokenizer.decode(list(sequence.ids[: site + 1]))
            before = model.tokenizer.decode(list(sequence.ids[:site]))
            assert re.search(re.escape(each.subject) + r"('s)?\W*$", read), read
            assert each.subject not in before
            assert site == subject_position(sequence, text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_scores_and_answers_are_those_of_the_plain_computation(tmp_path: Path, name: str) -> None:
    model = chat_model(tmp_path, "llama", name)
    probes = [
        Probe(prompt=prompt, answer=answer)
        for prompt in PROMPTS
        for answer in ("Paris", "Rome is", "a")
    ]
    batched = score(model, probes, tokens_per_batch=4096)
    single = score(model, probes, tokens_per_batch=1)
    for probe in probes:
        (sequence,) = encode_with_targets(model.tokenizer, [probe], chat=model.chat)
        with torch.no_grad():
            logits = model.network(**pad([sequence.ids]).arguments).logits[0].log_softmax(-1)
        expected = logits[sequence.predicting][
            range(len(sequence.target_ids)), list(sequence.target_ids)
        ].sum()
        for found in (batched[probe], single[probe]):
            assert found.sum_log_prob == pytest.approx(float(expected), abs=2e-4)
    plain = tiny_model("llama")
    assert score(plain, probes, tokens_per_batch=4096)[probes[0]] != batched[probes[0]]

    answers = continue_greedily(
        model, PROMPTS, max_new_tokens=4, tokens_per_batch=256, until=("never",)
    )
    for prompt in PROMPTS:
        ids = rendered(model, prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
        new = model.tokenizer.decode(
            ids[-4:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert new.strip().startswith(answers[prompt])


def test_an_edit_is_made_in_the_dialogue(tmp_path: Path) -> None:
    model = chat_model(tmp_path, "gpt2", "lines")
    probe = Probe(prompt=request().full_prompt, answer=request().target)
    before = score(model, [probe], tokens_per_batch=256)[probe]
    editkit.edit(
        model,
        request(),
        editor="ft",
        recipe="ft/tiny-gpt2",
        options={"layers": [1], "steps": 10, "lr": 1e-2},
    )
    after = score(model, [probe], tokens_per_batch=256)[probe]
    model.chat = None
    plain = score(model, [probe], tokens_per_batch=256)[probe]
    assert after.sum_log_prob > before.sum_log_prob + 1
    assert after.sum_log_prob > plain.sum_log_prob


def test_the_templates_own_words_are_not_measured_as_the_models(tmp_path: Path) -> None:
    model = chat_model(tmp_path, "gpt2", "lines")
    fluency = Fluency(limit=None, max_tokens=40, top_k=5, seed=0, tokens_per_batch=512)
    texts = fluency._texts(model, PROMPTS)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))
    assert not any("system" in text or "Answer." in text for text in texts)


def test_suites_put_their_items_into_the_same_template(tmp_path: Path) -> None:
    from editkit.evaluation.harness.lm import harness_model
    from editkit.evaluation.harness.load_tasks import build_requests
    from tests.support.suites import a_task

    model = chat_model(tmp_path, "gpt2", "lines")
    assert model.chat is not None
    lm = harness_model(model, tokens_per_batch=512)
    plain = build_requests(a_task(["One", "Two"]), limit=None)
    asked = build_requests(a_task(["One", "Two"]), limit=None, chat=lm.apply_chat_template)
    for item, instances in plain.items():
        for bare, framed in zip(instances, asked[item], strict=True):
            expected = model.chat.before + bare.args[0] + model.chat.after
            assert framed.args[0] == expected
            assert lm.tok_encode(framed.args[0]) == rendered(model, bare.args[0])


def test_a_model_in_memory_and_a_named_one_take_a_template_too(tmp_path: Path) -> None:
    file = tmp_path / "lines.jinja"
    file.write_text(TEMPLATES["lines"])
    tiny = tiny_model("gpt2")
    for model in (
        editkit.load(tiny.network, tiny.tokenizer, chat_template=str(file)),
        editkit.load("tiny-gpt2", chat_template=str(file)),
    ):
        assert model.chat is not None and model.chat.name == "lines.jinja"
    assert editkit.load("tiny-gpt2").chat is None


# --- runs


def composed(tmp_path: Path, *overrides: str) -> Any:
    chosen = compose(
        [
            *("model=tiny-gpt2", "editor=ft", "suite=none", "tracker=none", "edits=2"),
            *("milestones=[0,2]", f"paths.outputs={tmp_path}", "editor.steps=2"),
            *overrides,
        ]
    )
    return build(chosen.config, choices=chosen.choices)


@pytest.mark.slow
def test_records_and_provenance_name_the_template_and_null_leaves_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "lines.jinja"
    file.write_text(TEMPLATES["lines"])
    plain, chat = composed(tmp_path), composed(tmp_path, f"model.chat_template={file}")
    assert plain.folder.parent != chat.folder.parent
    before = dict(plain.config) | {
        "model": {k: v for k, v in plain.config["model"].items() if k != "chat_template"}
    }
    assert config_hash(before) == config_hash(plain.config)
    for experiment, label in ((plain, None), (chat, "lines.jinja ")):
        assert run(experiment) == 0
        records = [
            json.loads(line)
            for line in (experiment.folder / "evals.jsonl").read_text().splitlines()
        ]
        provenance = json.loads((experiment.folder / "provenance.json").read_text())["model"]
        editing = [record for record in records if record["kind"] == "editing"]
        named = {record.get("chat_template") for record in editing}
        assert editing and len(named) == 1
        assert named == {provenance.get("chat_template")}
        if label is None:
            assert named == {None}
            assert all("chat_template" not in record for record in records)
        else:
            assert str(next(iter(named))).startswith(label)


def test_a_run_does_not_resume_with_another_template(tmp_path: Path) -> None:
    file = tmp_path / "a.jinja"
    file.write_text(TEMPLATES["lines"])
    given = (f"model.chat_template={file}", "checkpoint.every=1")
    experiment = composed(tmp_path, *given)
    assert run(experiment) == 0
    (experiment.folder / "DONE").unlink()
    file.write_text(TEMPLATES["brackets"])
    with pytest.raises(ConfigError, match=r"model\.chat_template: .*a\.jinja is not what the run"):
        run(composed(tmp_path, *given))


# --- bad choices


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{% for %}", "the template does not render (TemplateSyntaxError"),
        ("{{ messages[7]['content'] }}", "the template does not render (UndefinedError"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ 1 / 0 }}", "the template does not render (ZeroDivisionError"),
        ("Hello.", "the template does not write the user's text once, as it is"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "once, as it is"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "once, as it is"),
    ],
)
def test_a_template_that_does_not_render_is_reported_before_the_weights_are_read(
    tmp_path: Path, content: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loads")
    )
    file = tmp_path / "own.jinja"
    file.write_text(content)
    config = ModelConfig(id="asset:tiny-gpt2", chat_template=str(file))
    with pytest.raises(ConfigError, match=re.escape(problem)) as error:
        config.load("cpu")
    assert len(error.value.problems) == 1 and str(error.value).startswith("model.chat_template: ")


def test_a_missing_file_and_a_tokenizer_without_a_template_are_reported(tmp_path: Path) -> None:
    gone = ModelConfig(id="asset:tiny-gpt2", chat_template="gone.jinja")
    (problem,) = gone.source_problems()
    assert problem == (
        "model.chat_template: there is no such file (got 'gone.jinja'; expected null, tokenizer or a"
        " file with a Jinja template)."
    )
    with pytest.raises(ConfigError, match=r"there is no such file"):
        gone.load("cpu")
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template"):
        ModelConfig(id="asset:tiny-gpt2", chat_template="tokenizer").load("cpu")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"model\.chat_template: cannot be read"):
        ModelConfig(id="asset:tiny-gpt2", chat_template=str(tmp_path / "bytes.jinja")).load("cpu")


def test_no_call_in_editkit_forgets_the_template() -> None:
    """Whatever is made of prompts of a model names its chat template. Running text has none, and
    SERAC refuses templates.
    """
    without = {
        "editkit/evaluation/perplexity.py": 1,
        "editkit/runner/context_length.py": 1,
        "editkit/editors/curvature.py": 1,
        "editkit/editors/serac.py": 2,
        "editkit/training/serac.py": 1,
    }
    root = Path(editkit.__file__).parent
    calls = re.compile(r"\b(?:encode_with_targets?|encode_prompts|encode)\(\s*model\.tokenizer")
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        forgotten = [
            found.start()
            for found in calls.finditer(text)
            if "chat=model.chat" not in text[found.start() : found.start() + 250]
        ]
        name = str(path.relative_to(root.parent))
        if not name.startswith("editkit/bench/"):
            assert len(forgotten) == without.get(name, 0), name
