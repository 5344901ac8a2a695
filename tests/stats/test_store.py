"""The store returns the requested second moments or refuses a file, and the sample of texts is
always the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.datasets.facts_table import read_table
from editkit.errors import ConfigError, OptionError
from editkit.linalg.lowrank import LowRank
from editkit.model.capture import capture
from editkit.model.editable import EditableModel
from editkit.model.tokens import pad
from editkit.stats.build import build, moment_keys
from editkit.stats.corpus import StatsConfig, digest, texts
from editkit.stats.store import Moments, list_stored, read, verify
from tests.support.helpers import SENTENCES, real_data, tiny_model
from tests.support.statistics import text_stats

MANY = tuple(f"{one} {other}" for one in SENTENCES for other in SENTENCES)


def config(folder: Path, **changes: Any) -> StatsConfig:
    return text_stats(folder, "\n\n".join(MANY), **changes)


def dense(
    model: EditableModel, module: str, documents: Sequence[str], context_length: int = 32
) -> tuple[torch.Tensor, int]:
    """sum k k^T in float64, one document at a time, and the number of tokens."""
    size = model.weight(module).shape[1]
    sum_II, num_tokens = torch.zeros(size, size, dtype=torch.float64), 0
    for document in documents:
        batch = pad([model.tokenizer(document)["input_ids"][:context_length]])
        with torch.no_grad(), capture(model, inputs=[module]) as captured:
            model.final_hidden(batch)
        for key_I in captured.inputs[module][0].double():
            sum_II += torch.outer(key_I, key_I)
            num_tokens += 1
    return sum_II, num_tokens


def modules_of(model: EditableModel, *layers: int) -> tuple[str, ...]:
    return model.down_projections(layers)


# The store


def test_what_is_stored_is_what_was_computed_and_is_not_computed_again(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    modules = modules_of(model, 0, 2)
    first = build(model, modules, chosen)
    files = {path: path.read_bytes() for path in (tmp_path / "stats").iterdir()}
    assert len(files) == 2
    again = build(model, modules, chosen, progress=lambda *_: pytest.fail("computed again"))
    for module in modules:
        wanted_II, num_tokens = dense(model, module, MANY)
        moment_II = first.second_moment(module)
        assert torch.equal(moment_II, again.second_moment(module))
        assert float((moment_II - wanted_II / num_tokens).norm() / moment_II.norm()) < 1e-6
    assert first.digests == again.digests
    assert set(first.digests) == set(modules)
    assert files == {path: path.read_bytes() for path in (tmp_path / "stats").iterdir()}


def test_only_missing_modules_are_collected(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    build(model, modules_of(model, 0), chosen)
    before = {path.name for path in (tmp_path / "stats").iterdir()}
    build(model, modules_of(model, 0, 1), chosen)
    added = {path.name for path in (tmp_path / "stats").iterdir()} - before
    assert len(added) == 1
    assert next(iter(added)).startswith("transformer.h.1.mlp.c_proj-")


def test_the_inverse_is_that_of_the_second_moment(tmp_path: Path) -> None:
    model = tiny_model("llama")
    [module] = modules_of(model, 1)
    moments = build(model, [module], config(tmp_path))
    keys_IN = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    solved_IN = moments.inverse_times(module, keys_IN)
    assert solved_IN.dtype == torch.float64
    torch.testing.assert_close(
        moments.second_moment(module) @ solved_IN, keys_IN.double(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "change", ["weights", "texts", "context_length", "num_documents", "dtype", "products", "preset"]
)
def test_whatever_changes_the_statistics_changes_the_file(tmp_path: Path, change: str) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    [module] = modules_of(model, 0)
    build(model, [module], chosen)
    if change == "weights":
        model = tiny_model("gpt2", seed=1)
    elif change == "dtype":
        model = tiny_model("gpt2", dtype="bfloat16")
    elif change == "texts":
        (tmp_path / "corpus.txt").write_text("\n".join((*MANY[:-1], MANY[0])), encoding="utf-8")
    elif change == "context_length":
        chosen = dataclasses.replace(chosen, context_length=16)
    elif change == "products":
        chosen = dataclasses.replace(chosen, products="bfloat16")
    elif change == "preset":
        chosen = dataclasses.replace(chosen, preset="minimal", vectors_per_dimension=2)
    else:
        chosen = dataclasses.replace(chosen, num_documents=60)
    calls: list[str] = []
    build(model, [module], chosen, announce=calls.append)
    assert calls
    assert len(list((tmp_path / "stats").iterdir())) == 2


def test_how_the_work_is_cut_does_not_change_the_file(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    build(model, modules_of(model, 0), chosen)
    build(
        model,
        modules_of(model, 0),
        dataclasses.replace(chosen, batch_tokens=4096),
        progress=lambda *_: pytest.fail("computed again"),
    )


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "text"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    build(model, modules_of(model, 0), chosen)
    [path] = (tmp_path / "stats").iterdir()
    payload = bytearray(path.read_bytes())
    payload[-20] ^= 1
    path.write_bytes(
        {
            "flipped": bytes(payload),
            "truncated": bytes(payload[:-100]),
            "empty": b"",
            "text": b"no statistics at all",
        }[damage]
    )
    with pytest.raises(ConfigError, match="corrupt statistics") as caught:
        build(model, modules_of(model, 0), chosen)
    assert str(path) in str(caught.value)
    assert path.exists()
    [stored] = verify(tmp_path / "stats")
    assert "corrupt statistics" in str(stored.problem)


def test_a_file_under_another_key_is_refused(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    build(model, modules_of(model, 0), chosen)
    [path] = (tmp_path / "stats").iterdir()
    other = moment_keys(model, modules_of(model, 1), chosen, MANY)["transformer.h.1.mlp.c_proj"]
    path.rename(path.with_name(other.file_name))
    with pytest.raises(ConfigError, match=r"of another key \(module differ"):
        build(model, modules_of(model, 1), chosen)
    [stored] = verify(tmp_path / "stats")
    assert "does not belong to its key" in str(stored.problem)


def test_a_changed_key_inside_the_file_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, chosen = tiny_model("gpt2"), config(tmp_path)
    build(model, modules_of(model, 0), chosen)
    [path] = (tmp_path / "stats").iterdir()
    key = moment_keys(model, modules_of(model, 0), chosen, MANY)["transformer.h.0.mlp.c_proj"]
    forged = dataclasses.replace(key, fingerprint="of another model")
    with safe_open(path, framework="pt") as opened:
        checksum = opened.metadata()["checksum"]
    save_file(load_file(path), path, metadata={"key": forged.as_json(), "checksum": checksum})
    with pytest.raises(ConfigError, match="checksum"):
        read(path)


def test_listing_names_the_stored_files(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    assert list_stored(tmp_path / "nothing here") == verify(tmp_path / "nothing here") == []
    build(model, modules_of(model, 0, 1), chosen)
    (tmp_path / "stats" / "other.safetensors").write_bytes(b"{}")
    for stored in (list_stored(tmp_path / "stats"), verify(tmp_path / "stats")):
        intact = [entry for entry in stored if entry.problem is None]
        assert [entry.key.module for entry in intact if entry.key] == [
            "transformer.h.0.mlp.c_proj",
            "transformer.h.1.mlp.c_proj",
        ]
        assert all(entry.num_tokens and entry.num_bytes > 0 for entry in intact)
        assert len(stored) == 3
    key = json.loads(intact[0].key.as_json()) if intact[0].key else {}
    assert key["corpus"] == digest(texts(chosen))
    assert key["fingerprint"] == model.fingerprint


def test_statistics_are_never_taken_on_an_edited_model(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path)
    [module] = modules_of(model, 0)
    model.edit([module])
    rows, columns = model.weight(module).shape
    model.apply(module, LowRank(torch.ones(rows, 1), torch.ones(columns, 1)))
    with pytest.raises(AssertionError, match="unedited"):
        build(model, [module], chosen)
    assert not (tmp_path / "stats").exists()


def test_an_editor_without_second_moments_gets_none(tmp_path: Path) -> None:
    model, chosen = tiny_model("gpt2"), config(tmp_path, name="none", source="none", path=None)
    assert build(model, [], chosen).digests == Moments().digests == {}
    with pytest.raises(
        ConfigError, match=r"stats: .*got 'none'; expected world, facts, text, hub or imported"
    ):
        build(model, modules_of(model, 0), chosen)


# The texts


def test_text_files_give_their_lines_and_a_seeded_sample_of_them(tmp_path: Path) -> None:
    chosen = config(tmp_path)
    assert tuple(texts(chosen)) == MANY
    some = tuple(texts(dataclasses.replace(chosen, num_documents=10)))
    assert some == tuple(texts(dataclasses.replace(chosen, num_documents=10)))
    assert some != tuple(texts(dataclasses.replace(chosen, num_documents=10, seed=2)))
    assert len(some) == 10
    assert [MANY.index(text) for text in some] == sorted(MANY.index(text) for text in some)


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "a.txt", "c.json"):
        (tmp_path / "texts" / name).write_text(f"from {name}\n", encoding="utf-8")
    assert list(texts(config(tmp_path, path=str(tmp_path / "texts")))) == [
        "from a.txt",
        "from b.txt",
    ]


@pytest.mark.parametrize(
    ("separator", "count"), [("<|end|>", 3), (None, 1), ("\n", 7), ("\n\n", 2), (r"\n\n", 2)]
)
def test_the_separator_says_where_a_document_ends(
    tmp_path: Path, separator: str | None, count: int
) -> None:
    chosen = config(tmp_path, path=str(tmp_path / "stories.txt"), separator=separator)
    (tmp_path / "stories.txt").write_text(
        "one\ntwo<|end|>\n\nthree\nfour\n<|end|>\nfive\n<|end|>\n", encoding="utf-8"
    )
    found = list(texts(chosen))
    assert len(found) == count
    if separator == "<|end|>":
        assert found == ["one\ntwo", "three\nfour", "five"]


@pytest.mark.parametrize("source", ["world", "facts"])
def test_bundled_texts_are_a_source_that_needs_nothing(tmp_path: Path, source: str) -> None:
    chosen = config(tmp_path, name=source, source=source, path=None, num_documents=50)
    first = list(texts(chosen))
    assert len(first) == 50
    assert first == list(texts(chosen)) != list(texts(dataclasses.replace(chosen, seed=2)))


def test_texts_about_facts_state_what_is_true_and_come_once_each(tmp_path: Path) -> None:
    chosen = config(tmp_path, name="facts", source="facts", path=None, num_documents=400)
    found = list(texts(chosen))
    assert len(set(found)) == 400
    table = read_table()
    stated = {f"{prompt} {fact.object}." for fact in table.facts for prompt in fact.prompts}
    assert all(text.split(". ", 1)[1] in stated for text in found)


def test_the_digest_is_of_content_order_and_borders() -> None:
    digests = [
        digest(documents)
        for documents in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "d"])
    ]
    assert len(set(digests)) == len(digests)
    assert digest(iter(["ab", "c"])) == digests[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, r"^path: is missing with source=text"),
        (
            {"num_documents": 0, "batch_tokens": -1},
            r"- num_documents: must be positive.*\n.*- batch_tokens: must be positive",
        ),
        ({"source": "hub", "path": None}, "id on the hub"),
        (
            {"context_length": 512},
            r"^batch_tokens: must not be below context_length \(got 256; expected at least 512\)",
        ),
        ({"save_every_s": -1.0, "separator": ""}, r"- save_every_s: .*\n.*- separator: "),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "binary.txt"])
def test_texts_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    chosen = config(tmp_path, path=str(tmp_path / name))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=rf"stats\.path.*{name}"):
        list(texts(chosen))


@pytest.mark.data
def test_running_text_gives_an_invertible_moment(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    [module] = modules_of(model, 0)
    path = real_data("lm_text/wikitext-2-raw/wiki.test.raw")
    moments = build(
        model, [module], config(tmp_path, path=str(path), num_documents=60, context_length=64)
    )
    assert bool(moments.inverse_times(module, torch.ones(128, 1)).isfinite().all())
