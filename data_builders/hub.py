"""Load data sets by name from the Hugging Face hub, or from a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from coconut.utils.files import sha256
from coconut.utils.pretrained import hub_unreachable

SPLIT_NAMES = {
    "train": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test",
}  # fmt: skip


def load_hub(name: str, config: str | None = None) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The records of the train, valid and test splits, and the manifest's entry on their source.

    `name` is OWNER/NAME on the hub, or a folder of .jsonl, .json, .txt or .parquet files whose names
    begin with their split. Other splits are left out. Raises ValueError if it cannot be read.
    """
    folder = Path(name).is_dir()
    silent = "" if folder else hub_unreachable()
    if silent:
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # use the cache only; must be set before datasets is imported
    from datasets import DatasetDict, load_dataset_builder

    try:
        builder = load_dataset_builder(name, config)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except Exception as error:  # datasets and the libraries below it raise many types
        raise ValueError(_complaint(name, folder, silent, error)) from error
    assert isinstance(loaded, DatasetDict)
    known = {split: SPLIT_NAMES[split] for split in map(str, loaded) if split in SPLIT_NAMES}
    if not known:
        raise ValueError(
            f"hub={name} has no split with a known name, only {', '.join(map(str, loaded))}. Wanted is one of "
            f"{', '.join(SPLIT_NAMES)}. Give its files as train=FILE valid=FILE test=FILE instead."
        )
    records = {ours: loaded[theirs].to_list() for theirs, ours in known.items()}
    described: dict[str, Any] = {"hub": Path(name).name if folder else name, "config": config}
    if folder:
        files = builder.config.data_files or {}
        described["files"] = {
            known[split]: [{"file": Path(path).name, "sha256": sha256(path)} for path in paths]
            for split, paths in files.items()
            if split in known
        }
    else:
        described["revision"] = builder.hash
    return records, described


def _complaint(name: str, folder: bool, silent: str, error: Exception) -> str:
    causes = [error] + ([error.__cause__] if error.__cause__ else [])
    told = "; ".join(f"{type(cause).__name__}: {(str(cause).strip() or '?').splitlines()[0]}" for cause in causes)
    told = f"{silent}, and the cache has no copy" if silent else told
    where = f"the folder {name}" if folder else f"{name!r} on the Hugging Face hub"
    way_out = (
        "If it holds several data sets, give hub_config=NAME; or give each file by itself as "
        if folder
        else "Check the name, hub_config and the connection. Or download its files elsewhere, and give them as "
        "hub=FOLDER, or each by itself as "
    )
    return f"The data set could not be read from {where} ({told}). {way_out}train=FILE valid=FILE test=FILE."
