"""What a person gets to see of the rows set aside: how many, why, and the very bytes."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny

from mmray import cli, storage
from mmray.archive import originals
from mmray.errors import ConfigError, NotFound
from mmray.report import export as exporting
from mmray.report.export import export
from mmray.report.inspect import inspect
from mmray.report.rejects import find
from mmray.verify import verify

SCARED = "image too large: 9x9 pixels, cap 64"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.bundle(str(tmp_path_factory.mktemp("bundles") / "one"))


@pytest.fixture(scope="module")
def made(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An archive and its OUT: a tar of good and broken pairs, one of good pairs only, Parquet with
    a caption that is no text and a broken picture, and a tar with hostile names."""
    base = tmp_path_factory.mktemp("made")
    archive, out = base / "archive", base / "out"
    tiny.write_tar(archive / "2024" / "a.tar", [*tiny.members(9), *runs.BROKEN])
    tiny.write_tar(archive / "b.tar", tiny.members(4, 20))
    images = [tiny.jpeg(i) for i in range(3)] + [None, b"\x89PNG\r\n broken", tiny.jpeg(6)]
    captions = [b"one", b"\xff\xfe", b"three", b"four", b"five", b"six"]
    table = pa.table({"image": images, "caption": pa.array(captions, pa.binary())})
    pq.write_table(table, archive / "c.parquet", row_group_size=5, compression="none")
    hostile = [
        ("../../up.jpg", tiny.jpeg(1)),
        ("../../up.txt", b"=cmd|' /C calc'!A0"),
        ("/abs/x.seg.jpg", b"nothing"),
        ("/abs/x.exe", b"not to be handed out"),
        ("/abs/x.json", b'{"caption": "in json"}'),
        ("twice.jpg", tiny.jpeg(2)),
        ("twice.seg.jpg", tiny.jpeg(3)),
        ("twice.txt", "zwei Bilder ü".encode()),
    ]
    tiny.write_tar(archive / "d.tar", hostile)
    runs.finished(bundle, archive, out, lambda s: SCARED if s.key.endswith("up") else None)
    assert verify(str(out)).ok
    return archive, out


REASONS = {
    "image truncated": 1,
    "no image": 2,
    "no caption": 1,
    "image empty": 1,
    "two images under one key": 2,
    "caption not UTF-8": 2,
    "image too large": 1,
}


def test_reasons_are_counted_and_shown_with_whole_rows(made: tuple[Path, Path]) -> None:
    found = find(str(made[1]), examples=1)
    unread = {reason: n for reason, n in found.reasons.items() if reason not in REASONS}
    assert {k: v for k, v in found.reasons.items() if k in REASONS} == REASONS
    assert found.reasons == runs.reasons(made[1]) and sum(unread.values()) == 2, unread
    assert (found.rows, found.shards, found.shards_with_rejects) == (9 + 6 + 4 + 6 + 3, 4, 3)
    assert found.set_aside == 12
    (one,) = found.examples["image too large"]
    assert (one.shard, one.row, one.key, one.error) == ("d.tar", 0, "../../up", SCARED)
    assert all(len(rows) == 1 for rows in found.examples.values())
    text = str(found)
    assert "12 of 28 rows set aside, in 3 of 4 shards" in text
    assert f"d.tar[0] ../../up: {SCARED}" in text

    some = find(str(made[1]), reasons=["image t", "no im"])
    assert some.reasons == {"no image": 2, "image truncated": 1, "image too large": 1}
    assert some.set_aside == 4


def test_files_without_rejects_are_not_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    """A run of 100,000 shards would be read whole to show three rows."""
    out = tmp_path / "out"
    for item in storage.list_objects(str(made[1])):
        data = storage.read_bytes(storage.join(str(made[1]), item.path))
        storage.write_bytes(storage.join(str(out), item.path), data)
    clean = out / "scores" / "b.tar.parquet"
    data = clean.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    clean.write_bytes(b"PAR1" + bytes(len(data) - footer - 4) + data[-footer:])
    assert find(str(out)).set_aside == 12
    moved = made[0] / "b.tar"
    moved.rename(made[0] / "b.away")
    try:
        assert export(str(out), str(tmp_path / "dest")).rows == 12
    finally:
        (made[0] / "b.away").rename(moved)


def manifest(dest: object) -> list[dict[str, str]]:
    text = storage.read_bytes(storage.join(str(dest), exporting.MANIFEST)).decode()
    return list(csv.DictReader(text.splitlines(keepends=True)))


def test_the_export_is_the_bytes_of_the_archive_under_names_of_our_own(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    done = export(str(made[1]), str(tmp_path / "dest"))
    assert (done.rows, done.without_bytes, done.tars) == (12, 0, 1)
    with tarfile.open(tmp_path / "dest" / "00000.tar") as tar:
        held = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    lines = {(line["shard"], int(line["row"])): line for line in manifest(tmp_path / "dest")}
    assert len(lines) == 12 and all(line["file"] in held for line in lines.values())
    assert len(held) == done.files and sum(map(len, held.values())) == done.bytes
    assert all(name.replace("-", "").replace(".", "").isalnum() for name in held)

    broken = dict(runs.BROKEN)
    assert held["000000-000000009.jpg"] == broken["bad0.jpg"]
    assert held["000000-000000013.png"] == broken["bad4.png"]
    assert held["000000-000000014.txt"] == broken["bad5.txt"]
    assert held["000002-000000001.txt"] == b"\xff\xfe" and "000002-000000004.png" in held
    assert held["000003-000000002.1.jpg"] == tiny.jpeg(3)
    assert b"not to be handed out" not in held.values()

    up = lines["d.tar", 0]
    assert up["file"] == "000003-000000000.jpg" and up["key"] == "../../up"
    assert (up["error"], up["error_stage"]) == (SCARED, "image")
    assert lines["d.tar", 1]["caption"] == "in json"
    assert lines["d.tar", 2]["caption"] == "zwei Bilder ü"
    assert lines["2024/a.tar", 14]["caption"] == "\ufffd\ufffd not text"
    assert sorted(p.name for p in (tmp_path / "dest").iterdir()) == ["00000.tar", "manifest.csv"]


def test_the_export_reads_as_an_archive_with_the_same_reasons(
    made: tuple[Path, Path], bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TAR_ROWS", 5)
    done = export(str(made[1]), str(tmp_path / "dest"))
    assert done.tars == 3
    assert len(list((tmp_path / "dest").glob("*.tar"))) == 3
    runs.finished(bundle, tmp_path / "dest", tmp_path / "again", lambda _: None)
    before = runs.reasons(made[1])
    del before["image too large"]  # the one that its bytes do not give
    assert runs.reasons(tmp_path / "again") == before
    assert inspect(str(tmp_path / "dest")).to_json()["pairs"] == 12


def test_what_cannot_be_read_is_in_the_manifest_alone(bundle: str, tmp_path: Path) -> None:
    root = tmp_path / "archive"
    root.mkdir()
    table = pa.table({"image": [tiny.jpeg(i) for i in range(6)], "caption": ["word"] * 6})
    path = root / "a.parquet"
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    damaged = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[damaged : damaged + 20] = b"\xff" * 20
    path.write_bytes(data)
    cut = tiny.write_tar(root / "b.tar", tiny.members(2))
    cut.write_bytes(cut.read_bytes()[:5000])
    runs.finished(bundle, root, tmp_path / "out", lambda _: None)
    done = export(str(tmp_path / "out"), str(tmp_path / "dest"))
    lines = manifest(tmp_path / "dest")
    assert done.rows == len(lines) == find(str(tmp_path / "out")).set_aside
    assert [line["file"] for line in lines if line["shard"] == "a.parquet"] == [""] * 3
    assert done.without_bytes >= 3


def test_a_file_too_large_to_hold_is_left_out(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "MOST_BYTES", 10)
    done = export(str(made[1]), str(tmp_path / "dest"), reasons=["image truncated"])
    assert (done.rows, done.files, done.without_bytes) == (1, 0, 1)
    assert done.tars == 0 and manifest(tmp_path / "dest")[0]["key"] == "bad0"


def test_an_export_spoils_no_archive_and_no_earlier_export(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    archive, out = made
    for place in (archive, archive / "in", out, out / "scores" / "in", out / "_run"):
        with pytest.raises(ConfigError, match="overlaps"):
            export(str(out), str(place))
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "kept.txt").write_text("something")
    with pytest.raises(ConfigError, match=r"not empty \(kept\.txt\)"):
        export(str(out), str(tmp_path / "dest"))
    with pytest.raises(NotFound, match="no scoring run"):
        find(str(tmp_path))


def test_an_export_to_s3(made: tuple[Path, Path], s3_endpoint: Any) -> None:
    dest = storage.join(s3_endpoint.bucket(), "rejects")
    done = export(str(made[1]), dest, reasons=["caption"])
    assert (done.rows, done.files) == (2, 4) and len(manifest(dest)) == 2
    assert inspect(dest).to_json()["pairs"] == 2


def test_the_verb_speaks_text_and_json(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["rejects", str(made[1]), "--reason", "image empty"]
    assert cli.run(line) == 0
    assert "1 of 28 rows set aside" in capsys.readouterr().out
    assert cli.run([*line, "--export", str(tmp_path / "dest"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reasons"] == {"image empty": 1} and result["export"]["rows"] == 1
    assert result["examples"]["image empty"][0]["key"] == "bad3"
    assert cli.run([*line, "--export", str(tmp_path / "dest")]) == 2
    assert "not empty" in capsys.readouterr().err
