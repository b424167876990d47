"""Two commands on one OUT would score everything twice; a dead one must not block the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from mmray import cli, lease, storage
from mmray.errors import ConfigError, RunError, StorageError
from mmray.lease import Lease


def quiet(_line: str) -> None:
    pass


def held(out: str) -> list[str]:
    return [item.path for item in storage.list_objects(storage.join(out, lease.LEASES))]


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    bucket: str = request.getfixturevalue("s3_endpoint").bucket()
    return f"{bucket}/out"


def other_machine(out: str, number: int = 1) -> None:
    text = json.dumps({"host": "elsewhere", "pid": 1, "begun": "then", "boot": "b", "pids": "p"})
    storage.write_bytes(storage.join(out, lease.LEASES, f"{number:06d}.json"), text.encode())


def test_the_second_is_refused_while_the_first_lives(out: str) -> None:
    with Lease(out, quiet) as first:
        with pytest.raises(ConfigError, match=rf"another command .*process {os.getpid()} on"):
            Lease(out, quiet).__enter__()
        first.check()
    with Lease(out, quiet):
        assert len(held(out)) == 1
    assert not held(out)


def test_a_killed_holder_is_followed_at_once(out: str) -> None:
    script = f"""
import os
from mmray.lease import Lease
Lease({out!r}, print).__enter__()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert len(held(out)) == 1
    began = time.monotonic()
    with Lease(out, quiet):
        assert len(held(out)) == 1
        assert time.monotonic() - began < lease.DEAD_SECONDS / 2


def test_a_process_that_only_has_the_number_of_a_dead_holder_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    with Lease(str(tmp_path), quiet) as first:
        text: dict[str, Any] = first._me | {"started": "1"}
    storage.write_bytes(f"{tmp_path}/{lease.LEASES}/000001.json", json.dumps(text).encode())
    with Lease(str(tmp_path), quiet):
        assert held(str(tmp_path)) == ["000002.json"]


def test_on_another_machine_a_sign_of_life_refuses_and_silence_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = str(tmp_path), list[str]()
    monkeypatch.setattr(lease, "DEAD_SECONDS", 3.0)
    other_machine(out)
    with Lease(out, said.append):
        assert held(out) == ["000002.json"]
    assert "held by process 1 on elsewhere" in said[0]

    other_machine(out)
    monkeypatch.setattr(time, "sleep", lambda _: storage.write_bytes(
        storage.join(out, lease.LEASES, "000001.json"), b'{"beat": 2}'
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="another command"):
        Lease(out, said.append).__enter__()


def test_a_holder_that_was_taken_for_dead_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    with Lease(str(tmp_path), quiet) as first:
        other_machine(str(tmp_path), number=2)
        first._thread.join(10)
        with pytest.raises(RunError, match="another command has taken over"):
            first.check()
    assert held(str(tmp_path)) == ["000001.json", "000002.json"]


def test_a_holder_that_cannot_renew_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(str(tmp_path), quiet) as first:
        first.check()
        monkeypatch.setattr(lease, "DEAD_SECONDS", 0.0)
        with monkeypatch.context() as patch, pytest.raises(RunError, match="could not be renewed"):
            patch.setattr(storage, "write_bytes", refuse)
            first.check()


def refuse(uri: str, *_: object, **__: object) -> None:
    raise StorageError(f"{uri}: S3 refused PutObject: InternalError (HTTP 500); try again later")


def test_an_outage_that_is_over_when_the_lease_is_checked_ends_nothing(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 is asked again for two minutes: longer than a lease lasts without a renewal."""
    with Lease(out, quiet) as first:
        monkeypatch.setattr(lease, "DEAD_SECONDS", 0.0)
        first.check()
        assert held(out) == ["000002.json"]
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="another command"):
            Lease(out, quiet).__enter__()
        first.check()
    assert not held(out)


@pytest.mark.parametrize("ended", [False, True])
def test_a_rival_that_took_over_during_the_outage_stops_the_first(
    out: str, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Whether it still works or has done all and gone: what this command knows of OUT is old."""
    with Lease(out, quiet) as first:
        other_machine(out, number=2)
        storage.delete(storage.join(out, lease.LEASES, "000001.json"))
        if ended:
            storage.delete(storage.join(out, lease.LEASES, "000002.json"))
        monkeypatch.setattr(lease, "DEAD_SECONDS", 0.0)
        with pytest.raises(RunError, match="another command has taken over"):
            first.check()
    assert held(out) == [] if ended else ["000002.json"]


def test_of_a_holder_and_a_rival_that_take_over_at_once_one_wins(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rival comes between the holder's look and its writing."""
    with Lease(out, quiet) as first:
        looked = first._numbers

        def look_then_lose() -> list[int]:
            numbers = looked()
            other_machine(out, number=2)
            return numbers

        monkeypatch.setattr(first, "_numbers", look_then_lose)
        monkeypatch.setattr(lease, "DEAD_SECONDS", 0.0)
        with pytest.raises(RunError, match="another command has taken over"):
            first.check()
    holder = storage.read_bytes(storage.join(out, lease.LEASES, "000002.json"))
    assert json.loads(holder)["host"] == "elsewhere"


@pytest.mark.parametrize("verb", ["score", "retry"])
def test_a_second_command_is_refused_while_one_works_on_an_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Exit code 2 and one line; nothing of the first one's is touched."""
    bundle = tiny.bundle(str(tmp_path / "bundle"))
    archive, out = tiny.write_archive(tmp_path / "archive", [5]), str(tmp_path / "out")
    runs.finished(bundle, archive, out, lambda sample: "no image" if sample.row == 2 else None)
    before = runs.content(out)
    line = [bundle, str(archive), "--out", out] if verb == "score" else [out]
    with Lease(out, quiet) as first:
        assert cli.run([verb, *line]) == 2
        first.check()
    said = capsys.readouterr().err
    assert f"mmray: {out}: another command works on it (process {os.getpid()} on" in said
    assert runs.content(out) == before
