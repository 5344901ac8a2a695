"""The card of an exported folder, and what goes to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from typer.testing import CliRunner

from editkit.cli.main import app
from editkit.errors import ConfigError
from editkit.runner import hub
from editkit.runner.export import export
from editkit.runner.hub import Repository
from tests.runner.test_export import edited_run


class FakeHub:
    """Keeps what a hub would be sent."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.made, self.files = error, {}, {}

    def whoami(self) -> None:
        if self.error is not None:
            raise self.error

    def create_repo(self, name: str, **options: Any) -> None:
        self.made[name] = options

    def upload_folder(self, *, folder_path: Path, **options: Any) -> Any:
        self.files = {
            str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*")
        }
        return SimpleNamespace(commit_url=f"https://hub.test/{options['repo_id']}/commit/1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a dataset, an editor and a model of the hub in its files."""
    folder, _ = edited_run(tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"editor": {"name": "rome"}, "dataset": {"name": "world"}, "seed": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((folder / "provenance.json").read_text())
    about |= {"dataset": {"digest": "d1" * 32}, "packages": {"editkit": "0.1.0"}}
    (folder / "provenance.json").write_text(json.dumps(about))
    return folder


def test_a_card_tells_what_was_edited_and_measured(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", view="prune")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "editkit" in card.data.tags
    assert card.data.base_model is None  # a folder is no model of the hub
    assert "| base model | base |" in card.text  # its name alone
    text = card.text
    assert str(tmp_path) not in text
    for fact in ("| editor | rome |", "| restraint | prune |", "| dataset | world |", "d1" * 32):
        assert fact in text
    assert "| edits | 4 (2 steps) |" in text and "| view | prune |" in text
    measured = [line for line in text.splitlines() if re.match(r"\| (prune|unrestrained) \|", line)]
    assert [line.split("|")[1:3] for line in measured] == [
        [" prune ", " 0 "],
        [" prune ", " 4 "],
    ] * 2
    assert "Protocol `probability`:" in text and "Protocol `argmax`:" in text
    assert "100.0" in measured[1] and "50.0" in measured[3] and "75.0" in measured[1]
    assert 'from_pretrained("FOLDER")' in text and "## Limits" in text


def test_a_card_of_a_hub_model_names_it_in_its_front_matter(run: Path, tmp_path: Path) -> None:
    from editkit.records.reader import load_run
    from editkit.runner.card import run_card

    records = load_run(run)
    records.config["model"]["id"] = "openai-community/gpt2-xl"  # type: ignore[index]
    front = yaml.safe_load(run_card(records, step=2, view=None, form="model").split("---")[1])
    assert front["base_model"] == "openai-community/gpt2-xl"
    assert front["base_model_relation"] == "finetune"
    records.config["model"]["id"] = "asset:tiny-gpt2"  # type: ignore[index]
    front = yaml.safe_load(run_card(records, step=2, view=None, form="lora").split("---")[1])
    assert "base_model" not in front and front["library_name"] == "peft"


def test_a_card_of_a_step_without_measurements_says_so(run: Path, tmp_path: Path) -> None:
    (run / "evals.jsonl").write_text("")
    (run / "steps.jsonl").write_text("")
    export(run, tmp_path / "out")
    assert "This view was not measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_shows_files_sizes_and_card_and_asks_no_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_api", lambda: pytest.fail("a dry run asks the hub"))
    monkeypatch.setattr(hub, "is_unreachable", lambda: pytest.fail("a dry run asks for an address"))
    shown = CliRunner().invoke(app, ["export", str(run), "--push", "me/edited", "--dry-run"])
    assert shown.exit_code == 0, shown.exception
    for part in ("nothing was sent to me/edited", "model.safetensors", "README.md"):
        assert part in shown.output
    assert "library_name: transformers" in shown.output and "kB" in shown.output


def test_what_is_pushed_is_the_exported_folder_in_a_private_repository(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub()
    monkeypatch.setattr(hub, "_api", lambda: fake)
    monkeypatch.setattr(hub, "is_unreachable", lambda: False)
    to = tmp_path / "out"
    sent = CliRunner().invoke(app, ["export", str(run), "--to", str(to), "--push", "me/edited"])
    assert sent.exit_code == 0, sent.exception
    assert "sent: https://hub.test/me/edited/commit/1" in sent.output
    assert fake.made["me/edited"]["private"] and fake.made["me/edited"]["exist_ok"]
    assert fake.files == {path.name: path.read_bytes() for path in to.iterdir()}


def refused(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(
        "no", response=SimpleNamespace(status_code=status, headers={}, request=None)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalTokenNotFoundError("none"), r"--push: nobody is logged in\. Fix: log in with"),
        (refused(403), r"--push: the hub refused me/edited with status 403\. Fix: log in"),
        (refused(500), r"--push: the hub refused me/edited with status 500\.$"),
        (ConnectionError("secret-key"), r"--push: the hub does not answer \(ConnectionError\)"),
    ],
)
def test_a_hub_that_refuses_is_one_message_before_the_model_is_loaded(
    error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_api", lambda: FakeHub(error))
    monkeypatch.setattr(hub, "is_unreachable", lambda: False)
    done = CliRunner().invoke(app, ["export", "no-such-run", "--push", "me/edited"])
    assert isinstance(done.exception, ConfigError)
    assert re.search(told, str(done.exception)) and "secret" not in str(done.exception)


def test_a_machine_without_a_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_unreachable", lambda: True)
    with pytest.raises(ConfigError, match="the hub has no address here"):
        Repository(name="me/edited").require_login()
