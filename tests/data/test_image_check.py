"""Quality of the JPEG files that `prepare` writes: of shrunk images only, and part of what makes shards the same."""

import io
import json

import pytest
from PIL import Image

from eve_ds.cli.prepare import main
from eve_ds.data.formats.captioned import Box
from eve_ds.data.image_check import encode_for_shard
from eve_ds.data.importers import FileSlice, GeneratedScenes
from eve_ds.data.importers.region import Region
from eve_ds.data.shard_writer import OutputError, WriterOptions, write_shards


def encode(kind, **options):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def tables(data):
    """Quantization tables of a JPEG file, which tell its quality."""
    with Image.open(io.BytesIO(data)) as image:
        return image.quantization


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("quality", [1, 75, 90, 100])
def test_shrunk_images_have_the_quality(kind, quality):
    stored, suffix = encode_for_shard(encode(kind), 20, quality)
    assert suffix == "jpg"
    assert tables(stored) == tables(encode("JPEG", quality=quality))


def test_default_quality_is_90():
    assert tables(encode_for_shard(encode("PNG"), 20)[0]) == tables(encode("JPEG", quality=90))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_that_are_not_shrunk_keep_their_bytes(kind):
    data = encode(kind)
    assert encode_for_shard(data, 40, 1)[0] == encode_for_shard(data, None, 1)[0] == data


@pytest.mark.parametrize(
    ("size", "stored", "kind"),
    [
        ((65_501, 2), (32_750, 1), "jpg"),
        ((131_000, 2), (65_500, 1), "jpg"),
        ((131_002, 2), (65_501, 1), "png"),
        ((2, 131_002), (1, 65_501), "png"),
    ],
)
@pytest.mark.parametrize("image_format", ["PNG", "BMP"])
def test_a_shrunk_image_too_long_for_jpeg_is_stored_as_png(capfd, size, stored, kind, image_format):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 200, 30)).save(file, image_format)
    data, suffix = encode_for_shard(file.getvalue(), 1)
    image = Image.open(io.BytesIO(data))
    assert (suffix, image.size) == (kind, stored)
    assert abs(image.convert("RGB").getpixel((0, 0))[1] - 200) < 5
    assert capfd.readouterr().err == "", "libjpeg prints a line about what it does not write"


@pytest.mark.parametrize(("width", "kind"), [(65_500, "JPEG"), (65_501, "PNG")])
def test_a_box_too_long_for_jpeg_is_stored_as_png(tmp_path, width, kind):
    Image.new("RGB", (70_000, 2)).save(tmp_path / "a.png")
    data = Region(FileSlice(str(tmp_path / "a.png")), Box(1, 0, width, 2)).read()
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == (kind, (width, 2))


def prepare(out, *options):
    return main(["scenes", "--num_samples", "3", "--out", str(out), "--workers", "1", *options])


def test_option_sets_the_quality(tmp_path, capsys):
    assert prepare(tmp_path, "--max_size", "32", "--quality", "30") == 0
    assert json.loads((tmp_path / "report.json").read_text())["options"]["quality"] == 30
    assert prepare(tmp_path, "--max_size", "32", "--quality", "31") == 2
    assert "(options.quality: 30 there, 31 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--quality", "80"), "--quality (80) is for the images that --max_size shrinks: add --max_size, or leave"),
        (("--max_size", "9", "--quality", "0"), "argument --quality: 0 must be from 1 to 100"),
        (("--max_size", "9", "--quality", "101"), "argument --quality: 101 must be from 1 to 100"),
        (("--max_size", "9", "--quality", "high"), "argument --quality: invalid whole number value: 'high'"),
    ],
)
def test_quality_of_no_use_is_refused(options, line, tmp_path, capsys):
    try:
        code = prepare(tmp_path / "out", *options)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert line in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_folders_of_earlier_versions_can_be_continued(tmp_path):
    """Their report names no quality. It was 95, and of no effect without a largest size."""
    write_shards(GeneratedScenes(3), tmp_path / "small", WriterOptions(max_size=32, quality=95))
    write_shards(GeneratedScenes(3), tmp_path / "whole", WriterOptions(quality=80))
    for name in ("small", "whole"):
        assert "quality" not in json.loads((tmp_path / name / "report.json").read_text())["options"]
    write_shards(GeneratedScenes(3), tmp_path / "whole", WriterOptions())
    with pytest.raises(OutputError, match=r"options\.quality: null there, 90 here"):
        write_shards(GeneratedScenes(3), tmp_path / "small", WriterOptions(max_size=32))
