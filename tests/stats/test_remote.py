"""Second moments and hypernetworks from a shared folder, an HTTP address or the hub."""

from __future__ import annotations

import functools
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from typer.testing import CliRunner, Result

from editkit.cli.main import app
from editkit.config.identity import config_hash
from editkit.errors import ConfigError, OptionError
from editkit.stats import remote as remotes
from editkit.stats.build import build, fill_store, statistics
from editkit.stats.remote import INDEX, Remote, share
from tests.support.helpers import SENTENCES, tiny_model
from tests.support.hypernets import load_hypernetwork
from tests.support.paths import ROOT
from tests.support.statistics import text_stats

HYPERNETWORK = ROOT / "editkit" / "assets" / "mend" / "tiny-gpt2" / "hypernetwork.safetensors"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared folder with the second moments of two matrices of `tiny_model`, and a hypernetwork."""
    here = tmp_path / "theirs"
    here.mkdir()
    model = tiny_model("gpt2")
    build(model, model.down_projections((0, 1)), text_stats(here, "\n".join(SENTENCES)))
    share([*sorted((here / "stats").glob("*.safetensors")), HYPERNETWORK], tmp_path / "shared")
    return tmp_path / "shared"


@pytest.fixture
def served(shared: Path) -> Iterator[str]:
    """The address of an HTTP server of the shared folder."""
    handler = functools.partial(Quiet, directory=str(shared))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def wanted(folder: Path, address: str, *, num_layers: int = 2, timeout_s: float = 5.0):  # type: ignore[no-untyped-def]
    """The statistics of a run on another machine, with nothing stored."""
    folder.mkdir(exist_ok=True)
    model = tiny_model("gpt2")
    text = "\n".join(SENTENCES)
    stats = text_stats(folder, text, remote=address, remote_timeout_s=timeout_s)
    return statistics(model, model.down_projections(range(num_layers)), stats)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("by_http", [False, True])
def test_a_run_fetches_what_is_there_and_computes_the_rest(
    tmp_path: Path, shared: Path, served: str, by_http: bool
) -> None:
    required = wanted(tmp_path / "mine", served if by_http else str(shared), num_layers=3)
    said: list[str] = []
    assert fill_store(required, announce=said.append)
    assert said[0].startswith("2 of 3 second moments are at ") and "1 second moment" in said[1]
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs/stats").iterdir()}
    mine = {path.name: path.read_bytes() for path in required.folder.glob("*.safetensors")}
    assert len(mine) == 3 and theirs.items() <= mine.items()
    assert len(required.read().digests) == 3
    (shared / INDEX).unlink()
    assert fill_store(required)  # nothing is missing, so nobody is asked


def test_a_remote_without_the_key_changes_nothing(tmp_path: Path) -> None:
    share([HYPERNETWORK], tmp_path / "shared")
    required = wanted(tmp_path / "mine", str(tmp_path / "shared"), num_layers=1)
    assert fill_store(required) and len(required.read().digests) == 1


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def exchange(path: Path) -> None:
    """Another matrix under this name, and an index that agrees."""
    index = json.loads((path.parent / INDEX).read_text())
    names = [name for name, node in index["files"].items() if node["kind"] == "statistics"]
    (other,) = set(names) - {path.name}
    path.write_bytes((path.parent / other).read_bytes())
    index["files"][path.name] = index["files"][other]
    (path.parent / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (alter, r"does not match its checksum, nothing was kept \(got '\d+ bytes, SHA-256"),
        (cut, r"does not match its checksum, nothing was kept"),
        (remove, r"cannot be used: (status 404|no such file)"),
        (exchange, r"cannot be used: nothing was kept \(.*another key"),
        (
            lambda path: (path.parent / INDEX).unlink(),
            r"index\.json: cannot be used: (status 404|no)",
        ),
        (lambda path: (path.parent / INDEX).write_text("[]"), r"it is no index"),
        (lambda path: (path.parent / INDEX).write_text('{"format": 2}'), r"its format is 2"),
        (
            lambda path: (path.parent / INDEX).write_text(
                '{"format": 1, "files": {"../x": {"kind": "statistics", "sha256": "", "bytes": 1, "about": {}}}}'
            ),
            r"'\.\./x' is no name of a file",
        ),
    ],
)
def test_a_damaged_remote_is_one_message_and_leaves_nothing(
    tmp_path: Path, shared: Path, served: str, spoil: Callable[[Path], object], told: str
) -> None:
    spoil(sorted(shared.glob("transformer*.safetensors"))[0])
    required = wanted(tmp_path / "mine", served, num_layers=1)
    with pytest.raises(ConfigError, match=told) as refused:
        fill_store(required)
    assert len(refused.value.problems) == 1
    assert not list((tmp_path / "mine" / "stats").glob("*"))


def test_a_remote_that_does_not_answer_has_a_time_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"does not answer \(for 0\.3 s\)\. Fix: repeat"):
            fill_store(wanted(tmp_path, address, num_layers=1, timeout_s=0.3))
    with pytest.raises(ConfigError, match=r"does not answer .*refused.*stats.remote=null"):
        fill_store(wanted(tmp_path, address, num_layers=1))


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ftp://there", "remote: no such kind of place"),
        ("hub:name", "remote: no such kind of place"),
        ("https://me:secret-1@there/x", "a password or a query"),
        ("https://there/x?token=secret-1", "a password or a query"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_without_its_secrets(
    tmp_path: Path, address: str, told: str
) -> None:
    with pytest.raises(OptionError, match=told) as refused:
        wanted(tmp_path, address)
    assert "secret-1" not in str(refused.value)
    assert "secret-1" not in str(call("pull", address).exception)


def test_the_hub_is_asked_for_files_of_a_dataset(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, name: str, *, repo_type: str, etag_timeout: float) -> str:
        asked.append((repo, name, repo_type))
        if not (shared / name).exists():
            answer = SimpleNamespace(status_code=404, headers={}, request=None)
            raise RemoteEntryNotFoundError("no", response=answer)  # type: ignore[arg-type]
        return str(shared / name)

    monkeypatch.setattr(remotes, "is_unreachable", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fill_store(wanted(tmp_path / "mine", "hub:us/moments", num_layers=1))
    assert asked[0] == ("us/moments", INDEX, "dataset") and len(asked) == 2
    (shared / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"hub:us/moments/index\.json: cannot be used: no such"):
        Remote(address="hub:us/moments", timeout_s=1).entries()
    monkeypatch.setattr(remotes, "is_unreachable", lambda: True)
    with pytest.raises(ConfigError, match="the hub has no address here"):
        Remote(address="hub:us/moments", timeout_s=1).entries()


def test_a_group_shares_a_folder_by_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: str, shared: Path
) -> None:
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path / "cache"))
    listed = call("pull", served)
    assert listed.exit_code == 0 and listed.output.count("statistics") == 2
    assert listed.output.count("hypernetwork-tiny-gpt2-") == 1
    fetched = call("pull", served, "*")
    assert fetched.exit_code == 0, fetched.exception
    assert fetched.output.count("fetched: ") == 3
    (network,) = (tmp_path / "cache" / "hypernetworks").iterdir()
    mine, theirs = (load_hypernetwork(str(path))[0].tensors for path in (network, HYPERNETWORK))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert call("pull", served, "*").output.count("there already: ") == 3
    again = call("share", "--to", str(tmp_path / "ours"))  # the store of the cache
    assert again.exit_code == 0 and "2 files in" in again.output, again.exception
    more = call("share", str(network), "--to", str(tmp_path / "ours"))
    assert more.exit_code == 0, more.exception
    ours, index = tmp_path / "ours", json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index == json.loads((shared / INDEX).read_text())
    assert {path.name for path in ours.iterdir()} == {*index["files"], INDEX, ".lock"}


def test_what_cannot_be_shared_or_found_is_told(tmp_path: Path, shared: Path) -> None:
    torch_file = tmp_path / "other.safetensors"
    torch_file.write_bytes(b"nothing")
    problems = str(call("share", str(torch_file), "none", "--to", str(tmp_path / "x")).exception)
    assert "files: nothing there (got 'none'" in problems and "cannot be read" in problems
    assert not (tmp_path / "x").exists()
    assert "names: not there (got 'h.9*'" in str(call("pull", str(shared), "h.9*").exception)
    assert "a folder without index.json" in str(call("pull", str(tmp_path / "y")).exception)


def test_where_second_moments_come_from_does_not_name_a_run() -> None:
    config = {"stats": {"name": "world", "folder": "a"}, "evaluation": {"protocols": ["argmax"]}}
    asked = {**config, "stats": config["stats"] | {"remote": "x", "remote_timeout_s": 1}}
    assert config_hash(asked) == config_hash(config)
    assert config_hash({**config, "evaluation": {"protocols": []}}) != config_hash(config)
