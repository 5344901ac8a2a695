"""A ledger gives the sum without a block, names what later edits owe to it, and notices what was
changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editkit.errors import ConfigError
from editkit.ledger.pair import diff, merge
from editkit.ledger.revert import revert
from editkit.linalg.lowrank import Update, dense
from editkit.model.load import ModelConfig
from editkit.records.ledger import FACTORS, LEDGER, LedgerRecord, read_ledger
from editkit.records.writer import EVALS, STEPS, RecordFiles
from editkit.restraints.prune import Prune
from editkit.runner.checkpoint import Checkpoint
from editkit.runner.measure import corrections
from editkit.runner.session import require_same_ledger
from tests.support.helpers import KINDS, Kind, request
from tests.support.ledgers import four_blocks, matrices, saved_base, update_of, write_ledger

PRUNE = {
    "_target_": "editkit.restraints.prune.Prune",
    "function": "linear",
    "alpha": 2.0,
    "apply_at": "evaluation",
    "every": None,
    "allow_amplify": False,
}


def plain_sum(updates: Sequence[Mapping[str, Update]], module: str) -> torch.Tensor:
    """Of the updates of a matrix, (O, I) float64."""
    sums = [dense(own[module]).double() for own in updates if module in own]
    return torch.stack(sums).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reverted_model_has_the_sum_of_all_other_blocks(tmp_path: Path, kind: Kind) -> None:
    run, updates = four_blocks(tmp_path, kind)
    model = revert(run, ["2", "test/0"]).model
    for module in model.edited_modules:
        expected = model.base(module).double() + plain_sum(updates[2:], module)
        torch.testing.assert_close(model.weight(module).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_reverted_model_is_measured_and_says_what_later_edits_owe(tmp_path: Path) -> None:
    run, _ = four_blocks(tmp_path)
    made = revert(run, ["2"])
    first, second = made.model.edited_modules
    assert made.later == {3: (second,), 4: (first,)}
    assert "with the reverted edits" in made.saw
    assert made.before.groups["reverted"].n == 2 and made.after.groups["kept"].n == 3
    assert made.after.locality is not None and made.after.num_locality == 3


def test_without_any_block_the_model_is_the_unedited_one(tmp_path: Path) -> None:
    run, _ = four_blocks(tmp_path)
    made = revert(run, ["1", "2", "3", "4"])
    for module in made.model.edited_modules:
        assert torch.equal(made.model.weight(module), made.model.base(module))
    assert made.after.groups["reverted"].unedited == made.after.locality == 1.0
    assert made.after.groups["kept"].efficacy is None


def test_one_request_of_a_batch_is_refused_with_the_reason(tmp_path: Path) -> None:
    run, _ = four_blocks(tmp_path)
    with pytest.raises(ConfigError, match="shares block 2 with 1 others: one least-squares"):
        revert(run, ["test/2"])


def test_a_view_is_computed_from_the_reverted_total(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    model = revert(four_blocks(tmp_path)[0], ["4"]).model
    module = matrices(model)[0]
    updates = [{module: update_of(model, module, seed)} for seed in (7, 8, 9)]
    blocks = [(own, [request(index)]) for index, own in enumerate(updates)]
    run = write_ledger(tmp_path / "pruned", base, blocks, restraint={"prune": PRUNE})
    plain, pruned = revert(run, ["2"]).model, revert(run, ["2"], view="prune").model
    restraint = Prune(**{name: value for name, value in PRUNE.items() if name != "_target_"})
    sigma = float(torch.linalg.matrix_norm(plain.base(module), ord=2))
    totals = {module: plain.total(module)}
    correction = corrections(restraint, totals, {module: sigma})[module]
    expected = plain.weight(module) + dense(correction).float()
    torch.testing.assert_close(pruned.weight(module), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="--view: the run has no such view"):
        revert(run, ["2"], view="nope")


@pytest.mark.parametrize("form", ["model", "delta", "lora"])
def test_an_export_holds_the_reverted_weights_and_says_so(tmp_path: Path, form: str) -> None:
    from safetensors.torch import load_file

    run, _ = four_blocks(tmp_path)
    made = revert(run, ["4", "1"], to=tmp_path / "out", form=form)  # type: ignore[arg-type]
    about = json.loads((tmp_path / "out" / "editkit.json").read_text())["ledger"]
    assert about["reverted"] == [1, 4] and about["requests"] == ["test/0", "test/4"]
    assert about["after"]["locality"] == made.after.locality
    name = {"model": "model", "delta": "editkit_delta", "lora": "adapter_model"}[form]
    tensors = load_file(tmp_path / "out" / f"{name}.safetensors")
    module = made.model.edited_modules[0]
    total = made.model.total(module).dense()
    if form == "model":
        assert torch.equal(tensors[f"{module}.weight"], made.model.weight(module))
    else:
        keys = {
            "delta": (f"{module}.left", f"{module}.right"),
            "lora": (
                f"base_model.model.{module}.lora_B.weight",
                f"base_model.model.{module}.lora_A.weight",
            ),
        }[form]
        left, right = (tensors[key] for key in keys)
        product = left @ (right.mT if form == "delta" else right)
        torch.testing.assert_close(product, total, rtol=1e-4, atol=1e-4)


def test_a_merge_is_the_sum_of_both_totals_and_names_conflicts(tmp_path: Path) -> None:
    run, updates = four_blocks(tmp_path)
    base = tmp_path / "base"
    model = ModelConfig(id=str(base)).load("cpu")
    module = matrices(model)[0]
    other = {module: update_of(model, module, 11)}
    same_fact = replace(request(0), id="b/0", prompt="the mother tongue  of {} is", target="Dutch")
    b = write_ledger(tmp_path / "b", base, [(other, [same_fact, request(8)])])
    made = merge(run, b)
    expected = made.model.base(module).double() + plain_sum([*updates, other], module)
    torch.testing.assert_close(made.model.weight(module).double(), expected, rtol=1e-6, atol=1e-6)
    kinds = {(each.kind, each.a.id, each.b.id, each.agrees) for each in made.conflicts}
    assert kinds == {
        ("fact", "test/0", "b/0", False),
        ("fact", "test/3", "b/0", False),
        ("prompt", "test/2", "test/8", True),
    }
    assert set(made.variants) == {"A", "B", "merged"}
    found = diff(run, b)
    assert [each.id for each in found.only["B"]] == ["b/0"] and found.same == 0
    assert found.totals[module]["b"] == pytest.approx(float(dense(other[module]).norm()))
    same = diff(run, run)
    assert same.same == 5 and same.totals[module]["difference"] == 0.0


def test_ledgers_of_different_base_models_are_refused(tmp_path: Path) -> None:
    run, _ = four_blocks(tmp_path)
    other = saved_base(tmp_path / "other", seed=3)
    b = write_ledger(tmp_path / "b", other, [])
    for call in (diff, merge):
        with pytest.raises(ConfigError, match="edited different base models"):
            call(run, b)


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    run, _ = four_blocks(tmp_path)
    (tmp_path / "empty").mkdir()
    cases: dict[str, Callable[[], object]] = {
        r"empty: has no ledger .*Fix: run it with ledger\.keep=true": lambda: revert(
            tmp_path / "empty", ["1"]
        ),
        "none: not a folder": lambda: revert(tmp_path / "none", ["1"]),
        r"2 problems[\s\S]*got '9'; expected a block, 1 to 4[\s\S]*got 'x/1'": lambda: revert(
            run, ["9", "1", "x/1"]
        ),
        "--rank: larger than the matrix": lambda: revert(
            run, ["4"], to=tmp_path / "o", form="lora", rank=10_000
        ),
        "--to: nothing is written without it": lambda: revert(run, ["1"], rank=2),
        "--as: unknown form": lambda: revert(
            run,
            ["1"],
            to=tmp_path / "o",
            form="zip",  # type: ignore[arg-type]
        ),
    }
    for pattern, call in cases.items():
        with pytest.raises(ConfigError, match=pattern):
            call()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("keeps", [True, False])
def test_a_run_cannot_begin_or_end_its_ledger_when_it_resumes(keeps: bool) -> None:
    kept = {STEPS: 9, EVALS: 9} | ({} if keeps else {LEDGER: 9})
    checkpoint = Checkpoint(step=1, groups={}, facts={}, record_bytes=kept)
    require_same_ledger(checkpoint, keeps=not keeps)
    began = "without" if keeps else "with"
    with pytest.raises(ConfigError, match=rf"ledger\.keep: the run began {began} a ledger"):
        require_same_ledger(checkpoint, keeps=keeps)


def changed_line(run: Path, old: bytes, new: bytes) -> None:
    path = run / LEDGER
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def without_line(run: Path, index: int) -> None:
    lines = (run / LEDGER).read_bytes().splitlines(keepends=True)
    del lines[index]
    (run / LEDGER).write_bytes(b"".join(lines))


def changed_head(run: Path) -> None:
    path = run / FACTORS / "head.json"
    path.write_text(path.read_text().replace("memit", "rome"))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda run: changed_line(run, b'"English"', b'"Breton"'), r"ledger\.jsonl:1: the line"),
        (lambda run: changed_line(run, b'"note": "why"', b'"note": "how"'), r"jsonl:1: the line"),
        (lambda run: without_line(run, 1), r"ledger\.jsonl:2: the line, the one before"),
        (changed_head, r"ledger\.jsonl:1: the line"),
        (lambda run: changed_line(run, b'{"id"', b'"id"'), r"ledger\.jsonl:1: malformed line"),
    ],
)
def test_a_changed_ledger_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], pattern: str
) -> None:
    base = saved_base(tmp_path / "base")
    blocks = [({}, [request(index)]) for index in range(3)]
    run = write_ledger(tmp_path / "run", base, blocks, note="why")
    assert len(read_ledger(run).requests) == 3
    change(run)
    with pytest.raises(ConfigError, match=pattern):
        read_ledger(run)


def test_changed_factors_are_noticed(tmp_path: Path) -> None:
    run, _ = four_blocks(tmp_path)
    path = read_ledger(run).blocks[1].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="does not match its checksum"):
        revert(run, ["1"])


def test_a_ledger_is_cut_back_to_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    run, updates = four_blocks(tmp_path)
    head = json.loads((run / FACTORS / "head.json").read_text())

    def record(step: int) -> LedgerRecord:
        return LedgerRecord(step=step, requests=(request(step),), updates=updates[step - 1])

    def contents(folder: Path) -> list[str]:
        return [block.content for block in read_ledger(folder).blocks]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    files = RecordFiles(whole, {}, head)
    for step in (1, 2, 3):
        files.append_block(record(step))
    files.close()
    files = RecordFiles(killed, {}, head)
    files.append_block(record(1))
    lengths = files.sync()
    assert set(lengths) == {STEPS, EVALS, LEDGER}
    files.append_block(record(2))
    files.close()
    with open(killed / LEDGER, "ab") as file:
        file.write(b'{"id": 3, "requ')
    assert contents(killed) == contents(whole)[:2]  # the half line is left out
    again = RecordFiles(killed, lengths, head)
    for step in (2, 3):
        again.append_block(record(step))
    again.close()
    assert contents(killed) == contents(whole)
    for ours, theirs in zip(read_ledger(killed).blocks, read_ledger(whole).blocks, strict=True):
        assert ours.path.read_bytes() == theirs.path.read_bytes()
