"""What an image becomes: every mode and format, orientations, transparency, frames; the expected pixels by hand."""

import ast
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

import eve_ds
from eve_ds import limits
from eve_ds.data import image_file
from eve_ds.data.errors import BadSample
from eve_ds.data.image_check import encode_for_shard
from eve_ds.data.image_file import open_image, to_rgb
from eve_ds.data.transforms import TrainTransform

COLORS = np.array(
    [[[200, 30, 10], [0, 255, 90]], [[17, 99, 180], [255, 255, 255]], [[0, 0, 0], [128, 64, 32]]], np.uint8
)
ALPHA = np.array([[255, 0], [128, 255], [0, 51]], np.uint8)
GRAY = np.array([[0, 255], [7, 128], [200, 33]], np.uint8)
EXIF_ORIENTATION = 0x0112


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(data):
    return np.asarray(to_rgb(open_image(data)))


def gray(values):
    return np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, axis=2)


def on_white(colors, alpha):
    share = alpha[:, :, None] / 255
    return np.rint(colors * share + 255 * (1 - share))


def png(depth, color_type, rows, transparent=None):
    """PNG of numbers that Pillow cannot write: (H, W) or (H, W, C) integers of 8 or 16 bits, (H, W) of 2 or 4."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.asarray(rows)
    lines = b"".join(
        b"\0" + (row.astype(f">u{depth // 8}").tobytes() if depth >= 8 else bits(row, depth)) for row in rows
    )
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, color_type, 0, 0, 0)
    color = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + color
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def bits(row, depth):
    """Numbers of `depth` bits each, one after the other, filled up to whole bytes."""
    text = "".join(f"{value:0{depth}b}" for value in row)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def tiff(depth, rows, white_is_zero=False, sample_format=1, orientation=1):
    """Gray TIFF, little-endian, uncompressed; a depth of less than 16 bits is packed."""
    rows = np.asarray(rows)
    data = b"".join(bits(row, depth) for row in rows) if depth < 16 else rows.tobytes()
    height, width = rows.shape
    shorts = {256: width, 257: height, 258: depth, 259: 1, 262: 0 if white_is_zero else 1, 274: orientation, 277: 1}
    tags = {**shorts, 278: height, 339: sample_format}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = [(tag, struct.pack("<HHI", tag, 3, 1) + struct.pack("<HH", value, 0)) for tag, value in tags.items()]
    entries += [(tag, struct.pack("<HHII", tag, 4, 1, value)) for tag, value in ((273, start), (279, len(data)))]
    table = b"".join(entry for _, entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + data


# ------------------------------------------------------------------------------------------------------ every mode


RGBA = np.dstack([COLORS, ALPHA])
LA = np.dstack([GRAY, ALPHA])
FOUR_LEVELS = np.array([[0, 1, 2, 3]])
WORDS = np.array([[0, 65535], [257 * 7, 257 * 128 + 100], [51400, 300]], np.uint16)  # / 257: 0 255 7 128.4 200 1.2
WORDS_8 = [[0, 255], [7, 128], [200, 1]]
FRACTIONS = np.array([[0, 1], [0.25, 0.5], [0.1, 0.999]], np.float32)
FRACTIONS_8 = [[0, 255], [64, 128], [26, 255]]
PALETTE = [200, 30, 10, 0, 255, 90, 17, 99, 180]
INDICES = np.array([[0, 1], [2, 1], [1, 0]], np.uint8)


def palette_image():
    image = Image.fromarray(INDICES, "L")
    image.putpalette(PALETTE)
    return image


def with_transparency(image, key):
    image.info["transparency"] = key
    return image


def big_endian(words):
    return Image.frombytes("I;16B", words.shape[::-1], words.astype(">u2").tobytes())


def palette_rgba():
    image = palette_image()
    image.putpalette([200, 30, 10, 255, 0, 255, 90, 0, 17, 99, 180, 128], "RGBA")
    return image


PALETTE_COLORS = np.array(PALETTE, np.uint8).reshape(3, 3)[INDICES]
PALETTE_ALPHA = np.array([255, 0, 128], np.uint8)[INDICES]
WHITE_KEY = on_white(COLORS, np.where((COLORS == [17, 99, 180]).all(axis=2), 0, 255))
INK = 255 - COLORS  # cyan, magenta, yellow without black

MODES = {
    "RGB PNG": (lambda: encode(Image.fromarray(COLORS)), COLORS),
    "RGB TIFF": (lambda: encode(Image.fromarray(COLORS), "TIFF"), COLORS),
    "RGB BMP": (lambda: encode(Image.fromarray(COLORS), "BMP"), COLORS),
    "RGB PPM": (lambda: encode(Image.fromarray(COLORS), "PPM"), COLORS),
    "RGB WEBP": (lambda: encode(Image.fromarray(COLORS), "WEBP", lossless=True), COLORS),
    "L PNG": (lambda: encode(Image.fromarray(GRAY)), gray(GRAY)),
    "L PGM": (lambda: encode(Image.fromarray(GRAY), "PPM"), gray(GRAY)),
    "1 PNG": (lambda: encode(Image.fromarray(GRAY > 100)), gray((GRAY > 100) * 255)),
    "1 TIFF": (lambda: encode(Image.fromarray(GRAY > 100), "TIFF"), gray((GRAY > 100) * 255)),
    "P PNG": (lambda: encode(palette_image()), PALETTE_COLORS),
    "P GIF": (lambda: encode(palette_image(), "GIF"), PALETTE_COLORS),
    "P BMP": (lambda: encode(palette_image(), "BMP"), PALETTE_COLORS),
    "RGBA PNG": (lambda: encode(Image.fromarray(RGBA)), on_white(COLORS, ALPHA)),
    "RGBA TIFF": (lambda: encode(Image.fromarray(RGBA), "TIFF"), on_white(COLORS, ALPHA)),
    "RGBA WEBP": (lambda: encode(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), on_white(COLORS, ALPHA)),
    "LA PNG": (lambda: encode(Image.fromarray(LA)), on_white(gray(GRAY), ALPHA)),
    "LA TIFF": (lambda: encode(Image.fromarray(LA), "TIFF"), on_white(gray(GRAY), ALPHA)),
    "PA TIFF": (lambda: encode(palette_rgba().convert("PA"), "TIFF"), on_white(PALETTE_COLORS, PALETTE_ALPHA)),
    "P PNG with an alpha for each color": (
        lambda: encode(palette_image(), transparency=bytes([255, 0, 128])),
        on_white(PALETTE_COLORS, PALETTE_ALPHA),
    ),
    "P PNG with one transparent color": (
        lambda: encode(palette_image(), transparency=1),
        on_white(PALETTE_COLORS, np.where(INDICES == 1, 0, 255)),
    ),
    "P GIF with one transparent color": (
        lambda: encode(palette_image(), "GIF", transparency=1),
        on_white(PALETTE_COLORS, np.where(INDICES == 1, 0, 255)),
    ),
    "L PNG with a transparent level": (
        lambda: encode(with_transparency(Image.fromarray(GRAY), 7)),
        gray(np.where(GRAY == 7, 255, GRAY)),
    ),
    "1 PNG with a transparent level": (
        lambda: encode(with_transparency(Image.fromarray(GRAY > 100), 0)),
        gray(np.full_like(GRAY, 255)),
    ),
    "RGB PNG with a transparent color": (
        lambda: encode(with_transparency(Image.fromarray(COLORS), (17, 99, 180))),
        WHITE_KEY,
    ),
    "RGB PNG of 16 bits": (lambda: png(16, 2, COLORS.astype(np.uint16) * 257), COLORS),
    "RGB PNG of 16 bits with a transparent color": (
        lambda: png(16, 2, COLORS.astype(np.uint16) * 256 + 5, (17 * 256 + 5, 99 * 256 + 5, 180 * 256 + 5)),
        WHITE_KEY,
    ),
    "RGBA PNG of 16 bits": (lambda: png(16, 6, RGBA.astype(np.uint16) * 257), on_white(COLORS, ALPHA)),
    "LA PNG of 16 bits": (lambda: png(16, 4, LA.astype(np.uint16) * 257), on_white(gray(GRAY), ALPHA)),
    "I;16 PNG": (lambda: encode(Image.fromarray(WORDS)), gray(WORDS_8)),
    "I;16 PNG with a transparent level": (lambda: png(16, 0, WORDS, (1799,)), gray([[0, 255], [255, 128], [200, 1]])),
    "I;16 TIFF": (lambda: encode(Image.fromarray(WORDS), "TIFF"), gray(WORDS_8)),
    "I;16B TIFF": (lambda: encode(big_endian(WORDS), "TIFF"), gray(WORDS_8)),
    "I PGM": (lambda: b"P5 2 3 65535\n" + WORDS.astype(">u2").tobytes(), gray(WORDS_8)),
    "I PGM, dark": (lambda: b"P5 2 1 65535\n" + struct.pack(">2H", 0, 200), gray([[0, 1]])),
    "I TIFF of 16 bits": (lambda: encode(Image.fromarray(WORDS.astype(np.int32)), "TIFF"), gray(WORDS_8)),
    "I TIFF of 8 bits": (lambda: encode(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), gray(GRAY)),
    "F TIFF up to 1": (lambda: encode(Image.fromarray(FRACTIONS), "TIFF"), gray(FRACTIONS_8)),
    "F TIFF up to 255": (lambda: encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), gray(GRAY)),
    "F TIFF up to 65535": (lambda: encode(Image.fromarray(WORDS.astype(np.float32)), "TIFF"), gray(WORDS_8)),
    **{
        f"L PNG of {depth} bits with a transparent level {level}": (
            lambda depth=depth, level=level: png(depth, 0, FOUR_LEVELS, (level,)),
            gray(np.where(level == FOUR_LEVELS, 255, FOUR_LEVELS * 255 // (2**depth - 1))),
        )
        for depth in (2, 4)
        for level in range(4)
    },
    "I;16 TIFF of 12 bits": (lambda: tiff(12, [[0, 4095, 2048, 1024]]), gray([[0, 255, 128, 64]])),
    "I;16 TIFF of 12 bits, turned": (
        lambda: tiff(12, [[0, 4095, 2048, 1024]], orientation=6),
        gray([[0], [255], [128], [64]]),
    ),
    **{
        f"{depth}-bit TIFF whose 0 is white": (
            lambda depth=depth: tiff(depth, FOUR_LEVELS * (2**depth // 3), white_is_zero=True),
            gray([[255, 170, 85, 0]]),
        )
        for depth in (2, 4)
    },
    "I;16 TIFF whose 0 is white": (lambda: tiff(16, WORDS, white_is_zero=True), 255 - gray(WORDS_8)),
    "F TIFF whose 0 is white": (
        lambda: tiff(32, FRACTIONS, white_is_zero=True, sample_format=3), 255 - gray(FRACTIONS_8)
    ),
    "CMYK TIFF": (lambda: encode(Image.fromarray(np.dstack([INK, INK[..., 0] * 0]), "CMYK"), "TIFF"), COLORS),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize("name", MODES)
def test_every_mode_and_format_becomes_the_expected_rgb(name):
    make, expected = MODES[name]
    data = make()
    assert np.abs(read(data).astype(int) - expected).max() <= 1, "one level for the rounding of Pillow's composition"
    stored = encode_for_shard(data)[0]
    assert (read(stored) == read(data)).all(), "the stored image must look like its source"
    if "with" not in name and "A" not in name.split()[0]:
        assert (read(data) == expected).all(), "an opaque image is exact"


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "YCbCr", "LAB", "PA", "RGBX", "CMYK", "I;16L"])
def test_modes_of_images_in_memory_become_rgb(mode):
    """A caller of the exported processor may give an image of any mode; the color is one that every mode can hold."""
    color = Image.new("RGB", (2, 2), (204, 204, 204))
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(color, transform)
    elif mode == "I;16L":
        image = Image.frombytes(mode, (2, 2), struct.pack("<4H", *[204 * 257] * 4))
    else:
        steps = {"La": ("LA",), "RGBa": ("RGBA",), "PA": ("P",)}.get(mode, ())
        image = color
        for step in (*steps, mode):
            image = image.convert(step)
    pixels = np.asarray(to_rgb(image)).astype(int)
    assert pixels.shape == (2, 2, 3)
    assert np.abs(pixels - 204).max() <= 3


def test_cmyk_of_adobe_is_inverted():
    """Adobe writes 255 - ink; a decoder that ignores its marker shows the negative."""
    inks = Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in (10, 200, 220, 0)])
    data = encode(inks, "JPEG", quality=100)
    assert b"Adobe" in data[:200]
    assert np.abs(read(data).astype(int) - [245, 55, 35]).max() <= 3


def test_premultiplied_transparency_is_composited_once():
    image = Image.fromarray(RGBA).convert("RGBa")
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - on_white(COLORS, ALPHA)).max() <= 3


@pytest.mark.parametrize(
    "values", [[[-1.0, 0.5]], [[0.0, 70_000.0]], [[float("nan"), 0.5]], [[0.0, float("inf")]]], ids=str
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_scale_are_counted(values, dtype):
    if dtype is np.int32 and not all(abs(value) < 2**31 for row in values for value in row):
        values = [[-(2**31), 2**31 - 1]]
    data = encode(Image.fromarray(np.floor(np.array(values)).astype(dtype)), "TIFF")
    for use in (read, encode_for_shard):
        with pytest.raises(BadSample) as caught:
            use(data)
        assert caught.value.reason == "unusable pixel values"


# ------------------------------------------------------------------------------------- orientation, frames, formats


def oriented(orientation, kind):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return encode(
        Image.fromarray(COLORS.repeat(8, 0).repeat(8, 1)), kind, exif=exif, **{"lossless": True, "quality": 95}
    )


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_applied(kind, orientation):
    """Rows of the stored image are, by the EXIF standard, columns or mirrored rows of the upright one."""
    stored = np.asarray(Image.open(io.BytesIO(oriented(1, kind))).convert("RGB"))
    data = oriented(orientation, kind)
    expected = UPRIGHT[orientation](stored)
    assert (read(data) == expected).all()
    pixels = TrainTransform(16, (1.0, 1.0), 0.0, seed=0)(data, "a", 0, "k")
    flat = Image.fromarray(expected).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(pixels.astype(int) - np.asarray(flat)).max() <= (1 if kind != "JPEG" else 8), "training sees the same"
    assert (read(encode_for_shard(data)[0]) == expected).all(), "prepare keeps the orientation, or applies it"
    small = read(encode_for_shard(data, max_size=8)[0])
    assert small.shape == (expected.shape[0] // 2, expected.shape[1] // 2, 3)


def test_crops_are_drawn_in_the_upright_image():
    transform = TrainTransform(8, (0.1, 0.4), 0.5, seed=3)
    turned, whole = oriented(6, "PNG"), encode(Image.fromarray(read(oriented(6, "PNG"))))
    for number in range(10):
        assert (transform(turned, "a", 0, str(number)) == transform(whole, "a", 0, str(number))).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_exif_leaves_the_image_as_it_is():
    data = encode(Image.fromarray(COLORS), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\x01")
    assert (read(data) == COLORS).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_used(kind):
    frames = [Image.new("RGB", (6, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (read(data) == [255, 0, 0]).all()
    assert (read(encode_for_shard(data)[0]) == [255, 0, 0]).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_and_stored_as_png():
    data = encode(Image.new("RGBA", (8, 8), (10, 200, 30, 0)), "AVIF")
    assert read(data).min() >= 254
    assert encode_for_shard(data)[1] == "png"


OTHER_FORMATS = {
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PSD": b"8BPS\0\1",
    "ICO": b"\0\0\1\0\1\0",
}
BRANDS = ("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1")  # of ISO/IEC 23008-12


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_format_that_is_not_read_is_named(name, monkeypatch):
    monkeypatch.setattr(image_file, "READ_FORMATS", ("JPEG", "PNG"))
    with pytest.raises(BadSample, match=r"not one of JPEG, PNG: convert it to PNG") as caught:
        open_image(OTHER_FORMATS[name])
    assert caught.value.reason == f"unreadable image ({name})"


@pytest.mark.parametrize("brand", BRANDS)
def test_every_brand_of_heic_is_named(brand):
    with pytest.raises(BadSample, match=r"unreadable image \(HEIC\)"):
        open_image(b"\0\0\0\x18ftyp" + brand.encode() + b"\0" * 40)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"\n  <HTML>", "a web page"),
    ],
)
def test_what_a_failed_download_leaves_is_named(data, name):
    with pytest.raises(BadSample, match="get the file again") as caught:
        encode_for_shard(data)
    assert caught.value.reason == f"no image but {name}"


def test_a_targa_file_has_no_wrong_name():
    with pytest.raises(BadSample) as caught:
        open_image(encode(Image.fromarray(COLORS), "TGA"))
    assert caught.value.reason == "unreadable image"


def test_a_file_above_the_cap_is_counted(monkeypatch):
    monkeypatch.setattr(limits, "IMAGE_BYTES", 10)
    with pytest.raises(BadSample, match=r"too large an image file \(\d+ bytes, more than 10\)"):
        open_image(encode(Image.fromarray(COLORS)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_cut_file_of_any_format_is_counted(kind, orientation):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encode(noise, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    for end in (0, 1, 10, 30, len(data) // 2):
        for use in (read, encode_for_shard):
            with pytest.raises(BadSample) as caught:
                use(data[:end])
            assert caught.value.reason in ("truncated image", "unreadable image", "zero-size image")


def test_images_are_opened_in_one_module_only():
    """`Image.open` without the list of formats would start Ghostscript for EPS."""
    package = Path(eve_ds.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                assert "formats=READ_FORMATS" in ast.unparse(node), file
                found.add(file.relative_to(package).as_posix())
            opens = isinstance(node, ast.ImportFrom) and node.module == "PIL.Image"
            assert not opens or "open" not in {alias.name for alias in node.names}, file
            reader = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("imread", "read_image")
            assert not reader, f"{file} opens an image by another library"
    assert found == {"data/image_file.py"}
