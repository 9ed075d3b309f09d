"""Every source that looks for files finds them behind links to folders, and says which links it does not follow."""

import json
import shutil

import pytest
from photo_sets import one_line, pack, photo, prepare, write

from eve_ds.cli.prepare import main

LINK = "link out of the image folder (--follow_links follows it)"


def pairs(*numbers):
    return {number: f"caption {number}" for number in numbers}


def sample(number):
    url = json.dumps({"url": f"http://x/{number}", "caption": f"caption {number}"})
    return {f"{number}.png": photo(number), f"{number}.txt": b"caption %d" % number, f"{number}.json": url.encode()}


def nlvr_split(name, number):
    line = {"sentence": f"caption {number}", "label": "true", "identifier": f"{number}-0", "directory": "0"}
    images = {f"images/0/{name}-{number}-0-{k}.png": photo(number + k) for k in range(6)}
    return {f"{name}.json": json.dumps(line), **images}


def part(kind, folder, number):
    """Write one part of a data set, with one image; all parts are in one folder."""
    if kind in ("tars", "urls of tars"):
        pack(folder / f"{number}.tar", sample(number).items())
    elif kind in ("files", "urls of files"):
        write(folder, sample(number))
    elif kind == "imagefolder":
        write(
            folder, {"metadata.csv": f"file_name,text\n{number}.png,caption {number}\n", f"{number}.png": photo(number)}
        )
    else:
        write(folder, nlvr_split("abcd"[number // 10], number))


def arguments(kind, folder):
    if kind.startswith("urls"):
        rows = "".join(f"caption {number}\thttp://x/{number}\n" for number in (0, 10, 20))
        write(folder.parent, {"list.tsv": rows})
        return ("urls", folder.parent / "list.tsv", "--images", folder)
    return ({"tars": "img2dataset", "files": "img2dataset"}.get(kind, kind), folder)


def expected(kind, *numbers):
    if kind != "nlvr":
        return pairs(*numbers)
    return {number + k: f"caption {number}" for number in numbers for k in range(6)}


KINDS = ["tars", "files", "urls of tars", "urls of files", "imagefolder", "nlvr"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_linked_folder_is_read(tmp_path, kind):
    part(kind, tmp_path / "in" / "real", 0)
    part(kind, tmp_path / "elsewhere", 10)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "real")
    options = ["--follow_links"] if kind == "imagefolder" else []
    code, found, reasons = prepare(tmp_path / "out", *arguments(kind, tmp_path / "in"), *options)
    assert (code, found) == (0, expected(kind, 0, 10))
    assert sum(reasons.values()) == (1 if kind.startswith("urls") else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_a_link_is_read(tmp_path, kind):
    part(kind, tmp_path / "elsewhere", 0)
    (tmp_path / "in").symlink_to(tmp_path / "elsewhere")
    assert prepare(tmp_path / "out", *arguments(kind, tmp_path / "in"))[1] == expected(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_to_a_folder_that_is_gone_is_counted(tmp_path, kind):
    part(kind, tmp_path / "in" / "real", 0)
    place = tmp_path / "in" / ("real/images/gone" if kind == "nlvr" else "gone")
    place.symlink_to(tmp_path / "nowhere")
    code, found, reasons = prepare(tmp_path / "out", *arguments(kind, tmp_path / "in"))
    assert (code, found) == (0, expected(kind, 0))
    if not kind.startswith("urls"):
        assert reasons == {"broken link": 1}


@pytest.mark.parametrize("kind", ["files", "urls of files", "imagefolder", "nlvr"])
@pytest.mark.parametrize("follow", [False, True])
def test_links_of_single_images_are_followed_on_request(tmp_path, kind, follow):
    for number, folder in ((0, "in/real"), (10, "in/other")):
        part(kind, tmp_path / folder, number)
    images = list((tmp_path / "in" / "other").rglob("*.png"))
    for image in images:
        shutil.move(image, tmp_path / image.name)
        image.symlink_to(tmp_path / image.name)
    options = ["--follow_links"] if follow else []
    code, found, reasons = prepare(tmp_path / "out", *arguments(kind, tmp_path / "in"), *options)
    assert (code, found) == (0, expected(kind, 0, *([10] if follow else [])))
    assert reasons.get(LINK, 0) == (0 if follow else len(images))


@pytest.mark.parametrize("kind", ["files", "urls of files", "nlvr"])
def test_an_image_may_be_a_link_inside_a_linked_folder(tmp_path, kind):
    part(kind, tmp_path / "elsewhere", 0)
    image = next((tmp_path / "elsewhere").rglob("*0.png"))
    shutil.move(image, image.with_name("blob"))
    image.symlink_to("blob")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert prepare(tmp_path / "out", *arguments(kind, tmp_path / "in"))[1] == expected(kind, 0)


def test_a_linked_folder_of_images_names_the_option(tmp_path, capsys):
    write(tmp_path, {"data/0.png": photo(0), "a.json": '[{"image": "train2014/0.png", "caption": "caption 0"}]'})
    (tmp_path / "train2014").symlink_to(tmp_path / "data")
    write(tmp_path, {"coco/a.json": '[{"image": "train2014/0.png", "caption": "caption 0"}]'})
    (tmp_path / "coco" / "train2014").symlink_to(tmp_path / "data")
    assert prepare(tmp_path / "out", "json", tmp_path / "a.json")[1] == pairs(0), "a link inside the folder"
    assert prepare(tmp_path / "no", "json", tmp_path / "coco" / "a.json")[0] == 2
    assert f"no sample could be used: {LINK}: 1 (as train2014/0.png)" in one_line(capsys)
    assert prepare(tmp_path / "yes", "json", tmp_path / "coco" / "a.json", "--follow_links")[1] == pairs(0)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json"])
def test_a_linked_annotation_file_keeps_its_suffix_and_folder(tmp_path, suffix):
    """As in the cache of Hugging Face, where the names of files are links to blobs."""
    content = {
        "tsv": "image\tcaption\n0.png\tcaption 0\n",
        "csv": "image,caption\n0.png,caption 0\n",
        "jsonl": '{"image": "0.png", "caption": "caption 0"}\n',
        "json": '[{"image": "0.png", "caption": "caption 0"}]',
    }[suffix]
    write(tmp_path, {"blobs/abc": content, "snapshot/0.png": photo(0)})
    (tmp_path / "snapshot" / f"a.{suffix}").symlink_to("../blobs/abc")
    command = "table" if suffix.endswith("sv") else "json"
    assert prepare(tmp_path / "out", command, tmp_path / "snapshot" / f"a.{suffix}") == (0, pairs(0), {})


def test_splits_of_nlvr_may_share_a_folder_of_images(tmp_path):
    for name, number in (("a", 0), ("b", 10)):
        write(
            tmp_path / "pool", {k.removeprefix("images/"): v for k, v in nlvr_split(name, number).items() if "png" in k}
        )
        write(tmp_path / "in" / name, {f"{name}.json": nlvr_split(name, number)[f"{name}.json"]})
        (tmp_path / "in" / name / "images").symlink_to(tmp_path / "pool")
    assert prepare(tmp_path / "out", "nlvr", tmp_path / "in") == (0, expected("nlvr", 0, 10), {})


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ({"train-0.parquet": b"", "README.md": b""}, ", as {}/*.parquet"),
        ({"data/a.csv": b"", "b.txt": b""}, ", as {}/data/*.csv"),
        ({"README.md": b""}, ""),
    ],
)
@pytest.mark.parametrize("command", ["table", "json", "coco", "karpathy", "visual_genome"])
def test_a_folder_in_place_of_files_names_the_files(tmp_path, capsys, command, files, advice):
    write(tmp_path / "in", files)
    assert main([command, str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    line = f"annotation file {tmp_path / 'in'} is not a file but a folder: give files{advice.format(tmp_path / 'in')}"
    assert one_line(capsys) == f"prepare: {line}"
