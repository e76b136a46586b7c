"""Install the package as its users do, and use it: train, generate, evaluate and analyze by the installed commands.

    python tests/check_installed.py [torch=VERSION]

Builds the wheel and installs it into an empty environment, with the newest releases of all that it needs. Only torch is
pinned: by default to the version in constraints.txt. The commands run in another folder, without the sources. Needs a
package index, and takes some minutes; run by hand before a release.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from helpers import ROOT
from helpers.processes import CLEAN
from helpers.runs import graph_files

from coconut.data.examples import read_examples

MODEL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
OWN = ("torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "hydra-core", "omegaconf")


def done(*command: str | Path, cwd: Path, env: dict[str, str]) -> str:
    """What a command prints. Ends this script if it fails, or warns."""
    print(f"$ {' '.join(str(part) for part in command)}", flush=True)
    ended = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode or "Warning" in ended.stdout or "Traceback" in ended.stdout:
        raise SystemExit(f"{ended.stdout}\nexit status {ended.returncode}")
    return ended.stdout


def main(torch: str = "") -> None:
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    with tempfile.TemporaryDirectory() as place:
        folder, elsewhere = Path(place), Path(place) / "elsewhere"
        elsewhere.mkdir()
        env = {name: value for name, value in CLEAN.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"COCONUT_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        venv.create(folder / "env", with_pip=True)
        bin_folder = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        pip = (bin_folder / "python", "-m", "pip", "--disable-pip-version-check")
        done(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "wheel", ROOT, cwd=folder, env=env)
        done(*pip, "install", f"torch=={torch or pinned[1]}", cwd=folder, env=env)
        done(*pip, "install", *(folder / "wheel").glob("*.whl"), cwd=folder, env=env)
        packages = done(*pip, "list", "--format=freeze", cwd=folder, env=env).splitlines()
        print("  ".join(package for package in packages if package.startswith(tuple(f"{name}==" for name in OWN))))

        data = graph_files(folder, 28, 12, 8)
        question = read_examples(data.test)[0].question
        given = [
            "experiment=quickstart", "run=run", f"data.train={data.train}", f"data.valid={data.valid}",
            f"data.test={data.test}", *(f"model.architecture.{name}={value}" for name, value in MODEL.items()),
            "curriculum.stage0_length=2", "curriculum.stage_length=1", "curriculum.max_stage=2",
            "curriculum.total_length=5", "batch_size=8",
        ]  # fmt: skip
        for name, arguments in {
            "train": given, "generate": ["run=run", f"question={question}"], "evaluate": ["run=run"],
            "analyze": ["run=run"],
        }.items():  # fmt: skip
            print(done(bin_folder / "coconut", name, *arguments, cwd=elsewhere, env=env))
        for made in ("run/checkpoints/step-0000005", "run/evaluation", "run/analysis"):
            assert any((elsewhere / made).iterdir()), made
    print("Installed as users install it, all four commands work.")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
