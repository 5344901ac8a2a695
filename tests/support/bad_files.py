"""Files that no reader can read, below the current folder, for calls of commands."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tests.support.counterfact_files import flat
from tests.support.records import a_step, as_json, editing

A_CSV = "preset,source,table,row,value,unit,model,editor,restraint,dataset,edits,metric,protocol\n"


def write_bad_files() -> None:
    """Folders `data/`, `models/`, `runs/`, `hypernetworks/`, `published/` and single files."""
    _data(Path("data"))
    _models(Path("models"))
    _runs(Path("runs"))
    Path("a_file").write_text("text")
    for folder in ("empty", "hypernetworks", "published", "statistics", "multirun"):
        Path(folder).mkdir()
    Path("hypernetworks/text.safetensors").write_text("no tensors at all")
    header = json.dumps({"__metadata__": {"editkit": json.dumps({"format": 9})}}).encode()
    Path("hypernetworks/other.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    Path("published/bytes.csv").write_bytes(b"preset\xff\n")
    Path("published/columns.csv").write_text("preset,source\n1,2\n")
    Path("published/value.csv").write_text(A_CSV + "p,s,t,r,many,%,m,e,n,d,3,efficacy,x\n")
    Path("published/edits.csv").write_text(A_CSV + "p,s,t,r,1,%,m,e,n,d,few,efficacy,x\n")
    Path("statistics/world.safetensors").write_text("no tensors at all")
    Path("multirun/cells.json").write_text("[")
    Path("text.jinja").write_bytes(b"\xff\xfe")


def _data(folder: Path) -> None:
    folder.mkdir()
    good = {"prompt": "{} lives in", "subject": "Ann", "target": "Rome"}
    (folder / "good.jsonl").write_text(
        "".join(json.dumps(good | {"subject": name}) + "\n" for name in ("Ann", "Bea", "Cleo"))
    )
    (folder / "empty.json").write_text("")
    (folder / "object.json").write_text("{}")
    (folder / "no_records.json").write_text("[]")
    (folder / "cut.json").write_text(json.dumps([flat()])[:40])
    (folder / "latin.json").write_bytes(b'[{"prompt": "caf\xe9"}]')
    (folder / "numbers.json").write_text("[1, 2]")
    (folder / "fields.json").write_text('[{"nothing": "of it"}]')
    (folder / "table.tsv").write_text("a\tb\n1\n")


def _models(folder: Path) -> None:
    for name, config, tokenizer, weights in (
        ("list", "[]", "tokenizer.json", "model.safetensors"),
        ("cut", '{"model_type":', "tokenizer.json", "model.safetensors"),
        ("nameless", "{}", "tokenizer.json", "model.safetensors"),
        ("no_tokenizer", '{"model_type": "gpt2"}', None, "model.safetensors"),
        ("no_weights", '{"model_type": "gpt2"}', "tokenizer.json", None),
        ("pickled", '{"model_type": "gpt2"}', "tokenizer.json", "pytorch_model.bin"),
        ("none", None, None, None),
    ):
        (folder / name).mkdir(parents=True)
        if config is not None:
            (folder / name / "config.json").write_text(config)
        for file in (tokenizer, weights):
            if file is not None:
                (folder / name / file).write_text("{}")
    (folder / "text.gguf").write_text("no GGUF")


def _runs(folder: Path) -> None:
    steps = "".join(json.dumps(as_json(a_step(step))) + "\n" for step in (0, 1))
    evals = json.dumps(as_json(editing(1, "efficacy", 1.0))) + "\n"
    for name, changes in {
        "good": {},
        "steps_cut": {"steps.jsonl": '{"step": 1, \n'},
        "steps_list": {"steps.jsonl": "[1]\n"},
        "steps_text": {"steps.jsonl": '{"step": "one"}\n'},
        "evals_text": {"evals.jsonl": '{"step": 1, "value": "much"}\n'},
        "config_list": {"config.yaml": "- 1\n"},
        "config_cut": {"config.yaml": "{a: [\n"},
        "provenance_cut": {"provenance.json": "{"},
        "failed_list": {"FAILED.json": "[]"},
        "pointer_cut": {"state/latest.json": "{"},
        "pointer_text": {"state/latest.json": '{"file": 7, "sha256": "", "step": 1, "record_bytes": {}}'},
        "checkpoint_gone": {"state/latest.json": '{"file": "x", "sha256": "", "step": 1, "record_bytes": {}}'},
    }.items():  # fmt: skip
        run = folder / name / "seed0"
        (run / "state").mkdir(parents=True)
        contents = {"steps.jsonl": steps, "evals.jsonl": evals, "config.yaml": "{}\n"}
        for file, content in (contents | changes).items():
            (run / file).write_text(content)
