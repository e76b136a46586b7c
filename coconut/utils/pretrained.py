"""Load pretrained models, configs and tokenizers from a folder or the Hugging Face hub, with errors that help."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# An environment variable and no configuration key: a run's own files must not decide whether to trust code.
REMOTE_CODE_VARIABLE = "COCONUT_REMOTE_CODE"


def load_pretrained(auto_class: Any, name_or_path: Any, **settings: Any) -> Any:
    """Call `from_pretrained` of a transformers Auto class, and copy the weights out of their memory-mapped file.

    If the hub does not answer, only the local cache is used. Code inside a model's folder is run only if the
    environment variable COCONUT_REMOTE_CODE is 1; raises ValueError if it is needed and not allowed.
    """
    if not Path(name_or_path).exists() and hub_unreachable():
        settings["local_files_only"] = True
    try:
        loaded = auto_class.from_pretrained(
            name_or_path, trust_remote_code=os.environ.get(REMOTE_CODE_VARIABLE) == "1", **settings
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} needs its own code, which is not run unless you allow it. Read its *.py files; if you "
            f"trust them, set the environment variable {REMOTE_CODE_VARIABLE}=1."
        ) from None
    _copy_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def _copy_weights(model: Any) -> None:
    """Copy a model's tensors out of their memory-mapped file, where they are not aligned.

    On some processors the last digit of a matrix product depends on the alignment: an uninterrupted run would differ
    from a resumed one, whose weights were loaded from a checkpoint.
    """
    if hasattr(model, "parameters"):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def resolve_local_path(name_or_path: Path | str) -> Path:
    """The path of a local folder, or of the cached download of OWNER/NAME from the Hugging Face hub.

    Raises FileNotFoundError if the hub has no such repository, or cannot be reached.
    """
    if Path(name_or_path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    unreachable = hub_unreachable()
    try:
        return Path(snapshot_download(str(name_or_path), local_files_only=bool(unreachable)))
    except (OSError, HFValidationError, HTTPError) as error:
        reason = unreachable or (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{name_or_path} is not a local folder, and could not be loaded as OWNER/NAME from the Hugging Face hub: "
            f"{reason}"
        ) from None


def hub_unreachable() -> str:
    """Why the Hugging Face hub cannot be reached; "" if it can.

    One request is made and its result is cached: without it, each request of the libraries would be retried for half a
    minute.
    """
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _request_hub(constants.ENDPOINT)


@cache
def _request_hub(endpoint: str) -> str:
    """Send one request. Returns what went wrong, or "" for any answer, an HTTP error included."""
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
    """Turn an OSError of loading a model or tokenizer into a ValueError with advice. `key`: the setting for `name`."""
    try:
        yield
    except OSError as error:
        unreachable = "" if Path(name).exists() else hub_unreachable()
        reason = f"{unreachable}, and the cache has no copy." if unreachable else str(error).strip().split("\n")[0]
        advice = " To try the command without pretrained weights: model=gpt2_new model.tokenizer=FOLDER."
        raise ValueError(
            f"{name} could not be loaded, neither as a folder nor from the Hugging Face hub: {reason}\n"
            f"Without access to the hub, set {key}=FOLDER to a copy on this machine (for GPT-2: config.json, "
            "model.safetensors, tokenizer.json), or HF_HOME to a filled cache, or HF_ENDPOINT to a mirror."
            + (advice if key.startswith("model.") else "")
        ) from error
