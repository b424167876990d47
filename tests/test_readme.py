"""Every command block of the README is run, so that the README cannot lie."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
#: Run here. The others: make's targets are looked up below, and tests/test_jobs.py submits a job,
#: and tests/test_engine_serve.py serves.
ELSEWHERE = ("ray job", "mmray serve")
TOUR = [
    block for block in BLOCKS if "mmray" in block and not any(word in block for word in ELSEWHERE)
]


def test_the_blocks_are_all_known() -> None:
    others = [block for block in BLOCKS if block not in TOUR]
    assert [block.split()[:3] for block in others] == [
        ["make", "demo", "make"],
        ["ray", "job", "submit"],
        ["mmray", "serve", "tour/model"],
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo: install" in makefile and "\ntest: install" in makefile


def test_the_file_tree_names_files_that_are_there() -> None:
    tree = README.split("## Files\n", 1)[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if depth == 0:
            folder = ROOT / name
            assert folder.is_dir(), name
        elif depth == 1:
            inner = folder / name
            assert inner.exists(), name
        else:
            assert (inner / name).exists(), name


@pytest.mark.timeout(900)
def test_the_tour_runs_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    outputs = ""
    for block in TOUR:
        for line in block.strip().splitlines():
            done = subprocess.run(
                shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            outputs += done.stdout + done.stderr
    assert "nothing to do" in outputs and "holds" in outputs
    assert not re.search(r"^\S*\[\d{4}-", outputs, re.MULTILINE), f"lines of Ray's own\n{outputs}"
    assert (tmp_path / "tour" / "scores" / "_run" / "report.html").exists()
