"""A certificate: a run's configuration, code, inputs, files and numbers in one JSON file, under a
chain of digests.

Each section has a digest of the one before it, of its own name and of its content; the last one is
the digest of the certificate. A chain shows that a file is whole. Who changes it can compute a new
chain: only a signature, or a digest that was noted elsewhere, shows that it is still the first one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.config.identity import config_hash
from editkit.errors import ConfigError, message
from editkit.files import file_digest, not_an_object, write_atomically
from editkit.records.ledger import LEDGER, read_ledger
from editkit.records.reader import RunRecords, load_run
from editkit.types import as_json

KIND = "editkit certificate"
VERSION = 1
NAME = "certificate.json"
# In the order of the chain. What a section holds is in `sections_of`.
SECTIONS = ("about", "code", "configuration", "inputs", "files", "numbers")
CODE = ("git", "packages", "python", "platform", "device", "threads", "earlier_sessions")
INPUTS = (
    "model",
    "dataset",
    "statistics",
    "statistics_imported",
    "editor",
    "requests",
    "evaluated",
)
# Files of a run that later commands write, or that hold nothing but pictures and caches.
UNCERTIFIED = ("figures", "wandb", ".lock", NAME)
A_CERTIFICATE = "a file that `editkit certify` wrote"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate as it was read. Its chain may be broken (`broken_link`)."""

    path: Path
    content: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The last digest of the chain, as the file states it."""
        return str(self.content["chain"][-1])

    def section(self, name: str) -> Any:
        """The content of a section."""
        return self.content[name]

    @property
    def broken_link(self) -> str | None:
        """The first section whose digest is not that of its content; None if the chain is whole."""
        found = chain_of(self.content)
        stated = list(self.content["chain"])
        if len(stated) != len(found):
            return "chain"
        return next(
            (name for name, a, b in zip(SECTIONS, stated, found, strict=True) if a != b), None
        )


def certify(run: Path, to: Path, *, key: Path | None = None) -> Certificate:
    """Writes the certificate of a complete run.

    Args:
        run: the run's folder.
        to: the file to write.
        key: a private key of OpenSSH, with which the last digest is signed.

    Raises:
        ConfigError: the folder is no run, or the run is not done or was measured by another
            program; its ledger is broken; the key cannot sign; the file cannot be written.
    """
    from editkit.certify.signature import signed

    records = load_run(run)
    if records.status != "done":
        problem = f"the run is {records.status}, and its numbers may still change"
        fix = "finish it with the same command"
        raise ConfigError(message(str(run), problem, expected="a run that is done", fix=fix))
    if not records.provenance or not records.config:
        problem = "the run has no provenance.json or config.yaml"
        raise ConfigError(message(str(run), problem, expected="a run of editkit"))
    if (run / LEDGER).exists():
        read_ledger(run)  # raises if it is broken
    content: dict[str, Any] = {"kind": KIND, "version": VERSION} | sections_of(records)
    content["chain"] = chain_of(content)
    if key is not None:
        content["signature"] = signed(content["chain"][-1], key)
    write_atomically(to, json.dumps(content, indent=1).encode() + b"\n")
    return Certificate(path=to, content=content)


def sections_of(records: RunRecords) -> dict[str, Any]:
    """The sections of a run's certificate, in their order."""
    provenance, config = records.provenance, dict(records.config)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    last = records.steps[-1].step if records.steps else 0
    return {
        "about": {
            "run": records.folder.resolve().parent.name,
            "seed": config.get("seed"),
            "steps": last,
            "time": now,
            "views": list(records.views),
        },
        "code": {name: provenance.get(name) for name in CODE},
        "configuration": {"hash": config_hash(config), "config": config},
        "inputs": {name: provenance[name] for name in INPUTS if name in provenance},
        "files": files_of(records.folder),
        "numbers": [as_json(record) for record in records.evals],
    }


def files_of(run: Path) -> dict[str, dict[str, Any]]:
    """The SHA-256 and the size of each file of a run, by its path in the folder."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        is_left_out = name.parts[0] in UNCERTIFIED or path.name.endswith(".tmp")
        if path.is_file() and not is_left_out:
            found[str(name)] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    return found


def chain_of(content: Mapping[str, Any]) -> list[str]:
    """The digest of each section in their order."""
    before, chain = f"{KIND} {content['version']}", []
    for name in SECTIONS:
        text = f"{before}\n{name}\n{json.dumps(content[name], sort_keys=True)}"
        before = hashlib.sha256(text.encode()).hexdigest()
        chain.append(before)
    return chain


def read_certificate(path: Path) -> Certificate:
    """The certificate in a file. Raises ConfigError if it is none of this version."""
    if problem := not_an_object(path):
        raise ConfigError(message(str(path), problem, expected=A_CERTIFICATE))
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("kind") != KIND:
        got = content.get("kind")
        raise ConfigError(message(str(path), "no certificate", got=got, expected=A_CERTIFICATE))
    if content.get("version") != VERSION:
        got, expected = content.get("version"), f"version {VERSION}"
        raise ConfigError(message(str(path), "unknown version", got=got, expected=expected))
    kinds: dict[str, type] = dict.fromkeys(SECTIONS, dict) | {"numbers": list, "chain": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    unknown = sorted(content.keys() - {"kind", "version", "signature", *kinds})
    if wrong or unknown or not content["chain"]:
        got = ", ".join([*(f"without {name}" for name in wrong), *unknown]) or "an empty chain"
        raise ConfigError(message(str(path), "no certificate", got=got, expected=A_CERTIFICATE))
    return Certificate(path=path, content=content)
