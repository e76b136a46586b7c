"""Upload a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from coconut.hub.folder import write_folder
from coconut.hub.model_card import card
from coconut.utils.pretrained import hub_unreachable

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def check_name(name: str) -> None:
    """Raise ValueError unless the name has the form OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push={name} is not a valid OWNER/NAME on the hub: {error}") from None
    if name.count("/") != 1:
        raise ValueError(f"push={name} is not a valid OWNER/NAME on the hub.")


def push_model(lm: LatentLM, name: str, private: bool = True) -> None:
    """Save the model with a card, and put it on the hub as OWNER/NAME. Raises ValueError if the hub refuses it."""
    with TemporaryDirectory() as folder:
        write_folder(lm, folder, card(lm, name=name))
        push(Path(folder), name, private)


def push(folder: Path | str, name: str, private: bool = True) -> None:
    """Upload a saved folder to the Hugging Face hub as OWNER/NAME.

    Raises ValueError if the upload fails, or if `private` is set and the repository exists and is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    check_name(name)
    if unreachable := hub_unreachable():
        raise ValueError(f"{name} was not uploaded: {unreachable}.")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        public = private and not api.repo_info(name).private
        if not public:
            api.upload_folder(repo_id=name, folder_path=folder)
    except (HTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} was not uploaded: {reason} To log in: hf auth login") from error
    if public:
        raise ValueError(
            f"{name} exists on the hub and is public, but private=true, so nothing was uploaded. Make it private "
            "there, use another name, or publish with private=false."
        )
