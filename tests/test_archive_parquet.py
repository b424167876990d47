"""A user would lose rows of a Parquet archive, or score the wrong column."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import brief, noise, read, read_one

from mmray.archive import rows
from mmray.archive.rows import Sample, ShardEnd
from mmray.archive.shards import check_columns, list_shards
from mmray.config import Columns
from mmray.errors import ConfigError

COUNT = 150


def columns(count: int = COUNT) -> dict[str, Any]:
    return {
        "id": [f"k{n}" for n in range(count)],
        "image": [noise(n, 100 + n) for n in range(count)],
        "caption": [f"caption {n} ü" for n in range(count)],
        "label": [f"l{n % 3}" for n in range(count)],
    }


def write(path: Path, data: dict[str, Any] | pa.Table, **options: Any) -> Path:
    table = data if isinstance(data, pa.Table) else pa.table(data)
    options = {"row_group_size": 40, "compression": "none"} | options
    pq.write_table(table, path, **options)
    return path


def read_file(path: Path, **options: Any) -> tuple[list[Sample], ShardEnd]:
    samples, (end,) = read(path, **options)
    return samples, end


def with_image_type(kind: pa.DataType) -> pa.Table:
    data = columns()
    images = data["image"]
    if pa.types.is_struct(kind):
        images = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
    return pa.table(data | {"image": pa.array(images, type=kind)})


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
    ],
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_row_comes_out_in_order(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    path = write(tmp_path / "x.parquet", with_image_type(kind), compression=compression)
    samples, end = read_file(path, fields=("label",))
    data = columns()
    assert [(s.row, s.key, s.image, s.caption, s.fields["label"]) for s in samples] == list(
        zip(range(COUNT), data["id"], data["image"], data["caption"], data["label"], strict=True)
    )
    assert all(s.error is None and s.shard == "x.parquet" for s in samples)
    assert end == ShardEnd("x.parquet", COUNT, None)


def test_a_real_archive_with_hugging_face_images(shared: Path) -> None:
    path = shared / "data" / "fashion" / "fashion-00007.parquet"
    samples, end = read_file(path, fields=("season", "split"))
    table = pq.read_table(path)
    assert [s.image for s in samples] == [i["bytes"] for i in table["image"].to_pylist()]
    assert [s.caption for s in samples] == table["caption"].to_pylist()
    assert [s.key for s in samples] == table["id"].to_pylist()
    assert [s.fields["season"] for s in samples] == table["season"].to_pylist()
    assert (end.rows, end.problem) == (953, None)


def test_what_is_missing_is_a_fact_not_an_error(tmp_path: Path) -> None:
    data = {"image": [b"x", None, b""], "caption": [None, "t", ""]}
    samples, _ = read_file(write(tmp_path / "x.parquet", data))
    assert [(s.key, s.image, s.caption, s.error) for s in samples] == [
        ("0", b"x", None, None),
        ("1", None, "t", None),
        ("2", b"", "", None),
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    nulls = [None, {"bytes": None, "path": "a.jpg"}, {"bytes": b"x", "path": None}]
    table = pa.table({"image": pa.array(nulls, type=kind), "text": ["a", "b", "c"]})
    write(tmp_path / "x.parquet", table)
    for images in (True, False):
        samples, _ = read_file(tmp_path / "x.parquet", images=images)
        assert [s.image for s in samples] == [None, None, b"x" if images else b""]


def test_an_archive_may_have_only_images_or_only_captions(tmp_path: Path) -> None:
    samples, end = read_file(write(tmp_path / "x.parquet", {"jpg": [b"x"]}))
    assert [(s.image, s.caption) for s in samples] == [(b"x", None)]
    assert end.problem is None
    for images in (True, False):
        path = write(tmp_path / "y.parquet", {"text": ["t"]})
        samples, end = read_file(path, images=images)
        assert [(s.image, s.caption) for s in samples] == [(None, "t")]
        assert end.problem is None


def test_keys_come_from_a_key_column_or_the_row(tmp_path: Path) -> None:
    for data, keys in [
        ({"id": [7, None], "key": ["a", "b"]}, ["a", "b"]),
        ({"id": [7, None]}, ["7", "1"]),
        ({"__key__": ["x/y", "z"], "key": ["a", "b"]}, ["x/y", "z"]),
        ({"other": [1, 2]}, ["0", "1"]),
    ]:
        path = write(tmp_path / "x.parquet", data | {"caption": ["s", "t"]})
        assert [s.key for s in read_file(path)[0]] == keys


def test_columns_are_guessed_by_name_and_type(tmp_path: Path) -> None:
    data = columns(3)
    for image in ("image", "IMG", "jpg", "image_bytes", "png"):
        for caption in ("Caption", "TEXT", "txt", "sentence", "title"):
            table = {image: data["image"], caption: data["caption"], "url": data["caption"]}
            samples, end = read_file(write(tmp_path / "x.parquet", table))
            assert [s.caption for s in samples] == data["caption"]
            assert [s.image for s in samples] == data["image"]
            assert end.problem is None
    # a column of file names is no image column; a column of numbers no caption
    path = write(tmp_path / "x.parquet", {"image": ["a.jpg"], "jpg": [b"x"], "text": [3]})
    (sample,), _ = read_file(path)
    assert (sample.image, sample.caption) == (b"x", None)


def test_named_columns_win(tmp_path: Path) -> None:
    data = {"image": [b"1"], "thumb": [b"2"], "caption": ["usual"], "alt": [b"named"]}
    path = write(tmp_path / "x.parquet", data)
    (sample,), _ = read_file(path, columns=Columns(image="thumb", caption="alt"), fields=("*",))
    assert (sample.image, sample.caption) == (b"2", "named")
    assert sample.fields == {"image": None, "caption": "usual"}


UNCLEAR: list[tuple[dict[str, Any], Columns, str]] = [
    ({"a": [b"x"], "caption": ["t"]}, Columns(image="pic"), "no column 'pic' for the image; there"),
    ({"jpg": [b"x"], "png": [b"x"]}, Columns(), "image column is ambiguous: jpg, png; name one"),
    ({"text": ["t"], "title": ["t"]}, Columns(), "caption column is ambiguous: text, title"),
    ({"image": ["a.jpg"], "text": ["t"]}, Columns(image="image"), "image column 'image' is string"),
    ({"image": [b"x"], "text": [3]}, Columns(caption="text"), "caption column 'text' is int64"),
]


@pytest.mark.parametrize(("data", "asked", "message"), UNCLEAR)
def test_unclear_columns_lose_no_row_and_can_be_refused_early(
    tmp_path: Path, data: dict[str, Any], asked: Columns, message: str
) -> None:
    write(tmp_path / "x.parquet", {name: values * 5 for name, values in data.items()})
    samples, ends = read(tmp_path, columns=asked)
    assert brief(samples) == [(row, str(row), "columns unclear") for row in range(5)]
    assert all(message in (s.error or "") for s in samples)
    assert ends[0].rows == 5
    assert message in (ends[0].problem or "")
    (shard,) = list_shards(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^x\.parquet: ") as caught:
        check_columns(str(tmp_path), shard, asked)
    assert message in str(caught.value)
    _, end = read_one(tmp_path, shard, columns=asked, stop=2)
    assert end.rows == 2


def test_columns_that_are_needed_are_checked_before_a_job(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"image": [b"x"], "season": ["s"]})
    (shard,) = list_shards(str(tmp_path))
    root = str(tmp_path)
    check_columns(root, shard, fields=("season",), caption=False)
    with pytest.raises(ConfigError, match=r"no column 'label'; there are image, season"):
        check_columns(root, shard, fields=("label",), caption=False)
    with pytest.raises(ConfigError, match=r"no caption column found; there are image, season; .*"):
        check_columns(root, shard)
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    (shard,) = list_shards(root)
    check_columns(root, shard)  # nothing to tell; reading reports it


def test_a_table_that_is_no_archive_is_reported(tmp_path: Path) -> None:
    samples, end = read_file(write(tmp_path / "x.parquet", {f"c{n}": [1] for n in range(40)}))
    assert (samples, end.rows) == ([], 0)
    assert end.problem is not None
    assert end.problem.startswith("no image and no caption column found; there are c0, c1")
    assert "and 10 more" in end.problem


def test_captions_that_are_not_utf8_are_rows_with_a_reason(tmp_path: Path) -> None:
    raw = [b"fine", b"caf\xe9", None, "fine ü".encode()]
    text = pa.Array.from_buffers(pa.string(), 4, pa.array(raw, type=pa.binary()).buffers())
    for caption in (text, pa.array(raw, type=pa.binary()), text.dictionary_encode()):
        table = pa.table({"image": [b"x"] * 4, "caption": caption, "label": text})
        samples, _ = read_file(write(tmp_path / "x.parquet", table), fields=("label",))
        assert [s.caption for s in samples] == ["fine", None, None, "fine ü"]
        assert brief(samples)[1] == (1, "1", "caption not UTF-8")
        assert [s.error is None for s in samples] == [True, False, True, True]
        assert samples[1].fields == {"label": "caf\ufffd"}
        rows.to_table(samples)


def test_images_over_the_cap_are_set_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns())
    samples, _ = read_file(path, max_image_bytes=200)
    assert [s.error is None for s in samples] == [n <= 100 for n in range(COUNT)]
    assert {s.error_stage for s in samples[101:]} == {"read"}
    assert samples[120].error == "image too large: 220 bytes, at most 200 are read"
    assert all(s.image is None for s in samples[101:])


def test_fields_are_what_json_can_hold(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 11, 23, 5, 0)
    table = pa.table({
        "caption": ["t"], "n": [3], "f": [0.5], "b": [True], "none": pa.array([None], pa.string()),
        "when": [when], "day": [when.date()], "d": pa.array([1], pa.decimal128(7, 3)),
        "dict": pa.array(["x"]).dictionary_encode(), "list": [[1, 2]], "raw": [b"x"],
        "obj": [{"a": when.date()}],
    })  # fmt: skip
    write(tmp_path / "x.parquet", table)
    (sample,), _ = read_file(tmp_path / "x.parquet", fields=tuple(table.column_names))
    scalars = {
        "caption": "t", "n": 3, "f": 0.5, "b": True, "none": None, "when": "2026-11-23T05:00:00",
        "day": "2026-11-23", "d": "1.000", "dict": "x", "list": [1, 2], "raw": None,
    }  # fmt: skip
    assert sample.fields == scalars
    (sample,), _ = read_file(tmp_path / "x.parquet", fields=("*",))
    del scalars["caption"]
    assert sample.fields == scalars | {"list": [1, 2], "obj": {"a": "2026-11-23"}}
    rows.to_table([sample])


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PARQUET-1481.parquet", "ARROW-GH-41321.parquet"])
def test_damaged_files_of_other_tools_are_reported(shared: Path, name: str) -> None:
    for asked in (Columns(), Columns(caption="dict"), Columns(image="binary", caption="string")):
        samples, end = read_file(shared / "data" / "interop" / name, columns=asked, fields=("*",))
        assert end.problem is not None
        assert len(samples) == end.rows


def test_a_row_group_that_cannot_be_read_loses_only_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns(), compression="zstd")
    whole, _ = read_file(path)
    chunk = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 60] = b"\xff" * 60
    path.write_bytes(data)
    samples, end = read_file(path)
    assert samples[:40] == whole[:40]
    assert samples[80:] == whole[80:]
    assert brief(samples[40:80]) == [(n, str(n), "row group unreadable") for n in range(40, 80)]
    assert end.rows == COUNT
    assert end.problem is not None
    assert end.problem.startswith("row group unreadable: row group 1, rows 40 to 79: ")
    window, end = read_file(path, start=35, stop=45)
    assert window == samples[35:45]
    assert end.rows == 45


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"x" * 5000, b"PAR1" + b"\xff" * 99])
def test_what_is_no_parquet_is_reported(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    samples, end = read_file(tmp_path / "x.parquet")
    assert (samples, end.rows) == ([], 0)
    assert end.problem is not None
    assert end.problem.startswith("not Parquet, or its footer is damaged: ")


def test_a_file_cut_short_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns())
    path.write_bytes(path.read_bytes()[:-100])
    samples, end = read_file(path)
    assert (samples, end.rows) == ([], 0)
    assert "footer" in (end.problem or "")


def test_damaged_bytes_anywhere_are_never_an_exception(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns(20), row_group_size=7, compression="snappy")
    data = path.read_bytes()
    rng = random.Random(5)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        samples, end = read_file(path, fields=("*",))
        assert [sample.row for sample in samples] == list(range(end.rows))
        rows.to_table(samples)


# --- parts of a shard ----------------------------------------------------------------------------


def test_windows_and_skips_count_rows_as_a_whole_read_does(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns())
    whole, _ = read_file(path)
    for start, stop in [(0, 0), (0, 40), (39, 41), (80, 999), (200, 300), (130, None), (45, 60)]:
        samples, end = read_file(path, start=start, stop=stop)
        assert samples == whole[start:stop]
        assert end.rows == (COUNT if stop is None else min(COUNT, stop))
    asked: list[int] = []

    def skip(row: int) -> bool:
        asked.append(row)
        return row < 90

    samples, end = read_file(path, skip=skip, start=10)
    assert samples == whole[90:]
    assert asked == list(range(10, COUNT))
    assert end.rows == COUNT


def test_without_images_their_bytes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = [noise(n, 1000) * 100 for n in range(40)]
    path = write(tmp_path / "x.parquet", columns(40) | {"image": big})
    size = path.stat().st_size
    read_bytes = 0

    class Counting:
        def __init__(self, handle: Any) -> None:
            self._handle = handle

        def read(self, count: int = -1) -> bytes:
            nonlocal read_bytes
            data: bytes = self._handle.read(count)
            read_bytes += len(data)
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self._handle, name)

    from mmray.archive.parquet import read_parquet
    from mmray.archive.want import Want

    with open(path, "rb") as handle:
        *samples, _ = read_parquet(
            Counting(handle),
            "x",
            Columns(),
            Want(images=False, fields=("label",)),  # type: ignore[arg-type]
        )
    assert [s.image for s in samples if isinstance(s, Sample)] == [b""] * 40
    assert read_bytes < size / 10
