"""The sources of datasets, and the order of their requests."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from editkit.datasets.world import WorldDataset
from tests.support.counterfact_files import (
    counterfact,
    flat,
    original,
    problems_of,
    write,
    zsre,
)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    assert problems_of(counterfact(str(tmp_path / "none.json")))[0].startswith(
        f"dataset.path: the file does not exist (got '{tmp_path / 'none.json'}'; expected a JSON file"
    )
    write(tmp_path, [])
    assert (
        "expected a JSON file; in the folder: records.json"
        in problems_of(counterfact(str(tmp_path)))[0]
    )


def test_the_data_folder_is_used_when_no_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITKIT_DATA", str(tmp_path))
    assert (
        f"{tmp_path / 'counterfact/x.json'} ($EDITKIT_DATA) does not exist"
        in problems_of(counterfact(None))[0]
    )
    (tmp_path / "counterfact").mkdir()
    (tmp_path / "counterfact/x.json").write_text(json.dumps([flat()]))
    assert counterfact(None).load(0).origin == str(tmp_path / "counterfact/x.json")
    path = write(tmp_path, [flat(), flat(1)])
    assert len(counterfact(path).load(0).requests) == 2  # an explicit path comes first


def test_without_any_source_the_error_lists_the_searched_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    problem = problems_of(zsre(None))[0]
    assert all(
        part in problem
        for part in (
            "dataset.path is null",
            "$EDITKIT_DATA is not set",
            "dataset.id is null",
            "zsre_mend_eval.json",
        )
    )


def test_the_digest_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, [flat()])
    assert counterfact(path).load(0).digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_order_is_that_of_the_file_or_determined_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, [flat(index) for index in range(30)])
    in_file = [request.id for request in counterfact(path).load(1).requests]
    assert in_file == [f"counterfact/{index}" for index in range(30)]
    shuffled = [
        [request.id for request in counterfact(path, order="shuffled").load(seed).requests]
        for seed in (1, 1, 2)
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == sorted(in_file) and shuffled[0] != in_file
    assert [
        request.id for request in counterfact(path, order="shuffled", limit=5).load(1).requests
    ] == shuffled[0][:5]
    last_first = counterfact(path, order="reversed", limit=5).load(1).requests
    assert [request.id for request in last_first] == in_file[:-6:-1]
    assert (
        "dataset.limit: out of range (got 0; expected at least 1"
        in problems_of(counterfact(path, limit=0))[0]
    )


def test_the_world_needs_no_file_and_its_requests_have_counterfacts_shape() -> None:
    dataset = WorldDataset(name="world", world_seed=0, order="file", limit=None)
    loaded = dataset.load(0)
    assert loaded == dataset.load(1)
    assert len({request.id for request in loaded.requests}) == len(loaded.requests) >= 1000
    for request in loaded.requests:
        assert (
            request.prompt.count("{}") == 1
            and request.target
            and request.target != request.target_old
        )
        assert len(request.paraphrases) >= 2 and len(request.neighbours) >= 5
    assert loaded.digest.startswith("2074abfd78a5"), "runs of earlier versions resume"
    assert (
        loaded.digest
        != WorldDataset(name="world", world_seed=1, order="file", limit=None).load(0).digest
    )


def test_records_are_checked_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path, [flat()])
    program = (
        "import sys; from editkit.datasets.counterfact import CounterFact; import editkit.datasets.zsre, editkit.datasets.world;"
        f"CounterFact(name='c', path={path!r}, file='', id=None, snippets=None, order='file', limit=None, on_bad_record='error').load(0);"
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.slow
def test_a_hub_dataset_is_read_if_there_is_no_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub", [original(4)])
    loaded = counterfact(None, id=str(tmp_path / "hub")).load(0)
    assert [request.id for request in loaded.requests] == ["counterfact/4"]
    problem = problems_of(counterfact(None, id=str(tmp_path / "missing")))[0]
    assert f"hub dataset {tmp_path / 'missing'} cannot be read" in problem
