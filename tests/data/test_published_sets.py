"""Every data set of the paper, and its relatives, in their published form: the right captions of each image.

The files are tiny, and each image is a color, so that a caption of another image is seen.
"""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from photo_sets import one_line, pack, photo, prepare, prepare_groups, write
from PIL import Image

from eve_ds import limits
from eve_ds.cli.prepare import main
from eve_ds.data.formats.image_ids import image_names, in_data_set
from eve_ds.data.importers import Candidate, CaptionJson, ImagePaths, Skip, Table


def report(out, *arguments):
    assert main([*map(str, arguments), "--out", str(out), "--workers", "1"]) == 0
    return json.loads((out / "report.json").read_text())


# ------------------------------------------------------------------------------------------------- COCO


def coco(year, numbers=(9, 25, 30), name=None, annotations_first=False):
    """`captions_train2014.json`: two captions for each image, those of an image apart from one another."""
    name = name or ("COCO_train2014_{:012d}.jpg" if year == 2014 else "{:012d}.jpg")
    images = [
        {
            "license": 5,
            "file_name": name.format(n),
            "id": n,
            "flickr_url": f"http://farm1.staticflickr.com/2/{n}7_ab.jpg",
        }
        for n in numbers
    ]
    annotations = [{"image_id": n, "id": 10 * n + k, "caption": f"caption {n}-{k}"} for k in range(2) for n in numbers]
    parts = {"info": {"year": year, "contributor": [1, 2]}, "images": images, "licenses": [{"id": 1}]}
    both = {"annotations": annotations}
    return json.dumps({**both, **parts} if annotations_first else {**parts, **both})


def coco_images(folder, name="{:012d}.jpg", numbers=(9, 25, 30)):
    return {f"{folder}{name.format(n)}": photo(n) for n in numbers}


COCO_PAIRS = {n: [f"caption {n}-0", f"caption {n}-1"] for n in (9, 25, 30)}


@pytest.mark.parametrize("annotations_first", [False, True])
@pytest.mark.parametrize(
    ("year", "folder", "option"),
    [(2014, "train2014/", ""), (2014, "", ""), (2014, "train2014/", "train2014"), (2017, "train2017/", "")],
)
def test_captions_of_coco_are_grouped_by_image(tmp_path, year, folder, option, annotations_first):
    name = "COCO_train2014_{:012d}.jpg" if year == 2014 else "{:012d}.jpg"
    write(tmp_path / "coco", coco_images(folder, name))
    write(tmp_path, {f"captions_train{year}.json": coco(year, annotations_first=annotations_first)})
    out = tmp_path / "out"
    arguments = ("coco", tmp_path / f"captions_train{year}.json", "--image_root", tmp_path / "coco" / option)
    assert prepare_groups(out, *arguments) == (0, COCO_PAIRS, {})
    report = json.loads((out / "report.json").read_text())
    assert (report["samples"], report["images"]) == (6, 3)
    lines = [f"{name.format(n).removesuffix('.jpg')}\tFlickr_{n}7\n" for n in COCO_PAIRS]
    assert (out / "ids.txt").read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"caption"', "malformed entry"),
        ('"image_id"', "malformed entry"),
        ('"file_name"', "malformed entry"),
    ],
)
def test_an_annotation_without_its_image_or_caption_is_counted(tmp_path, change, message):
    text = coco(2017)
    at = text.index(change)
    write(tmp_path, {**coco_images(""), "a.json": text[:at] + '"other"' + text[at + len(change) :]})
    code, _, reasons = prepare_groups(tmp_path / "out", "coco", tmp_path / "a.json")
    assert (code, list(reasons)) == (0, [message])


def test_boxes_of_objects_are_no_captions(tmp_path, capsys):
    write(tmp_path, {"instances_train2017.json": coco(2017).replace('"caption"', '"bbox"')})
    assert prepare(tmp_path / "out", "coco", tmp_path / "instances_train2017.json")[0] == 2
    assert "has boxes of objects and no captions: give captions_*.json" in one_line(capsys)


# ------------------------------------------------------------------------------------------------- Visual Genome


def region(number, phrase, box=(0, 0, 32, 32), image=1):
    x, y, width, height = box
    return {"region_id": number, "width": width, "height": height, "image_id": image, "phrase": phrase, "y": y, "x": x}


REGIONS = [
    {"id": 1, "regions": [region(1, "a sky "), region(2, "a dog", (1, 2, 8, 9)), region(3, "a dog", (1, 2, 8, 9))]},
    {"id": 200, "regions": [region(4, "two cats", image=200), region(5, "", image=200)]},
    {"id": 7, "regions": [region(6, 5, image=7), region(7, "a hat", image=7), {"phrase": "no box"}]},
]
VG_IMAGES = {"VG_100K/1.jpg": photo(1), "VG_100K_2/200.jpg": photo(200), "VG_100K/7.jpg": photo(7)}


def test_regions_are_captions_of_the_whole_image(tmp_path):
    write(tmp_path, VG_IMAGES | {"region_descriptions.json": json.dumps(REGIONS)})
    code, pairs, reasons = prepare_groups(tmp_path / "out", "visual_genome", tmp_path / "region_descriptions.json")
    assert (code, reasons) == (0, {"malformed entry": 1, "empty caption": 1})
    assert pairs == {1: ["a sky", "a dog"], 200: ["two cats"], 7: ["a hat", "no box"]}


def split_image(box):
    """PNG that is black but for one box of white."""
    image = Image.new("RGB", (64, 48))
    x, y, width, height = box
    image.paste((255, 255, 255), (x, y, x + width, y + height))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def stored_images(out):
    """Size and mean brightness of the images of shards, with their captions."""
    from webdataset import WebDataset

    for sample in WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False):
        image = Image.open(io.BytesIO(sample["jpg" if "jpg" in sample else "png"])).convert("L")
        texts = [sample[name].decode() for name in sample if name.endswith("txt")]
        yield image.size, round(sum(image.tobytes()) / len(image.tobytes())), texts


BOX = (8, 16, 24, 20)


@pytest.mark.parametrize(
    ("box", "size"),
    [(BOX, (24, 20)), ((8.5, 16.5, 23, 19), (24, 20)), ((-5, -5, 10, 10), (5, 5)), ((60, 40, 99, 99), (4, 8))],
    ids=["inside", "fraction", "over the start", "over the end"],
)
def test_the_box_of_a_region_is_cut_out(tmp_path, box, size):
    regions = [
        {"id": 1, "regions": [region(1, "white", box), region(2, "the same", box), region(3, "none", (64, 0, 5, 5))]}
    ]
    write(tmp_path, {"1.jpg": split_image(BOX), "r.json": json.dumps(regions)})
    code, _, reasons = prepare_groups(tmp_path / "out", "visual_genome", tmp_path / "r.json", "--boxes")
    assert (code, reasons) == (0, {"box outside the image": 1})
    ((found, light, captions),) = stored_images(tmp_path / "out")
    assert (found, captions) == (size, ["white", "the same"])
    assert light == (255 if box[0] in (8, 8.5) else 0)


@pytest.mark.parametrize(
    "box", [None, [], [1, 2, 3], ["1", 2, 3, 4], [1, 2, 3, float("nan")], [1, 2, 3, True]], ids=str
)
def test_a_malformed_box_is_counted(tmp_path, box):
    elements = [{"caption": "x", "bb": box}, {"caption": "y", "bb": [0, 0, 32, 32]}]
    write(tmp_path, {"1.png": photo(1), "a.json": json.dumps([{"image": "1.png", "elems": elements}])})
    assert prepare_groups(tmp_path / "whole", "json", tmp_path / "a.json") == (0, {1: ["x", "y"]}, {})
    code, _, reasons = prepare_groups(tmp_path / "boxes", "json", tmp_path / "a.json", "--boxes")
    assert (code, reasons) == (0, {"malformed entry": 1})


# ------------------------------------------------------------------------------------------------- X-VLM


def test_elements_of_x_vlm_are_captions_of_the_image_or_of_their_boxes(tmp_path):
    elements = [
        {"caption": "square", "bb": list(BOX), "attributes": ["white", "small"]},
        {"caption": ["left", "dark"], "bb": [0, 0, 4, 4]},
    ]
    entries = [
        {"image": "1.png", "caption": ["whole"], "elems": elements},
        {"image": "1.png", "elems": []},
        {"image": "2.png", "caption": "plain"},
    ]
    write(tmp_path, {"1.png": split_image(BOX), "2.png": photo(2), "a.json": json.dumps(entries)})
    assert report(tmp_path / "whole", "json", tmp_path / "a.json")["skipped"]["no caption"]["count"] == 1
    assert [found[2] for found in stored_images(tmp_path / "whole")] == [
        ["whole", "white square", "small square", "left", "dark"],
        ["plain"],
    ]
    report(tmp_path / "boxes", "json", tmp_path / "a.json", "--boxes")
    assert [(size, texts) for size, _, texts in stored_images(tmp_path / "boxes")] == [
        ((64, 48), ["whole"]),
        ((24, 20), ["white square", "small square"]),
        ((4, 4), ["left", "dark"]),
        ((32, 32), ["plain"]),
    ]


# ------------------------------------------------------------------------------------------------- lists of addresses

ADDRESSES = [f"http://static.flickr.com/2723/438505896{n}_b0f291553e.jpg" for n in range(4)]
CAPTIONS = ['15" screen, "wide', "caption 1", "Ünïcödé, two", "never downloaded"]


def parquet(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
    return path


def rows(*columns):
    return "".join("\t".join(row) + "\n" for row in zip(*columns, strict=True))


LISTS = {
    "sbu-captions-all.json": lambda: json.dumps({"image_urls": ADDRESSES, "captions": CAPTIONS, "user_ids": ["x"] * 4}),
    "sbu, captions first.json": lambda: json.dumps({"captions": CAPTIONS, "image_urls": ADDRESSES}),
    "Train_GCC-training.tsv": lambda: rows(CAPTIONS, ADDRESSES),
    "cc12m.tsv": lambda: rows(ADDRESSES, CAPTIONS),
    "cc3m with a header.tsv": lambda: rows(["caption", *CAPTIONS], ["url", *ADDRESSES]),
    "cc12m with a header.tsv": lambda: rows(["url", *ADDRESSES], ["caption", *CAPTIONS]),
    "cc3m.txt": lambda: rows(CAPTIONS, ADDRESSES),
    "labels of cc3m.tsv": lambda: rows(CAPTIONS, ADDRESSES, ["a,b"] * 4, [".5,.1"] * 4),
    "quoted.csv": lambda: "".join(
        f'"{c.replace(chr(34), 2 * chr(34))}",{a}\n' for c, a in zip(CAPTIONS, ADDRESSES, strict=True)
    ),
    "list.json": lambda: json.dumps([{"url": a, "caption": c} for a, c in zip(ADDRESSES, CAPTIONS, strict=True)]),
    "lines.jsonl": lambda: "".join(
        json.dumps({"URL": a, "TEXT": c}) + "\n" for a, c in zip(ADDRESSES, CAPTIONS, strict=True)
    ),
    "list.txt": lambda: json.dumps(
        [{"url": a, "caption": c} for a, c in zip(ADDRESSES, CAPTIONS, strict=True)], indent=1
    ),
    "laion400m.parquet": {"URL": ADDRESSES, "TEXT": CAPTIONS, "WIDTH": [1, 2, 3, 4]},
    "datacomp.parquet": {"uid": ["a", "b", "c", "d"], "url": ADDRESSES, "text": CAPTIONS},
}
LISTS |= {"lines.txt": LISTS["lines.jsonl"], "lines.csv": LISTS["lines.jsonl"]}


def download(folder, layout, numbers=(0, 1, 2)):
    """Output of img2dataset for a list, which keeps its own captions in another order than the list."""
    files = [
        (f"00000/0000000{number}.{suffix}", data)
        for number in reversed(numbers)
        for suffix, data in (
            ("png", photo(number)),
            ("txt", b"another caption"),
            ("json", json.dumps({"url": ADDRESSES[number], "status": "success"}).encode()),
        )
    ]
    if layout == "files":
        write(folder, dict(files))
        return
    pack(folder / "00000.tar", [(name.removeprefix("00000/"), data) for name, data in files])


@pytest.mark.parametrize("layout", ["files", "webdataset"])
@pytest.mark.parametrize("name", LISTS)
def test_addresses_find_the_images_that_were_downloaded(tmp_path, name, layout):
    download(tmp_path / "images", layout)
    content = LISTS[name]
    if isinstance(content, dict):
        parquet(tmp_path / name, content)
    else:
        write(tmp_path, {name: content()})
    out = tmp_path / "out"
    code, pairs, reasons = prepare(out, "urls", tmp_path / name, "--images", tmp_path / "images")
    assert (code, pairs, reasons) == (0, dict(enumerate(CAPTIONS[:3])), {"image not downloaded": 1})
    assert (out / "ids.txt").read_text().split() == ADDRESSES[:3]


def test_two_captions_of_an_address_share_its_image(tmp_path):
    download(tmp_path / "images", "webdataset")
    write(tmp_path, {"a.tsv": rows(["one", "two", "three"], [ADDRESSES[0], ADDRESSES[1], ADDRESSES[0]])})
    arguments = ("urls", tmp_path / "a.tsv", "--images", tmp_path / "images")
    assert prepare_groups(tmp_path / "out", *arguments) == (0, {0: ["one", "three"], 1: ["two"]}, {})


BAD_LISTS = {
    "unequal.json": (
        json.dumps({"image_urls": ADDRESSES, "captions": CAPTIONS[:2]}),
        "has 4 image_urls and 2 captions: there must be as many",
    ),
    "other.tsv": (rows(["x"], ["http://other.invalid/a.jpg"]), "none of its addresses is one of the 3 images of"),
    "only malformed.json": (
        '{"image_urls": ["http://h/a.jpg"], "captions": [5]}',
        "no usable address: malformed entry (as only malformed.json entry 0: caption (5) must be a string or a list",
    ),
    "only commas.csv": (
        "a dog, asleep,http://h/a.jpg\n",
        "has no usable address: more than 2 fields (quote captions with ',' in them) (as row 1)",
    ),
    "one column.tsv": (rows([ADDRESSES[0]]), "has one column: expected an address and a caption"),
    "captions.json": ('[{"image": "a.jpg", "caption": "x"}]', "images and captions: give it to `prepare.py json`"),
    "coco.json": ('{"images": [{}], "annotations": [{}]}', "is COCO annotations: give it to `prepare.py coco`"),
    "cut.json": ('{"image_urls": ["a"', "is not JSON: Expecting"),
    "no columns.tsv": ("a\tb\nc\td\n", "has no column 'url'; it has: a, b"),
    "damaged.parquet": (b"PAR1" + bytes(100), "cannot be read as Parquet: "),
    "empty.parquet": (b"", "cannot be read as Parquet: "),
    "page.parquet": (b"<html>", "cannot be read as Parquet: "),
    "no captions.tsv": ("url\tother\nx\ty\n", "it has: url, other (another name? --caption_column NAME)\n"),
    "empty.tsv": (b"", "is empty; expected a header row with the columns url, caption"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_list_without_usable_addresses_is_one_line(tmp_path, capsys, name):
    content, message = BAD_LISTS[name]
    download(tmp_path / "images", "webdataset")
    write(tmp_path, {name: content})
    assert prepare(tmp_path / "out", "urls", tmp_path / name, "--images", tmp_path / "images")[0] == 2
    assert message in one_line(capsys) + "\n"


def test_a_folder_without_addresses_is_one_line(tmp_path, capsys):
    write(tmp_path, {"images/0.png": photo(0), "images/0.txt": "x", "a.tsv": rows(CAPTIONS, ADDRESSES)})
    assert prepare(tmp_path / "out", "urls", tmp_path / "a.tsv", "--images", tmp_path / "images")[0] == 2
    assert "has no metadata (KEY.json) with the addresses of its images" in one_line(capsys)


# ------------------------------------------------------------------------------------------------- Parquet with images

EMBEDDED = {
    "datasets of Hugging Face": lambda n: {"image": {"bytes": photo(n), "path": f"{n}.png"}, "text": f"caption {n}"},
    "one path for all": lambda n: {"image": {"bytes": photo(n), "path": "image.png"}, "text": f"caption {n}"},
    "without paths": lambda n: {"image": {"bytes": photo(n), "path": None}, "caption": f"caption {n}"},
    "plain bytes": lambda n: {"image": photo(n), "TEXT": f"caption {n}"},
    "a list of captions": lambda n: {"image": photo(n), "caption": [f"caption {n}", f"more {n}"]},
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_images_inside_parquet_are_read(tmp_path, name):
    table = [EMBEDDED[name](n) for n in range(5)] + [EMBEDDED[name](5) | {"image": None}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=2)
    more = name == "a list of captions"
    expected = {n: [f"caption {n}", *([f"more {n}"] if more else [])] for n in range(5)}
    assert prepare_groups(tmp_path / "out", "table", path) == (0, expected, {"no image": 1})


def test_damage_inside_parquet_costs_its_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    table = [{"image": photo(n), "text": f"caption {n}"} for n in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=2)
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    data[start : start + place.total_compressed_size] = b"\xff" * place.total_compressed_size
    path.write_bytes(data)
    code, pairs, reasons = prepare(tmp_path / "out", "table", path)
    assert (code, pairs) == (0, {n: f"caption {n}" for n in (0, 1, 4, 5)})
    assert reasons == {"damaged row group (rows of it are lost)": 1}


def test_parquet_without_its_library_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path, {"a.parquet": b"PAR1"})
    for command in (("table",), ("urls", "--images", tmp_path)):
        assert prepare(tmp_path / "out", command[0], tmp_path / "a.parquet", *command[1:])[0] == 2
        assert "a.parquet is Parquet, which pyarrow reads: pip install 'eve_ds[parquet]'" in one_line(capsys)


def test_rows_of_one_image_inside_parquet_share_it(tmp_path):
    table = [{"image": photo(n), "caption": caption} for n, caption in ((1, "a"), (1, "b"), (2, "c"))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    assert prepare_groups(tmp_path / "out", "table", tmp_path / "a.parquet") == (0, {1: ["a", "b"], 2: ["c"]}, {})


def test_output_of_img2dataset_in_parquet_is_read(tmp_path):
    table = {
        "key": ["000000000", "000000001", "000000002"],
        "url": ADDRESSES[:3],
        "caption": CAPTIONS[:3],
        "status": ["success", "failed_to_download", "success"],
        "jpg": [photo(0), None, photo(2)],
    }
    parquet(tmp_path / "in" / "00000.parquet", table)
    write(tmp_path / "in", {"00000_stats.json": "{}"})
    code, pairs, reasons = prepare(tmp_path / "out", "img2dataset", tmp_path / "in")
    assert (code, pairs, reasons) == (0, {0: CAPTIONS[0], 2: CAPTIONS[2]}, {"no image": 1})
    assert (tmp_path / "out" / "ids.txt").read_text().split() == [ADDRESSES[0], ADDRESSES[2]]


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_tables_of_metadata_beside_images_are_not_opened(tmp_path, monkeypatch, layout):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path / "in", {"00000.parquet": b"PAR1"})
    download(tmp_path / "in", layout)
    assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in")[1] == dict.fromkeys(range(3), "another caption")


# ------------------------------------------------------------------------------------------------- Flickr8k, Flickr30K

NUMBERED = '0.png#0\tA dog .\n0.png#1\tA "red" dog , asleep .\n1.png#0\tA cat .\n'
FLICKR_FILES = {
    "Flickr8k.token.txt": NUMBERED,
    "results_20130124.token": NUMBERED,
    "with a mark.token": "\ufeff" + NUMBERED,
    "line ends of Windows.txt": NUMBERED.replace("\n", "\r\n"),
    "a tab in a caption.token": "0.png#2\tcut\there\n" + NUMBERED,
    "with a header.tsv": "image\tcaption\n" + NUMBERED,
    "numbers of another language.txt": NUMBERED.replace("#", "#zh#"),
}


@pytest.mark.parametrize("name", FLICKR_FILES)
def test_captions_with_numbers_are_read_without_a_header(tmp_path, name):
    write(tmp_path, {name: FLICKR_FILES[name], "0.png": photo(0), "1.png": photo(1)})
    expected = {0: ["A dog .", 'A "red" dog , asleep .'], 1: ["A cat ."]}
    code, groups, reasons = prepare_groups(tmp_path / "out", "table", tmp_path / name)
    assert (code, groups) == (0, expected)
    cut = {"more than 2 fields (quote captions with '\\t' in them)": 1}
    assert reasons == (cut if name == "a tab in a caption.token" else {})
    assert (tmp_path / "out" / "ids.txt").read_text().split() == ["0.png", "1.png"]


def test_lists_in_cells_and_the_split_of_flickr30k_on_the_hub(tmp_path):
    """flickr_annotations_30k.csv of nlphuji/flickr30k."""
    cell = '"[""A dog ."", ""A \\""red\\"" dog , asleep .""]"'
    rows = "".join(
        f'{cell},"[0, 1]",{split},{n}.png,{n}\n' for n, split in enumerate(["train", "test", "val", "train"])
    )
    write(tmp_path, {"a.csv": f"raw,sentids,split,filename,img_id\n{rows}", **{f"{n}.png": photo(n) for n in range(4)}})
    arguments = ("table", tmp_path / "a.csv", "--image_column", "filename", "--caption_column")
    captions = ["A dog .", 'A "red" dog , asleep .']
    expected = 0, {0: captions, 3: captions}, {}
    assert prepare_groups(tmp_path / "out", *arguments, "raw", "--where", "split=train") == expected


def test_results_of_flickr30k_with_padded_columns(tmp_path):
    rows = "".join(f"{n}.png| {k}| Caption {n}-{k} , long .\n" for n in range(2) for k in range(2))
    write(
        tmp_path, {"results.csv": f"image_name| comment_number| comment\n{rows}", "0.png": photo(0), "1.png": photo(1)}
    )
    arguments = ("--delimiter", "|", "--image_column", "image_name", "--caption_column", "comment")
    expected = {n: [f"Caption {n}-{k} , long ." for k in range(2)] for n in range(2)}
    assert prepare_groups(tmp_path / "out", "table", tmp_path / "results.csv", *arguments) == (0, expected, {})


# ------------------------------------------------------------------------------------------------- Hugging Face

METADATA = {
    "metadata.jsonl": lambda rows: "".join(json.dumps({"file_name": n, "text": c}) + "\n" for n, c in rows),
    "metadata.csv": lambda rows: "file_name,text\n" + "".join(f"{n},{c}\n" for n, c in rows),
    "metadata.parquet": lambda rows: {"file_name": [n for n, _ in rows], "text": [c for _, c in rows]},
}


def metadata_file(folder, name, rows, **columns):
    """Metadata of rows (image, caption); `columns` renames the columns."""
    content = METADATA[name](rows)
    if isinstance(content, dict):
        parquet(folder / name, {columns.get(key, key): value for key, value in content.items()})
        return
    for old, new in columns.items():
        content = content.replace(old, new)
    write(folder, {name: content})


def image_folder(folder, name, count=2, first=0, captions="text", image="file_name"):
    numbers = range(first, first + count)
    write(folder, {f"sub/{n}.png": photo(n) for n in numbers})
    metadata_file(folder, name, [(f"sub/{n}.png", f"caption {n}") for n in numbers], text=captions, file_name=image)


@pytest.mark.parametrize("captions", ["text", "caption", "additional_feature"])
@pytest.mark.parametrize("name", METADATA)
def test_an_image_folder_of_hugging_face_is_read(tmp_path, name, captions):
    image_folder(tmp_path / "in", name, captions=captions)
    options = ["--caption_column", captions] if captions == "additional_feature" else []
    code, pairs, reasons = prepare(tmp_path / "out", "imagefolder", tmp_path / "in", *options)
    assert (code, pairs, reasons) == (0, {0: "caption 0", 1: "caption 1"}, {})
    assert (tmp_path / "out" / "ids.txt").read_text().split() == ["sub/0.png", "sub/1.png"]


def test_one_of_several_columns_of_images_is_chosen(tmp_path, capsys):
    write(tmp_path / "in", {"0.png": photo(0), "1.png": photo(1), "metadata.csv": ""})
    write(tmp_path / "in", {"metadata.csv": "text,left_file_name,right_file_name\nx,0.png,1.png\n"})
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in")[0] == 2
    assert "has several columns of files (left_file_name, right_file_name): choose one with --ima" in one_line(capsys)
    options = ("--image_column", "right_file_name")
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in", *options)[1] == {1: "x"}


def test_each_folder_of_a_tree_has_its_own_metadata(tmp_path):
    for number, name in enumerate(METADATA):
        image_folder(tmp_path / "in" / f"split{number}", name, first=2 * number)
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in")[1] == {n: f"caption {n}" for n in range(6)}
    assert (tmp_path / "out" / "ids.txt").read_text().split()[0] == "split0/sub/0.png"


def test_an_image_folder_without_metadata_is_one_line(tmp_path, capsys):
    write(tmp_path, {"in/a.png": photo(0)})
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in")[0] == 2
    message = "holds no metadata.jsonl, metadata.csv or metadata.parquet, which give the captions of an image folder"
    assert one_line(capsys).endswith(message)
    write(tmp_path, {"in/data/train-00000.parquet": b"PAR1"})
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in")[0] == 2
    assert one_line(capsys).endswith(message + "; give its Parquet files to `prepare.py table`")


@pytest.mark.parametrize("name", METADATA)
def test_an_image_of_another_column_is_read(tmp_path, name):
    image_folder(tmp_path / "in", name, image="photo_file_name")
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in") == (0, {0: "caption 0", 1: "caption 1"}, {})


@pytest.mark.parametrize("names", list(itertools.combinations(METADATA, 2)))
@pytest.mark.parametrize("below", ["", "train"])
def test_two_metadata_files_of_a_folder_are_refused(tmp_path, capsys, names, below):
    for name in names:
        image_folder(tmp_path / "in" / below, name)
    assert prepare(tmp_path / "out", "imagefolder", tmp_path / "in")[0] == 2
    both = " and ".join(sorted(names))
    line = f"{tmp_path / 'in' / below} holds {both}, which both give captions of its images: remove all but one"
    assert one_line(capsys) == f"prepare: {line}"


@pytest.mark.parametrize(("above", "below"), list(itertools.product(METADATA, METADATA)))
def test_a_caption_that_two_levels_give_is_taken_once(tmp_path, above, below):
    image_folder(tmp_path / "in" / "train", below, count=3)
    rows = [("train/sub/0.png", "caption 0"), ("./train/sub/1.png", "another caption")]
    rows += [("train/sub/2.png", "caption 2")] * 2
    metadata_file(tmp_path / "in", above, rows)
    code, found, reasons = prepare_groups(tmp_path / "out", "imagefolder", tmp_path / "in")
    captions = {0: ["caption 0"], 1: ["another caption", "caption 1"], 2: ["caption 2", "caption 2"]}
    assert (code, found, reasons) == (0, captions, {"caption that two metadata files give": 2})


@pytest.mark.parametrize("name", ["laion400m.parquet", "datacomp.parquet", "cc3m with a header.tsv"])
def test_a_table_of_addresses_names_the_command_that_reads_it(tmp_path, capsys, name):
    content = LISTS[name]
    path = tmp_path / name
    path.write_text(content()) if callable(content) else parquet(path, content)
    assert prepare(tmp_path / "out", "table", path)[0] == 2
    assert "has no column 'image'; it has: " in (line := one_line(capsys))
    assert line.endswith("(a list of addresses? give it to `prepare.py urls`)")


# ------------------------------------------------------------------------------------------------- grouping

ROWS = [("a.png", "one"), ("b.png", "two"), ("a.png", "three"), ("a.png", "four")]


def source_of(folder, kind):
    write(folder, {"a.png": photo(0), "b.png": photo(1)})
    if kind == "table":
        write(folder, {"a.tsv": rows(["image", *(n for n, _ in ROWS)], ["caption", *(c for _, c in ROWS)])})
        return Table([folder / "a.tsv"], ImagePaths(folder))
    write(folder, {"a.json": json.dumps([{"image": n, "caption": c} for n, c in ROWS])})
    return CaptionJson([folder / "a.json"])


@pytest.mark.parametrize("kind", ["table", "json"])
def test_captions_are_grouped_wherever_they_stand_unless_the_file_is_large(tmp_path, monkeypatch, kind):
    found = list(source_of(tmp_path, kind))
    assert [(item.name, item.captions) for item in found] == [("a.png", ("one", "three", "four")), ("b.png", ("two",))]
    monkeypatch.setattr(limits, "GROUPED_BYTES", 10)
    found = list(source_of(tmp_path, kind))
    assert [item.captions for item in found] == [("one",), ("two",), ("three", "four")]


def test_an_image_with_more_captions_than_a_group_may_have_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GROUP_CAPTIONS", 2)
    assert [item.captions for item in source_of(tmp_path, "json")] == [("one", "three"), ("four",), ("two",)]


@pytest.mark.parametrize("ids", [(7, 8), (7, None)])
def test_entries_with_other_ids_are_not_grouped(tmp_path, ids):
    entries = [{"image": "a.png", "caption": f"{number}", "image_id": ids[number]} for number in range(2)]
    write(tmp_path, {"a.png": photo(0), "a.json": json.dumps(entries)})
    assert [item.image_id for item in CaptionJson([tmp_path / "a.json"])] == ["7", str(ids[1] or "a.png")]


def test_entries_that_are_counted_stay_single(tmp_path):
    entries = [
        {"image": "a.png", "caption": []},
        {"image": "a.png", "caption": "x"},
        {"image": "a.png", "caption": None},
    ]
    write(tmp_path, {"a.png": photo(0), "a.json": json.dumps(entries)})
    found = list(CaptionJson([tmp_path / "a.json"]))
    assert [type(item) for item in found] == [Skip, Candidate, Skip]


# ------------------------------------------------------------------------------------------------- test sets

EXCLUDED = {  # how a test set calls an image, and the training sets that hold it under another name
    "COCO's, by Karpathy": "COCO_val2014_000000000025",
    "COCO's, by number": "25",
    "COCO's of 2017": "000000000025",
    "COCO's, by its file": "COCO_val2014_000000000025.jpg",
    "Flickr30K's": "4385058961",
    "Flickr30K's, by its file": "4385058961.jpg",
}


def training_set(folder, kind):
    """Arguments for a set with two images, the second of which is one of the test set."""
    if kind == "coco":
        write(folder, {**coco_images(""), "a.json": coco(2017).replace("257_ab", "4385058961_ab")})
        return ("coco", folder / "a.json")
    if kind == "karpathy":
        images = [{"filename": f"{n}.jpg", "cocoid": n, "split": "train", "sentences": [{"raw": "x"}]} for n in (9, 25)]
        write(folder, {"9.jpg": photo(9), "25.jpg": photo(25), "a.json": json.dumps({"images": images})})
        return ("karpathy", folder / "a.json")
    if kind == "visual_genome":
        data = [{"image_id": 1, "coco_id": None, "flickr_id": None}]
        data += [{"image_id": 200, "coco_id": 25, "flickr_id": 4385058961}, {"image_id": 7}]
        write(folder, VG_IMAGES | {"r.json": json.dumps(REGIONS), "image_data.json": json.dumps(data)})
        return ("visual_genome", folder / "r.json")
    download(folder / "images", "webdataset")
    write(folder, {"a.tsv": rows(CAPTIONS, ADDRESSES)})
    return ("urls", folder / "a.tsv", "--images", folder / "images") if kind == "urls" else (kind, folder / "images")


COCO_NAMES = [name for name in EXCLUDED if name.startswith("COCO")]
HELD = {"coco": EXCLUDED, "visual_genome": EXCLUDED, "karpathy": COCO_NAMES}
FLICKR_NAMES = [name for name in EXCLUDED if name.startswith("Flickr")]
HELD |= {"urls": FLICKR_NAMES, "img2dataset": FLICKR_NAMES}  # of these, addresses alone are known


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HELD.items() for name in names])
def test_an_image_of_a_test_set_is_left_out_whatever_its_name(tmp_path, kind, name):
    write(tmp_path, {"a/ids.txt": "unknown\n", "b/ids.txt": f"{EXCLUDED[name]}\n"})
    arguments = training_set(tmp_path, kind)
    whole = report(tmp_path / "whole", *arguments)
    lists = ("--exclude-ids", tmp_path / "a" / "ids.txt", "--exclude_ids", tmp_path / "b" / "ids.txt")
    part = report(tmp_path / "part", *arguments, *lists)
    assert part["images"] == whole["images"] - 1
    assert part["excluded_ids"] == {"listed": 2, "matched": 1}


@pytest.mark.parametrize("text", ["{}", "[]", '[{"image_id": 1}]', "[7]", '{"coco_id": 1}'])
def test_a_file_without_the_names_in_coco_is_refused(tmp_path, capsys, text):
    write(tmp_path, {**VG_IMAGES, "r.json": json.dumps(REGIONS), "image_data.json": text})
    assert prepare(tmp_path / "out", "visual_genome", tmp_path / "r.json")[0] == 2
    assert 'image_data.json has no numbers of images in COCO and Flickr: expected [{"image_id", "co' in one_line(capsys)


def test_a_missing_list_of_the_names_in_coco_is_said(tmp_path, capsys):
    write(tmp_path, {**VG_IMAGES, "r.json": json.dumps(REGIONS), "ids.txt": "x\n"})
    report(tmp_path / "out", "visual_genome", tmp_path / "r.json", "--exclude_ids", tmp_path / "ids.txt")
    assert "without image_data.json (--image_data), images of COCO and Flickr30K are not recog" in one_line(capsys)


@pytest.mark.parametrize(
    ("address", "number"),
    [
        ("http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "4385058960"),
        ("http://farm5.staticflickr.com/4084/5150339149_6d9eb3af8a_z.jpg", "5150339149"),
        ("https://live.staticflickr.com/65535/48600090482_3fcc5b8bd1_b.jpg?zz=1", "48600090482"),
        ("http://farm4.static.flickr.com/3/4_a.jpg", "4"),
        ("https://www.flickr.com/photos/someone/4385058960/", None),
        ("http://other.com/2723/4385058960_b0f291553e.jpg", None),
        ("http://other.com/?u=http://static.flickr.com/2723/4385058960_b0f291553e.jpg", None),
        ("", None),
    ],
)
def test_addresses_of_flickr_hold_the_number_of_the_photograph(address, number):
    found = {name for name in image_names("x", address) if name.startswith("Flickr")}
    assert found == ({f"Flickr {number}"} if number else set())


@pytest.mark.parametrize("number", [None, "", "x", "1.5", "-1", "²"])
def test_what_is_no_number_has_no_name_in_coco(number):
    assert in_data_set("COCO", number) == ()


# ------------------------------------------------------------------------------------------------- the recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
SHARED = {"COCO": 25, "Flickr30K": 77, "NLVR2": "http://photos.invalid/nlvr2.jpg"}
"""Test images that are also in training sets."""


def recipe():
    """Commands of `prepare` in the recipe, as lists of words."""
    block = PAGE.read_text(encoding="utf-8").partition("## The paper's four million images")[2].split("```")[1]
    lines = block.replace("\\\n", " ").splitlines()
    excluded = " ".join(re.findall(r"--exclude_ids \S+\.txt", block)).split()
    for line in lines:
        program, _, words = line.partition("launcher/prepare.py ")
        if program == "python ":
            yield [word for name in words.split() for word in (excluded if name == "$exclude" else [name])]


def karpathy_set(folder, splits):
    images = [
        {"filename": f"{n}.jpg", "cocoid": n, "split": split, "sentences": [{"raw": f"{n}"}]}
        for n, split in splits.items()
    ]
    write(folder, {f"{image['filename']}": photo(image["cocoid"]) for image in images})
    return json.dumps({"images": images})


def sets_of_the_recipe(folder):
    """Each training set with one image of its own and one of each test set that it can hold."""
    flickr = f"http://static.flickr.com/1/{SHARED['Flickr30K']}_ab.jpg"
    lists = {name: [(f"http://{name}.invalid/a.jpg", 1), (flickr, 2), (SHARED["NLVR2"], 3)] for name in ("sbu", "cc3m")}
    for name, rows_ in lists.items():
        files = [
            (f"{n}.{s}", d) for u, n in rows_ for s, d in (("png", photo(n)), ("json", json.dumps({"url": u}).encode()))
        ]
        pack(folder / name / "00000.tar", files)
    sbu, cc3m = ([address for address, _ in lists[name]] for name in ("sbu", "cc3m"))
    regions = [{"id": n, "regions": [region(0, "x", image=n)]} for n in (1, 2, 3)]
    data = [{"image_id": 2, "coco_id": SHARED["COCO"]}, {"image_id": 3, "flickr_id": SHARED["Flickr30K"]}]
    files = {
        "dataset_coco.json": karpathy_set(folder / "coco", {1: "train", 2: "restval", SHARED["COCO"]: "test"}),
        "dataset_flickr30k.json": karpathy_set(folder / "flickr30k", {1: "train", SHARED["Flickr30K"]: "test"}),
        "nlvr2-test.txt": f"{SHARED['NLVR2']}\n",
        **{f"vg/{place}.jpg": photo(n) for n, place in ((1, "VG_100K/1"), (2, "VG_100K/2"), (3, "VG_100K_2/3"))},
        "region_descriptions.json": json.dumps(regions),
        "image_data.json": json.dumps(data),
        "sbu-captions-all.json": json.dumps({"image_urls": sbu, "captions": ["x", "y", "z"]}),
        "Train_GCC-training.tsv": rows(["x", "y", "z"], cc3m),
    }
    write(folder, files)


def test_the_recipe_of_the_paper_leaves_out_the_images_of_its_test_sets(tmp_path, monkeypatch):
    sets_of_the_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    counts = {}
    for words in recipe():
        assert main([*words, "--workers", "1"]) == 0
        out = Path(words[words.index("--out") + 1])
        counts[out.name] = json.loads((out / "report.json").read_text())
    images = {name: report["images"] for name, report in counts.items()}
    assert images == {"coco-test": 1, "flickr30k-test": 1, "coco": 2, "vg": 1, "sbu": 1, "cc3m": 1}
    left_out = {name: report["excluded_ids"]["matched"] for name, report in counts.items()}
    assert left_out == {"coco-test": 0, "flickr30k-test": 0, "coco": 0, "vg": 2, "sbu": 2, "cc3m": 2}
