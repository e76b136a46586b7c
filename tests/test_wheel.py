"""The wheel: made from the source distribution, complete, and of use in an environment without the sources."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.installed import done, use
from helpers.processes import CLEAN

pytestmark = pytest.mark.slow
ENV = {name: value for name, value in CLEAN.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from what the source distribution holds."""
    assert find_spec("hatchling"), "the extra dev has hatchling"
    folder = tmp_path_factory.mktemp("distributions")
    build = (sys.executable, "-m", "hatchling", "build", "-d", str(folder))
    done(*build, "-t", "sdist", cwd=ROOT, env=ENV)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
    done(*build, "-t", "wheel", cwd=folder / sdist.name.removesuffix(".tar.gz"), env=ENV)
    (built,) = folder.glob("*.whl")
    return built


def files_of(*folders: str) -> Iterator[str]:
    """The files of these folders of the repository."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return (path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts)


def test_it_holds_all_that_the_commands_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    wanted = {f"coconut/{name}" for name in files_of("conf")} | {*files_of("coconut", "data_builders")}
    assert found == wanted
    assert {"coconut/py.typed", "data_builders/py.typed", "coconut/conf/train.yaml", "coconut/hub/card.md.j2"} <= found


def test_its_version_is_that_of_the_citation(wheel: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == version
    assert wheel.name == f"coconut_latent-{version}-py3-none-any.whl"


def test_its_commands_work_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the packages that coconut needs from this one."""
    environment, elsewhere = tmp_path / "env", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    bin_folder = environment / ("Scripts" if os.name == "nt" else "bin")
    own = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    quiet = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--ignore-installed")
    to = ("--python", str(bin_folder / "python"))
    done(sys.executable, "-m", "pip", *to, "install", *quiet, wheel, cwd=elsewhere, env=ENV)
    (own / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    env = {**ENV, "COCONUT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    where = "import coconut, data_builders; print(coconut.__file__, data_builders.__file__)"
    python = bin_folder / "python"
    assert done(python, "-c", where, cwd=elsewhere, env=env).split() == [
        str(own / "coconut" / "__init__.py"), str(own / "data_builders" / "__init__.py")
    ]  # fmt: skip
    use(bin_folder / "coconut", elsewhere, env)
