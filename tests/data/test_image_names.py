"""Names of one photograph in every source and every kind of list, and the spellings of its path."""

import json
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from photo_sets import pack, photo, prepare_groups, write

from eve_ds import limits
from eve_ds.cli.prepare import main
from eve_ds.data.formats.image_ids import id_line, image_names, listed_names
from eve_ds.data.formats.spelling import normal_path, whole_number
from eve_ds.data.formats.tables import Columns
from eve_ds.data.importers import (
    Addresses,
    Candidate,
    CaptionJson,
    Coco,
    ImagePaths,
    Img2dataset,
    Karpathy,
    MetadataFolder,
    SourceError,
    Table,
    VisualGenome,
)
from eve_ds.data.writing.excluded_ids import read_ids

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

# ------------------------------------------------------------------------------------- one photograph, many names

COCO, FLICKR, VG = 391895, 4385058961, 2409818
LINES = {  # data set: lines by which a list calls the photograph
    "COCO": [
        f"COCO_val2014_{COCO:012d}",
        f"COCO_train2014_{COCO:012d}.jpg",
        f"{COCO:012d}",
        f"{COCO:012d}.png",
        f"{COCO}",
        f"{COCO}.0",
        f"COCO_{COCO}",
        f"val2014/COCO_val2014_{COCO:012d}.jpg",
        f"./images/../val2014/COCO_val2014_{COCO:012d}.jpg",
        f"D:\\coco\\train2017\\{COCO:012d}.jpg",
        f"/data/coco/train2017/{COCO:012d}.jpg",
        f"17\tval2014/COCO_val2014_{COCO:012d}.jpg",
        f"anything\tCOCO_{COCO}",
        f"http://images.cocodataset.org/train2017/{COCO:012d}.jpg",
        f"https://host/a/COCO_val2014_{COCO:012d}.jpg?size=1",
    ],
    "Flickr": [
        f"{FLICKR}",
        f"{FLICKR}.jpg",
        f"Flickr_{FLICKR}",
        f"flickr30k-images/{FLICKR}.jpg",
        f"/data/flickr30k/{FLICKR}.png",
        f"9\tflickr30k-images/{FLICKR}.jpg",
        f"{FLICKR}_b0f291553e.jpg",
        f"http://static.flickr.com/2723/{FLICKR}_b0f291553e.jpg",
        f"https://live.staticflickr.com/65535/{FLICKR}_3fcc5b8bd1_b.jpg?zz=1",
    ],
    "VG": [
        f"VG_{VG}",
        f"VG_100K/{VG}.jpg",
        f"VG_100K_2/{VG}.jpg",
        f"/data/vg/VG_100K/{VG}.jpg",
        f"https://cs.stanford.edu/people/rak248/VG_100K_2/{VG}.jpg",
    ],
    "none": [  # near misses
        *(f"COCO_val2014_{COCO + 1:012d}", f"COCO_val2014_{COCO}0.jpg", f"{COCO}0", f"{COCO // 10}", f"COCO_{FLICKR}"),
        *(f"Flickr_{COCO}", f"VG_{COCO}", f"VG_100K/{COCO}.jpg", f"COCO_{VG}", f"Flickr_{VG}", f"{FLICKR // 10}.jpg"),
        *(f"http://host/{FLICKR}.jpg", f"http://host/{COCO}.jpg", "0.jpg", "val2014", "jpg", "image.png", "9", "17"),
        *(f"{COCO}\tother.jpg", f"{VG}\tother.jpg", f"9\t{VG}.png", "COCO_val2014_", "VG_100K/", "/", "."),
    ],
}


def table(folder, image, name="a.csv"):
    write(folder, {name: f"image,caption\n{image},x\n" if name.endswith("csv") else f"image\tcaption\n{image}\tx\n"})
    return Table([folder / name], ImagePaths(folder))


def table_with_ids(folder, image):
    write(folder, {"a.csv": f"image,caption,id\n{image},x,id of {Path(image).stem}\n"})
    return Table([folder / "a.csv"], ImagePaths(folder), Columns(image_id="id"))


def parquet_table(folder, image, embedded=False):
    value = {"bytes": photo(1), "path": image} if embedded else image
    parquet.write_table(pyarrow.table({"image": [value], "caption": ["x"]}), folder / "a.parquet")
    return Table([folder / "a.parquet"], ImagePaths(folder))


def caption_json(folder, image, image_id="{}"):
    entry = {"image": image, "caption": "x", "image_id": image_id.format(image)}
    write(folder, {"a.json": json.dumps([entry])})
    return CaptionJson([folder / "a.json"])


def absolute_json(folder, image):
    write(folder, {"a.json": json.dumps([{"image": f"/old/machine/{image}", "caption": "x"}])})
    return CaptionJson([folder / "a.json"], ImagePaths(folder, strip_prefix="/old/machine"))


def image_folder(folder, image, name="metadata.csv"):
    jsonl = json.dumps({"file_name": image, "text": "x"}) + "\n"
    write(folder, {name: jsonl if name.endswith("jsonl") else f"file_name,text\n{image},x\n"})
    return MetadataFolder(folder)


def karpathy(folder, image, **more):
    place = {"filename": Path(image).name, "filepath": str(Path(image).parent)}
    images = [{**place, "split": "train", "sentences": [{"raw": "x"}], **more}]
    write(folder, {"a.json": json.dumps({"images": images})})
    return Karpathy(folder / "a.json")


def coco(folder, image, **more):
    entry = {"id": COCO, "file_name": Path(image).name, **more}
    write(folder, {"a.json": json.dumps({"images": [entry], "annotations": [{"image_id": COCO, "caption": "x"}]})})
    return Coco([folder / "a.json"], ImagePaths((folder / image).parent))


def visual_genome(folder, image, **more):
    regions = [{"id": VG, "regions": [{"image_id": VG, "phrase": "x", "x": 0, "y": 0, "width": 9, "height": 9}]}]
    write(
        folder,
        {"r.json": json.dumps(regions), "image_data.json": json.dumps([{"image_id": VG, "coco_id": None} | more])},
    )
    return VisualGenome(folder / "r.json")


def downloaded(folder, address, layout="tar", id_field=None):
    metadata = {"url": address, "key": "000000007", "caption": "x"}
    if layout == "parquet":
        columns = {name: [value] for name, value in metadata.items()}
        parquet.write_table(pyarrow.table({"jpg": [photo(1)], **columns}), folder / "00000.parquet")
    else:
        files = {"0.png": photo(1), "0.txt": b"x", "0.json": json.dumps(metadata).encode()}
        write(folder, files) if layout == "files" else pack(folder / "0.tar", files.items())
    return Img2dataset(folder, id_field)


def address_list(folder, address):
    downloaded(folder / "images", address)
    write(folder, {"a.tsv": f"caption\turl\nx\t{address}\n"})
    return Addresses([folder / "a.tsv"], folder / "images")


PATHS = {
    "csv": table,
    "tsv": partial(table, name="a.tsv"),
    "csv with ids": table_with_ids,
    "Parquet": parquet_table,
    "Parquet with images": partial(parquet_table, embedded=True),
    "json": caption_json,
    "json with numbers": partial(caption_json, image_id="17000"),
    "json with ids": partial(caption_json, image_id="id of {}"),
    "json of another machine": absolute_json,
    "imagefolder": image_folder,
    "imagefolder of lines": partial(image_folder, name="metadata.jsonl"),
}
ADDRESSES = {
    "urls": address_list,
    **{f"img2dataset, {layout}": partial(downloaded, layout=layout) for layout in ("tar", "files", "parquet")},
    **{
        f"img2dataset by key, {layout}": partial(downloaded, layout=layout, id_field="key")
        for layout in ("tar", "files", "parquet")
    },
}
COCO_2014, COCO_2017 = f"val2014/COCO_val2014_{COCO:012d}.jpg", f"train2017/{COCO:012d}.jpg"
FLICKR_PHOTO = f"http://farm4.staticflickr.com/27/{FLICKR}_b0f291553e.jpg"
PLACES = {  # data set: paths and addresses of the photograph
    "COCO": ([COCO_2014, COCO_2017, Path(COCO_2017).name], [f"http://images.cocodataset.org/{COCO_2017}"]),
    "Flickr": ([f"flickr30k-images/{FLICKR}.jpg", f"{FLICKR}.jpg"], [FLICKR_PHOTO]),
    "VG": ([f"vg/VG_100K/{VG}.jpg"], [f"https://cs.stanford.edu/people/rak248/VG_100K_2/{VG}.jpg"]),
}
SOURCES = {  # name: function of a folder that makes the source, path or address, data sets by whose names it is known
    **{
        f"{kind}: {image}": (make, image, {data_set})
        for data_set, places in PLACES.items()
        for makers, images in zip((PATHS, ADDRESSES), places, strict=True)
        for kind, make in makers.items()
        for image in images
    },
    "karpathy, COCO": (partial(karpathy, cocoid=COCO), COCO_2014, {"COCO"}),
    "karpathy, other names": (partial(karpathy, cocoid=COCO), "coco/a.jpg", {"COCO"}),
    "karpathy, Flickr30K": (karpathy, f"{FLICKR}.jpg", {"Flickr"}),
    "coco, other names": (partial(coco, coco_url=f"http://mscoco.org/images/{COCO_2017}"), "train2017/a.jpg", {"COCO"}),
    "coco 2014": (coco, COCO_2014.replace("val", "train"), {"COCO"}),
    "coco 2017": (partial(coco, flickr_url=FLICKR_PHOTO), COCO_2017, {"COCO", "Flickr"}),
    "visual_genome": (visual_genome, f"VG_100K/{VG}.jpg", {"VG"}),
    "visual_genome, second folder": (visual_genome, f"VG_100K_2/{VG}.jpg", {"VG"}),
    "visual_genome, one folder": (visual_genome, f"{VG}.jpg", {"VG"}),
    "visual_genome of COCO": (partial(visual_genome, coco_id=COCO), f"VG_100K/{VG}.jpg", {"VG", "COCO"}),
    "visual_genome of both": (
        partial(visual_genome, coco_id=COCO, flickr_id=FLICKR),
        f"VG_100K/{VG}.jpg",
        {"VG", "COCO", "Flickr"},
    ),
}


def candidate(folder, make, image):
    folder.mkdir(parents=True)
    if "://" not in image:
        write(folder, {image: photo(1)})
    (found,) = make(folder, image)
    return found.resolve()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Name of each source -> its image."""
    root = tmp_path_factory.mktemp("sources")
    return {name: candidate(root / str(at), *SOURCES[name][:2]) for at, name in enumerate(SOURCES)}


@pytest.mark.parametrize("name", SOURCES)
def test_every_line_of_a_data_set_means_its_image_in_every_source_and_no_other_line_does(images, name, tmp_path):
    lines = [line for lines in LINES.values() for line in lines]
    (tmp_path / "ids.txt").write_text("\n".join(lines), encoding="utf-8")
    expected = {line for data_set in SOURCES[name][2] for line in LINES[data_set]}
    assert read_ids((str(tmp_path / "ids.txt"),)).matching(images[name].names()) == expected


@pytest.mark.parametrize("name", SOURCES)
def test_the_ids_of_every_source_leave_the_image_out_of_every_other(images, name):
    listed = listed_names(images[name].id_line())
    found = {other for other in SOURCES if listed & images[other].names()}
    assert found == {other for other in SOURCES if SOURCES[other][2] & SOURCES[name][2]}


# ------------------------------------------------------------------------------------------------- other images

OTHERS = {  # arguments of `image_names` and `id_line`: different images with numbers and names in common
    "COCO's 9": ("COCO_val2014_000000000009", "val2014/COCO_val2014_000000000009.jpg", ("COCO_9",)),
    "Visual Genome's 9": ("VG_100K/9.jpg", "VG_100K/9.jpg"),
    "Flickr's 9": ("flickr30k/9.jpg", "flickr30k/9.jpg"),
    "entry 9 of COCO": ("9", "val2014/COCO_val2014_000000000017.jpg", (), True),
    "entry 9 of Flickr30K": ("9", "flickr30k-images/1007129816.jpg", (), True),
    "key 9 of img2dataset": ("9", "http://host/a.jpg", (), True),
    "id 9 of a table": ("9", "photos/a.jpg"),
    "id that is a stem elsewhere": ("dog", "photos/b.jpg"),
    "file of that stem": ("animals/dog.jpg", "animals/dog.jpg"),
    "product of a shop": ("http://shop/012345678901.jpg", "http://shop/012345678901.jpg"),
    "product of another": ("http://other/012345678901.jpg", "http://other/012345678901.jpg"),
    "a short number in a folder": ("a/1234567.jpg", "a/1234567.jpg"),
    "the same in another folder": ("b/1234567.jpg", "b/1234567.jpg"),
    "file 9 of a folder": ("photos/9.jpg", "photos/9.jpg"),
    "file 9 of another folder": ("images/9.jpg", "images/9.jpg"),
    "PNG 9": ("photos/9.png", "photos/9.png"),
    "address of a 9": ("http://host/9.jpg", "http://host/9.jpg"),
    "the same at another host": ("http://other/9.jpg", "http://other/9.jpg"),
    "row 9 of Parquet": ("data/a.parquet/9", None),
    "sample 9 of img2dataset": ("00000.tar/000000009", None),
    "counter 9 of a split": ("train/000000009.jpg", "train/000000009.jpg"),
    "counter 9 of another split": ("test/000000009.jpg", "test/000000009.jpg"),
}


MEANT_BY_9 = {name for name in OTHERS if name.startswith(("COCO", "Flickr", "entry", "key", "id 9", "file 9", "PNG"))}
"""What a number can mean that stands alone; not Visual Genome's file 9, as lists of COCO's numbers are common."""


@pytest.mark.parametrize("name", OTHERS)
def test_the_line_of_an_image_means_no_other_image(name):
    listed = listed_names(id_line(*OTHERS[name]))
    assert [other for other, image in OTHERS.items() if listed & image_names(*image)] == [name]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("9", MEANT_BY_9),
        ("COCO_9", {"COCO's 9"}),
        ("VG_9", {"Visual Genome's 9"}),
        ("Flickr_9", {"Flickr's 9"}),
        ("photos/9", {"file 9 of a folder", "PNG 9"}),
        ("9.png", {"PNG 9", "Flickr's 9"}),
        ("/home/photos/9.jpg", {"file 9 of a folder"}),
        ("HTTPS://HOST/9.jpg#top", {"address of a 9"}),
        ("000000009", {"counter 9 of a split", "counter 9 of another split"}),
    ],
)
def test_a_line_means_all_that_its_form_allows(line, meant):
    assert {name for name, image in OTHERS.items() if listed_names(line) & image_names(*image)} == meant


def test_the_ids_of_another_data_set_in_the_form_of_coco_are_no_numbers_of_coco(tmp_path):
    image = candidate(tmp_path / "a", coco, "train2017/a.jpg")
    assert not listed_names(f"{COCO}") & image.names()
    assert image.id_line() == "a"


def test_the_number_of_visual_genome_is_no_file_elsewhere():
    flat = image_names("9.jpg", "9.jpg")
    assert not listed_names("VG_100K/9.jpg") & flat
    assert listed_names("photos/9.jpg") & flat


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (
            ("COCO_val2014_000000000009", "val2014/COCO_val2014_000000000009.jpg", ("COCO_9",)),
            "COCO_val2014_000000000009",
        ),
        (("000000000009", "000000000009.jpg", ("COCO_9", FLICKR_PHOTO)), f"000000000009\tFlickr_{FLICKR}"),
        (("36979", "36979.jpg"), "36979\t36979.jpg"),
        (("9", "a/1.jpg", (), True), "a/1.jpg"),
        (("9", "a/1.jpg"), "9\ta/1.jpg"),
        (("x y", "a/1  2.jpg"), "x y\ta/1 2.jpg"),
        (("a.jpg", "a.jpg"), "a.jpg"),
        (("a/7", None), "a/7"),
        (("VG_100K/9.jpg", "VG_100K/9.jpg", ("COCO_7", "Flickr_8")), "VG_100K/9.jpg\tCOCO_7\tFlickr_8"),
    ],
)
def test_a_line_of_ids_holds_what_names_the_image_and_nothing_twice(image, line):
    assert id_line(*image) == line


# ------------------------------------------------------------------------------------------- spellings of a path

SPELLINGS = ["a/1.jpg", "./a/1.jpg", "a//1.jpg", "a/./1.jpg", "b/../a/1.jpg", "a\\1.jpg", ".\\a\\b\\..\\1.jpg"]


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        *((path, "a/1.jpg") for path in SPELLINGS),
        *(
            ("/a/../b/1.jpg", "/b/1.jpg"),
            ("../1.jpg", "../1.jpg"),
            ("a/../../1.jpg", "../1.jpg"),
            ("a/", "a"),
            (".", "."),
        ),
        *(("C:\\a\\1.jpg", "C:/a/1.jpg"), ("http://host//a/../1.jpg", "http://host//a/../1.jpg"), ("", ".")),
    ],
)
def test_a_path_has_one_spelling(path, normal):
    assert normal_path(path) == normal


def test_paths_of_any_depth_are_compared():
    deep = "x/" * 3000 + "1.jpg"
    image = image_names(deep, deep)
    assert all(listed_names(line) & image for line in (deep, f"./{deep}", "x/1.jpg", "1"))
    assert len(image) < 200


def several(folder, kind, paths):
    """Source of one image whose captions stand under several spellings of its path."""
    entries = [{"image": path, "file_name": path, "caption": f"{at}"} for at, path in enumerate(paths)]
    if kind == "json":
        write(folder, {"a.json": json.dumps(entries)})
        return CaptionJson([folder / "a.json"])
    if kind == "jsonl":
        write(folder, {"metadata.jsonl": "".join(json.dumps(entry) + "\n" for entry in entries)})
        return MetadataFolder(folder)
    if kind == "Parquet":
        columns = {key: [entry[key] for entry in entries] for key in ("image", "caption")}
        parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
        return Table([folder / "a.parquet"])
    write(folder, {"a.csv": "image,caption\n" + "".join(f"{entry['image']},{entry['caption']}\n" for entry in entries)})
    return Table([folder / "a.csv"])


@pytest.mark.parametrize("memory", [limits.GROUPED_BYTES, 10])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "Parquet"])
def test_captions_under_all_spellings_of_a_path_are_those_of_one_image(tmp_path, monkeypatch, kind, memory):
    monkeypatch.setattr(limits, "GROUPED_BYTES", memory)
    write(tmp_path, {"a/1.jpg": photo(1)})
    paths = [*SPELLINGS, str(tmp_path / "a" / "1.jpg")]
    (image,) = several(tmp_path, kind, paths)
    assert (image.name, image.image_id, image.id_line()) == ("a/1.jpg",) * 3
    assert image.captions == tuple(str(at) for at in range(len(paths)))
    assert image.image.read() == photo(1)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "Parquet"])
def test_captions_under_both_forms_of_an_accent_are_those_of_one_image(tmp_path, kind, stored):
    forms = [unicodedata.normalize(form, "\u00e9/1.jpg") for form in ("NFC", "NFD", "NFC")]
    write(tmp_path, {unicodedata.normalize(stored, forms[0]): photo(1)})
    (image,) = several(tmp_path, kind, forms)
    assert (image.image_id, image.captions, image.image.read()) == (forms[0], ("0", "1", "2"), photo(1))
    assert all(listed_names(id_line(form, form)) & image.names() for form in forms)


@pytest.mark.parametrize("memory", [limits.GROUPED_BYTES, 10])
@pytest.mark.parametrize("kind", ["json", "csv", "Parquet"])
def test_captions_that_stand_apart_are_grouped_in_small_files_of_every_kind(tmp_path, monkeypatch, kind, memory):
    monkeypatch.setattr(limits, "GROUPED_BYTES", memory)
    write(tmp_path, {"1.jpg": photo(1), "2.jpg": photo(2)})
    found = [image.captions for image in several(tmp_path, kind, ["1.jpg", "2.jpg", "1.jpg"])]
    assert found == ([("0", "2"), ("1",)] if memory > 10 else [("0",), ("1",), ("2",)])


# -------------------------------------------------------------------------------------------------- ids of tables


@pytest.mark.parametrize(
    ("text", "number"),
    [*(("9.0", "9"), ("9.00", "9"), ("-3.0", "-3"), ("9", "9"), ("9.5", "9.5"), ("a.0", "a.0"), ("1.0.0", "1.0.0"))],
)
def test_a_whole_number_has_one_spelling(text, number):
    assert whole_number(text) == number


def test_ids_that_pandas_wrote_beside_a_missing_one_are_whole_numbers(tmp_path):
    write(tmp_path, {"1.jpg": photo(1), "2.jpg": photo(2)})
    write(tmp_path, {"a.csv": "image,caption,id\n1.jpg,a,8\n1.jpg,b,8.0\n1.jpg,c, 8 \n2.jpg,d,\n"})
    first, second = Table([tmp_path / "a.csv"], columns=Columns(image_id="id"))
    assert (first.image_id, first.captions, second.image_id) == ("8", ("a", "b", "c"), "2.jpg")
    assert all(listed_names(line) & first.names() for line in ("8", "8.0"))


# ------------------------------------------------------------------------------------- images inside of Parquet


def embedded(folder, names):
    """Table of one image for each name; equal numbers are equal images."""
    values = [{"bytes": photo(number), "path": name} for name, number in names]
    columns = {"image": values, "caption": [f"{at}" for at in range(len(names))]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def test_a_name_that_different_images_of_a_table_have_names_none_of_them(tmp_path, capsys):
    names = [("image.png", 1), ("image.png", 2), ("b.png", 3), ("b.png", 3), ("image.png", 4), (None, 5)]
    code, found, _ = prepare_groups(tmp_path / "out", "table", embedded(tmp_path, names))
    assert (code, found) == (0, {1: ["0"], 2: ["1"], 3: ["2", "3"], 4: ["4"], 5: ["5"]})
    assert "6 samples of 5 images" in capsys.readouterr().out
    rows = [f"{tmp_path.name}/a.parquet/{number}" for number in (1, 2, 5, 6)]
    assert (tmp_path / "out" / "ids.txt").read_text().split() == [*rows[:2], "b.png", *rows[2:]]
    images = [item.names() for item in Table([tmp_path / "a.parquet"])]
    assert [sum(bool(names & listed_names(line)) for names in images) for line in ("1", "image.png", rows[0])] == [
        0,
        0,
        1,
    ]


def test_a_column_of_paths_and_nulls_is_no_column_of_images(tmp_path):
    write(tmp_path, {"1.jpg": photo(1)})
    parquet.write_table(
        pyarrow.table({"image": ["1.jpg", None, "1.jpg"], "caption": list("abc")}), tmp_path / "a.parquet"
    )
    found = [item.captions for item in Table([tmp_path / "a.parquet"]) if isinstance(item, Candidate)]
    assert found == [("a", "c")]


# ------------------------------------------------------------------------------------ fields of img2dataset's ids


@pytest.mark.parametrize("layout", ["tar", "files", "parquet"])
def test_a_field_of_ids_that_no_metadata_have_is_refused(tmp_path, layout):
    with pytest.raises(
        SourceError, match=r"has no column 'URL'|\(URL\) is no field of .*; name one of: url, key, caption$"
    ):
        downloaded(tmp_path, "http://host/1.jpg", layout, id_field="URL")


def test_without_a_chosen_field_the_names_of_samples_are_the_ids(tmp_path):
    write(tmp_path, {"0.png": photo(1), "0.txt": "x", "0.json": "{}"})
    assert [sample.resolve().image_id for sample in Img2dataset(tmp_path)] == ["0"]
    with pytest.raises(
        SourceError, match=r"--id_field \(url\) is no field of .* first images; they have no fields: leave it out$"
    ):
        Img2dataset(tmp_path, "url")


# ----------------------------------------------------------------------------------------------- boxes as images


def test_boxes_are_counted_as_the_images_that_they_become(tmp_path, capsys):
    sizes = [(0, 9), (3, 9), (10, 0), (10.5, 0), (4, -2), (900, 9)]
    boxes = [{"caption": f"{at}", "bb": [x, 1, width, 7]} for at, (x, width) in enumerate(sizes)]
    write(tmp_path, {"1.jpg": photo(1), "a.json": json.dumps([{"image": "1.jpg", "elems": boxes}])})
    assert main(["json", str(tmp_path / "a.json"), "--boxes", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "2 samples of 2 images" in text
    assert "skipped 3: empty box (as 1.jpg, 1.jpg, 1.jpg)" in text
    assert "skipped 1: box outside the image" in text
    assert (tmp_path / "out" / "ids.txt").read_text() == "1.jpg\n"
