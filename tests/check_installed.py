"""Install the package as its users do, and use it: train, evaluate, generate and analyze by the installed commands.

    python tests/check_installed.py [torch=VERSION]

Builds the wheel and installs it into an empty environment, with the newest releases of all that it needs. Only torch is
pinned: by default to the version in constraints.txt. The commands run in another folder, without the sources. Needs a
package index, and takes some minutes; run by hand before a release.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import venv
from pathlib import Path

from helpers import ROOT
from helpers.installed import done, use
from helpers.processes import CLEAN

OWN = ("torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "hydra-core", "omegaconf")


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

        run = use(bin_folder / "coconut", elsewhere, env)
        print(done(bin_folder / "coconut", "analyze", "run=run", cwd=elsewhere, env=env))
        assert any((run / "analysis").iterdir())
    print("Installed as users install it, its commands work.")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
