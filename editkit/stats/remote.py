"""Second moments and hypernetworks that others computed: a folder, an HTTP address or a dataset of
the Hugging Face hub, with an index.

    index.json    {"format": 1, "files": {name: {"kind", "sha256", "bytes", "about"}}}
    <name>        the files themselves

A name holds a digest of everything that the content depends on (its content key), so a file that is
found is the one that would be computed. A file appears locally whole and verified, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from editkit.errors import ConfigError, message
from editkit.files import LOCK, file_digest, take_lock, write_atomically, written_atomically
from editkit.model.hub import is_unreachable, quietly
from editkit.stats.store import MomentKey

INDEX = "index.json"
FORMAT = 1
HUB = "hub:"
WEB = ("http://", "https://")
EXPECTED = "a folder, http(s)://..., or hub:owner/name"
NAME = re.compile(r"[\w][\w.+=-]*\.safetensors")  # it leads to no other folder
CHUNK = 1 << 20
LONGEST_INDEX = 64 << 20  # bytes
PATIENCE_S = 60.0  # for another process that adds to the same folder
Kind = Literal["statistics", "hypernetwork"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of an index."""

    name: str
    kind: Kind
    sha256: str
    num_bytes: int
    about: Mapping[str, Any]  # what the content depends on, for readers


def form_problems(address: str) -> list[str]:
    """What is wrong with an address, as of an OptionError with the key `remote`."""
    if address.startswith(WEB):
        parts = urllib.parse.urlsplit(address)
        if "@" in parts.netloc or parts.query or parts.fragment:
            fix = "leave out what follows ? and stands before @: it would be written into files"
            shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            return [message("remote", "an address with a password or a query", got=shown, fix=fix)]
        return [] if parts.hostname else [_unknown(address)]
    if address.startswith(HUB):
        return [] if re.fullmatch(r"[\w.-]+/[\w.-]+", address[len(HUB) :]) else [_unknown(address)]
    return [_unknown(address)] if not address or "://" in address else []


def _unknown(address: str) -> str:
    return message("remote", "no such kind of place", got=address, expected=EXPECTED)


def absent(address: str) -> list[str]:
    """Why a folder is no remote, as of an OptionError. Nothing is asked over a network."""
    if address.startswith((*WEB, HUB)) or form_problems(address):
        return []
    folder = Path(address).expanduser()
    if (folder / INDEX).is_file():
        return []
    fix = f"fill it with `editkit share --to {address}`"
    return [message("remote", f"a folder without {INDEX}", got=address, fix=fix)]


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A place with files of others. `timeout_s` is the longest wait for an answer, in seconds."""

    address: str
    timeout_s: float

    def entries(self) -> dict[str, Entry]:
        """The files by name.

        Raises:
            ConfigError: the place does not answer in time, or has no index that can be read.
        """
        with self._opened(INDEX) as stream:
            until = time.monotonic() + self.timeout_s
            text = b""
            while chunk := stream.read1(CHUNK) if hasattr(stream, "read1") else stream.read(CHUNK):
                text += chunk
                if time.monotonic() > until:
                    raise ConfigError(self._silent(INDEX, "it sends too slowly"))
                if len(text) > LONGEST_INDEX:
                    raise ConfigError(self._wrong(INDEX, "it is no index, it is too long"))
        return _parsed(text, self)

    def fetch(self, entry: Entry, folder: Path, check: Callable[[Path], object]) -> Path:
        """Writes one file into the folder, whole and verified.

        Args:
            check: raises ConfigError if the content of a file does not belong to its name.

        Raises:
            ConfigError: the place does not answer in time, or the file does not match.
        """
        path = folder / entry.name
        with written_atomically(path) as temporary:
            total, num_bytes = hashlib.sha256(), 0
            with self._opened(entry.name) as stream, open(temporary, "wb") as file:
                while chunk := stream.read(CHUNK):
                    num_bytes += len(chunk)
                    total.update(chunk)
                    file.write(chunk)
                    if num_bytes > entry.num_bytes:
                        break
            if num_bytes != entry.num_bytes or total.hexdigest() != entry.sha256:
                raise ConfigError(
                    message(
                        f"{self.address}/{entry.name}",
                        "the file does not match its checksum, nothing was kept",
                        got=f"{num_bytes} bytes, SHA-256 {total.hexdigest()[:12]}...",
                        expected=f"{entry.num_bytes} bytes, {entry.sha256[:12]}...",
                        fix="repeat the command; if it stays, share the file again",
                    )
                )
            try:
                check(temporary)
            except ConfigError as error:
                raise ConfigError(
                    self._wrong(entry.name, f"nothing was kept ({error.problems[0]})")
                ) from None
        return path

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """The stream of one file. Errors while it is opened or read become one message."""
        try:
            with contextlib.ExitStack() as stack:
                yield stack.enter_context(self._open(name))
        except urllib.error.HTTPError as error:
            error.close()
            raise ConfigError(self._wrong(name, f"status {error.code}")) from None
        except FileNotFoundError:
            raise ConfigError(self._wrong(name, "no such file")) from None
        except TimeoutError:
            raise ConfigError(self._silent(name, f"for {self.timeout_s:g} s")) from None
        except urllib.error.URLError as error:
            raise ConfigError(self._silent(name, str(error.reason))) from None
        except (ConnectionError, EOFError) as error:
            raise ConfigError(self._silent(name, type(error).__name__)) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "http":  # http.client, of half an answer
                raise
            raise ConfigError(self._silent(name, type(error).__name__)) from None

    def _open(self, name: str) -> IO[bytes]:
        if self.address.startswith(WEB):
            url = f"{self.address.rstrip('/')}/{urllib.parse.quote(name)}"
            opened: IO[bytes] = urllib.request.urlopen(url, timeout=self.timeout_s)
            return opened
        if self.address.startswith(HUB):
            return open(self._from_hub(name), "rb")
        return open(Path(self.address).expanduser() / name, "rb")

    def _from_hub(self, name: str) -> str:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

        if is_unreachable():
            raise ConfigError(self._silent(name, "the hub has no address here"))
        repo = self.address.removeprefix(HUB)
        try:
            with quietly():
                return hf_hub_download(repo, name, repo_type="dataset", etag_timeout=self.timeout_s)
        except RemoteEntryNotFoundError:
            raise FileNotFoundError(name) from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "?")
            raise ConfigError(self._wrong(name, f"the hub answers with status {status}")) from None
        except Exception as error:
            raise ConfigError(self._silent(name, type(error).__name__)) from None

    def _wrong(self, name: str, problem: str) -> str:
        expected = f"the files of `editkit share --to {self.address}`" if name == INDEX else None
        return message(f"{self.address}/{name}", f"cannot be used: {problem}", expected=expected)

    def _silent(self, name: str, reason: str) -> str:
        return message(
            f"{self.address}/{name}",
            f"does not answer ({reason})",
            fix="repeat the command later, or set stats.remote=null, which computes here",
        )


def _parsed(text: bytes, remote: Remote) -> dict[str, Entry]:
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
        entries = {
            name: Entry(
                name=name,
                kind=node["kind"],
                sha256=str(node["sha256"]),
                num_bytes=int(node["bytes"]),
                about=dict(node["about"]),
            )
            for name, node in content["files"].items()
        }
        if wrong := [name for name in entries if not NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"it is no index ({type(error).__name__}: {error})"
        raise ConfigError(remote._wrong(INDEX, problem)) from None
    return entries


def described(path: Path) -> Entry:
    """The entry of a local file of second moments or of a hypernetwork.

    Raises:
        ConfigError: it is neither.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        about = json.loads(metadata.get("key") or metadata.get("editkit") or "null")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(message(str(path), f"cannot be read ({error})")) from None
    if not isinstance(about, dict):
        expected = "second moments or a hypernetwork of editkit"
        raise ConfigError(message(str(path), "cannot be shared", expected=expected))
    if "key" in metadata:
        kind: Kind = "statistics"
        try:
            name = MomentKey(**about).file_name
        except TypeError:
            problem = "second moments of another version of editkit"
            raise ConfigError(message(str(path), problem)) from None
    else:
        kind = "hypernetwork"
        digest = hashlib.sha256(metadata["editkit"].encode()).hexdigest()[:20]
        model = re.sub(r"[^\w.+=-]+", "-", str(about.get("model", "model")))
        name = f"hypernetwork-{model}-{digest}.safetensors"
        about = {key: about.get(key) for key in ("model", "fingerprint", "dataset", "sha256")}
    return Entry(
        name=name,
        kind=kind,
        sha256=file_digest(path),
        num_bytes=path.stat().st_size,
        about=about,
    )


def share(files: Sequence[Path], folder: Path) -> list[Entry]:
    """Copies files into a shared folder and adds them to its index. What is there stays.

    Raises:
        ConfigError: a file is neither second moments nor a hypernetwork, the index cannot be read,
            or another process keeps the folder.
    """
    entries = [described(path) for path in files]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as lock:
        if not take_lock(lock, patience_s=PATIENCE_S):
            raise ConfigError(message(str(folder), "another process is adding to it"))
        here = Remote(address=str(folder), timeout_s=PATIENCE_S)
        known = here.entries() if (folder / INDEX).exists() else {}
        for path, entry in zip(files, entries, strict=True):
            if known.get(entry.name) != entry or not (folder / entry.name).exists():
                with written_atomically(folder / entry.name) as temporary:
                    shutil.copyfile(path, temporary)
            known[entry.name] = entry
        write_atomically(folder / INDEX, _index(known))
    return entries


def total(entries: Sequence[Entry]) -> int:
    """The bytes of all files."""
    return sum(entry.num_bytes for entry in entries)


def _index(entries: Mapping[str, Entry]) -> bytes:
    files = {
        name: {
            "kind": entry.kind,
            "sha256": entry.sha256,
            "bytes": entry.num_bytes,
            "about": entry.about,
        }
        for name, entry in sorted(entries.items())
    }
    return json.dumps({"format": FORMAT, "files": files}, indent=1).encode()
