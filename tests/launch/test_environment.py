"""Building the environment: real virtual environments with one tiny package, which is made here; no package index."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.launch import environment as env
from tests.runs import ROOT


def package(folder: Path, version: str) -> Path:
    """A source tree that pip builds without a network: the build backend is in the tree."""
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "tiny-thing"\nversion = "{version}"\n'
    )
    (folder / "backend.py").write_text(f"""
import os, time, zipfile
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    if os.path.exists("{folder}/broken"):
        raise RuntimeError("this package does not build")
    with open("{folder}/builds", "a") as log:
        log.write("built\\n")
    end = time.monotonic() + 60
    while os.path.exists("{folder}/hold") and time.monotonic() < end:
        time.sleep(0.02)
    name, info = "tiny_thing-{version}-py3-none-any.whl", "tiny_thing-{version}.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        wheel.writestr("tiny_thing.py", "VERSION = '{version}'\\n")
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: tiny-thing\\nVersion: {version}\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return name
""")
    return folder


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `requirements.txt` that names the package, version 1."""
    monkeypatch.delenv("SFT_VENV", raising=False)
    package(tmp_path / "thing", "1")
    (tmp_path / "requirements.txt").write_text(f"{tmp_path}/thing\n")
    return tmp_path


def build(tree: Path) -> Path:
    return env.ensure_environment(tree / ".venv", [tree / "requirements.txt"])


def builds(tree: Path) -> int:
    log = tree / "thing" / "builds"
    return len(log.read_text().splitlines()) if log.exists() else 0


def version(python: Path) -> str:
    command = [str(python), "-c", "import tiny_thing; print(tiny_thing.VERSION)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_it_is_built_once_and_again_when_the_requirements_change(tree: Path) -> None:
    python = build(tree)
    assert python == tree / ".venv" / "bin" / "python"
    assert (version(python), builds(tree)) == ("1", 1)
    build(tree)
    assert builds(tree) == 1
    package(tree / "thing", "2")
    (tree / "requirements.txt").write_text(f"{tree}/thing  # version 2\n")
    assert (version(build(tree)), builds(tree)) == ("2", 2)


@pytest.mark.slow
def test_an_installation_that_failed_is_repeated(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tree / "thing" / "broken").touch()
    arguments = ["--default", str(tree / ".venv"), str(tree / "requirements.txt")]
    assert env.main(arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"[setup] could not build {tree}/.venv" in captured.err
    assert env.find_outdated(tree / ".venv", [tree / "requirements.txt"]) == [tree / "requirements.txt"]
    (tree / "thing" / "broken").unlink()
    assert env.main(arguments) == 0
    assert capfd.readouterr().out == f"{tree}/.venv/bin/python\n"
    assert version(tree / ".venv" / "bin" / "python") == "1"


@pytest.mark.slow
def test_a_build_that_was_killed_starts_over(tree: Path) -> None:
    half = tree / ".venv"
    (half / "lib").mkdir(parents=True)
    (half / "lib" / "half a file").touch()
    (half / env.BUILDING).touch()
    assert version(build(tree)) == "1"
    assert not (half / "lib" / "half a file").exists()
    assert not (half / env.BUILDING).exists()


@pytest.mark.slow
def test_a_python_that_is_gone_is_replaced(tree: Path) -> None:
    python = build(tree)
    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    assert version(build(tree)) == "1"


@pytest.mark.slow
def test_two_at_once_build_once(tree: Path) -> None:
    command = [sys.executable, "-P", str(ROOT / "sft" / "launch" / "environment.py"), "--default", str(tree / ".venv")]
    command.append(str(tree / "requirements.txt"))
    hold = tree / "thing" / "hold"
    hold.touch()
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while builds(tree) == 0:  # the package is being built
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert second.stderr is not None
    assert "another process is installing" in second.stderr.readline()
    hold.unlink()
    ends = [process.communicate(timeout=120) for process in (first, second)]
    assert [out for out, _ in ends] == [f"{tree}/.venv/bin/python\n"] * 2
    assert "another process is installing" not in ends[0][1]
    assert builds(tree) == 1


def test_the_users_environment_is_used_as_it_is(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tree / "own"
    (own / "bin").mkdir(parents=True)
    (own / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("SFT_VENV", str(own))
    assert env.main(["--default", str(tree / ".venv"), str(tree / "requirements.txt")]) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{own}/bin/python\n"
    assert captured.err == f"[setup] using SFT_VENV={own} as it is; nothing is installed into it\n"
    assert builds(tree) == 0
    assert sorted(path.name for path in own.iterdir()) == ["bin"]


def test_a_folder_that_is_no_environment(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFT_VENV", str(tree / "thing"))
    assert env.main(["--default", str(tree / ".venv"), str(tree / "requirements.txt")]) == 1
    assert "is no virtual environment" in capfd.readouterr().err


def test_a_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "oldpython"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.8.10' && exit 0\nexit 1\n")
    old.chmod(0o755)
    command = [str(ROOT / "launch_training.sh"), "--help"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Python 3.11 or newer is needed; {old} is Python 3.8.10\n")
    assert done.stdout == ""


def test_every_pinned_package_has_its_reason() -> None:
    pinned = [
        line.split("==")[0].lower()
        for file in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / file).read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    ]
    lines = (ROOT / "docs" / "dependencies.md").read_text().splitlines()
    reasons = [line.split("`")[1].lower() for line in lines if line.startswith("| `")]
    assert reasons == pinned
    for file in ("requirements.txt", "requirements-dev.txt"):
        packages = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] not in "#-"]
        assert all("==" in line for line in packages)
