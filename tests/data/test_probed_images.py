"""A folder without the images is refused at once; one that holds some of them is not, wherever these stand."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from photo_sets import one_line, photo, prepare_groups, write

from eve_ds.data.formats import images
from eve_ds.data.importers import annotations

ABSENT, CAPTIONS = 60, 5
"""Images that are absent at the start, and captions of each image."""
NAMES = [f"{number:03d}.png" for number in range(ABSENT + 20)]
ROWS = [(name, f"{name} {k}") for name in NAMES for k in range(CAPTIONS)]


def delimited(sign, header):
    return "".join(f"{sign.join(row)}\n" for row in [header, *ROWS])


def lines(image, caption):
    return "".join(json.dumps({image: name, caption: text}) + "\n" for name, text in ROWS)


def by_image(make):
    return [make(name, [text for other, text in ROWS if other == name]) for name in NAMES]


def coco():
    annotations = [{"image_id": NAMES.index(name), "caption": text} for name, text in ROWS]
    return {"images": [{"id": n, "file_name": name} for n, name in enumerate(NAMES)], "annotations": annotations}


def karpathy(name, texts):
    return {"filename": name, "split": "train", "sentences": [{"raw": text} for text in texts]}


def regions(name, texts):
    return {"id": int(name[:3]), "regions": [{"phrase": text} for text in texts]}


FILES = {  # command: {name of the file: content}
    "table": {
        "a.csv": delimited(",", ("image", "caption")),
        "a.tsv": delimited("\t", ("image", "caption")),
        "a.parquet": {"image": [name for name, _ in ROWS], "caption": [text for _, text in ROWS]},
    },
    "json": {
        "a.jsonl": lines("image", "caption"),
        "a.json": json.dumps(by_image(lambda name, texts: {"image": name, "caption": texts})),
    },
    "coco": {"a.json": json.dumps(coco())},
    "karpathy": {"a.json": json.dumps({"images": by_image(karpathy)})},
    "visual_genome": {"a.json": json.dumps(by_image(regions))},
    "imagefolder": {
        "metadata.csv": delimited(",", ("file_name", "text")),
        "metadata.jsonl": lines("file_name", "text"),
        "metadata.parquet": {"file_name": [name for name, _ in ROWS], "text": [text for _, text in ROWS]},
    },
}
CASES = [(command, name) for command, files in FILES.items() for name in files]


def annotate(folder, command, name):
    content = FILES[command][name]
    if isinstance(content, str):
        write(folder, {name: content})
    else:
        pyarrow.parquet.write_table(pyarrow.table(content), folder / name)
    return (command, folder if command == "imagefolder" else folder / name)


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_source_whose_first_images_are_absent_is_read(tmp_path, monkeypatch, command, name):
    monkeypatch.setattr(images, "PROBES_BEFORE_DOUBLING", 20)  # fewer than the absent ones
    suffix = "jpg" if command == "visual_genome" else "png"
    names = [f"{int(n[:3])}.jpg" for n in NAMES] if suffix == "jpg" else NAMES
    write(tmp_path, {names[number]: photo(number) for number in range(ABSENT, len(NAMES))})
    code, found, reasons = prepare_groups(tmp_path / "out", *annotate(tmp_path, command, name))
    assert code == 0
    assert found == {n: [f"{NAMES[n]} {k}" for k in range(CAPTIONS)] for n in range(ABSENT, len(NAMES))}
    assert reasons == {"missing file": ABSENT}


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_source_without_its_images_is_one_line(tmp_path, capsys, command, name):
    write(tmp_path, {"other.png": photo(0)})
    assert prepare_groups(tmp_path / "out", *annotate(tmp_path, command, name))[0] == 2
    line = one_line(capsys)
    assert "probed images exists (the first: " in line
    assert "set the folder of the images with --images, or remove the start of their paths with --strip_prefix" in line


def test_a_table_that_holds_its_images_is_not_read_to_look_for_them(tmp_path, monkeypatch):
    def counting(table):
        for record in read(table):
            taken.append(record)
            yield record

    taken, read = [], annotations.counted
    monkeypatch.setattr(annotations, "counted", counting)
    columns = {"image": [photo(n) for n in range(9)], "caption": [f"caption {n}" for n in range(9)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    source = annotations.Table([tmp_path / "a.parquet"])
    assert len(taken) == 1
    assert len(list(source)) == 9


# ------------------------------------------------------------------------------------------------- folders of COCO

NUMBERS = (9, 25)
PLACES = {
    "2014": "val2014/COCO_val2014_{:012d}.jpg",
    "2014 in the other subset": "train2014/COCO_train2014_{:012d}.jpg",
    "2017": "train2017/{:012d}.jpg",
    "2017 in the other subset": "val2017/{:012d}.jpg",
    "2014 in one folder": "COCO_val2014_{:012d}.jpg",
    "2017 in one folder": "{:012d}.jpg",
}


def coco_annotations(command, file_name):
    texts = {number: f"caption {number}" for number in NUMBERS}
    if command == "karpathy":
        folder, _, name = file_name.rpartition("/")
        images = [{"filepath": folder, **karpathy(name.format(n), [texts[n]]), "cocoid": n} for n in NUMBERS]
        return json.dumps({"images": images})
    if command == "coco":
        images = [{"id": n, "file_name": file_name.rpartition("/")[2].format(n)} for n in NUMBERS]
        return json.dumps({"images": images, "annotations": [{"image_id": n, "caption": texts[n]} for n in NUMBERS]})
    if command == "json":
        return json.dumps([{"image": file_name.format(n), "caption": texts[n]} for n in NUMBERS])
    return "image,caption\n" + "".join(f"{file_name.format(n)},{texts[n]}\n" for n in NUMBERS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("named", ["2014", "2017"])
@pytest.mark.parametrize("command", ["karpathy", "coco", "json", "table"])
def test_images_of_coco_are_found_in_the_folders_of_both_years(tmp_path, command, named, place):
    name = "a.csv" if command == "table" else "a.json"
    write(tmp_path, {name: coco_annotations(command, PLACES[named])})
    write(tmp_path / "coco", {PLACES[place].format(number): photo(number) for number in NUMBERS})
    found = prepare_groups(tmp_path / "out", command, tmp_path / name, "--images", tmp_path / "coco")
    assert found == (0, {number: [f"caption {number}"] for number in NUMBERS}, {})


def test_the_published_place_comes_first(tmp_path):
    write(tmp_path, {"a.json": coco_annotations("json", PLACES["2014"])})
    write(tmp_path, {PLACES["2014"].format(number): photo(number) for number in NUMBERS})
    write(tmp_path, {PLACES[place].format(n): photo(99) for place in [*PLACES][1:] for n in NUMBERS})
    assert prepare_groups(tmp_path / "out", "json", tmp_path / "a.json")[1] == {n: [f"caption {n}"] for n in NUMBERS}


def test_folders_that_may_hold_images_of_coco_are_named(tmp_path, capsys):
    write(tmp_path, {"a.json": coco_annotations("karpathy", PLACES["2014"])})
    assert prepare_groups(tmp_path / "out", "karpathy", tmp_path / "a.json")[0] == 2
    line = one_line(capsys)
    assert f"none of 2 probed images exists (the first: {tmp_path}/val2014/COCO_val2014_000000000009.jpg)" in line
    assert "; the folder may also hold it as train2014/COCO_train2014_000000000009.jpg, train2017/" in line
    assert line.endswith("COCO_val2014_000000000009.jpg, 000000000009.jpg")


@pytest.mark.parametrize("name", ["a/{:012d}.jpg", "{:011d}.jpg", "COCO_test2014_{:012d}.jpg", "{:012d}.png"])
def test_other_names_have_no_other_place(tmp_path, capsys, name):
    write(tmp_path, {"a.json": coco_annotations("json", name)})
    write(tmp_path, {PLACES[place].format(number): photo(number) for place in PLACES for number in NUMBERS})
    assert prepare_groups(tmp_path / "out", "json", tmp_path / "a.json")[0] == 2
    assert one_line(capsys).endswith("--strip_prefix")
