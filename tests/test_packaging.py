"""The set-up that README opens with: what is pinned, what is installed, what make does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmray import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def needed() -> dict[str, set[str]]:
    """Every package that `make install` needs on this machine, with the extras asked of it."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    waiting = [Requirement(text) for group in groups for text in group]
    found: dict[str, set[str]] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == "mmray" or (name in found and requirement.extras <= found[name]):
            continue
        extras = found.setdefault(name, set()) | requirement.extras
        found[name] = extras
        for text in metadata.requires(name) or []:
            inner = Requirement(text)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in ["", *extras]
            ):
                waiting.append(inner)
    return found


def test_every_package_is_pinned_to_the_version_that_is_tested() -> None:
    pinned = dict(line.split("==") for line in LINES)
    unpinned = {name: metadata.version(name) for name in needed() if name not in pinned}
    assert not unpinned, "constraints.txt lacks them"
    other = {
        name: f"{metadata.version(name)} is installed, {pinned[name]} pinned"
        for name in needed()
        if metadata.version(name) != pinned[name]
    }
    assert not other


def test_constraints_name_versions_and_no_machine() -> None:
    """No hosts, no hashes, no local builds: the file holds wherever the packages come from."""
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line) for line in LINES)
    assert sorted(set(LINES)) == sorted(LINES)


def test_both_commands_are_the_same_program() -> None:
    expected = f"mmray, version {__version__}\n"
    for command in [
        [str(Path(sys.executable).with_name("mmray"))],
        [sys.executable, "-m", "mmray"],
    ]:
        ran = subprocess.run([*command, "--version"], cwd=ROOT, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, expected), ran.stderr
    assert PROJECT["version"] == __version__


def test_the_wheel_holds_mmray_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("mmray", "tests", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"mmray", f"mmray-{__version__}.dist-info"}
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mmray").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert modules <= names


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=checkout, capture_output=True, text=True)


def test_an_old_python_is_refused_in_one_clear_line(checkout: Path) -> None:
    old = checkout / "python3.10"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c "
        "'import sys; sys.version_info = (3, 10, 4); exec(sys.argv[2])' \"$@\"\n"
    )
    old.chmod(0o755)
    refused = make(checkout, "test", f"PYTHON={old}")
    assert refused.returncode != 0
    assert "mmray needs Python 3.11 or newer" in refused.stderr
    assert not (checkout / ".venv").exists()


def test_install_runs_again_only_when_the_requirements_change(checkout: Path) -> None:
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert make(checkout, "--question", "install").returncode == 0
    changed = stamp.stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (changed, changed))
    assert make(checkout, "--question", "install").returncode == 1


OPTIONAL = ["install-ceph", "install-chromium"]  # what some tests need and are skipped without


@pytest.mark.parametrize("failing", ["nothing", "lint", *OPTIONAL, "test"])
def test_ci_installs_lints_and_tests_and_fails_as_they_do(checkout: Path, failing: str) -> None:
    fake = checkout / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\necho "made $1"; [ "$1" = test ] && echo "3 passed in 1.00s"\n'
        f'if [ "$1" = {failing} ]; then echo "make: *** [{failing}] Error 1" >&2; exit 2; fi\n'
    )
    fake.chmod(0o755)
    ran = subprocess.run(
        [checkout / ".ci" / "run"],
        env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    steps = re.findall(r"^made (\S+)", ran.stdout, re.M)
    wanted = ["install", "lint", *OPTIONAL, "test"]
    assert steps == (wanted if failing != "lint" else wanted[:2])
    assert (ran.returncode == 0) == (failing in ("nothing", *OPTIONAL))
    if failing != "lint":
        assert ran.stdout.splitlines()[-1] == "3 passed in 1.00s"
