"""Builds the wheels from a copy of the sources and uses each as a new user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 300
COMMAND_SECONDS = 60

pytestmark = pytest.mark.timeout(900)


def run(*argv: str | Path, timeout: float = COMMAND_SECONDS, cwd: Path | None = None) -> str:
    """Run a command in a bare environment and return what it printed; a failure shows it."""
    # Nothing of the tests' own environment may be used.
    keep = ("PATH", "HOME", "LANG")
    env = {name: value for name, value in os.environ.items() if name in keep or name.startswith("PIP_")}
    words = [str(word) for word in argv]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=env,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}"
    return done.stdout


PARTS = ["core", "storage", "azure", "libvirt", "physical"]
# What is installed together: a driver brings what it needs.
TOGETHER = {
    "core": ["core"],
    "azure": ["core", "azure"],
    "libvirt": ["core", "storage", "libvirt"],
    "physical": ["core", "physical"],
}


def sources(work: Path, part: str) -> Path:
    """A copy: a `build/lib` left in the tree would put files into the wheel that are no longer in the sources."""
    ours = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "tests")
    if part != "core":
        return Path(shutil.copytree(PROJECT / "drivers" / part, work / part, ignore=ours))
    (work / "core").mkdir()
    ours = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(PROJECT / "asrcore", work / "core/asrcore", ignore=ours)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(PROJECT / name, work / "core")
    return work / "core"


def build(source: Path, output: Path) -> Path:
    options = ("--no-isolation", "--wheel", "--outdir")
    run(sys.executable, "-m", "build", *options, output, source, timeout=BUILD_SECONDS)
    name = {"core": "asrcore", "storage": "asr_storage"}.get(source.name, f"asr_driver_{source.name}")
    return next(output.glob(f"{name}-*.whl"))


def environment(place: Path, *wheels: Path) -> Path:
    """A new virtual environment with just these wheels and what they say they need."""
    run(sys.executable, "-m", "venv", place, timeout=BUILD_SECONDS)
    # --no-compile: the environment lives for a few commands, and the SDKs have thousands of modules.
    run(place / "bin/pip", "install", "-q", "--no-input", "--no-compile", *wheels, timeout=BUILD_SECONDS)
    return place / "bin"


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="session")
def wheels(work: Path) -> dict[str, Path]:
    """The wheel of each distribution."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda part: build(sources(work, part), work / "dist"), PARTS)
        return dict(zip(PARTS, found, strict=True))


@pytest.fixture(scope="session")
def environments(work: Path, wheels: dict[str, Path]) -> dict[str, Path]:
    """The directory of the commands of each bare environment."""

    def made(name: str) -> Path:
        return environment(work / f"{name}-venv", *(wheels[part] for part in TOGETHER[name]))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TOGETHER, pool.map(made, TOGETHER), strict=True))


@pytest.fixture(scope="session", params=["azure", "libvirt"])
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def core_wheel(wheels: dict[str, Path]) -> Path:
    return wheels["core"]


@pytest.fixture(scope="session")
def driver_wheel(wheels: dict[str, Path], driver: str) -> Path:
    return wheels[driver]


@pytest.fixture(scope="session")
def core_alone(environments: dict[str, Path]) -> Path:
    return environments["core"]


@pytest.fixture(scope="session")
def core_and_driver(environments: dict[str, Path], driver: str) -> Path:
    return environments[driver]


def test_core_wheel_holds_the_library_and_nothing_else(core_wheel: Path) -> None:
    names = zipfile.ZipFile(core_wheel).namelist()
    assert "asrcore/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"asrcore"}


def test_every_module_of_the_core_is_in_its_wheel(core_wheel: Path) -> None:
    """Folders without `__init__.py` and data files are easily omitted."""
    names = set(zipfile.ZipFile(core_wheel).namelist())
    sources = [path for path in (PROJECT / "asrcore").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(PROJECT)) for path in sources} <= names


def test_driver_wheel_holds_the_driver_and_its_entry_point(driver_wheel: Path, driver: str) -> None:
    archive = zipfile.ZipFile(driver_wheel)
    names = archive.namelist()
    assert f"asr_driver_{driver}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {f"asr_driver_{driver}"}
    entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert f"{driver} = asr_driver_{driver}.plugin" in entry_points


def test_storage_wheel_holds_no_driver(wheels: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(wheels["storage"])
    names = archive.namelist()
    assert "asr_storage/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"asr_storage"}
    assert not any(name.endswith("entry_points.txt") for name in names)


def test_core_alone_has_a_command_and_only_its_own_driver(core_alone: Path) -> None:
    assert "Usage" in run(core_alone / "asr", "--help")
    script = "from asrcore import plugins; p = plugins.load(); print(sorted(p.drivers), p.broken)"
    assert run(core_alone / "python", "-c", script).strip() == "['remote'] ()"


def test_core_alone_makes_a_vault(core_alone: Path, tmp_path: Path) -> None:
    """It needs the migrations, which are files as well as modules."""
    vault = f"sqlite:///{tmp_path}/vault.db"
    run(core_alone / "asr", "--vault", vault, "init", cwd=tmp_path)
    assert (tmp_path / "vault.db").stat().st_size > 0
    run(core_alone / "asr", "--vault", vault, "status", "--json", cwd=tmp_path)


def test_driver_beside_the_core_is_found(core_and_driver: Path, driver: str) -> None:
    script = "from asrcore import plugins; p = plugins.load(); print(sorted(p.drivers), p.broken)"
    assert run(core_and_driver / "python", "-c", script).strip() == f"['{driver}', 'remote'] ()"
    assert driver in run(core_and_driver / "asr", "driver", "list")


def test_physical_driver_beside_the_core_packs_its_agent(
    wheels: dict[str, Path], environments: dict[str, Path], tmp_path: Path
) -> None:
    names = {name.split("/")[0].split("-")[0] for name in zipfile.ZipFile(wheels["physical"]).namelist()}
    assert names == {"asr_driver_physical", "asr_mobility"}
    bin_dir = environments["physical"]
    assert "physical" in run(bin_dir / "asr", "driver", "list")
    run(bin_dir / "asr", "physical", "package", tmp_path / "agent.pyz")
    assert run(sys.executable, "-I", tmp_path / "agent.pyz", "version").strip()
