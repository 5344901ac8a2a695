"""Signatures by `ssh-keygen -Y`, OpenSSH's format SSHSIG with the namespace `editkit`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message

NAMESPACE = "editkit"
PATIENCE_S = 60


def signed(digest: str, key: Path) -> dict[str, str]:
    """The signature of a certificate's digest, with the public key.

    Raises:
        ConfigError: there is no ssh-keygen or no such key, or it cannot sign (a passphrase that no
            agent knows).
    """
    if not key.is_file():
        expected = "a private key of OpenSSH, or a public one whose private one an agent holds"
        raise ConfigError(message("--key", "no such file", got=str(key), expected=expected))
    done = _keygen(["-Y", "sign", "-n", NAMESPACE, "-f", str(key)], digest)
    if done.returncode:
        problem = f"cannot sign ({_last_line(done.stderr)})"
        fix = "create one with ssh-keygen -t ed25519, or add it to an agent"
        raise ConfigError(message("--key", problem, got=str(key), fix=fix))
    public = key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")
    text = public.read_text().strip() if public.is_file() else _public_of(key)
    return {"namespace": NAMESPACE, "key": " ".join(text.split()[:2]), "ssh": done.stdout}


def problem_of(signature: Mapping[str, Any], digest: str, expected: Path | None) -> str | None:
    """What is wrong with a signature; None if it is the stated key's signature of this digest, and
    that key is the expected one.

    Args:
        expected: a public key, or None if any key will do.
    """
    if set(signature) != {"namespace", "key", "ssh"} or not all(
        isinstance(value, str) for value in signature.values()
    ):
        return "it is malformed"
    key = str(signature["key"])
    if not re.fullmatch(r"[\w@.-]+ [\w+/=]+", key):
        return "its key is malformed"
    if expected is not None and key.split()[:2] != key_in(expected).split()[:2]:
        return f"it was made with another key than {expected}"
    with tempfile.TemporaryDirectory() as folder:
        signers, file = Path(folder) / "signers", Path(folder) / "signature"
        signers.write_text(f'editkit namespaces="{NAMESPACE}" {key}\n')
        file.write_text(str(signature["ssh"]))
        options = ["-Y", "verify", "-n", NAMESPACE, "-I", "editkit"]
        done = _keygen([*options, "-f", str(signers), "-s", str(file)], digest)
    return None if done.returncode == 0 else "it is not that of the digest by the stated key"


def key_in(path: Path) -> str:
    """The public key in a file: its type and its base64. Raises ConfigError if there is none."""
    expected = "a public key of OpenSSH, such as id_ed25519.pub"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            message("--key", "cannot be read", got=str(path), expected=expected)
        ) from None
    words = text.split()
    if len(words) < 2 or "PRIVATE" in text:
        raise ConfigError(message("--key", "no public key", got=str(path), expected=expected))
    return " ".join(words[:2])


def fingerprint_of(signature: Mapping[str, Any]) -> str:
    """How ssh-keygen names the key: SHA256:..."""
    import base64
    import hashlib

    raw = base64.b64decode(str(signature["key"]).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(raw).digest()).decode().rstrip("=")


def _public_of(key: Path) -> str:
    done = _keygen(["-y", "-P", "", "-f", str(key)], "")
    if done.returncode:
        fix = f"put the public key beside it, as {key.name}.pub"
        problem = f"its public key is unknown ({_last_line(done.stderr)})"
        raise ConfigError(message("--key", problem, got=str(key), fix=fix))
    return done.stdout


def _keygen(options: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["ssh-keygen", *options],
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        fix = "install OpenSSH 8.1 or later; without --key the certificate has a digest chain alone"
        raise ConfigError(message("--key", f"ssh-keygen failed ({error})", fix=fix)) from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
