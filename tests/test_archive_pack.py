"""A user would lose rows, labels or the order of a data set while packing it."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import brief, noise, pairs, read, tar_bytes

from mmray import storage
from mmray.archive.pack import Format, PackReport, pack
from mmray.config import Columns
from mmray.errors import ConfigError, NotFound, StorageError

JPEG = b"\xff\xd8\xff" + noise(0, 50)
BOTH = pytest.mark.parametrize("kind", ["tar", "parquet"])


def folder(path: Path, rows: Sequence[Sequence[Any]], header: str, name: str = "t.csv") -> Path:
    """A table, and an image file for each path in it that begins with ``i/``."""
    (path / "i").mkdir(parents=True, exist_ok=True)
    with open(path / name, "w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
        writer = csv.writer(handle)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    for row in rows:
        for cell in row:
            if str(cell).startswith("i/"):
                (path / cell).write_bytes(JPEG + str(cell).encode())
    return path


def image(name: str) -> bytes:
    return JPEG + name.encode()


@BOTH
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_table_of_images_becomes_an_archive(
    kind: Format, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows = [[f"i/{n}.jpg", f"caption {n}, ü", f"l{n % 2}", "train", ""] for n in range(25)]
    source = folder(tmp_path / "in", rows, "image,caption,label,split,note")
    dest = str(tmp_path / "out")
    if where == "s3":
        dest = str(request.getfixturevalue("s3_endpoint").bucket()) + "/out"
    seen: list[tuple[int, int | None]] = []
    report = pack(
        str(source), dest, format=kind, shard_rows=10, progress=lambda *done: seen.append(done)
    )
    samples, ends = read(dest, fields=("label", "split", "note"))
    assert [end.shard for end in ends] == [f"0000{n}.{kind}" for n in range(3)]
    assert [(end.rows, end.problem) for end in ends] == [(10, None), (10, None), (5, None)]
    assert [s.image for s in samples] == [image(f"i/{n}.jpg") for n in range(25)]
    assert [s.caption for s in samples] == [f"caption {n}, ü" for n in range(25)]
    assert [s.key for s in samples] == [f"{n:09d}" for n in range(25)]
    assert [s.fields["label"] for s in samples] == [f"l{n % 2}" for n in range(25)]
    assert all(s.fields.get("note") is None for s in samples)
    assert seen == [(n, 25) for n in range(1, 26)]
    assert (report.rows, report.shards, report.images, report.captions, report.labels) == (
        25, 3, 25, 25, 25,
    )  # fmt: skip
    assert report.bytes == sum(item.size for item in storage.list_objects(dest))
    assert report.columns == {"image": "image", "caption": "caption", "key": None}


@BOTH
def test_the_same_source_gives_the_same_bytes(kind: Format, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", [[f"i/{n}.jpg", "t"] for n in range(7)], "file,text")
    for out in ("one", "two"):
        pack(str(source), str(tmp_path / out), format=kind, shard_rows=3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_tars_open_with_ordinary_tools(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", [["i/1.jpg", "t", "x"]], "image,text,label")
    pack(str(source), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == ["000000000.jpg", "000000000.txt", "000000000.json"]
        assert all((m.mtime, m.uid, m.gid) == (0, 0, 0) for m in tar.getmembers())
        member = tar.extractfile("000000000.json")
        assert member is not None
        assert json.loads(member.read()) == {"label": "x"}


@BOTH
def test_jsonl_keeps_types_and_bad_lines_keep_their_place(kind: Format, tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "a.png").write_bytes(JPEG)
    lines = [
        {"image": "i/a.png", "text": "first", "label": 1, "score": 0.5, "ok": True, "tags": ["x"]},
        None,
        {"image": "i/a.png", "text": 3, "score": 2},
        {"image": "i/a.png", "text": "half \ud83d", "mixed": 1},
        {"image": "i/a.png", "text": None, "mixed": "two", "image_note": None},
    ]
    text = "\n".join("{broken" if line is None else json.dumps(line) for line in lines)
    (tmp_path / "t.jsonl").write_text(text + "\n\n")
    report = pack(str(tmp_path / "t.jsonl"), str(tmp_path / "out"), format=kind)
    samples, _ = read(tmp_path / "out", fields=("*",))
    assert report.errors == {
        "line unreadable": 1, "caption not text": 1, "caption not UTF-8": 1
    }  # fmt: skip
    assert report.rows == len(samples) == 5
    assert [s.caption for s in samples] == ["first", None, None, None, None]
    assert [s.image is not None for s in samples] == [True, False, False, False, True]
    found = [s.fields for s in samples]
    assert found[1]["pack_error"].startswith("line unreadable: ")
    assert (found[0]["label"], found[0]["score"], found[0]["ok"]) == (1, 0.5, True)
    assert found[2]["score"] == 2
    assert found[0]["tags"] == (["x"] if kind == "tar" else '["x"]')
    assert [f.get("mixed") for f in found[3:]] == ([1, "two"] if kind == "tar" else ["1", "two"])


@BOTH
def test_a_missing_image_is_a_row_and_is_counted(kind: Format, tmp_path: Path) -> None:
    rows = [["i/1.jpg", "one"], ["gone/2.jpg", "two"], ["", "three"], ["i/4.jpg", ""]]
    source = folder(tmp_path / "in", rows, "image,caption")
    report = pack(str(source), str(tmp_path / "out"), format=kind)
    samples, _ = read(tmp_path / "out")
    assert [(s.image is not None, s.caption) for s in samples] == [
        (True, "one"),
        (False, "two"),
        (False, "three"),
        (True, ""),
    ]
    assert (report.rows, report.missing_images) == (4, 2)
    assert report.missing_examples == ["gone/2.jpg", "(no path)"]
    assert "image file missing: 2 (first: gone/2.jpg" in str(report)


@BOTH
def test_rows_of_a_table_that_cannot_be_used_keep_their_place(kind: Format, tmp_path: Path) -> None:
    rows = [["i/1.jpg", "caf\udce9"], ["i/2.jpg", "fine"], ["i/3.jpg", "a", "extra"]]
    source = folder(tmp_path / "in", rows, "image,caption")
    report = pack(str(source), str(tmp_path / "out"), format=kind)
    samples, _ = read(tmp_path / "out", fields=("pack_error",))
    assert [s.caption for s in samples] == [None, "fine", None]
    assert [s.image is None for s in samples] == [True, False, True]
    assert report.errors == {"caption not UTF-8": 1, "more cells than columns": 1}
    assert samples[2].fields["pack_error"] == "more cells than columns: 3 cells, 2 columns"


@pytest.mark.parametrize(
    "path",
    ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "C:\\x.jpg", "..\\x.jpg", "//host/x", "\\x"],
)
def test_paths_that_lead_out_of_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"secret")
    source = folder(tmp_path / "in", [["i/1.jpg", "one"], [path, "two"]], "image,caption")
    with pytest.raises(ConfigError, match=r"row 2: image path .* leads out of"):
        pack(str(source), str(tmp_path / "out"), shard_rows=1)
    assert not (tmp_path / "out").exists()


def test_keys_are_made_safe_and_unique_in_a_tar(tmp_path: Path) -> None:
    keys = ["a", "a", "a-2", "b/c.d", "b_c_d", "", "..", "x" * 300, "é ü", "a"]
    rows = [[key, "i/1.jpg", f"t{n}"] for n, key in enumerate(keys)]
    source = folder(tmp_path / "in", rows, "id,image,caption")
    report = pack(str(source), str(tmp_path / "out"))
    samples, _ = read(tmp_path / "out", fields=("id", "original_key"))
    assert brief(samples) == [
        (0, "a", None), (1, "a-2", None), (2, "a-2-2", None), (3, "b_c_d", None),
        (4, "b_c_d-2", None), (5, "000000005", None), (6, "__", None), (7, "x" * 90, None),
        (8, "é ü", None), (9, "a-3", None),
    ]  # fmt: skip
    assert [s.caption for s in samples] == [f"t{n}" for n in range(10)]
    assert [s.fields.get("original_key") for s in samples] == [
        None, "a", "a-2", "b/c.d", "b_c_d", None, "..", "x" * 300, None, "a"
    ]  # fmt: skip
    assert report.renamed_keys == 7
    pack(str(source), str(tmp_path / "out2"), format="parquet")
    samples, _ = read(tmp_path / "out2")
    assert [s.key for s in samples] == ["000000005" if key == "" else key for key in keys]


def test_columns_and_labels_by_name(tmp_path: Path) -> None:
    rows = [["i/1.jpg", "i/2.jpg", "one", "two", "Fall", "old"]]
    header = "thumb,image,title,text,season,label"
    source = folder(tmp_path / "in", rows, header)
    with pytest.raises(ConfigError, match="caption column is ambiguous: title, text; name one"):
        pack(str(source), str(tmp_path / "out"))
    named = Columns(image="thumb", caption="title")
    pack(str(source), str(tmp_path / "out"), columns=named, label="season")
    (sample,), _ = read(tmp_path / "out", fields=("*",))
    assert (sample.image, sample.caption) == (image("i/1.jpg"), "one")
    assert sample.fields == {
        "image": "i/2.jpg", "text": "two", "label": "Fall", "source_label": "old"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no column 'pic'; there are thumb, image, title"):
        pack(str(source), str(tmp_path / "out3"), columns=Columns(image="pic", caption="text"))
    folder(tmp_path / "in", [["x"]], "words")
    with pytest.raises(ConfigError, match="no column with image paths; there are words"):
        pack(str(source), str(tmp_path / "out3"))


def test_image_extensions_come_from_the_name_or_the_content(tmp_path: Path) -> None:
    files = {
        "a.PNG": b"anything", "b": b"GIF89a...", "c.bin": b"RIFF....WEBPVP8 ", "d.MoCkHoOk": b"?",
        "e": b"\x89PNG\r\n\x1a\n", "f.tif": b"", "g": b"", "h.heif": b"x",
    }  # fmt: skip
    source = folder(tmp_path / "in", [[name, "t"] for name in files], "image,caption")
    for name, data in files.items():
        (source / name).write_bytes(data)
    pack(str(source), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        found = [name.rpartition(".")[2] for name in tar.getnames() if not name.endswith(".txt")]
    assert found == ["png", "gif", "webp", "jpg", "png", "tif", "jpg", "heif"]
    samples, _ = read(tmp_path / "out")
    assert [s.image for s in samples] == list(files.values())


# --- archives as sources -------------------------------------------------------------------------


def test_an_archive_can_become_the_other_kind_and_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes(pairs(20)))
    (tmp_path / "in" / "b.tar").write_bytes(tar_bytes(pairs(5)))
    first, _ = read(tmp_path / "in", fields=("label", "n"))
    pack(str(tmp_path / "in"), str(tmp_path / "p"), format="parquet", shard_rows=8)
    table = pq.read_table(tmp_path / "p" / "00000.parquet")
    assert table.schema.field("n").type == pa.int64()
    report = pack(str(tmp_path / "p"), str(tmp_path / "t"), format="tar", shard_rows=30)
    assert report.renamed_keys == 5  # 0000 to 0004 came from both tars
    for place in ("p", "t"):
        samples, _ = read(tmp_path / place, fields=("label", "n", "original_key"))
        for was, now in zip(first, samples, strict=True):
            assert (now.image, now.caption) == (was.image, was.caption)
            fields = dict(now.fields)
            assert fields.pop("original_key", None) in (None, was.key)
            assert fields == was.fields


def test_a_real_archive_keeps_every_pair(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "interop" / "cc12m-train-0000.tar"
    pack(str(source), str(tmp_path / "p"), format="parquet")
    pack(str(tmp_path / "p"), str(tmp_path / "t"))
    first, _ = read(source)
    samples, _ = read(tmp_path / "t")
    assert [(s.row, s.key, s.image, s.caption) for s in samples] == [
        (s.row, s.key, s.image, s.caption) for s in first
    ]


@BOTH
def test_samples_that_cannot_be_used_stay_so_and_are_counted(kind: Format, tmp_path: Path) -> None:
    """Packing must not make a sound pair of one with two images by dropping one."""
    members = [
        ("a.jpg", JPEG), ("a.txt", b"sound"),
        ("b.jpg", JPEG), ("b.png", JPEG), ("b.txt", b"two"), ("b.json", b'{"label": "x"}'),
        ("c.jpg", JPEG), ("c.txt", b"\xff"),
        ("a.jpg", JPEG), ("a.txt", b"came back"),
        ("d.jpg", JPEG * 30), ("d.txt", b"cut"),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(tar_bytes(members, end=False)[:-2048])
    (tmp_path / "in" / "y.tar").write_bytes(b"no tar")
    report = pack(str(tmp_path / "in"), str(tmp_path / "out"), format=kind)
    samples, _ = read(tmp_path / "out", fields=("pack_error", "label"))
    assert [(s.image is not None, s.caption) for s in samples] == [
        (True, "sound"), *[(False, None)] * 4
    ]  # fmt: skip
    assert samples[1].fields["pack_error"].startswith("two images under one key: ")
    assert samples[1].fields["label"] == "x"
    assert report.errors == {
        "two images under one key": 1, "caption not UTF-8": 1, "key came back": 1, "shard cut": 1
    }  # fmt: skip
    assert [problem.split(":")[0] for problem in report.problems] == ["x.tar", "y.tar"]
    assert "two images under one key: 1" in str(report)
    assert "source y.tar: not a tar" in str(report)


def test_columns_of_the_source_do_not_hide_the_pairs_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = {"image": [b"x"], "alt": [None], "caption": ["other"], "key": ["k"], "id": ["i"]}
    pq.write_table(
        pa.table(table | {"alt": pa.array([None], pa.string())}), tmp_path / "in/a.parquet"
    )
    for kind in ("tar", "parquet"):
        out = tmp_path / kind
        pack(str(tmp_path / "in"), str(out), format=kind, columns=Columns(caption="alt"))  # type: ignore[arg-type]
        (sample,), _ = read(out, fields=("source_caption", "id"))
        assert (sample.key, sample.caption) == ("k", None)
        assert sample.fields == {"source_caption": "other", "id": "i"}


# --- sources and destinations that will not do ---------------------------------------------------


def test_a_destination_that_is_taken_is_refused(tmp_path: Path) -> None:
    rows = [[f"i/{n}.jpg", "t"] for n in range(4)]
    source = str(folder(tmp_path / "in", rows, "image,caption"))
    out = str(tmp_path / "out")
    pack(source, out, shard_rows=1)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"out: already holds shards \(00000.tar\)"):
        pack(source, out, shard_rows=2)
    pack(source, out, shard_rows=2, overwrite=True)
    assert [item.path for item in storage.list_objects(out)] == [
        "00000.tar", "00001.tar", "notes.txt"
    ]  # fmt: skip
    for dest in (out, out + "/deeper", str(tmp_path)):
        with pytest.raises(ConfigError, match="overlaps the source"):
            pack(out, dest, overwrite=True)
    for dest in (str(tmp_path / "new.tar"), str(tmp_path / "out" / "notes.txt")):
        with pytest.raises(ConfigError, match="names a file"):
            pack(source, dest)


def test_sources_that_will_not_do(tmp_path: Path, s3_endpoint: Any) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(NotFound):
        pack(str(tmp_path / "nowhere"), out)
    with pytest.raises(NotFound):
        pack(str(tmp_path / "nowhere.csv"), out)
    with pytest.raises(NotFound, match="no such bucket"):
        pack(str(folder(tmp_path / "ok", [["i/1.jpg"]], "image")), "s3://no-such-bucket/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must hold shards"):
        pack(str(tmp_path / "empty"), out)
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(ConfigError, match=r"several tables \(a.csv, b.jsonl\)"):
        pack(str(tmp_path / "empty"), out)
    with pytest.raises(ConfigError, match=r"a.csv: needs a header"):
        pack(str(tmp_path / "empty" / "a.csv"), out)
    (tmp_path / "quotes.csv").write_text('image,caption\na.jpg,"never closed\nb.jpg,lost\n')
    with pytest.raises(ConfigError, match=r"quotes.csv: line 3: "):
        pack(str(tmp_path / "quotes.csv"), out)
    with pytest.raises(ConfigError, match="shard_rows: got 0"):
        pack(str(tmp_path / "ok"), out, shard_rows=0)
    with pytest.raises(StorageError):  # a directory in place of an image
        pack(str(folder(tmp_path / "dir", [["i"]], "image")), out)


def test_a_label_that_is_not_there_is_said(tmp_path: Path) -> None:
    source = str(folder(tmp_path / "in", [["i/1.jpg", "t"]], "image,caption"))
    report = pack(source, str(tmp_path / "out"), label="season")
    assert report.problems == [f"{source}: no row has a label 'season'"]
    assert isinstance(report, PackReport)
    assert json.loads(json.dumps(report.to_json()))["labels"] == 0


def test_shards_beside_a_table_are_the_source(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", [["i/1.jpg", "t"]], "image,caption")
    (source / "x.tar").write_bytes(tar_bytes(pairs(3)))
    assert pack(str(source), str(tmp_path / "a")).rows == 3
    assert pack(str(source / "t.csv"), str(tmp_path / "b")).rows == 1
