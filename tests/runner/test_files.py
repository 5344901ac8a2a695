"""The files of a run."""

from __future__ import annotations

import gzip
import json

from editkit.records.writer import save_samples
from editkit.types import SampleRecord


def test_the_same_samples_give_the_same_file_and_read_back_as_they_were(tmp_path):
    record = SampleRecord(
        step=7,
        view="prune",
        name="editing-generate",
        rows=({"prompt": "a", "generation": "é"}, {"prompt": "b"}),
    )

    path = save_samples(record, tmp_path)
    first = path.read_bytes()

    assert save_samples(record, tmp_path).read_bytes() == first
    assert path.name == "000007-prune-editing-generate.jsonl.gz"
    assert [json.loads(line) for line in gzip.decompress(first).decode().splitlines()] == [
        dict(row) for row in record.rows
    ]
