"""Whether a certificate is whole, signed by whom it should be, and true of its run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.certify.certificate import (
    Certificate,
    files_of,
    read_certificate,
    sections_of,
)
from editkit.certify.rerun import Rerun, rerun
from editkit.certify.signature import fingerprint_of, problem_of
from editkit.errors import ConfigError, message
from editkit.records.ledger import LEDGER, read_ledger
from editkit.records.reader import load_run
from editkit.runner.checkpoint import read_checkpoint

# Sections that follow from the run's files, so that a new chain does not hide a change of them.
DERIVED = ("code", "configuration", "inputs", "numbers")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A certificate and what is wrong with it."""

    certificate: Certificate
    problems: tuple[str, ...]
    signer: str | None  # the fingerprint of the key that signed; None: not signed
    run: Path | None  # the folder that was compared; None: none was found
    rerun: Rerun | None = None


def verify(
    path: Path,
    *,
    run: Path | None = None,
    key: Path | None = None,
    share: float | None = None,
    seed: int | None = None,
    tolerance: float = 1e-6,
    device: str | None = None,
) -> Verified:
    """Checks a certificate.

    Args:
        path: the certificate.
        run: the run's folder; by default the folder of the certificate, if a run lies there.
        key: the public key that must have signed it.
        share: of the measurements of the run, in (0, 1], that is recomputed; None: none.
        seed: of the choice of measurements; None: a new one for each call.
        tolerance: the largest difference of a recomputed number.
        device: where it is recomputed.

    Raises:
        ConfigError: it is no certificate; the run's folder is missing; an option is out of range;
            the measurements cannot be recomputed.
    """
    if share is not None and not 0 < share <= 1:
        expected = "a share above 0, at most 1"
        raise ConfigError(message("--rerun", "out of range", got=share, expected=expected))
    certificate = read_certificate(path)
    problems = []
    if broken := certificate.broken_link:
        problem = "its content is not what the chain of digests covers"
        problems.append(message(broken, problem))
    signature = certificate.content.get("signature")
    signer = None
    if signature is not None:
        if not isinstance(signature, Mapping):
            problems.append(message("signature", "it is malformed"))
        elif wrong := problem_of(signature, certificate.digest, key):
            problems.append(message("signature", wrong))
        else:
            signer = fingerprint_of(signature)
    elif key is not None:
        problems.append(message("signature", f"there is none by {key}"))
    folder = _folder(path, run, is_needed=share is not None)
    made = None
    if folder is not None:
        problems += _problems_of_folder(certificate, folder)
        if share is not None and not problems:
            made = rerun(certificate, folder, share=share, seed=seed, device=device)
            problems += made.problems(tolerance)
    return Verified(
        certificate=certificate,
        problems=tuple(problems),
        signer=signer,
        run=folder,
        rerun=made,
    )


def _folder(path: Path, run: Path | None, *, is_needed: bool) -> Path | None:
    if run is not None:
        if not (run / "steps.jsonl").is_file():
            raise ConfigError(message("--run", "no run's folder", got=str(run)))
        return run
    if (path.parent / "steps.jsonl").is_file():
        return path.parent
    if is_needed:
        problem = "measurements are recomputed from the run's folder"
        fix = "name it with --run outputs/.../seed<k>"
        raise ConfigError(message("--rerun", problem, fix=fix))
    return None


def _problems_of_folder(certificate: Certificate, folder: Path) -> Iterator[str]:
    """What differs between a certificate and the run's folder."""
    stated, found = certificate.section("files"), files_of(folder)
    if certificate.path.resolve().is_relative_to(folder.resolve()):  # another name in the folder
        found.pop(str(certificate.path.resolve().relative_to(folder.resolve())), None)
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            yield message(f"files.{name}", "it is missing in the run's folder")
        elif name not in stated:
            yield message(f"files.{name}", "it is not among the certified files")
        elif stated[name] != found[name]:
            yield message(f"files.{name}", "it is not the certified file")
    try:
        records = load_run(folder)
    except ConfigError as error:
        yield from error.problems
        return
    sections = _plain(sections_of(records))
    for name in DERIVED:
        if certificate.section(name) != sections[name]:
            where = _where(certificate.section(name), sections[name])
            yield message(f"{name}{where}", "it is not what the run's files say")
    about = {key: value for key, value in sections["about"].items() if key not in ("time", "run")}
    for key, value in about.items():
        if certificate.section("about").get(key) != value:
            got = certificate.section("about").get(key)
            yield message(f"about.{key}", "it is not what the run's files say", got=got)
    if records.status != "done":
        yield message("status", "the run is not done", got=records.status)
    yield from _inner_problems(folder)


def _inner_problems(folder: Path) -> Iterator[str]:
    """What the run's own digests say: of its checkpoint, and of its ledger."""
    try:
        read_checkpoint(folder / "state")
        if (folder / LEDGER).exists():
            for block in read_ledger(folder).blocks:
                block.load()
    except ConfigError as error:
        yield from error.problems


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    import json

    return json.loads(json.dumps(value))


def _where(stated: Any, found: Any) -> str:
    """The path of the first difference: ".config.seed", "[3].value"."""
    if isinstance(stated, Mapping) and isinstance(found, Mapping):
        for key in sorted(stated.keys() | found.keys(), key=str):
            if stated.get(key) != found.get(key):
                return f".{key}{_where(stated.get(key), found.get(key))}"
    if isinstance(stated, list) and isinstance(found, list):
        if len(stated) != len(found):
            return f" ({len(stated)} instead of {len(found)})"
        for index, (one, other) in enumerate(zip(stated, found, strict=True)):
            if one != other:
                return f"[{index}]{_where(one, other)}"
    return ""
