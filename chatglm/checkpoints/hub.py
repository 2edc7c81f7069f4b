"""Fetches a model's files from the hub; without a network, finds those that were fetched before."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import ModelLoadError

SOON = 4.0  # seconds without an answer after which a warning explains the wait
PATIENCE = 30.0  # seconds without an answer after which the hub counts as unreachable


def fetch(repo_id: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Fetches the missing data files of a hub repository, never code, and returns their folder.

    The hub is that of huggingface_hub: `HF_ENDPOINT` names a mirror, `HF_HUB_OFFLINE=1` forbids the network.

    Args:
        local_files_only: do not ask the hub, take what was fetched before.

    Raises:
        ModelLoadError: there is no such repository or revision, its terms are not accepted, or the hub cannot be
            reached and the files are not on this machine.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if local_files_only:
        try:
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise ModelLoadError(
                f"there is no folder {repo_id}, and no hub model of this name{at} on this machine: load it once "
                "without local_files_only, or give the folder"
            ) from error
    try:
        # One request without retries: snapshot_download alone takes half a minute to notice that there is no network.
        info = _answer(lambda: HfApi().model_info(repo_id, revision=revision, timeout=PATIENCE))
        names = [file.rfilename for file in info.siblings or []]
        kind = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=["*.json", "*.model", kind]))
    except GatedRepoError as error:
        raise ModelLoadError(f"the hub's {repo_id} asks you to accept its terms first: do so on its page") from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"the hub's {repo_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"there is no folder {repo_id} and no model of this name on the hub") from error
    except HFValidationError as error:
        raise ModelLoadError(f"there is no folder {repo_id}, and it cannot be a name on the hub") from error
    except Exception as error:  # no network: every HTTP client has its own errors for that
        try:
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ModelLoadError(
                f"there is no folder {repo_id}, no hub model of this name on this machine, and the hub cannot be "
                f"reached ({type(error).__name__}): download it elsewhere and give the folder"
            ) from error


def _answer(ask: Callable[[], Any]) -> Any:
    """What `ask` returns or raises; TimeoutError after PATIENCE, as name lookup and connecting have no time limit."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, ask()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="hub")
    thread.start()
    thread.join(SOON)
    if not outcome:
        warnings.warn(
            f"the hub has not answered for {SOON:g} s: waiting up to {PATIENCE:g} s; without a network give a folder, "
            "or set HF_HUB_OFFLINE=1 to use files fetched before",
            stacklevel=6,  # the line that calls `chatglm.load`
        )
        thread.join(PATIENCE - SOON)
    if not outcome:
        raise TimeoutError(f"no answer in {PATIENCE:g} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value
