"""The environment in which the rivals are installed: apart from ours, because their requirements contradict ours.

It is made from `requirements.txt` the first time. What cannot be installed is named, and measured is what can.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
REQUIREMENTS = _HERE / "requirements.txt"
FOLDER = _HERE.parent.parent / ".venv-rivals"
_SECONDS = 1800.0
_INSTALLED = "installed.txt"  # what was asked for when it was made

# What each is imported as; all are needed for something.
PACKAGES = {"flwr": "flwr", "nvflare": "nvflare", "chorus-fl": "chorus", "torch": "torch"}


@dataclass(frozen=True)
class Rivals:
    """What is installed where."""

    folder: Path
    versions: dict[str, str]  # by package; those that are missing are not in it
    complaints: tuple[str, ...] = ()  # why

    @property
    def programs(self) -> Path:
        """The folder of the commands."""
        return self.folder / "bin"

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.program("python")

    def program(self, name: str) -> Path:
        """A command."""
        return self.programs / name

    def why_not(self, *packages: str) -> str:
        """Why something that needs these packages cannot run; empty if it can."""
        absent = [package for package in packages if package not in self.versions]
        return f"{', '.join(absent)} could not be installed: {'; '.join(self.complaints)}" if absent else ""


def requirements() -> dict[str, str]:
    """The pinned version of each package, in the order of the file."""
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    return dict(line.split("==", 1) for line in lines if line)


def prepare(say: Callable[[str], None], folder: Path = FOLDER) -> Rivals:
    """The environment, made if it is missing or was made for other pins; `say` is told what takes long."""
    mark, wanted = folder / _INSTALLED, REQUIREMENTS.read_text(encoding="utf-8")
    complaints: list[str] = []
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        say(f"Making {folder.name} for Flower, NVIDIA FLARE and chorus (some minutes, once).")
        complaints = _install(folder, say)
        if not complaints:
            mark.write_text(wanted, encoding="utf-8")
    return Rivals(folder, _versions(folder), tuple(complaints))


def _install(folder: Path, say: Callable[[str], None]) -> list[str]:
    """What could not be installed. One after the other: one that fails must not take the others along."""
    if complaint := _run((sys.executable, "-m", "venv", str(folder))):
        return [complaint]
    complaints = []
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    for package, version in requirements().items():
        say(f"{package} {version}")
        if complaint := _run((*pip, f"{package}=={version}")):
            complaints.append(f"{package} {version}: {complaint}")
    return complaints


def _run(command: tuple[str, ...]) -> str:
    """The last line of what it complained about; empty if it went well."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {_SECONDS:g} s"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (said[-1] if said else f"exit status {done.returncode}")


def _versions(folder: Path) -> dict[str, str]:
    """Of the wanted packages that are there."""
    python = folder / "bin" / "python"
    if not python.exists():
        return {}
    listing = subprocess.run(
        (str(python), "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    known = dict(line.lower().split("==", 1) for line in listing.stdout.splitlines() if "==" in line)
    return {package: known[package] for package in PACKAGES if package in known}
