"""An exported folder on the Hugging Face hub, with the user's own login. Sends only files that this export wrote."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from cli.errors import Failed
from cli.words import plain
from common.errors import ConfigError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MAX_SAID_CHARS = 300


def check_can_push(repository: str) -> None:
    """Before anything is made: raises ConfigError for a name that cannot be, Failed if nobody is logged in."""
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push-to {repository!r}: expected USER/REPOSITORY, for example ada/gsm8k-lora")
    if find_spec("huggingface_hub") is None:
        raise Failed('--push-to needs huggingface_hub; install it with: pip install "raflora[worker]"')
    from huggingface_hub import constants, get_token  # noqa: PLC0415 - seldom needed, and may not be installed

    if constants.HF_HUB_OFFLINE:
        raise Failed(f"--push-to {repository}: HF_HUB_OFFLINE is set; unset it or leave --push-to out")
    if get_token() is None:
        raise Failed(f"--push-to {repository}: nobody is logged in here; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, files: Sequence[str], repository: str, *, private: bool) -> str:
    """Makes the repository if there is none and uploads the files; returns its address. Raises Failed."""
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    api = HfApi(library_name="raflora")
    # The HTTP library's own errors ("nobody answers"): which one it is depends on the hub library's version.
    of_http = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (*of_http, OSError, RuntimeError, ValueError)
    try:
        # An existing repository keeps its visibility; a new one without --private has the account's default.
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[_literally(name) for name in files],
            commit_message="raflora export",
        )
    except expected as error:
        raise _not_pushed(folder, repository, error) from None
    return str(address)


def _not_pushed(folder: Path, repository: str, error: Exception) -> Failed:
    said = plain(" ".join(str(error).split()))[:_MAX_SAID_CHARS] or type(error).__name__
    return Failed(
        f"--push-to {repository}: the hub did not take it: {said}; the folder is whole, so "
        f"`hf upload {repository} {folder}` can be tried later"
    )


def _literally(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
