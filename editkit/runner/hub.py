"""An exported folder on the Hugging Face hub.

Keys are read by huggingface_hub from the environment or its own login. They pass through no value
of editkit and stand in no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message
from editkit.model.hub import is_unreachable, quietly
from editkit.runner.card import README, total_size

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Where a folder goes: the model repository `owner/name`."""

    name: str
    is_public: bool = False  # of a repository that does not exist yet

    def problems(self) -> list[str]:
        """What is wrong with the name."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        expected = "owner/name"
        if self.name.count("/") != 1:
            return [message("--push", "no repository", got=self.name, expected=expected)]
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            problem = f"no name of a repository ({str(error).split(':')[0]})"
            return [message("--push", problem, got=self.name, expected=expected)]
        return []

    def require_login(self) -> None:
        """Asks the hub who writes there. Raises ConfigError if it does not answer, or if nobody is
        logged in.
        """
        with _told(self.name):
            _api().whoami()

    def send(self, folder: Path, *, about: str) -> str:
        """Creates the repository where it is missing and writes one commit. Returns its address.

        Raises:
            ConfigError: the hub does not answer, or refuses.
        """
        with _told(self.name):
            api = _api()
            api.create_repo(self.name, private=not self.is_public, exist_ok=True, repo_type="model")
            done = api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=about, repo_type="model"
            )
        return str(getattr(done, "commit_url", done))


def listing(folder: Path) -> Iterator[str]:
    """The lines of a dry run: each file with its size, the sum, and the card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        yield f"{total_size([path.stat().st_size]):>10}  {path.relative_to(folder)}"
    yield f"{total_size([path.stat().st_size for path in files]):>10}  in {len(files)} files"
    yield ""
    yield f"{README}:"
    yield (folder / README).read_text(encoding="utf-8")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="editkit")


class _told:
    """Within, an error of the hub becomes one message. Its text never holds a key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._quiet = quietly()

    def __enter__(self) -> None:
        if is_unreachable():
            fix = "connect this machine, or leave --push out and upload the folder elsewhere"
            raise ConfigError(message("--push", "the hub has no address here", fix=fix))
        self._quiet.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._quiet.__exit__(kind, error, trace)
        if error is None:
            return
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        if isinstance(error, LocalTokenNotFoundError):
            raise ConfigError(message("--push", "nobody is logged in", fix=LOGIN)) from None
        if isinstance(error, OfflineModeIsEnabled):
            fix = "unset HF_HUB_OFFLINE"
            raise ConfigError(message("--push", "the hub is switched off", fix=fix)) from None
        if isinstance(error, HfHubHTTPError):
            status = getattr(error.response, "status_code", "?")
            problem = f"the hub refused {self.name} with status {status}"
            login = LOGIN if status in (401, 403) else None
            raise ConfigError(message("--push", problem, fix=login)) from None
        library = type(error).__module__.partition(".")[0]  # huggingface_hub asks through it
        if isinstance(error, OSError) or library in ("httpx", "httpcore"):
            problem = f"the hub does not answer ({type(error).__name__})"
            fix = "repeat the command later, with a new folder if --to was written"
            raise ConfigError(message("--push", problem, fix=fix)) from None
