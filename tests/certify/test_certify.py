"""A certificate of a run is whole, signed and true, or says what is not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.certify.certificate import NAME, certify, chain_of
from editkit.certify.leaderboard import PAGE, TEXT, leaderboard
from editkit.certify.signature import signed
from editkit.certify.verify import verify
from editkit.errors import ConfigError
from editkit.linalg.total import Total
from editkit.runner.checkpoint import RunState, generator_states, save_state
from tests.support.ledgers import four_blocks
from tests.support.records import write_run

needs_ssh = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen (OpenSSH) is not installed"
)
PROVENANCE: dict[str, Any] = {
    "git": "0123abcd",
    "packages": {"editkit": "1", "torch": "2"},
    "model": {"name": "tiny-gpt2", "fingerprint": "f" * 32},
    "dataset": {"name": "world", "digest": "d" * 64},
    "statistics": {"h.0.mlp.c_proj": "5" * 32},
    "requests": ["world/2", "world/3"],
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done, with a ledger and a checkpoint."""
    folder = tmp_path_factory.mktemp("certified")
    run = write_run(four_blocks(folder)[0])
    (run / "provenance.json").write_text(json.dumps(PROVENANCE))
    (run / "DONE").touch()
    state = RunState(
        step=2,
        totals={"m": Total((2, 3), matrix=torch.ones(2, 3))},
        contexts=("{}",),
        editor={},
        solve={},
        baselines={},
        spectra={},
        base_sigma_max={"m": 1.0},
        rng=generator_states(),
    )
    save_state(state, run / "state", {})
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(template, folder)
    certify(folder, folder / NAME)
    return folder


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rechained(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """The change with a chain that fits it."""

    def both(content: Any) -> None:
        change(content)
        content["chain"] = chain_of(content)

    return both


def put(*path: Any) -> Callable[[Any], None]:
    """Sets the value at a path of keys; the last argument is the value."""
    *parents, name, value = path

    def change(content: Any) -> None:
        for parent in parents:
            content = content[parent]
        content[name] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    *parents, name = path

    def change(content: Any) -> None:
        for parent in parents:
            content = content[parent]
        del content[name]

    return change


# Each manipulation of the certificate, and where it is noticed.
IN_FILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "a value": (put("numbers", 1, "value", 0.99), "numbers"),
    "a standard error": (put("numbers", 1, "stderr", 0.001), "numbers"),
    "a protocol": (put("numbers", 1, "protocol", "generate"), "numbers"),
    "a number less": (drop("numbers", 2), "numbers"),
    "a number more": (lambda content: content["numbers"].append({"value": 1}), "numbers"),
    "the model": (put("inputs", "model", "name", "gpt-j"), "inputs"),
    "the dataset": (put("inputs", "dataset", "digest", "e" * 64), "inputs"),
    "the statistics": (put("inputs", "statistics", {}), "inputs"),
    "the code": (put("code", "git", "fedc"), "code"),
    "the configuration": (put("configuration", "config", "seed", 2), "configuration"),
    "the hash": (put("configuration", "hash", "00000000"), "configuration"),
    "the steps": (put("about", "steps", 3), "about"),
    "a file's digest": (put("files", "evals.jsonl", "sha256", "0" * 64), "files"),
    "the last digest": (lambda content: put("chain", -1, "0" * 64)(content), "numbers"),
    "a shorter chain": (drop("chain", 0), "chain"),
    "a value, with a new chain": (
        rechained(put("numbers", 1, "value", 0.99)),
        r"numbers\[1\]\.value",
    ),
    "the model, with a new chain": (
        rechained(put("inputs", "model", "fingerprint", "a" * 32)),
        r"inputs\.model\.fingerprint",
    ),
    "the seed, with a new chain": (
        rechained(put("configuration", "config", "seed", 2)),
        r"configuration\.config\.seed",
    ),
    "the views, with a new chain": (rechained(put("about", "views", ["prune"])), "about.views"),
}


def append(name: str, text: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        with open(run / name, "a") as file:
            file.write(text)

    return change


def replace_in(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


def flip(pattern: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (path, *_) = sorted(run.glob(pattern))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return change


# Each manipulation of the run's folder, and where it is noticed.
IN_FOLDER: dict[str, tuple[Callable[[Path], None], str]] = {
    "a number": (replace_in("evals.jsonl", "0.75", "0.95"), r"files\.evals\.jsonl"),
    "a line more": (append("steps.jsonl", '{"step": 3}\n'), r"files\.steps\.jsonl"),
    "the configuration": (replace_in("config.yaml", "seed: 1", "seed: 2"), "configuration"),
    "the provenance": (replace_in("provenance.json", "0123abcd", "0"), r"code\.git"),
    "the checkpoint": (flip("state/step-*.safetensors"), "corrupt checkpoint"),
    "the pointer": (replace_in("state/latest.json", '"step": 2', '"step": 1'), "latest"),
    "a request of the ledger": (replace_in("ledger.jsonl", "English", "Breton"), "ledger"),
    "factors of the ledger": (flip("ledger/*.safetensors"), "does not match its checksum"),
    "a file less": (lambda run: (run / "ledger/head.json").unlink(), r"files\.ledger/head\.json"),
    "a file more": (append("extra.json", "{}"), r"files\.extra\.json"),
    "not done": (lambda run: (run / "DONE").unlink(), "status"),
}


def test_a_certificate_that_nobody_touched_is_verified(run: Path) -> None:
    made = verify(run / NAME)
    assert not made.problems and made.signer is None and made.run == run
    content = made.certificate.content
    assert len(content["numbers"]) == 20 and content["code"]["git"] == "0123abcd"
    assert content["files"].keys() >= {"evals.jsonl", "config.yaml", "state/latest.json"}
    moved = run.parent / "mail.json"
    shutil.copy(run / NAME, moved)
    assert not verify(moved).problems and verify(moved).run is None
    assert not verify(moved, run=run).problems


@pytest.mark.parametrize("what", IN_FILE)
def test_a_manipulated_certificate_is_caught(run: Path, what: str) -> None:
    change, where = IN_FILE[what]
    edit_json(run / NAME, change)
    problems = "\n".join(verify(run / NAME).problems)

    assert re.search(where, problems), problems


@pytest.mark.parametrize("what", IN_FOLDER)
def test_a_manipulated_run_is_caught(run: Path, what: str) -> None:
    change, where = IN_FOLDER[what]
    change(run)
    problems = "\n".join(verify(run / NAME).problems)

    assert re.search(where, problems), problems


@needs_ssh
def test_a_signature_is_that_of_its_key_or_is_caught(run: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for key in (ours, theirs):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    public = tmp_path / "ours.pub"
    path = certify(run, run / NAME, key=ours).path
    made = verify(path, key=public)
    assert not made.problems and str(made.signer).startswith("SHA256:")
    whole = path.read_text()

    def caught(change: Callable[[Any], None], pattern: str) -> None:
        path.write_text(whole)
        edit_json(path, change)
        problems = "\n".join(verify(path, key=public).problems)
        assert pattern in problems, problems

    def signed_anew(content: Any) -> None:
        rechained(put("numbers", 1, "value", 0.99))(content)
        content["signature"] = signed(content["chain"][-1], theirs)

    caught(drop("signature"), "there is none by")
    caught(rechained(put("about", "time", "never")), "it is not that of the digest")
    caught(signed_anew, "with another key")
    caught(put("signature", "ssh", "x"), "it is not that of the digest")
    caught(put("signature", "x"), "it is malformed")
    with pytest.raises(ConfigError, match="--key: cannot sign"):
        certify(run, run / NAME, key=run / "config.yaml")


def test_bad_input_is_one_message(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no certificate")
    (tmp_path / "b.json").write_text('{"kind": "something"}')
    cases: dict[str, Callable[[], object]] = {
        "none: it cannot be read": lambda: verify(tmp_path / "none"),
        r"a\.txt: malformed JSON in line 1": lambda: verify(tmp_path / "a.txt"),
        r"b\.json: no certificate \(got 'something'": lambda: verify(tmp_path / "b.json"),
        "--rerun: out of range": lambda: verify(run / NAME, share=1.5),
        "--run: no run's folder": lambda: verify(run / NAME, run=tmp_path),
        "--key: cannot be read": lambda: certify_without(run, tmp_path / "none.pub"),
        r"2 problems[\s\S]*a\.txt[\s\S]*b\.json": lambda: leaderboard(
            [tmp_path / "a.txt", tmp_path / "b.json"], tmp_path / "board"
        ),
    }
    for pattern, call in cases.items():
        with pytest.raises(ConfigError, match=pattern):
            call()
    (run / "DONE").unlink()
    with pytest.raises(ConfigError, match="the run is unfinished"):
        certify(run, run / NAME)


def certify_without(run: Path, key: Path) -> object:
    """A certificate that claims a signature by a key that is not there."""
    edit_json(run / NAME, put("signature", {"namespace": "editkit", "key": "a b", "ssh": "x"}))
    return verify(run / NAME, key=key)


def test_a_leaderboard_mixes_neither_protocols_nor_models(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    replace_in("provenance.json", "ffff", "abcd")(other)
    second = certify(other, other / NAME).path
    tables = leaderboard([run / NAME, second, run / NAME], tmp_path / "board")
    assert {(each.fingerprint[:4], each.protocol) for each in tables} == {
        ("ffff", "probability"),
        ("ffff", "argmax"),
        ("abcd", "probability"),
        ("abcd", "argmax"),
    }
    assert all([row.view for row in rows] == ["unrestrained", "prune"] for rows in tables.values())
    text, page = ((tmp_path / "board" / name).read_text() for name in (TEXT, PAGE))
    assert text.count("protocol probability") == page.count("protocol probability") == 2
    assert "100.0 ± 2.0" in text and "not signed" in text
    edit_json(second, put("numbers", 1, "value", 0.99))
    with pytest.raises(ConfigError, match="its section numbers is not what the chain"):
        leaderboard([second], tmp_path / "board")
