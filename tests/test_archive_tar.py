"""A user would lose pairs, or get one pair's caption on another's picture."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from archives import BLOCK, brief, noise, pairs, read, read_bytes, tar_bytes

from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.archive.tar import IMAGE_EXTENSIONS

JPG = noise("picture", 1000)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def library(path: Path) -> list[dict[str, Any]]:
    """What the webdataset library reads, bytes undecoded."""
    import webdataset  # seconds, because it looks for torch

    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


def assert_same(ours: Iterable[Sample], theirs: Iterable[dict[str, Any]]) -> None:
    for row, (sample, other) in enumerate(zip(ours, theirs, strict=True)):
        images = [v for name, v in other.items() if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
        assert sample.error is None
        assert (sample.row, sample.key) == (row, other["__key__"])
        assert sample.image == (images[0] if images else None)
        record = json.loads(other.get("json", b"{}"))
        assert sample.caption == (
            other["txt"].decode() if "txt" in other else record.get("caption")
        )
        assert sample.fields == record


# --- as others read them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "interop/cc12m-train-0000.tar",
        "interop/image1.tar",
        "interop/image2.tar",
        "tweets/tweets-00003.tar",
        "tweets-unlabelled/tweets-unlabelled-00000.tar",
    ],
)
def test_real_tars_read_as_the_webdataset_library_reads_them(shared: Path, name: str) -> None:
    path = shared / "data" / name
    samples, (end,) = read(path, fields=("*",))
    assert_same(samples, library(path))
    assert (end.rows, end.problem) == (len(samples), None)
    assert samples


@pytest.mark.parametrize("kind", FORMATS)
def test_names_group_as_in_the_webdataset_library(tmp_path: Path, kind: int) -> None:
    long = "/".join(["deep" * 9] * 5) if kind != tarfile.USTAR_FORMAT else "deep" * 9
    names = [
        "a.jpg", "a.txt", "b.JPG", "b.Txt", "./c.png", "./c.txt", "d.e/f.jpg", "d.e/f.txt",
        "g/h.jpg", "g/h.seg.npy", "i/h.jpg", "i.txt", "i.other", ".hidden", "noextension",
        "__meta__", "__index__/a.jpg", "x/__y__/z.jpg", "é/ü.jpg", "é/ü.txt", "k l.webp", "k l.txt",
        f"{long}/m.jpg", f"{long}/m.txt", f"{long}/{'n' * 80}.jpg", "o.npy", "p.txt", "q.a.b.jpeg",
    ]  # fmt: skip
    data = tar_bytes([(name, noise(name, 50).hex().encode()) for name in names], kind=kind)
    samples, end = read_bytes(tmp_path, data)
    assert_same(samples, library(tmp_path / "x.tar"))
    assert (end.rows, end.problem) == (15, None)


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
            info = tarfile.TarInfo(f"k{kind[0]}.jpg")
            info.size = len(JPG)
            info.pax_headers = {"comment": "x" * 600}
            tar.addfile(info, io.BytesIO(JPG))
    samples, end = read_bytes(tmp_path, out.getvalue())
    assert [sample.image for sample in samples] == [JPG] * 4
    assert_same(samples, library(tmp_path / "x.tar"))
    assert end.problem is None


def test_pax_values_for_all_members_and_sizes_in_pax(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}
    ) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(JPG)
        info.pax_headers = {"size": str(len(JPG))}
        tar.addfile(info, io.BytesIO(JPG))
        info = tarfile.TarInfo("a.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    samples, end = read_bytes(tmp_path, out.getvalue())
    assert [(s.key, s.image, s.caption) for s in samples] == [("a", JPG, "hi")]
    assert end.problem is None


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar", "X.TAR"])
@pytest.mark.parametrize("zipped", [True, False])
def test_gzip_is_told_by_content_not_by_name(tmp_path: Path, name: str, zipped: bool) -> None:
    data = tar_bytes(pairs(5))
    half = len(data) // 2
    stored = gzip.compress(data[:half]) + gzip.compress(data[half:]) if zipped else data
    samples, end = read_bytes(tmp_path, stored, name, fields=("*",))
    plain, _ = read_bytes(tmp_path, data, fields=("*",))
    assert [(s.image, s.caption, s.fields) for s in samples] == [
        (s.image, s.caption, s.fields) for s in plain
    ]
    assert (end.shard, end.rows, end.problem) == (name, 5, None)


def test_an_empty_tar_is_no_problem(tmp_path: Path) -> None:
    samples, end = read_bytes(tmp_path, tar_bytes([]))
    assert (samples, end.rows, end.problem) == ([], 0, None)


# --- captions and fields -------------------------------------------------------------------------


def test_where_captions_come_from(tmp_path: Path) -> None:
    data = tar_bytes([
        ("txt.jpg", JPG), ("txt.json", b'{"caption": "from json"}'), ("txt.txt", b"from txt"),
        ("json.jpg", JPG), ("json.json", b'{"caption": "from json"}'),
        ("none.jpg", JPG), ("none.json", b'{"caption": null}'),
        ("bare.jpg", JPG),
        ("empty.jpg", b""), ("empty.txt", b""),
        ("text.txt", b"no picture"),
    ])  # fmt: skip
    samples, _ = read_bytes(tmp_path, data)
    assert {s.key: (s.caption, s.image) for s in samples} == {
        "txt": ("from txt", JPG),
        "json": ("from json", JPG),
        "none": (None, JPG),
        "bare": (None, JPG),
        "empty": ("", b""),
        "text": ("no picture", None),
    }
    assert all(s.error is None for s in samples)


def test_a_named_json_field_is_the_caption_rather_than_txt(tmp_path: Path) -> None:
    from mmray.config import Columns

    data = tar_bytes([
        ("a.txt", b"from txt"), ("a.json", b'{"alt": "named", "caption": "usual"}'),
        ("b.txt", b"from txt"), ("b.json", b'{"caption": "usual"}'),
        ("c.json", b'{"caption": "usual"}'),
    ])  # fmt: skip
    samples, _ = read_bytes(tmp_path, data, columns=Columns(caption="alt"))
    assert [s.caption for s in samples] == ["named", "from txt", None]


def test_fields_are_the_scalars_and_lists_that_were_asked_for(tmp_path: Path) -> None:
    record = {"label": "x", "n": 3, "f": 0.5, "b": True, "null": None, "list": [1], "obj": {"a": 1}}
    data = tar_bytes([("a.json", json.dumps(record).encode()), ("a.cls", b" 7\n"), ("b.cls", b"8")])
    samples, _ = read_bytes(tmp_path, data, fields=(*record, "cls"))
    assert samples[0].fields == {
        "label": "x", "n": 3, "f": 0.5, "b": True, "null": None, "list": [1], "cls": "7"
    }  # fmt: skip
    assert samples[1].fields == {"cls": "8"}
    everything, _ = read_bytes(tmp_path, data, fields=("*",))
    assert everything[0].fields == record | {"cls": "7"}
    nothing, _ = read_bytes(tmp_path, data)
    assert nothing[0].fields == {}


def test_text_that_arrow_cannot_hold_does_not_get_in(tmp_path: Path) -> None:
    """Half a surrogate pair in a json, or a name that is not UTF-8, would fail the whole chunk."""
    data = tar_bytes([("a.json", b'{"caption": "\\ud83d"}'), ("b.json", b'{"label": "\\ud83d"}')])
    data = tar_bytes([("n\udcff.jpg", JPG)], end=False) + data
    samples, _ = read_bytes(tmp_path, data, fields=("*",))
    assert brief(samples) == [(0, "n\\xff", None), (1, "a", "caption not UTF-8"), (2, "b", None)]
    assert rows.from_table(rows.to_table(samples))[2].fields == {"label": "?"}


# --- wrong samples are rows with a reason --------------------------------------------------------

GOOD = [("z.jpg", JPG), ("z.txt", b"good")]

WRONG: list[tuple[str, list[tuple[str, bytes]]]] = [
    ("two images under one key", [("a.jpg", JPG), ("a.png", JPG), ("a.txt", b"t")]),
    ("two images under one key", [("a.jpg", JPG), ("a.jpg", JPG), ("a.txt", b"t")]),
    ("two images under one key", [("a.left.jpg", JPG), ("a.right.jpg", JPG)]),
    ("two captions under one key", [("a.jpg", JPG), ("a.txt", b"t"), ("a.txt", b"u")]),
    ("caption not UTF-8", [("a.jpg", JPG), ("a.txt", b"caf\xe9 au lait")]),
    ("caption not UTF-8", [("a.jpg", JPG), ("a.txt", "utf-16 \u00e9".encode("utf-16"))]),
    ("image too large", [("a.jpg", noise(1, 5001)), ("a.txt", b"t")]),
    ("caption too large", [("a.jpg", JPG), ("a.txt", b"t" * (1 << 20) + b"t")]),
    ("json too large", [("a.jpg", JPG), ("a.json", b" " * (1 << 20) + b"{}")]),
    ("json unreadable", [("a.jpg", JPG), ("a.json", b'{"caption": "t"')]),
    ("json unreadable", [("a.jpg", JPG), ("a.json", b"\xff\xfe\x00")]),
    ("json unreadable", [("a.jpg", JPG), ("a.json", b"[" * 100_000)]),
    ("json unreadable", [("a.jpg", JPG), ("a.json", b'["caption"]')]),
    ("json unreadable", [("a.jpg", JPG), ("a.json", b'{"n": ' + b"9" * 5000 + b"}")]),
    ("caption not text", [("a.jpg", JPG), ("a.json", b'{"caption": 3}')]),
]


@pytest.mark.parametrize(("reason", "members"), WRONG)
def test_a_wrong_sample_is_a_row_with_a_reason(
    tmp_path: Path, reason: str, members: list[tuple[str, bytes]]
) -> None:
    samples, end = read_bytes(tmp_path, tar_bytes([*members, *GOOD]), max_image_bytes=5000)
    assert brief(samples) == [(0, "a", reason), (1, "z", None)]
    assert samples[0].error_stage == "read"
    assert samples[0].image is None
    assert (samples[1].image, samples[1].caption) == (JPG, "good")
    assert (end.rows, end.problem) == (2, None)
    headers, _ = read_bytes(
        tmp_path, tar_bytes([*members, *GOOD]), max_image_bytes=5000, images=False
    )
    assert brief(headers) == brief(samples)


def test_a_key_that_comes_back_is_a_row_of_its_own(tmp_path: Path) -> None:
    members = [("a.jpg", JPG), ("b.jpg", JPG), ("a.txt", b"late"), ("b.jpg", JPG), ("c.jpg", JPG)]
    samples, end = read_bytes(tmp_path, tar_bytes(members))
    assert brief(samples) == [
        (0, "a", None),
        (1, "b", None),
        (2, "a", "key came back"),
        (3, "b", "key came back"),
        (4, "c", None),
    ]
    assert end.rows == 5


def test_a_broken_json_spoils_no_pair_that_has_its_caption(tmp_path: Path) -> None:
    data = tar_bytes([("a.jpg", JPG), ("a.txt", b"t"), ("a.json", b"{")])
    samples, _ = read_bytes(tmp_path, data, fields=("label",))
    assert (samples[0].error, samples[0].caption, samples[0].fields) == (None, "t", {})


def test_sparse_members_are_set_aside_and_what_follows_is_read(tmp_path: Path) -> None:
    """GNU tar writes these with --sparse; their stored bytes are not the file's."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % BLOCK  # stored size
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[482] = 1  # one more map block
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data = bytes(header) + b"\0" * BLOCK + noise(1, BLOCK) + tar_bytes(GOOD)
    samples, end = read_bytes(tmp_path, data)
    assert brief(samples) == [(0, "a", "sparse member"), (1, "z", None)]
    assert end.problem is None


# --- damaged tars: what is whole comes out, the rest is reported ---------------------------------


def expected_cut(whole: list[Sample], ends: list[tuple[int, int]], cut: int) -> list[Any]:
    """(row, key, reason) of what a tar cut at byte ``cut`` must give; ``ends`` has the byte where
    each member's header ends and where its data end, three members a sample."""
    out: list[Any] = []
    for sample in whole:
        mine = ends[sample.row * 3 : sample.row * 3 + 3]
        begun = [data_end for header_end, data_end in mine if header_end <= cut]
        if begun:
            reason = "shard cut" if begun[-1] > cut else None
            out.append((sample.row, sample.key, reason))
    return out


@pytest.mark.parametrize("zipped", [False, True])
def test_a_tar_cut_anywhere_gives_what_was_before_the_cut(tmp_path: Path, zipped: bool) -> None:
    data = tar_bytes(pairs(6, 1100))
    whole, _ = read_bytes(tmp_path, data)
    ends, at = [], 0
    for _, payload in pairs(6, 1100):
        ends.append((at + BLOCK, at + BLOCK + len(payload)))
        at += BLOCK + len(payload) + -len(payload) % BLOCK
    rng = random.Random(3)
    cuts = [*range(BLOCK, at + 1, BLOCK), *rng.sample(range(BLOCK, at), 60)]
    for cut in cuts:
        stored = gzip.compress(data[:cut]) if zipped else data[:cut]
        samples, end = read_bytes(tmp_path, stored)
        assert brief(samples) == expected_cut(whole, ends, cut), cut
        for sample in samples:
            if sample.error is None:
                assert sample.image == whole[sample.row].image
                assert sample.caption in (whole[sample.row].caption, None)
            else:
                assert (sample.error_stage, sample.image, sample.caption) == ("read", None, None)
        assert end.rows == len(samples)
        assert end.problem is not None
        assert f"byte {cut}" in end.problem
        headers, same_end = read_bytes(tmp_path, stored, images=False)
        assert (brief(headers), same_end) == (brief(samples), end)


def test_every_way_of_being_cut_is_said(tmp_path: Path) -> None:
    data = tar_bytes(pairs(2, 1000), end=False)  # jpg: header, 1000 bytes, 24 of padding
    problems = {
        len(data): "no end-of-archive marker: ends at byte 7168, may be cut",
        BLOCK + 100: "cut at byte 612: inside '0000.jpg'",
        BLOCK + 1010: "cut at byte 1522: just after '0000.jpg'",
        1536 + 100: "cut at byte 1636: inside a member's header",
        100: "not a tar: 100 bytes, less than one header",
        0: "not a tar: 0 bytes, less than one header",
    }
    for cut, problem in problems.items():
        assert read_bytes(tmp_path, data[:cut])[1].problem == problem


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_header_does_not_end_the_shard_silently(tmp_path: Path, kind: int) -> None:
    """tarfile takes it for the end of the archive; six pairs would vanish without a word."""
    data = bytearray(tar_bytes(pairs(10), kind=kind))
    start = data.index(b"0004.jpg")
    data[start + 130] ^= 0xFF
    samples, end = read_bytes(tmp_path, bytes(data))
    assert brief(samples) == [(row, f"{row:04d}", None) for row in range(4)]
    assert end.rows == 4
    assert end.problem is not None
    assert end.problem.startswith(f"corrupt at byte {start}: ")


def test_data_after_the_end_marker_are_reported(tmp_path: Path) -> None:
    first = tar_bytes(pairs(2))
    samples, end = read_bytes(tmp_path, first + tar_bytes(pairs(3)))
    assert len(samples) == end.rows == 2
    assert end.problem is not None
    assert f"data after the end-of-archive marker: from byte {len(first)}" in end.problem
    assert len(samples) == len(library(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"<html><body>404 Not Found</body></html>" * 40, "not a tar: a web page"),
        (b"PAR1" + noise(1, 2000), "not a tar: a Parquet file"),
        (b"\x28\xb5\x2f\xfd" + noise(1, 2000), "not a tar: zstd"),
        (noise(1, 2000), "not a tar: "),
        (gzip.compress(noise(1, 2000)), "not a tar: "),
        (b"\x1f\x8b" + noise(1, 2000), "not a tar: "),
    ],
)
def test_what_is_no_tar_is_reported(tmp_path: Path, data: bytes, problem: str) -> None:
    samples, end = read_bytes(tmp_path, data)
    assert (samples, end.rows) == ([], 0)
    assert end.problem is not None
    assert end.problem.startswith(problem)


def test_damaged_gzip_gives_what_was_before_the_damage(tmp_path: Path) -> None:
    data = tar_bytes(pairs(40))
    stored = gzip.compress(data)
    for cut in (len(stored) // 3, len(stored) - 20):
        samples, end = read_bytes(tmp_path, stored[:cut], "x.tar.gz")
        assert end.problem is not None
        assert "gzip: " in end.problem
        assert samples[0].error is None
        assert len(samples) == end.rows
    wrong_sum = bytearray(stored)
    wrong_sum[-8] ^= 0xFF
    samples, end = read_bytes(tmp_path, bytes(wrong_sum), "x.tar.gz")
    assert brief(samples) == [(row, f"{row:04d}", None) for row in range(40)]
    assert end.problem is not None
    assert "gzip: CRC check failed" in end.problem


def test_damaged_bytes_anywhere_are_never_an_exception(tmp_path: Path) -> None:
    data = tar_bytes([*pairs(4), ("n" * 150 + ".jpg", JPG)], kind=tarfile.PAX_FORMAT)
    rng = random.Random(4)
    for stored in (data, gzip.compress(data)):
        for _ in range(150):
            damaged = bytearray(stored)
            for _ in range(rng.choice([1, 1, 3])):
                damaged[rng.randrange(len(damaged))] = rng.choice([0, 32, 55, 128, 255])
            samples, end = read_bytes(tmp_path, bytes(damaged))
            assert [sample.row for sample in samples] == list(range(end.rows))
            rows.to_table(samples)


def test_a_header_that_claims_terabytes_costs_nothing(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 1 << 42
    data = header.tobuf(tarfile.GNU_FORMAT) + JPG
    samples, end = read_bytes(tmp_path, data, max_image_bytes=1 << 50)
    assert brief(samples) == [(0, "a", "shard cut")]
    assert end.problem == f"cut at byte {len(data)}: inside 'a.jpg'"


# --- parts of a shard ----------------------------------------------------------------------------


def test_windows_and_skips_count_rows_as_a_whole_read_does(tmp_path: Path) -> None:
    data = tar_bytes(pairs(10))
    whole, _ = read_bytes(tmp_path, data)
    for start, stop in [(0, 10), (0, 0), (3, 7), (0, 3), (9, 10), (7, 99), (20, 30), (4, None)]:
        samples, end = read_bytes(tmp_path, data, start=start, stop=stop)
        assert samples == whole[start:stop]
        assert end.rows == (10 if stop is None else min(10, stop))
    asked: list[int] = []

    def skip(row: int) -> bool:
        asked.append(row)
        return row % 3 == 0

    samples, end = read_bytes(tmp_path, data, skip=skip, start=2, stop=9)
    assert samples == [s for s in whole[2:9] if s.row % 3]
    assert asked == list(range(2, 9))
    assert end.rows == 9


def test_without_images_their_presence_is_still_told(tmp_path: Path) -> None:
    data = tar_bytes([*pairs(3), ("x.txt", b"no picture")])
    samples, end = read_bytes(tmp_path, data, images=False, fields=("label",))
    assert [s.image for s in samples] == [b"", b"", b"", None]
    assert [s.fields.get("label") for s in samples] == ["l0", "l1", "l2", None]
    assert (end.rows, end.problem) == (4, None)


def test_images_that_are_not_wanted_are_not_held(tmp_path: Path) -> None:
    import tracemalloc

    big = noise(1, 1000) * 20_000  # 20 MB
    data = tar_bytes([("a.jpg", big), ("b.jpg", big), *GOOD])
    (tmp_path / "x.tar").write_bytes(data)
    del data
    for options in ({"images": False}, {"max_image_bytes": 10_000}, {"start": 2}):
        tracemalloc.start()
        samples, _ = read(tmp_path / "x.tar", **options)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert samples[-1].key == "z"
        assert peak < 8_000_000
