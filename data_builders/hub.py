"""Load data sets by name from the Hugging Face hub, or from a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut.utils.files import sha256
from coconut.utils.pretrained import hub_unreachable

SPLIT_NAMES = {
    "train": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test",
}  # fmt: skip


def load_hub(
    name: str, config: str | None = None, splits: Mapping[str, str] = SPLIT_NAMES, key: str = "hub"
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The records of the train, valid and test splits, and the manifest's entry on their source.

    `name` is OWNER/NAME on the hub, or a folder of .jsonl, .json, .txt or .parquet files whose names
    begin with their split. `splits`: for the names of splits there, those of ours; others are left out. `key`: the
    configuration key that gave the name, for messages. A class label is given as its name.

    Raises ValueError if it cannot be read.
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
        raise ValueError(_complaint(name, folder, silent, error, key)) from error
    assert isinstance(loaded, DatasetDict)
    known = {split: splits[split] for split in map(str, loaded) if split in splits}
    if not known:
        raise ValueError(
            f"{key}={name} has no split with a known name, only {', '.join(map(str, loaded))}. Wanted is one of "
            f"{', '.join(splits)}. Give its files as train=FILE valid=FILE test=FILE instead."
        )
    records = {ours: label_names(loaded[theirs].to_list(), loaded[theirs].features) for theirs, ours in known.items()}
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


def label_names(records: list[dict[str, Any]], features: Any) -> list[dict[str, Any]]:
    """The records with the names of class labels (`datasets.ClassLabel`) in place of their numbers."""
    from datasets import ClassLabel

    labels = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for record in records:
        for name, feature in labels.items():
            if isinstance(record[name], int):
                record[name] = feature.int2str(record[name]) if record[name] >= 0 else None  # -1: not labelled
    return records


def _complaint(name: str, folder: bool, silent: str, error: Exception, key: str) -> str:
    causes = [error] + ([error.__cause__] if error.__cause__ else [])
    told = "; ".join(f"{type(cause).__name__}: {(str(cause).strip() or '?').splitlines()[0]}" for cause in causes)
    told = f"{silent}, and the cache has no copy" if silent else told
    where = f"the folder {name}" if folder else f"{name!r} on the Hugging Face hub"
    way_out = (
        "If it holds several data sets, give hub_config=NAME; or give each file by itself as "
        if folder
        else "Check the name, hub_config and the connection. Or download its files elsewhere, and give them as "
        f"{key}=FOLDER, or each by itself as "
    )
    return f"The data set could not be read from {where} ({told}). {way_out}train=FILE valid=FILE test=FILE."
