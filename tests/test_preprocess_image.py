"""preprocess/image.py: what a model sees of every kind of picture, and what it is never shown."""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmray.config import ImagePreprocess
from mmray.errors import BadRow
from mmray.preprocess import image as room
from mmray.preprocess.image import ORIENTATION, decode_image

CFG = ImagePreprocess(size=64)
CROP = ImagePreprocess(size=64, resize="crop")
REASONS = {
    "image empty",
    "image not recognised",
    "image format not supported",
    "image too large",
    "image truncated",
    "image corrupt",
}


def scene(width: int = 300, height: int = 200) -> Image.Image:
    """Smooth colours that differ in every corner, so that any turn or shift is seen."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    blue = 127 + 100 * np.sin(x / 40) * np.cos(y / 30)
    return Image.fromarray(np.dstack([red, green, blue]).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(data: bytes, cfg: ImagePreprocess) -> np.ndarray:
    """The plain way with Pillow alone, everything at full size; int64 [3, size, size]."""
    image = Image.open(io.BytesIO(data))
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    upright = upright.convert("RGB")
    if cfg.resize == "crop":
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        upright = upright.crop((left, top, upright.width - left, upright.height - top))
    small = upright.resize((cfg.size, cfg.size), Image.Resampling.BILINEAR)
    return np.asarray(small).transpose(2, 0, 1).astype(int)


def away(data: bytes, cfg: ImagePreprocess = CFG) -> float:
    """Mean absolute difference from the reference, on the scale of 0 to 255."""
    return float(np.abs(decode_image(data, cfg) - reference(data, cfg)).mean())


def refused(data: bytes, cfg: ImagePreprocess = CFG) -> BadRow:
    with pytest.raises(BadRow) as caught:
        decode_image(data, cfg)
    assert caught.value.stage == "image"
    assert caught.value.reason in REASONS
    assert "\n" not in str(caught.value)
    return caught.value


# --- every format and mode -----------------------------------------------------------------------

FORMATS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"subsampling": 0, "quality": 95}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
    ("JPEG2000", {}),
    ("TGA", {}),
    ("ICO", {"sizes": [(128, 128)]}),
    ("AVIF", {}),
]


@pytest.mark.parametrize(("kind", "options"), FORMATS)
def test_every_format_shows_the_model_the_same_picture(
    kind: str, options: dict[str, object]
) -> None:
    data = encoded(scene(), kind, **options)
    pixels = decode_image(data, CFG)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 64, 64)
    assert pixels.transpose(1, 2, 0).flags.c_contiguous  # what a batch is stacked from
    assert away(data) < 1.0


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_is_converted_as_pillow_converts_it(mode: str) -> None:
    kind = "PNG" if mode in ("1", "L", "P", "LA", "RGBA") else "TIFF"
    picture = scene() if mode != "LAB" else Image.merge("LAB", scene().split())
    if mode == "HSV":  # no format stores it; the conversion alone
        converted = room._rgb(picture.convert("HSV"))
        assert np.abs(np.asarray(converted).astype(int) - np.asarray(picture)).mean() < 3
        return
    data = encoded(picture if mode == "LAB" else picture.convert(mode), kind)
    assert away(data) < 1.0


def test_cmyk_jpegs_are_not_shown_inverted() -> None:
    data = encoded(scene().convert("CMYK"), "JPEG", quality=95)
    shown = decode_image(data, CFG).astype(int)
    assert np.abs(shown - np.asarray(scene().resize((64, 64))).transpose(2, 0, 1)).mean() < 4


def test_grey_pictures_have_three_equal_channels() -> None:
    for kind in ("JPEG", "PNG"):
        red, green, blue = decode_image(encoded(scene().convert("L"), kind), CFG)
        assert (red == green).all()
        assert (red == blue).all()
        assert red.std() > 20


def test_transparency_shows_white_not_what_lies_hidden_under_it() -> None:
    rgba = Image.new("RGBA", (40, 40), (10, 20, 30, 0))
    assert (decode_image(encoded(rgba, "PNG"), CFG) == 255).all()
    assert (decode_image(encoded(rgba, "WEBP", lossless=True, exact=True), CFG) == 255).all()
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    assert np.abs(decode_image(encoded(half, "PNG"), CFG).astype(int) - 127).max() <= 1
    grey = Image.new("LA", (40, 40), (0, 0))
    assert (decode_image(encoded(grey, "PNG"), CFG) == 255).all()


def test_a_transparent_palette_entry_or_colour_key_is_white_too() -> None:
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    for kind in ("PNG", "GIF"):
        assert (decode_image(encoded(palette, kind, transparency=1), CFG) == 255).all()
        assert (decode_image(encoded(palette, kind), CFG)[1] == 200).all()
    keyed = encoded(Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (decode_image(keyed, CFG) == 255).all()
    sixteen = Image.fromarray(np.full((20, 20), 1234, np.uint16))
    assert (decode_image(encoded(sixteen, "PNG", transparency=1234), CFG) == 255).all()


def test_sixteen_bit_grey_keeps_its_shades_instead_of_clipping_to_white() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)
    picture = Image.fromarray(np.tile(ramp, (64, 1)))
    for kind in ("PNG", "TIFF", "JPEG2000"):
        shown = decode_image(encoded(picture, kind), CFG)[0, 0]
        assert np.abs(shown.astype(int) - (ramp >> 8)).max() <= 1, kind


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), np.linspace(0, 255, 64)),
        (np.linspace(0, 255, 64, dtype=np.float32), np.linspace(0, 255, 64)),
        (np.linspace(-40, 4000, 64, dtype=np.float32), np.linspace(0, 255, 64)),
        (np.linspace(0, 65535, 64).astype(np.int32), np.linspace(0, 255, 64)),
        (np.linspace(-9, 10**6, 64).astype(np.int32), np.linspace(0, 255, 64)),
        (np.full(64, 70000, np.int32), np.zeros(64)),
        (np.full(64, np.nan, np.float32), np.zeros(64)),
    ],
)
def test_32_bit_grey_is_brought_into_range(values: np.ndarray, expected: np.ndarray) -> None:
    picture = Image.fromarray(np.tile(values, (64, 1)))
    shown = decode_image(encoded(picture, "TIFF"), CFG)[0, 0]
    assert np.abs(shown - expected).max() <= 1


def test_the_first_frame_stands_for_an_animation_and_for_many_pages() -> None:
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = decode_image(data, CFG).astype(int)
        assert red.min() > 245, kind
        assert max(green.max(), blue.max()) < 10, kind


def test_the_format_is_told_by_content() -> None:
    gif = encoded(scene(), "GIF")
    assert room._open(gif).format == "GIF"
    assert room._open(encoded(scene(), "MPO", save_all=True, append_images=[scene()])).format == (
        "MPO"
    )


# --- orientation ---------------------------------------------------------------------------------

#: What a camera did to the upright picture before storing it with this orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("cfg", [CFG, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_photos_taken_sideways_stand_upright(
    orientation: int, kind: str, cfg: ImagePreprocess
) -> None:
    upright = scene(301, 200)
    turn = STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    shown = decode_image(encoded(stored, kind, exif=exif, **options), cfg).astype(int)
    wanted = decode_image(encoded(upright, "PNG"), cfg)
    # Scaled JPEG decoding starts at a corner, so turning before and after it differs a little.
    assert np.abs(shown - wanted).max() <= (6 if kind == "JPEG" else 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_or_senseless_exif_does_not_cost_the_picture() -> None:
    plain = decode_image(encoded(scene(), "PNG"), CFG)
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"):
        assert (decode_image(encoded(scene(), "PNG", exif=exif), CFG) == plain).all()
    senseless = Image.Exif()
    senseless[ORIENTATION] = 9
    assert (decode_image(encoded(scene(), "PNG", exif=senseless), CFG) == plain).all()


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (1, 5000), (5000, 1), (4000, 7)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("cfg", [CFG, CROP], ids=["squash", "crop"])
def test_tiny_and_extreme_pictures_are_pictures(
    size: tuple[int, int], kind: str, cfg: ImagePreprocess
) -> None:
    data = encoded(scene(*size), kind, quality=95)
    assert decode_image(data, cfg).shape == (3, 64, 64)
    assert away(data, cfg) < 2


def test_squash_keeps_all_of_a_wide_picture_and_crop_its_middle() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(wide, kind, quality=95)
        squashed, cropped = decode_image(data, CFG), decode_image(data, CROP)
        assert squashed[0, 32, 2] > 240, "the red sides are there"
        assert squashed[2, 32, 32] > 240
        assert cropped[0, :, 8:-8].max() < 20, "only the blue middle is left"
        assert cropped[2, :, 8:-8].min() > 240


def test_large_pictures_are_reduced_without_aliasing() -> None:
    """Fine stripes must come out grey, as from full size, not as a pattern that is not there."""
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (1600, 800)))
    for kind in ("PNG", "JPEG"):
        shown = decode_image(encoded(stripes, kind, quality=95), CFG).astype(int)
        assert np.abs(shown - 127).max() <= 4, kind
    assert away(encoded(scene(2000, 1200), "PNG")) < 1.0
    assert away(encoded(scene(2000, 1200), "JPEG")) < 1.0


def test_the_cap_is_read_from_the_header_before_anything_is_decoded() -> None:
    cfg = ImagePreprocess(size=64, max_pixels=60_000)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        assert decode_image(encoded(scene(300, 200), kind), cfg).shape == (3, 64, 64)
        data = encoded(scene(301, 200), kind)
        said = {str(refused(data, cfg))}
        if kind not in ("WEBP", "AVIF"):  # their decoders want all bytes before they tell the size
            said.add(str(refused(data[: len(data) * 2 // 3], cfg)))
        assert said == {"image too large: 301x200 pixels, cap 60000"}, kind


def test_a_bomb_is_refused_at_once_and_pillows_own_limit_is_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    bomb = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    assert str(refused(bytes(bomb), ImagePreprocess())) == (
        "image too large: 60000x60000 pixels, cap 100000000"
    )
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_cap_above_pillows_own_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(scene(), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, CFG).shape == (3, 64, 64)
    assert refused(data, ImagePreprocess(max_pixels=999)).reason == "image too large"


@pytest.mark.parametrize("where", [(room, "_decode_any"), (Image.Image, "getexif")])
def test_a_process_short_of_memory_does_not_set_a_picture_aside(
    monkeypatch: pytest.MonkeyPatch, where: tuple[object, str]
) -> None:
    """It would be lost for good, for a reason that was the machine's; nor is it to lie askew."""

    def exhausted(*_: object) -> Image.Image:
        raise MemoryError

    data = encoded(scene(), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(*where, exhausted)
        with pytest.raises(MemoryError):
            decode_image(data, CFG)
    assert decode_image(data, CFG).shape == (3, 64, 64)


def test_a_bomb_that_pillow_finds_is_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def bomb(*_: object) -> Image.Image:
        raise Image.DecompressionBombError("of its own")

    monkeypatch.setattr(room, "_decode_any", bomb)
    assert refused(encoded(scene(), "PNG")).reason == "image too large"


# --- what is no picture --------------------------------------------------------------------------


def test_reasons_that_reports_count_by() -> None:
    jpeg, png = encoded(scene(), "JPEG"), encoded(scene(), "PNG")
    broken = bytearray(png)
    broken[60:200] = bytes(140)
    said = {
        "nothing": (b"", "image empty"),
        "text": (b"not a picture, just words", "image not recognised"),
        "zeros": (bytes(1000), "image not recognised"),
        "web page": (b"<!DOCTYPE html><html></html>", "image format not supported"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(100), "image format not supported"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "image truncated"),
        "jpeg without its end": (jpeg[:-30], "image truncated"),
        "half a png": (png[: len(png) // 2], "image truncated"),
        "half a webp": (encoded(scene(), "WEBP")[:400], "image truncated"),
        "half a gif": (encoded(scene(), "GIF")[:900], "image truncated"),
        "half a tiff": (encoded(scene(), "TIFF")[:900], "image truncated"),
        "jpeg header alone": (jpeg[:200], "image truncated"),
        "overwritten png": (bytes(broken), "image corrupt"),
        "png signature alone": (png[:8] + b"\0\0\0\0\xff\xff\xff\xff", "image corrupt"),
    }
    assert {name: refused(data).reason for name, (data, _) in said.items()} == {
        name: reason for name, (_, reason) in said.items()
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_a_picture_cut_anywhere_is_decoded_whole_or_set_aside(kind: str) -> None:
    data = encoded(scene(90, 60), kind)
    whole = decode_image(data, CFG)
    for cut in range(0, len(data), max(len(data) // 60, 1)):
        try:
            shown = decode_image(data[:cut], CFG)
        except BadRow as error:
            assert error.reason in REASONS
        else:  # only a trailer was lost
            assert (shown == whole).all(), f"{kind} cut at {cut} of {len(data)}"


def test_a_program_is_never_started_for_a_picture() -> None:
    eps = encoded(scene(), "EPS")
    assert str(refused(eps)) == "image format not supported: PostScript"


# --- the same everywhere -------------------------------------------------------------------------


def test_the_same_bytes_give_the_same_pixels_in_every_process(tmp_path: Path) -> None:
    files = []
    for name, data in (
        ("a", encoded(scene(700, 500), "JPEG")),
        ("b", encoded(scene().convert("RGBA"), "PNG")),
        ("c", encoded(scene().convert("CMYK"), "JPEG")),
    ):
        files.append(tmp_path / name)
        files[-1].write_bytes(data)
    program = (
        "import sys, hashlib\nfrom mmray.config import ImagePreprocess\n"
        "from mmray.preprocess import decode_image\n"
        "for name in sys.argv[1:]:\n"
        "    pixels = decode_image(open(name, 'rb').read(), ImagePreprocess())\n"
        "    print(hashlib.sha256(pixels.tobytes()).hexdigest())\n"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout.split()
    for _ in range(2):
        here = [
            hashlib.sha256(decode_image(path.read_bytes(), ImagePreprocess()).tobytes())
            for path in files
        ]
        assert [digest.hexdigest() for digest in here] == elsewhere


def test_pillow_alone_shows_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where libjpeg-turbo's wrapper is missing, a model still sees what it was trained on."""
    jpegs = [encoded(scene(*size), "JPEG") for size in ((300, 200), (900, 700), (40, 30))]
    for cfg in (CFG, CROP):
        turbo = [decode_image(data, cfg).astype(int) for data in jpegs]
        with monkeypatch.context() as patch:
            patch.setattr(room, "simplejpeg", None)
            for data, seen in zip(jpegs, turbo, strict=True):
                assert np.abs(decode_image(data, cfg) - seen).mean() < 0.5


def test_importing_it_does_not_load_torch() -> None:
    program = "import sys, mmray.preprocess; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


# --- real files ----------------------------------------------------------------------------------

#: Files that the plain reference itself shows wrongly: it clips 16 bits to white.
CLIPPED_BY_PILLOW = {
    "pillow_16bit.cropped.j2k",
    "pillow_16_bit_binary_pgm.tiff",
    "pngsuite_basi0g16.png",
    "pillow_imagedraw_polygon_width_I.tiff",
}


@pytest.mark.filterwarnings("ignore")
def test_odd_files_are_scored_and_broken_ones_have_a_reason(shared: Path) -> None:
    folder = shared / "data" / "bad-images"
    with open(folder / "MANIFEST.csv", encoding="utf-8") as manifest:
        rows = list(csv.DictReader(manifest))
    wrong = []
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        try:
            shown = decode_image(data, ImagePreprocess())
        except BadRow as error:
            assert error.reason in REASONS
            outcome = "set aside"
        else:
            outcome = "ok"
            if row["file"] not in CLIPPED_BY_PILLOW:
                difference = np.abs(shown - reference(data, ImagePreprocess())).mean()
                assert difference < 3, row["file"]
        if (outcome == "ok") != (row["pillow_outcome"] == "ok"):
            wrong.append((row["file"], row["pillow_outcome"], outcome))
    assert not wrong
    assert len(rows) == 140


def test_real_photos_look_as_the_plain_way_shows_them(shared: Path) -> None:
    import pyarrow.parquet as pq

    with tarfile.open(shared / "data" / "tweets" / "tweets-00000.tar") as tar:
        photos = [
            tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar.getmembers()[:240]
            if member.name.endswith(".jpg")
        ]
    table = pq.read_table(shared / "data" / "fashion" / "fashion-00000.parquet", columns=["image"])
    photos += [image["bytes"] for image in table.column("image").slice(0, 80).to_pylist()]
    for cfg in (ImagePreprocess(), ImagePreprocess(resize="crop"), ImagePreprocess(size=96)):
        differences = [away(data, cfg) for data in photos]
        assert np.mean(differences) < 1.5
        assert max(differences) < 8
