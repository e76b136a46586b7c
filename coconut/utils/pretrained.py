"""Opening what transformers keeps in a folder or on the hub, and saying what to do where that does not come off."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ASKED = "COCONUT_REMOTE_CODE"  # an environment variable: whom to trust is not for a run's configuration to say


def load_pretrained(kind: Any, place: Any, **settings: Any) -> Any:
    """`kind.from_pretrained(place)`, of one of transformers' Auto classes; weights are copied out of their file.

    Where the hub does not answer, the cache's copy is taken.

    Code that the place brings along is not run, unless COCONUT_REMOTE_CODE=1 is set: raises ValueError if it is needed.
    """
    if not Path(place).exists() and out_of_reach():
        settings["local_files_only"] = True
    try:
        found = kind.from_pretrained(place, trust_remote_code=os.environ.get(ASKED) == "1", **settings)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{place} needs code that it brings along, and such code is not run unless you ask for it. Read its *.py "
            f"files; if you trust them, set the environment variable {ASKED}=1."
        ) from None
    _copy_weights(found[0] if isinstance(found, tuple) else found)
    return found


def _copy_weights(found: Any) -> None:
    """Copy a model's tensors out of their mapped file, where they lie at odd addresses.

    On some processors the last digit of a product depends on the address, so that a run would not end as one does that
    was resumed from a checkpoint of it.
    """
    if hasattr(found, "parameters"):
        for tensor in (*found.parameters(), *found.buffers()):
            tensor.data = tensor.data.clone()


def resolve_local_path(place: Path | str) -> Path:
    """A folder: this one, or of what is OWNER/NAME on the Hugging Face hub a copy in its cache.

    Raises FileNotFoundError if the hub has no such thing, or cannot be reached.
    """
    if Path(place).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    silent = out_of_reach()
    try:
        return Path(snapshot_download(str(place), local_files_only=bool(silent)))
    except (OSError, HFValidationError, HTTPError) as error:
        reason = silent or (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{place} is no folder here, and as OWNER/NAME it could not be had from the Hugging Face hub: {reason}"
        ) from None


def out_of_reach() -> str:
    """Why the Hugging Face hub does not answer, "" if it does.

    It is asked once: each of the libraries' own requests would be tried again for half a minute.
    """
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _silence(constants.ENDPOINT)


@cache
def _silence(endpoint: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError) as error:
        return f"{endpoint} does not answer ({str(error) or type(error).__name__})"
    return ""


@contextmanager
def explain_load_errors(name: str, key: str) -> Iterator[None]:
    """Say what to do where a model or tokenizer, which the setting `key` names, cannot be loaded."""
    try:
        yield
    except OSError as error:
        silent = "" if Path(name).exists() else out_of_reach()
        first = f"{silent}, and the cache has no copy." if silent else str(error).strip().split("\n")[0]
        new = " To try the command without pretrained weights: model=gpt2_new model.tokenizer=FOLDER."
        raise ValueError(
            f"{name} could not be loaded, neither as a folder nor from the Hugging Face hub: {first}\n"
            f"Where the hub cannot be reached, set {key}=FOLDER to a copy on this machine (for GPT-2: config.json, "
            "model.safetensors, tokenizer.json), or HF_HOME to a filled cache, or HF_ENDPOINT to a mirror."
            + (new if key.startswith("model.") else "")
        ) from error
