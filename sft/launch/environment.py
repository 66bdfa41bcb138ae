"""Builds and updates the virtual environment that the two shell scripts run in.

Standard library only: it runs before anything is installed. The environment keeps a copy of each requirements file that
is installed. An edited file differs from its copy and is installed again; a copy is written only after pip has
succeeded, so an interrupted installation is repeated. A lock in the environment keeps two jobs that share a disk from
installing at the same time.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

INSTALLED = ".sft-installed"  # the copies of the requirements files that are installed
BUILDING = ".sft-building"  # marks an environment whose first build has not finished
LOCK = ".sft-lock"


def python_of(environment: Path) -> Path:
    """Returns the Python of a virtual environment."""
    return environment / "bin" / "python"


def is_usable(environment: Path) -> bool:
    """Returns whether the environment's Python starts: an upgrade of the system's can leave a dangling link."""
    try:
        command = [str(python_of(environment)), "-c", ""]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def find_outdated(environment: Path, requirements: Sequence[Path]) -> list[Path]:
    """Returns the requirements files that are not installed or have changed since."""
    copies = environment / INSTALLED
    return [file for file in requirements if not _same_text(copies / file.name, file)]


def _same_text(copy: Path, file: Path) -> bool:
    try:
        return copy.read_bytes() == file.read_bytes()
    except FileNotFoundError:
        return False


@contextmanager
def locked(environment: Path) -> Iterator[None]:
    """Holds the environment's lock, which the kernel releases when the process ends.

    POSIX record locks (`lockf`) are the kind that NFS passes between nodes.
    """
    environment.mkdir(parents=True, exist_ok=True)
    with open(environment / LOCK, "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log(f"another process is installing into {environment}; waiting for it")
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def log(line: str) -> None:
    """Prints to stderr: stdout carries the path of the Python."""
    print(f"[setup] {line}", file=sys.stderr, flush=True)


def ensure_environment(environment: Path, requirements: Sequence[Path]) -> Path:
    """Builds or updates `environment` until it has all `requirements` and returns its Python.

    Raises:
        subprocess.CalledProcessError: `venv` or pip failed; pip has printed why.
    """
    if not find_outdated(environment, requirements) and is_usable(environment):
        return python_of(environment)
    with locked(environment):
        wanted = find_outdated(environment, requirements)
        if not is_usable(environment) or (environment / BUILDING).exists():
            _create(environment)
            wanted = list(requirements)
        if wanted:  # another process may have done it while this one waited
            _install(environment, wanted)
        (environment / BUILDING).unlink(missing_ok=True)
    return python_of(environment)


def _create(environment: Path) -> None:
    log(f"creating {environment} with Python {sys.version.split()[0]} (once)")
    for entry in environment.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (environment / BUILDING).touch()
    # The base interpreter: when this runs inside an environment, a new one must not depend on it.
    base = getattr(sys, "_base_executable", sys.executable)
    result = subprocess.run([base, "-m", "venv", str(environment)], stdout=sys.stderr, check=False)
    if result.returncode != 0:
        log("Python's `venv` module failed; on Debian and Ubuntu: apt-get install python3-venv")
        result.check_returncode()


def _install(environment: Path, requirements: Sequence[Path]) -> None:
    log(f"installing {', '.join(file.name for file in requirements)} into {environment} (this takes minutes)")
    texts = {file.name: file.read_bytes() for file in requirements}
    command = [str(python_of(environment)), "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stderr.isatty():  # in a job's log the progress bars are thousands of lines
        command.append("--quiet")
    for file in requirements:
        command += ["-r", str(file)]
    subprocess.run(command, stdout=sys.stderr, check=True)
    copies = environment / INSTALLED
    copies.mkdir(exist_ok=True)
    for name, text in texts.items():
        temporary = copies / f"{name}.{os.getpid()}"
        temporary.write_bytes(text)
        temporary.replace(copies / name)


def is_managed(environment: Path) -> bool:
    """Returns whether this module built `environment`, as opposed to one that the user made and named in SFT_VENV."""
    marks = (INSTALLED, BUILDING, LOCK)
    return not environment.exists() or any((environment / mark).exists() for mark in marks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the path of the Python to use. Exit code 1 when the environment could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--default", type=Path, required=True, help="the environment when SFT_VENV is not set")
    parser.add_argument("requirements", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    named = os.environ.get("SFT_VENV")
    environment = Path(named).expanduser().absolute() if named else options.default
    if named and not is_managed(environment):
        if not is_usable(environment):
            log(f"SFT_VENV={named} is no virtual environment: {python_of(environment)} does not run")
            return 1
        log(f"using SFT_VENV={named} as it is; nothing is installed into it")
        print(python_of(environment))
        return 0
    try:
        print(ensure_environment(environment, options.requirements))
    except subprocess.CalledProcessError as error:
        log(f"could not build {environment}: {' '.join(error.cmd[:4])} ... ended with {error.returncode}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
