"""Load pretrained models, configs and tokenizers from a folder, a GGUF file or the Hugging Face hub.

The errors say what to do.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from coconut.utils.console import log

# An environment variable and no configuration key: a run's own files must not decide whether to trust code.
REMOTE_CODE_VARIABLE = "COCONUT_REMOTE_CODE"


def load_pretrained(auto_class: Any, name_or_path: Any, **settings: Any) -> Any:
    """Call `from_pretrained` of a transformers Auto class, and copy the weights out of their memory-mapped file.

    A GGUF file gives its config, its tokenizer, or its weights, dequantised to `dtype`: an ordinary model, which trains
    and is saved as any other. If the hub does not answer, only the local cache is used. Code inside a model's folder is
    run only if the environment variable COCONUT_REMOTE_CODE is 1. Raises ValueError if it is needed and not allowed,
    and for a GGUF file that is missing, damaged or of an architecture that transformers does not read.
    """
    if str(name_or_path).endswith(GGUF):
        return _load_gguf(auto_class, Path(name_or_path), settings)
    _refuse_unnamed_gguf(Path(name_or_path))
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


GGUF = ".gguf"


def _load_gguf(auto_class: Any, file: Path, settings: dict[str, Any]) -> Any:
    """What `auto_class` reads of a GGUF file. A model is logged with the types that its weights were stored in."""
    from transformers import AutoConfig, AutoTokenizer

    if not file.is_file():
        raise ValueError(f"{file} does not exist. Name a GGUF file on this machine, or a folder, or OWNER/NAME.")
    stored = _stored_types(file)
    is_model = auto_class not in (AutoConfig, AutoTokenizer)
    if is_model:
        from transformers import GgufConfig

        settings["quantization_config"] = GgufConfig(dequantize=True)
    try:
        loaded = auto_class.from_pretrained(file.parent, gguf_file=file.name, **settings)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(
            f"transformers cannot read {file} ({type(error).__name__}: {error}). Take the model's own folder, with "
            "config.json and *.safetensors."
        ) from error
    if is_model:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        count = sum(weight.numel() for weight in model.parameters())
        log(f"{file.name}: {count:,} parameters, dequantised from {stored} to {str(model.dtype).split('.')[-1]}")
        _copy_weights(model)
    elif auto_class is AutoTokenizer:
        _drop_tokens_beyond_vocabulary(loaded)
    return loaded


def _drop_tokens_beyond_vocabulary(tokenizer: Any) -> None:
    """Remove the default special tokens that transformers adds to a tokenizer from a GGUF file which lacks them.

    The model has no embeddings for them.
    """
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < tokenizer.vocab_size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))


def _stored_types(file: Path) -> str:
    """The types of the weights in a GGUF file, the most frequent first. Those of vectors (norms) are left out."""
    try:
        import accelerate  # noqa: F401  # transformers needs it for GGUF files
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f"{file} is a GGUF file, which needs gguf and accelerate. Install them: pip install gguf accelerate, or "
            "'coconut-latent[gguf]'."
        ) from None
    numbers: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(file).tensors:
            if len(tensor.shape) > 1:
                numbers[tensor.tensor_type.name] += int(tensor.n_elements)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{file} is damaged, or no GGUF file: {error}. Download it again.") from error
    return ", ".join(name for name, _ in numbers.most_common())


def _refuse_unnamed_gguf(folder: Path) -> None:
    """Raise ValueError for a folder that holds GGUF files and nothing else to load."""
    if any((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return
    if files := sorted(folder.glob(f"*{GGUF}")):
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"{folder} has no config.json, but GGUF files: {names}. Name one: {files[0]}")


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
