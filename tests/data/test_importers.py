"""Importers: small data sets in each published format, and the real NLVR corpus if EVE_DS_TEST_DATA names it."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from eve_ds.data.formats.tables import Columns
from eve_ds.data.importers import (
    BadSample,
    Candidate,
    CaptionJson,
    GeneratedScenes,
    ImagePaths,
    Img2dataset,
    Karpathy,
    Nlvr,
    Skip,
    SourceError,
    Table,
)

TEST_DATA = os.environ.get("EVE_DS_TEST_DATA")
needs_corpus = pytest.mark.skipif(not TEST_DATA, reason="EVE_DS_TEST_DATA names no folder with the NLVR corpus")


def image_bytes(color=(200, 30, 30), size=(12, 8), image_format="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, image_format)
    return file.getvalue()


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes())


def write_json(path, tree):
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def split(items):
    items = list(items)
    return [item for item in items if not isinstance(item, Skip)], [item for item in items if isinstance(item, Skip)]


# ------------------------------------------------------------------------------------------------- Karpathy


def karpathy_tree():
    def entry(number, name):
        return {
            "filepath": "val2014",
            "filename": f"COCO_{number}.jpg",
            "cocoid": number,
            "split": name,
            "sentences": [{"raw": f"first {number}"}, {"raw": f"second {number}"}],
        }

    return {"dataset": "coco", "images": [entry(1, "train"), entry(2, "test"), entry(3, "restval"), entry(4, "val")]}


def test_karpathy_imports_all_captions_of_the_selected_splits(tmp_path):
    write_images(tmp_path, *(f"val2014/COCO_{number}.jpg" for number in (1, 2, 3, 4)))
    path = write_json(tmp_path / "dataset_coco.json", karpathy_tree())
    train = list(Karpathy(path))
    assert [item.image_id for item in train] == ["COCO_1", "COCO_3"]
    assert train[0].captions == ("first 1", "second 1")
    assert train[0].image.read() == image_bytes()
    assert "COCO 1" in train[0].names(), "the COCO id is a name that excludes the image"
    assert [item.image_id for item in Karpathy(path, splits=["test"])] == ["COCO_2"]


def test_karpathy_without_filepath_reads_flickr30k(tmp_path):
    write_images(tmp_path, "flickr/36979.jpg")
    tree = {"images": [{"filename": "36979.jpg", "split": "train", "sentences": [{"raw": "a cat"}]}]}
    (item,) = Karpathy(write_json(tmp_path / "dataset_flickr30k.json", tree), ImagePaths(tmp_path / "flickr"))
    assert (item.name, item.image_id) == ("36979.jpg", "36979")


def test_karpathy_errors_name_the_expected_content(tmp_path):
    path = write_json(tmp_path / "a.json", karpathy_tree())
    with pytest.raises(
        SourceError, match=r"no image of split dev; it has: restval \(1\), test \(1\), train \(1\), val"
    ):
        Karpathy(path, splits=["dev"])
    with pytest.raises(SourceError, match=r"is not a Karpathy JSON: expected .*sentences.*found a list of a number"):
        Karpathy(write_json(tmp_path / "b.json", [1, 2]))
    with pytest.raises(
        SourceError, match=r"a\.json: none of 2 probed images exists .*COCO_1\.jpg\): set the folder of the images with"
    ):
        Karpathy(path)
    with pytest.raises(SourceError, match=r"annotation file .*nothing\.json does not exist"):
        Karpathy(tmp_path / "nothing.json")
    with pytest.raises(SourceError, match=r"image folder .*a\.json is not a folder"):
        Karpathy(path, ImagePaths(path))


def test_karpathy_counts_malformed_entries(tmp_path):
    write_images(tmp_path, "val2014/COCO_1.jpg")
    tree = karpathy_tree()
    tree["images"][2:] = [
        7,
        {"split": "train", "filename": "x.jpg"},
        {"split": "train", "filename": "y", "sentences": []},
    ]
    found, skipped = split(Karpathy(write_json(tmp_path / "a.json", tree)))
    assert [item.image_id for item in found] == ["COCO_1"]
    assert [item.reason for item in skipped] == ["malformed entry", "malformed entry", "no caption"]


# ------------------------------------------------------------------------------------------------- caption JSON


def test_caption_json_reads_one_or_several_captions_and_ids(tmp_path):
    write_images(tmp_path, "a.jpg", "deep/b.jpg")
    first = [{"image": "a.jpg", "caption": "one", "image_id": 17}, {"image": "deep/b.jpg", "caption": ["two", "three"]}]
    second = [{"image": "a.jpg", "caption": "four", "image_id": 17}, {"image": "a.jpg"}, "text"]
    paths = [write_json(tmp_path / "1.json", first), write_json(tmp_path / "2.json", second)]
    found, skipped = split(CaptionJson(paths))
    assert [(item.image_id, item.captions) for item in found] == [
        ("17", ("one", "four")),
        ("deep/b.jpg", ("two", "three")),
    ]
    assert {"tail b.jpg", "tail b"} <= found[1].names()
    assert skipped == [
        Skip("2.json entry 1: caption is missing", "malformed entry"),
        Skip("2.json entry 2: must be an object", "malformed entry"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"file": "a", "text": "b"}]', "found a list of an object with the keys file, text"),
        ("[]", "found an empty list"),
        ("3", "found a number"),
    ],
)
def test_caption_json_of_another_format_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=r"is not a caption JSON: expected \[\{\"image\": path.*" + message):
        CaptionJson([tmp_path / "a.json"])


def test_invalid_caption_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption"')
    with pytest.raises(SourceError, match=r"a\.json is not JSON: Expecting"):
        CaptionJson([tmp_path / "a.json"])


# ------------------------------------------------------------------------------------------------- table


def test_table_reads_quotes_byte_order_marks_and_named_columns(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbffile,text,key\na.jpg,"a dog, asleep",k1\n,nobody,k2\nb.jpg,\xff\xfe,k3\nb.jpg\n'
    )
    table = Table([tmp_path / "t.csv"], columns=Columns("file", "text", "key"))
    found, skipped = split(table)
    assert [(item.image_id, item.captions[0]) for item in found] == [("k1", "a dog, asleep"), ("k3", "\udcff\udcfe")]
    assert skipped == [
        Skip("row 2: file is empty", "malformed entry"),
        Skip("row 4: it ends before the column key", "malformed entry"),
    ]


def test_table_delimiter_depends_on_the_suffix(tmp_path):
    write_images(tmp_path, "a.jpg")
    (tmp_path / "t.tsv").write_text("image\tcaption\na.jpg\tone, two\n")
    (tmp_path / "t.csv").write_text("image;caption\na.jpg;one, two\n")
    assert [item.captions for item in Table([tmp_path / "t.tsv"])] == [("one, two",)]
    assert [item.captions for item in Table([tmp_path / "t.csv"], delimiter=";")] == [("one, two",)]


def test_table_without_the_columns_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("path,title\na.jpg,b\n")
    with pytest.raises(SourceError, match=r"t\.csv has no column 'image'; it has: path, title"):
        Table([tmp_path / "t.csv"])
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(SourceError, match=r"t\.csv is empty; expected a header row with the columns image, caption"):
        Table([tmp_path / "t.csv"])


# ------------------------------------------------------------------------------------------------- img2dataset


def sample_files(key, **changes):
    metadata = {"key": key, "url": f"http://images.invalid/{key}", "caption": "from metadata", "status": "success"}
    files = {"jpg": image_bytes(), "txt": f"caption {key}".encode(), "json": json.dumps(metadata).encode()}
    return {f"{key}.{suffix}": data for suffix, data in (files | changes).items() if data is not None}


def write_tar(path, files, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def resolve(items):
    for item in items:
        try:
            yield item if isinstance(item, Skip) else item.resolve()
        except BadSample as bad:
            yield Skip(item.name, str(bad))


def test_img2dataset_tars_and_files_give_the_same_samples(tmp_path):
    samples = {}
    samples |= sample_files("000000000") | sample_files("000000001", txt=None)
    samples |= sample_files("000000002", jpg=None) | sample_files("000000003", json=b"{", png=b"")
    samples |= sample_files("000000004", txt=None, json=b"{}") | sample_files("000000005", json=None)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "00000.tar", samples)
    (tmp_path / "tars" / "00000_stats.json").write_text("{}")
    (tmp_path / "files" / "00000").mkdir(parents=True)
    (tmp_path / "files" / "00000_stats.json").write_text("{}")
    for name, data in samples.items():
        (tmp_path / "files" / "00000" / name).write_bytes(data)
    expected = [
        ("http://images.invalid/000000000", (b"caption 000000000",)),
        ("http://images.invalid/000000001", ("from metadata",)),
        "no image",
        "unreadable metadata",
        "no caption",
        ("00000{}/000000005", (b"caption 000000005",)),
    ]
    for layout, suffix in (("tars", ".tar"), ("files", "")):
        found = list(resolve(Img2dataset(tmp_path / layout)))
        seen = [i.reason if isinstance(i, Skip) else (i.image_id, i.captions) for i in found]
        assert seen == [e if isinstance(e, str) else (e[0].format(suffix), e[1]) for e in expected]
        assert found[0].image.read() == image_bytes()
    by_key = next(resolve(Img2dataset(tmp_path / "tars", id_field="key")))
    assert by_key.image_id == "000000000"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_img2dataset_finds_member_offsets_in_every_tar_format(tmp_path, form):
    long_name = "x" * 120  # both formats need an extra header for it
    write_tar(tmp_path / "0.tar", sample_files(long_name) | sample_files("1"), form)
    assert [item.captions[0] for item in resolve(Img2dataset(tmp_path))] == [
        f"caption {long_name}".encode(),
        b"caption 1",
    ]


def test_img2dataset_counts_broken_tars_and_reads_the_next_one(tmp_path):
    write_tar(tmp_path / "0.tar", sample_files("0") | sample_files("1"))
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        offsets = [member.offset for member in tar]
    (tmp_path / "0.tar").write_bytes(whole[: offsets[5] + 520])  # ends inside the last member's data
    (tmp_path / "1.tar").write_bytes(whole[: offsets[3]] + b"\xff" * 512 + whole[offsets[3] + 512 :])
    (tmp_path / "2.tar").write_bytes(b"no tar at all")
    write_tar(tmp_path / "3.tar", sample_files("9"))
    found, skipped = split(resolve(Img2dataset(tmp_path)))
    assert [item.name for item in found] == ["0.tar/0", "1.tar/0", "3.tar/9"]
    reasons = {(item.name, item.reason) for item in skipped}
    assert ("1.tar", "damaged tar (members of it are lost)") in reasons
    assert ("2.tar", "damaged tar (members of it are lost)") in reasons
    assert ("0.tar", "damaged tar (members of it are lost)") in reasons


def test_img2dataset_refuses_an_empty_folder(tmp_path):
    with pytest.raises(SourceError, match=r"holds neither \.tar shards nor images; expected the output of img2dataset"):
        Img2dataset(tmp_path)


# ------------------------------------------------------------------------------------------------- NLVR


def nlvr_files(name="dev", annotations_first=True):
    """Return files of an archive: examples 1-0 (true), 1-1 (false), 2-0 (true, one image missing), an image of none."""
    lines = [
        {"sentence": "there is a box", "label": "true", "identifier": "1-0", "directory": "0"},
        {"sentence": "there is a box", "label": "false", "identifier": "1-1", "directory": "0"},
        {"sentence": "two towers", "label": "true", "identifier": "2-0", "directory": "1"},
    ]
    png = image_bytes(image_format="PNG")
    images = {f"nlvr/{name}/images/0/{name}-1-{m}-{k}.png": png for m in (0, 1) for k in range(6)}
    images |= {f"nlvr/{name}/images/1/{name}-2-0-{k}.png": png for k in range(5)}
    images[f"nlvr/{name}/images/1/{name}-9-9-0.png"] = png
    annotations = {f"nlvr/{name}/{name}.json": "\n".join(map(json.dumps, lines)).encode()}
    return {"nlvr/README.md": b"about"} | (annotations | images if annotations_first else images | annotations)


def check_nlvr(items, name="dev"):
    found, skipped = split(items)
    expected = [f"{name}-1-0-{k}" for k in range(6)] + [f"{name}-2-0-{k}" for k in range(5)]
    assert [(item.image_id, item.captions[0]) for item in found] == [
        (image_id, "there is a box" if "-1-0-" in image_id else "two towers") for image_id in expected
    ]
    assert sorted((item.reason, item.name) for item in skipped) == [
        ("missing file", f"{name}-2-0-5"),
        ("no annotation", f"{name}-9-9-0"),
        *(("sentence labeled false", f"{name}-1-1-{k}") for k in range(6)),
    ]
    assert found[0].image.read() == image_bytes(image_format="PNG")


@pytest.mark.parametrize("annotations_first", [True, False])
@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w"])
def test_nlvr_archive_is_read_in_any_order_and_compression(tmp_path, mode, annotations_first):
    path = tmp_path / "nlvr.tar"
    with tarfile.open(path, mode) as tar:
        for name, data in nlvr_files(annotations_first=annotations_first).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = Nlvr([path])
    check_nlvr(source)
    assert source.total == 12
    check_nlvr(source)  # a second pass


@pytest.mark.parametrize("below", ["", "nlvr", "nlvr/dev"])
def test_nlvr_folder_is_read_from_any_level(tmp_path, below):
    for name, data in nlvr_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    check_nlvr(Nlvr([tmp_path / below]))


def test_nlvr_selects_splits_of_an_archive(tmp_path):
    write_tar(tmp_path / "nlvr.tar", nlvr_files("dev") | nlvr_files("test"))
    check_nlvr(Nlvr([tmp_path / "nlvr.tar"], splits=["test"]), "test")
    assert Nlvr([tmp_path / "nlvr.tar"]).description["splits"] is None
    with pytest.raises(SourceError, match=r"nlvr\.tar has no split hidden; it has: dev, test"):
        Nlvr([tmp_path / "nlvr.tar"], splits=["hidden"])


@pytest.mark.parametrize("form", ["folder", "archive", "two archives"])
def test_each_split_of_nlvr_that_is_asked_for_must_be_there(tmp_path, form):
    files = nlvr_files("dev") | nlvr_files("test")
    paths = [tmp_path / "nlvr.tar"]
    if form == "folder":
        paths = [tmp_path / "nlvr"]
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    elif form == "archive":
        write_tar(paths[0], files)
    else:
        paths = [tmp_path / "1.tar", tmp_path / "2.tar"]
        for path, name in zip(paths, ("dev", "test"), strict=True):
            write_tar(path, nlvr_files(name))
    found, _ = split(Nlvr(paths, splits=["test", "dev"]))
    assert len(found) == 22
    with pytest.raises(SourceError) as caught:
        Nlvr(paths, splits=["dev", "valid", "test"])
    assert str(caught.value) == f"{' + '.join(map(str, paths))} has no split valid; it has: dev, test"


def test_splits_of_nlvr_beside_one_folder_of_images_are_read_once(tmp_path):
    for name, data in (nlvr_files("dev") | nlvr_files("test")).items():
        path = tmp_path / name.replace("/dev/", "/both/").replace("/test/", "/both/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found, _ = split(Nlvr([tmp_path]))
    assert sorted(item.name for item in found) == sorted({item.name for item in found})
    assert len(found) == 22


def test_nlvr_errors_name_file_and_expected_layout(tmp_path):
    with pytest.raises(SourceError, match=r"source .*x\.tar\.xz does not exist"):
        Nlvr([tmp_path / "x.tar.xz"])
    (tmp_path / "x.tar.xz").write_bytes(b"not an archive" * 100)
    with pytest.raises(SourceError, match=r"x\.tar\.xz is not a tar archive .*expected SPLIT/SPLIT\.json"):
        Nlvr([tmp_path / "x.tar.xz"])
    write_tar(tmp_path / "y.tar", {"a/b.png": b""})
    with pytest.raises(SourceError, match=r"y\.tar is not in the NLVR layout: expected SPLIT/SPLIT\.json"):
        Nlvr([tmp_path / "y.tar"])
    write_tar(tmp_path / "z.tar", {"dev/dev.json": b'{"sentence": "a"}\n'})
    with pytest.raises(SourceError, match=r"line 1 of dev\.json is not an NLVR example; expected .* sentence, label"):
        list(Nlvr([tmp_path / "z.tar"]))


@needs_corpus
def test_nlvr_corpus_has_the_published_counts():
    source = Nlvr([Path(TEST_DATA) / "nlvr-dev.tar.xz"])
    found, skipped = split(source)
    assert len(found) + len(skipped) == 5934
    assert {item.reason for item in skipped} == {"sentence labeled false"}
    assert source.total == len(found) == 6 * 547
    assert len({item.image_id for item in found}) == len(found)
    by_example = {}
    for item in found:
        by_example.setdefault(item.image_id.rpartition("-")[0], set()).add(item.captions)
    assert all(len(captions) == 1 for captions in by_example.values()), (
        "the six images of an example share one sentence"
    )
    with Image.open(io.BytesIO(found[0].image.read())) as image:
        assert (image.size, image.mode) == ((400, 100), "RGBA")


@needs_corpus
def test_truncated_nlvr_archive_reports_the_number_of_files_read(tmp_path):
    data = (Path(TEST_DATA) / "nlvr-dev.tar.xz").read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(data[: len(data) // 4])
    with pytest.raises(SourceError, match=r"cut\.tar\.xz is damaged after \d+ files \(.*\); get it again"):
        list(Nlvr([tmp_path / "cut.tar.xz"]))


# ------------------------------------------------------------------------------------------------- scenes


def test_generated_scenes_equal_the_data_set():
    from eve_ds.data.synthetic.scenes import Scenes

    source = GeneratedScenes(3, level="hard", seed=5, split="val")
    candidates = [item.resolve() for item in source]
    assert [item.image_id for item in candidates] == [f"scenes-hard-5-val-{index}" for index in range(3)]
    scene = Scenes("hard", seed=5, split="val")[2]
    assert candidates[2].captions == (scene.caption,)
    with Image.open(io.BytesIO(candidates[2].image.read())) as image:
        assert image.tobytes() == scene.image.tobytes()


def test_candidate_resolves_to_itself():
    candidate = Candidate("a", None, ("b",), "c")
    assert candidate.resolve() is candidate
