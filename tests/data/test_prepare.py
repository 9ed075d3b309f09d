"""`prepare` on the files that people have: right pairs, counted samples, and one line for what cannot be used."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import socket
import tarfile
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_sets import one_line, pack, photo, prepare, write

from eve_ds import limits
from eve_ds.cli.prepare import main
from eve_ds.data.shard_captions import read_captions

COUNT = 8


def captioned(count=COUNT):
    return {number: f"caption {number}" for number in range(count)}


# ------------------------------------------------------------------------------------------------- img2dataset


def members(key):
    return [
        (f"{key(number)}.{suffix}", data)
        for number in range(COUNT)
        for suffix, data in (
            ("png", photo(number)),
            ("txt", f"caption {number}".encode()),
            ("json", json.dumps({"url": str(number)}).encode()),
        )
    ]


KEYS = {
    "numbers": lambda number: f"{number:09d}",
    "one dot": lambda number: f"a.{number}",
    "several dots": lambda number: f"2020.01.{number}.crop",
    "a folder with a dot": lambda number: f"v1.0/a.{number}",
    "dots at two places": lambda number: f"IMG.{number % 2}.{number}",
    "spaces": lambda number: f"my photo. {number}",
    "not Latin": lambda number: f"图片.{number}",
}


PACKED = {  # name: function that packs a tar, what prepare says about it
    "0.tar.gz": (gzip.compress, "compressed tar: unpack it"),
    "0.tgz": (gzip.compress, "compressed tar: unpack it"),
    "x/0.tar.xz": (lzma.compress, "compressed tar: unpack it"),
    "0.tar.zst": (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed tar: unpack it"),
    "gzip/0.tar": (gzip.compress, "no tar but compressed by gzip: unpack it"),
    "xz/0.tar": (lzma.compress, "no tar but compressed by xz: unpack it"),
    "bzip2/0.tar": (bz2.compress, "no tar but compressed by bzip2: unpack it"),
    "zip/0.tar": (
        lambda data: b"PK\x03\x04" + data,
        "no tar but a zip archive or a spreadsheet: unpack it, or save the sheet",
    ),
    "page/0.tar": (lambda data: b"<html>" * 200, "no tar but a web page: download the file again"),
    "text/0.tar": (lambda data: b"text" * 200, "damaged tar (members of it are lost)"),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("alone", [True, False])
def test_a_tar_that_is_not_unpacked_is_counted_by_name(tmp_path, capsys, name, alone):
    change, reason = PACKED[name]
    packed = pack(tmp_path / "plain", [("9.png", photo(9)), ("9.txt", b"caption 9")])
    write(tmp_path / "in", {name: change(packed.read_bytes()), "other.tar.notes": b"no archive"})
    if alone:
        assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in")[0] == 2
        assert f"no sample could be used: {reason}" in one_line(capsys)
        return
    pack(tmp_path / "in" / "1.tar", [("0.png", photo(0)), ("0.txt", b"caption 0")])
    code, pairs, reasons = prepare(tmp_path / "out", "img2dataset", tmp_path / "in")
    assert (code, pairs, list(reasons.values())) == (0, {0: "caption 0"}, [1])
    assert next(iter(reasons)).startswith(reason)


def test_a_packed_tar_beside_its_plain_one_is_no_loss(tmp_path):
    plain = pack(tmp_path / "in" / "0.tar", [("0.png", photo(0)), ("0.txt", b"caption 0")])
    write(tmp_path / "in", {name: gzip.compress(plain.read_bytes()) for name in ("0.tar.gz", "0.tgz", "._1.tar.gz")})
    assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in") == (0, {0: "caption 0"}, {})


@pytest.mark.parametrize("layout", ["tar", "files"])
@pytest.mark.parametrize("change", ["more", "larger", "none"])
def test_a_finished_folder_is_not_taken_for_that_of_more_downloads(tmp_path, capsys, layout, change):
    """img2dataset adds shards as it goes; `nothing to do` would leave them out for good."""

    def download(shard, count=1):
        files = [(f"{n}.{s}", d) for n in range(count) for s, d in (("png", photo(n)), ("txt", b"x"))]
        if layout == "tar":
            pack(tmp_path / "in" / f"{shard}.tar", files)
        else:
            write(tmp_path / "in" / str(shard), dict(files))

    download(0)
    arguments = ["img2dataset", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    if change == "more":
        download(1)
    elif change == "larger" and layout == "tar":
        download(0, count=20)
    else:
        assert main(arguments) == 0
        return
    capsys.readouterr()
    assert main(arguments) == 2
    assert re.search(r"holds the shards of another source or other options \(source\.contents", one_line(capsys))


@pytest.mark.parametrize("layout", ["tar", "files"])
@pytest.mark.parametrize("name", KEYS)
def test_keys_of_any_form_keep_their_own_captions(tmp_path, layout, name):
    files = members(KEYS[name])
    if layout == "tar":
        pack(tmp_path / "in" / "0.tar", files)
    else:
        write(tmp_path / "in", dict(files))
    assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in") == (0, captioned(), {})


@pytest.mark.parametrize(
    ("files", "expected", "reasons"),
    [
        ([("a.png", photo(1)), ("a.en.txt", b"other")], {}, {"no caption": 1, "no image": 1}),
        ([("a.png", photo(1)), ("a.seg.png", photo(2)), ("a.txt", b"one")], {1: "one"}, {"no caption": 1}),
        ([("a.png", photo(1)), ("a.txt", b"one"), ("a.npy", b"x"), ("a.emb.npy", b"x")], {1: "one"}, {}),
        ([("a.png", photo(1)), ("a.PNG", photo(2)), ("a.txt", b"one")], {}, {"duplicate member": 1}),
        ([("a.png", photo(1)), ("a.txt", b"one")] * 2, {}, {"duplicate member": 1}),
        ([("a.png", photo(1)), ("a.png", photo(2)), ("a.txt", b"1"), ("a.txt", b"2")], {}, {"duplicate member": 1}),
        ([("a.png", photo(1)), ("a.txt", b"\xef\xbb\xbf")], {}, {"empty caption": 1}),
        ([("a.png", photo(1)), ("a.json", b'{"caption": null}')], {}, {"no caption": 1}),
        ([("a.png", photo(1)), ("a.json", b'{"caption": NaN}')], {}, {"no caption": 1}),
        ([("a.png", photo(1)), ("a.json", b'{"caption": "from json"}')], {1: "from json"}, {}),
        ([("a.png", photo(1)), ("a.json", b"[" * 5000)], {}, {"unreadable metadata": 1}),
        ([("a.png", photo(1)), ("a.json", b'{"n": ' + b"9" * 5000 + b"}")], {}, {"unreadable metadata": 1}),
        ([("a.png", photo(1)), ("a.txt", b"x" * 20_000)], {}, {"caption longer than 10,000 characters": 1}),
    ],
)
def test_an_image_never_gets_a_caption_that_is_not_its_own(tmp_path, files, expected, reasons):
    pack(tmp_path / "in" / "0.tar", [*files, ("z.png", photo(99)), ("z.txt", b"last")])
    code, pairs, skipped = prepare(tmp_path / "out", "img2dataset", tmp_path / "in")
    assert (code, pairs, skipped) == (0, expected | {99: "last"}, reasons)


def test_a_key_that_occurs_again_later_is_another_sample(tmp_path):
    pack(tmp_path / "in" / "0.tar", [(f"{key}.{s}", d) for n, key in enumerate("aba") for s, d in pair(n)])
    assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in")[1] == captioned(3)


def pair(number):
    return (("png", photo(number)), ("txt", f"caption {number}".encode()))


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_files_of_macos_are_left_out(tmp_path, layout):
    plain = members(KEYS["numbers"])
    mac = [member for name, data in plain for member in ((f"._{name}", b"mac"), (f"__MACOSX/._{name}", b"mac"))]
    mac += [("__MACOSX/x.png", photo(77)), ("__MACOSX/x.txt", b"mac"), (".DS_Store", b"mac")]
    mixed = [member for two in zip(mac, [*plain, *plain], strict=False) for member in two]
    mixed = list(dict(mixed).items())
    if layout == "tar":
        pack(tmp_path / "in" / "0.tar", mixed)
        write(tmp_path / "in", {"._0.tar": b"mac", "__MACOSX/0.tar": b"mac"})
    else:
        write(tmp_path / "in", dict(mixed))
    assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in") == (0, captioned(), {})


def test_members_that_stand_apart_are_named(tmp_path, capsys):
    files = members(KEYS["numbers"])
    apart = [*files[0::3], *files[1::3]]
    pack(tmp_path / "in" / "0.tar", apart)
    assert prepare(tmp_path / "out", "img2dataset", tmp_path / "in")[0] == 2
    message = "no sample could be used: members of a sample must stand together in the tar: 16 (as 0.tar/000000000)"
    assert message in one_line(capsys)


# ------------------------------------------------------------------------------------------------- annotations


def karpathy(entries):
    images = [
        {"filename": name, "split": "train", "sentences": [{"raw": caption} for caption in captions]}
        for name, captions in entries
    ]
    return {"images": images}


WRITERS = {
    "json": lambda entries: json.dumps([{"image": name, "caption": captions} for name, captions in entries]),
    "karpathy": lambda entries: json.dumps(karpathy(entries)),
    "jsonl": lambda entries: "".join(f"{json.dumps({'image': n, 'caption': c})}\n" for n, c in entries),
    "metadata.jsonl": lambda entries: "".join(f"{json.dumps({'file_name': n, 'text': c})}\n" for n, c in entries),
    "tsv": lambda entries: "image\tcaption\n" + "".join(f"{n}\t{caption}\n" for n, cs in entries for caption in cs),
    "csv": lambda entries: "image,caption\n" + "".join(f"{n},{caption}\n" for n, cs in entries for caption in cs),
}
COMMANDS = {"karpathy": "karpathy", "tsv": "table", "csv": "table"}


def annotate(folder, name, entries):
    """Arguments of `prepare` for an annotation file of a format."""
    file = folder / (name if "." in name else f"a.{'json' if name == 'karpathy' else name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(WRITERS[name](entries))
    return COMMANDS.get(name, "json"), file


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_annotations_gives_the_same_pairs(tmp_path, name):
    write(tmp_path, {f"{number}.png": photo(number) for number in range(COUNT)})
    entries = [(f"{number}.png", [caption]) for number, caption in captioned().items()]
    assert prepare(tmp_path / "out", *annotate(tmp_path, name, entries)) == (0, captioned(), {})


@pytest.mark.parametrize("name", ["json", "karpathy", "jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("first", [None, float("nan"), "", "\ufeff"])
def test_a_null_in_a_list_of_captions_drops_the_null_alone(tmp_path, name, first):
    write(tmp_path, {"0.png": photo(0), "1.png": photo(1)})
    entries = [("0.png", [first]), ("1.png", [first, "caption 1", None])]
    code, pairs, reasons = prepare(tmp_path / "out", *annotate(tmp_path, name, entries))
    assert (code, pairs, reasons) == (0, {1: "caption 1"}, {"empty caption": 3})


@pytest.mark.parametrize("caption", [None, float("nan"), []])
def test_a_null_caption_in_the_first_entry_is_counted(tmp_path, caption):
    write(tmp_path, {"0.png": photo(0), "1.png": photo(1)})
    trees = {
        "json": [{"image": "0.png", "caption": caption}, {"image": "1.png", "caption": "caption 1"}],
        "karpathy": karpathy([("0.png", []), ("1.png", ["caption 1"])]),
    }
    for name, tree in trees.items():
        write(tmp_path, {f"{name}.json": json.dumps(tree)})
        code, pairs, reasons = prepare(tmp_path / f"out-{name}", name, tmp_path / f"{name}.json")
        assert (code, pairs, reasons) == (0, {1: "caption 1"}, {"no caption": 1})


MALFORMED = [
    *({}, [], 7, "text", None, True, [[]], {"image": None, "caption": "x"}, {"image": 5, "caption": "x"}),
    *({"image": "1.png"}, {"image": "1.png", "caption": 5}, {"image": "1.png", "caption": [5]}),
    *({"image": "1.png", "caption": {"en": "x"}}, {"image": ["1.png"], "caption": "x"}, {"image": "", "caption": "x"}),
    {"image": "1.png", "caption": [["x"]]},
]


@pytest.mark.parametrize("entry", MALFORMED, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_malformed_entry_is_counted_wherever_it_stands(tmp_path, entry, first):
    write(tmp_path, {"0.png": photo(0)})
    good = {"image": "0.png", "caption": "caption 0"}
    write(tmp_path, {"a.json": json.dumps([entry, good] if first else [good, entry])})
    assert prepare(tmp_path / "out", "json", tmp_path / "a.json") == (0, {0: "caption 0"}, {"malformed entry": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"sentences": [{"raw": 5}]},
        {"sentences": [{}]},
        {"sentences": ["x"]},
        {"sentences": 5},
        {"filename": None},
        {"filename": 5},
        {"filepath": 5},
        {"filepath": ["x"]},
    ],
    ids=str,
)
def test_a_malformed_karpathy_entry_is_counted(tmp_path, changes):
    write(tmp_path, {"0.png": photo(0)})
    tree = karpathy([("0.png", ["caption 0"]), ("1.png", ["x"])])
    tree["images"][1] |= changes
    tree["images"] += [{"split": ["train"]}, {"split": None}, {"split": {}}]
    write(tmp_path, {"a.json": json.dumps(tree)})
    assert prepare(tmp_path / "out", "karpathy", tmp_path / "a.json")[1:] == ({0: "caption 0"}, {"malformed entry": 1})


@pytest.mark.parametrize(("splits", "message"), [("train test", "test"), ("restvall", "restvall"), ("", None)])
def test_a_split_that_the_file_lacks_is_one_line(tmp_path, capsys, splits, message):
    write(tmp_path, {"0.png": photo(0), "a.json": json.dumps(karpathy([("0.png", ["caption 0"])]))})
    arguments = ["karpathy", tmp_path / "a.json", *(["--split", *splits.split()] if splits else [])]
    code, pairs, _ = prepare(tmp_path / "out", *arguments)
    assert (code, pairs) == ((2, {}) if message else (0, {0: "caption 0"}))
    if message:
        assert one_line(capsys).endswith(f"a.json has no image of split {message}; it has: train (1)")


IDS = [  # what a JSON holds, and the id: None is that of the path
    *(("17", "17"), (17, "17"), (17.0, "17"), (0, "0"), (-3, "-3"), (10**30, str(10**30)), (1e300, str(int(1e300)))),
    *((None, None), (float("nan"), None), ("", None), ("a b", "a b"), ("17.0", "17.0"), ("None", "None")),
]


@pytest.mark.parametrize(("value", "expected"), IDS, ids=str)
@pytest.mark.parametrize("command", ["json", "img2dataset"])
def test_ids_of_every_type_are_those_of_the_list_that_excludes_them(tmp_path, value, expected, command):
    """pandas writes whole numbers beside a missing one as 17.0; a list of ids has 17."""
    if command == "json":
        entry = {"image": "0.png", "caption": "caption 0", "image_id": value}
        write(tmp_path, {"0.png": photo(0), "in": json.dumps([entry])})
    else:
        write(tmp_path / "in", {"0.png": photo(0), "0.txt": "caption 0", "0.json": json.dumps({"url": value})})
    assert prepare(tmp_path / "out", command, tmp_path / "in")[1] == {0: "caption 0"}
    ids = tmp_path / "out" / "ids.txt"
    line = expected or "0"
    if command == "json":  # a number counts the entries of the file
        line = "0.png" if expected is None or expected.isdecimal() else f"{expected}\t0.png"
    assert ids.read_text(encoding="utf-8") == f"{line}\n"
    assert main([command, str(tmp_path / "in"), "--out", str(tmp_path / "b"), "--exclude_ids", str(ids)]) == 2


@pytest.mark.parametrize("value", [True, [17], {"a": 1}, 0.5, float("inf")], ids=str)
def test_what_is_no_id_is_counted(tmp_path, value):
    good = {"image": "1.png", "caption": "caption 1"}
    entry = {"image": "0.png", "caption": "caption 0", "image_id": value}
    write(tmp_path, {"0.png": photo(0), "1.png": photo(1), "a.json": json.dumps([entry, good])})
    assert prepare(tmp_path / "a", "json", tmp_path / "a.json") == (0, {1: "caption 1"}, {"malformed entry": 1})
    write(tmp_path / "in", {"0.png": photo(0), "0.txt": "x", "0.json": json.dumps({"url": value})})
    write(tmp_path / "in", {"1.png": photo(1), "1.txt": "caption 1"})
    expected = (0, {1: "caption 1"}, {"unreadable metadata": 1})
    assert prepare(tmp_path / "b", "img2dataset", tmp_path / "in") == expected


def test_the_number_of_coco_excludes_an_image_in_either_type(tmp_path):
    tree = karpathy([("0.png", ["caption 0"]), ("1.png", ["x"]), ("2.png", ["x"])])
    for image, number in zip(tree["images"], (None, 7, 8.0), strict=True):
        image["cocoid"] = number
    write(tmp_path, {"0.png": photo(0), "1.png": photo(1), "2.png": photo(2), "a.json": json.dumps(tree)})
    write(tmp_path, {"ids.txt": "7\n8\n"})
    arguments = ("karpathy", tmp_path / "a.json", "--exclude_ids", tmp_path / "ids.txt")
    assert prepare(tmp_path / "out", *arguments) == (0, {0: "caption 0"}, {"excluded id": 2})


NO_NAMES = [
    "x" * 300,
    "x" * 5000,
    "x/" * 3000 + "1.png",
    "x\\" * 3000,
    "é" * 200,
    "data:image/png;base64," + "iVBOR" * 2000,
]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: name[:8])
@pytest.mark.parametrize("command", ["json", "table"])
def test_an_image_that_no_file_can_be_named_after_is_counted(tmp_path, capsys, name, command):
    write(tmp_path, {"0.png": photo(0)})
    good, bad = ("0.png", "caption 0"), (name, "x")
    for number, rows in enumerate(([good, bad], [bad, good])):
        entries = [{"image": image, "caption": caption} for image, caption in rows]
        table = "".join(f"{image}\t{caption}\n" for image, caption in [("image", "caption"), *rows])
        write(tmp_path, {"a.tsv": json.dumps(entries) if command == "json" else table})
        code, pairs, reasons = prepare(tmp_path / f"out-{number}", command, tmp_path / "a.tsv")
        assert (code, pairs, reasons) == (0, {0: "caption 0"}, {"unreadable file": 1})
        assert max(map(len, capsys.readouterr().out.splitlines())) < 500, "the name is shown shortened"


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_a_name_is_found_in_either_form_of_its_accents(tmp_path, stored, written):
    """Archives of macOS hold names in NFD; annotations are written in NFC."""
    write(tmp_path, {f"{unicodedata.normalize(stored, 'é/한.png')}": photo(0)})
    entries = [{"image": unicodedata.normalize(written, "é/한.png"), "caption": "caption 0"}]
    write(tmp_path, {"a.json": json.dumps(entries)})
    assert prepare(tmp_path / "out", "json", tmp_path / "a.json") == (0, {0: "caption 0"}, {})


def test_html_entities_are_replaced_on_request(tmp_path):
    write(tmp_path, {"0.png": photo(0), "a.tsv": "image\tcaption\n0.png\tsalt &amp; &#34;pepper&quot;\n"})
    arguments = ("table", tmp_path / "a.tsv")
    assert prepare(tmp_path / "as-is", *arguments)[1] == {0: "salt &amp; &#34;pepper&quot;"}
    assert prepare(tmp_path / "text", *arguments, "--unescape-html")[1] == {0: 'salt & "pepper"'}
    assert "unescape_html" not in json.loads((tmp_path / "as-is" / "report.json").read_text())["options"]


def test_a_tab_is_a_delimiter_in_either_form(tmp_path):
    write(tmp_path, {"0.png": photo(0), "a.txt": "image\tcaption\n0.png\tone, two\n"})
    for number, delimiter in enumerate((r"\t", "\t")):
        arguments = ("table", tmp_path / "a.txt", "--delimiter", delimiter)
        assert prepare(tmp_path / str(number), *arguments)[1] == {0: "one, two"}


def test_a_lone_surrogate_in_an_id_reaches_the_list_of_ids(tmp_path):
    write(tmp_path, {"0.png": photo(0), "1.png": photo(1)})
    entries = '[{"image": "0.png", "caption": "a", "image_id": "\\ud800"}, {"image": "\\ud800.png", "caption": "b"},'
    write(tmp_path, {"a.json": entries + '{"image": "1.png", "caption": "c\\ud800"}]'})
    code, pairs, reasons = prepare(tmp_path / "out", "json", tmp_path / "a.json")
    assert (code, pairs) == (0, {0: "a"})
    assert reasons == {"unreadable file": 1, "caption is not UTF-8": 1}
    assert (tmp_path / "out" / "ids.txt").read_text(encoding="utf-8") == "\ufffd\t0.png\n"


DOCUMENTS = {
    "COCO captions": (
        '{"info": {}, "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}',
        r"is COCO annotations: give it to `prepare\.py coco`",
    ),
    "Visual Genome": (
        '[{"regions": [{"phrase": "x"}], "id": 1}]',
        "is Visual Genome region descriptions: give it to `prepare.py visual_genome`",
    ),
    "SBU": (
        '{"image_urls": ["x"], "captions": ["y"], "user_ids": []}',
        "is SBU captions: give it to `prepare.py urls`",
    ),
    "Karpathy": ('{"images": [{"filename": "a.jpg"}]}', "Karpathy's: give it to `prepare.py karpathy`"),
    "addresses": (
        '[{"url": "http://x/a.jpg", "caption": "x"}]',
        "addresses and captions: give it to `prepare.py urls`",
    ),
    "LLaVA": ('[{"image": "a.jpg", "conversations": []}]', "is LLaVA conversations; this is not read"),
    "VQAv2 questions": ('{"questions": []}', "is VQAv2 questions; this is not read"),
    "NLVR2": ('{"identifier": "a", "sentence": "b"}\n{"identifier": "c", "sentence": "d"}', "is NLVR2; this is not"),
    "pandas by column": ('{"image": {"0": "a.jpg"}, "caption": {"0": "x"}}', "is a table by columns, as pandas writes"),
    "Parquet": (
        b"PAR1\x15\x04",
        "is Parquet; this is not read: give it to `prepare.py table`, or a list of addresses to",
    ),
    "gzip": (b"\x1f\x8b\x08", "is compressed by gzip; this is not read"),
    "UTF-16": ("[]".encode("utf-16"), "is UTF-16; this is not read: save it as UTF-8"),
    "Latin-1 key": (b'[{"imag\xe9": "a"}]', "is not a caption JSON|malformed"),
    "deep": ("[" * 100_000, "is not JSON: lists and objects are nested deeper than 100 levels"),
    "a little deep": ("[" * 200 + "]" * 200, "is not JSON: lists and objects are nested deeper than 100 levels"),
    "deep object": ('{"a":' * 500 + "1" + "}" * 500, "is not JSON: lists and objects are nested deeper than 100"),
    "deep line": (
        '{"a": 1}\n' + "[" * 5000,
        "is not JSON: lists and objects are nested deeper than 100 levels: line 2",
    ),
    "large number": (f'[{{"image": {"9" * 5000}}}]', "is not JSON: a number has 5,000 digits, more than 300"),
    "cut": ('[{"image": "a.jpg", "caption": "x"', "is not JSON: Expecting"),
    "a bad line": ('{"image": "a.jpg", "caption": "x"}\n{"image":\n', "is not JSON: Expecting value: line 2"),
    "empty": ("", "is not JSON: Expecting value"),
    "one line of JSON lines": (
        '{"image": "a.jpg", "caption": "x"}',
        "the keys image, caption; put the object into a list, or name the file .jsonl",
    ),
    "an empty list": ("[]", "is not a caption JSON: .* found an empty list"),
    "NUL": ("[\0]", "it has NUL bytes; this is not read"),
}


@pytest.mark.parametrize("start", ["[", "{", ' [\n  {"image": "a.jpg"}'])
def test_json_is_no_table(tmp_path, capsys, start):
    write(tmp_path, {"a.json": start})
    assert main(["table", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]) == 2
    assert "a.json is JSON, not a table: give it to `prepare.py json`" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_is_not_read_is_named_in_one_line(tmp_path, capsys, name, suffix):
    text, message = DOCUMENTS[name]
    write(tmp_path, {f"a.{suffix}": text})
    assert prepare(tmp_path / "out", "json", tmp_path / f"a.{suffix}")[0] == 2
    line = one_line(capsys)
    if suffix == "json":
        with pytest.raises(ValueError, match=message):
            raise ValueError(line)


ONLY_MALFORMED = {
    "json": (
        '[{"image": ["1.jpg"], "caption": ["a"]}]',
        r"a\.json entry 0: image \(\['1\.jpg'\]\) must be a non-empty st",
    ),
    "json with numbers": (
        '[{"image": "1.jpg", "caption": 5}]',
        r"a\.json entry 0: caption \(5\) must be a string or a li",
    ),
    "json without captions": ('[{"image": "1.jpg"}, {}]', r"a\.json entry 0: caption is missing"),
    "coco": (
        '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
        r"malformed entry: 1 \(as a\.json entry 0: image_id \(2\) is not in the list of images\)",
    ),
    "karpathy": (
        '{"images": [{"filename": "1.jpg", "split": "train", "sentences": ["a"]}]}',
        r"malformed entry: 1 \(as a\.json entry 0: image 1\.jpg has no sentences but \['a'\]",
    ),
    "visual_genome": (
        '[{"id": 1, "regions": [{"phrase": 5, "image_id": 1}]}]',
        r"malformed entry: 1 \(as a\.json entry 0 region 0: phrase \(5\) must be a string",
    ),
    "urls": (
        '[{"link": "http://h/1.jpg", "caption": "x"}]',
        r"a\.json entry 0: url \(None\) must be a non-empty string",
    ),
}


@pytest.mark.parametrize("name", ONLY_MALFORMED)
def test_a_file_of_malformed_entries_says_what_is_wrong_with_the_first(tmp_path, capsys, name):
    text, message = ONLY_MALFORMED[name]
    download = {"images/0/0.png": photo(0), "images/0/0.txt": "x", "images/0/0.json": '{"url": "http://h/0.jpg"}'}
    write(tmp_path, {"a.json": text, **download})
    options = ("--images", tmp_path / "images") if name == "urls" else ()
    assert prepare(tmp_path / "out", name.split()[0], tmp_path / "a.json", *options)[0] == 2
    assert re.search(message, one_line(capsys))


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (
            [[{"raw": "a"}]],
            r"rows\.parquet row 1: caption \(\[\{'raw': 'a'\}\]\) must be a string or a list of strings",
        ),
        ([5], r"rows\.parquet row 1: caption \(5\) must be a string"),
        (
            ['[{"raw": "a"}]'],
            r"rows\.parquet row 1: caption \('\[\{\"raw\": \"a\"\}\]'\) is a list of other values than texts",
        ),
    ],
)
def test_parquet_of_malformed_captions_says_what_is_wrong_with_the_first(tmp_path, capsys, captions, message):
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "caption": captions}), tmp_path / "rows.parquet")
    write(tmp_path, {"0.png": photo(0)})
    assert prepare(tmp_path / "out", "table", tmp_path / "rows.parquet")[0] == 2
    assert re.search(message, one_line(capsys))


def test_captions_of_parquet_may_be_bytes(tmp_path):
    captions = ["é".encode(), b"\xff"]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": ["0.png", "1.png"], "caption": captions}), tmp_path / "rows.parquet"
    )
    write(tmp_path, {"0.png": photo(0), "1.png": photo(1)})
    expected = 0, {0: "é"}, {"caption is not UTF-8": 1}
    assert prepare(tmp_path / "out", "table", tmp_path / "rows.parquet") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"identifier": "a", "sentence": "b"}\n', "is NLVR2; this is not read: name it as `task.train.annotations`"),
        (
            '{"identifier": "1-0", "sentence": "b", "structured_rep": []}\n' * 2,
            "is NLVR 1.0; this is not read: give the folder that holds it and images/ to `prepare.py nlvr`",
        ),
        ("[1]", "is JSON, not an archive or a folder with images; expected SPLIT/SPLIT.json beside SPLIT/images/"),
    ],
)
def test_json_in_place_of_an_archive_of_nlvr_is_named(tmp_path, capsys, text, message):
    write(tmp_path, {"dev.json": text})
    assert prepare(tmp_path / "out", "nlvr", tmp_path / "dev.json")[0] == 2
    assert message in one_line(capsys)


def test_karpathy_names_the_captions_of_coco(tmp_path, capsys):
    write(tmp_path, {"a.json": DOCUMENTS["COCO captions"][0]})
    assert prepare(tmp_path / "out", "karpathy", tmp_path / "a.json")[0] == 2
    assert "is COCO annotations: give it to `prepare.py coco`" in one_line(capsys)


@pytest.mark.parametrize("name", ["pipe", "socket", "folder", "/dev/zero"])
def test_annotations_in_no_regular_file_are_refused(tmp_path, capsys, name):
    make_special_files(tmp_path)
    for command in ("json", "karpathy", "table"):
        assert prepare(tmp_path / "out", command, tmp_path / name)[0] == 2
        advice = " but a folder: give files" if name == "folder" else ": check the path"
        assert one_line(capsys).endswith(f"annotation file {tmp_path / name} is not a file{advice}")


# ------------------------------------------------------------------------------------------------- image paths


def make_special_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        place = os.getcwd()
        os.chdir(folder)  # the name of a socket is short
        server.bind("socket")
        os.chdir(place)


def outside(folder):
    """Image folder with one image, and names that do not lie in it -> the reason of each."""
    images = folder / "images"
    write(folder, {"images/0.png": photo(0), "secret.png": photo(50), "images2/x.png": photo(51)})
    (images / "file-link.png").symlink_to(folder / "secret.png")
    (images / "folder-link").symlink_to(folder)
    (images / "loop.png").symlink_to("loop.png")
    (images / "zero.png").symlink_to("/dev/zero")
    make_special_files(images)
    left = ["../secret.png", str(folder / "secret.png"), "file-link.png", "folder-link/secret.png", "/dev/zero"]
    left += ["zero.png", "/etc/passwd", "x/../../secret2.png", "../images2/x.png", "/proc/self/environ"]
    irregular = ["pipe", "socket", "folder/", "."]
    missing = ["gone.png", "x\0.png", "0.png/x.png", "folder/../gone2.png", "C:\\data\\0.png"]
    return images, left, irregular, missing


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["json", "karpathy"])
def test_only_regular_files_of_the_image_folder_are_read(tmp_path, name):
    images, left, irregular, missing = outside(tmp_path)
    names = ["0.png", *left, *irregular, *missing, "loop.png"]
    arguments = annotate(tmp_path, name, [(path, ["caption 0"]) for path in names])
    code, pairs, reasons = prepare(tmp_path / "out", *arguments, "--images", images)
    assert (code, pairs) == (0, {0: "caption 0"})
    links = reasons.pop("link out of the image folder (--follow_links follows it)")
    assert (links, reasons.pop("path outside the image folder")) == (3, len(left) - 3)
    assert reasons.pop("not a regular file") == len(irregular)
    assert sum(reasons.values()) == len(missing) + 1
    assert set(reasons) <= {"missing file", "unreadable file"}


def test_paths_inside_the_image_folder_are_read_in_any_form(tmp_path):
    write(tmp_path, {f"images/sub/{number}.png": photo(number) for number in range(5)})
    images = tmp_path / "images"
    (images / "inner-link.png").symlink_to("sub/2.png")
    (tmp_path / "elsewhere").symlink_to(images)
    names = ["sub/0.png", str(images / "sub" / "1.png"), "inner-link.png", "./sub/../sub/3.png", "sub\\4.png"]
    arguments = annotate(tmp_path, "json", [(name, [f"caption {number}"]) for number, name in enumerate(names)])
    for number, folder in enumerate((images, tmp_path / "elsewhere", f"{tmp_path}/elsewhere/../images")):
        assert prepare(tmp_path / f"out{number}", *arguments, "--images", folder) == (0, captioned(5), {})


def test_links_out_of_the_folder_are_followed_on_request(tmp_path):
    images, *_ = outside(tmp_path)
    entries = [("file-link.png", ["a"]), ("../images2/x.png", ["b"])]
    arguments = (*annotate(tmp_path, "json", entries), "--images", images, "--follow_links")
    assert prepare(tmp_path / "out", *arguments) == (0, {50: "a"}, {"path outside the image folder": 1})


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("prefix", "written"),
    [
        ("/data/other/coco", "/data/other/coco/sub/{}.png"),
        ("/data/other/coco/", "/data/other/coco/sub/{}.png"),
        ("C:\\data\\coco", "C:\\data\\coco\\sub\\{}.png"),
        ("C:/data/coco", "C:\\data\\coco\\sub\\{}.png"),
        ("file:///x", "file:///x/sub/{}.png"),
        ("train", "train//sub/{}.png"),
    ],
)
def test_a_prefix_of_another_machine_is_removed(tmp_path, name, prefix, written):
    write(tmp_path, {f"sub/{number}.png": photo(number) for number in range(2)})
    entries = [(written.format(number), [caption]) for number, caption in captioned(2).items()]
    arguments = annotate(tmp_path, name, entries)
    assert prepare(tmp_path / "out", *arguments, "--strip-prefix", prefix) == (0, captioned(2), {})
    if name == "json":
        assert (tmp_path / "out" / "ids.txt").read_text() == "sub/0.png\nsub/1.png\n"


def test_a_prefix_ends_at_a_slash_and_does_not_lead_out(tmp_path):
    write(tmp_path, {"images/0.png": photo(0), "secret.png": photo(9)})
    entries = [("/a/0.png", ["caption 0"]), ("/ab/0.png", ["b"]), ("/a/../secret.png", ["c"])]
    arguments = (*annotate(tmp_path, "json", entries), "--images", tmp_path / "images", "--strip_prefix", "/a")
    assert prepare(tmp_path / "out", *arguments)[1:] == ({0: "caption 0"}, {"path outside the image folder": 2})


def test_a_folder_without_the_images_names_both_options(tmp_path, capsys):
    arguments = annotate(tmp_path, "json", [("/mnt/a.png", ["x"])])
    assert prepare(tmp_path / "out", *arguments)[0] == 2
    assert "set the folder of the images with --images, or remove the start of their paths with --strip" in one_line(
        capsys
    )


def test_an_image_file_above_the_cap_is_not_read(tmp_path):
    write(tmp_path, {"0.png": photo(0)})
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(2**40)
    arguments = annotate(tmp_path, "json", [("0.png", ["caption 0"]), ("1.png", ["b"])])
    assert prepare(tmp_path / "out", *arguments)[1:] == ({0: "caption 0"}, {"too large a file": 1})


# ------------------------------------------------------------------------------------------------- archives


def bomb(kind):
    """Compressed archive of 200 MiB of zeros, as one member, as many, as a name, or as pax records."""
    file = io.BytesIO()
    zeros = bytes(2**20)
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
        header = tarfile.TarInfo("dev/images/0/dev-1-0-0.png")
        if kind == "many members":
            header.size = len(zeros)
            for _ in range(200):
                packed.write(header.tobuf(tarfile.USTAR_FORMAT) + zeros)
            return file.getvalue()
        header.size = 200 * len(zeros)
        header.type = {"one member": b"0", "long name": b"L", "pax records": b"x"}[kind]
        packed.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(200):
            packed.write(zeros)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["one member", "many members", "long name", "pax records"])
def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, capsys, kind):
    write(tmp_path, {"nlvr.tar.gz": bomb(kind)})
    assert prepare(tmp_path / "out", "nlvr", tmp_path / "nlvr.tar.gz")[0] == 2
    assert f"unpacks to more than {limits.ARCHIVE_RATIO} times its size: it is no archive" in one_line(capsys)


def test_the_holes_of_a_sparse_member_are_not_filled(tmp_path, capsys):
    header = tarfile.TarInfo("dev/dev.json")
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    write(tmp_path, {"nlvr.tar": bytes(block) + bytes(1024)})
    assert prepare(tmp_path / "out", "nlvr", tmp_path / "nlvr.tar")[0] == 2
    assert "nlvr.tar" in one_line(capsys)


def test_a_damaged_archive_leaves_no_shards(tmp_path, capsys):
    line = json.dumps({"sentence": "x", "label": "true", "identifier": "1-0", "directory": "0"}).encode()
    files = [
        ("dev/dev.json", line),
        *((f"dev/images/0/dev-1-0-{k}.png", photo(k) + os.urandom(50_000)) for k in range(6)),
    ]
    data = pack(tmp_path / "nlvr.tar", files).read_bytes()
    write(tmp_path, {"nlvr.tar.gz": gzip.compress(data)[:-100]})
    arguments = ("nlvr", tmp_path / "nlvr.tar.gz", "--samples_per_shard", "1")
    assert prepare(tmp_path / "out", *arguments)[0] == 2
    assert "is damaged after" in one_line(capsys)


# ------------------------------------------------------------------------------------------------- anything else


KEYS_OF_FORMATS = [
    "image",
    "caption",
    "image_id",
    "images",
    "sentences",
    "raw",
    "filename",
    "split",
    "text",
    "id",
    "url",
]
KEYS_OF_FORMATS += ["file_name", "annotations", "regions", "phrase", "x", "elems", "bb", "image_urls", "captions"]
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("0.png")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS_OF_FORMATS), inner, max_size=4)
    ),
    max_leaves=8,
)
GOOD_ENTRY = {
    **{"image": "0.png", "caption": "x", "filename": "0.png", "split": "train", "sentences": [{"raw": "x"}]},
    **{"file_name": "0.png", "id": 0, "image_id": 0, "url": "http://x/0.png"},
    "regions": [{"image_id": 0, "phrase": "x", "x": 0, "y": 0, "width": 9, "height": 9}],
}
DOCUMENT_KEYS = [None, ("images",), ("images", "annotations"), ("image_urls", "captions")]


@settings(max_examples=100)
@given(
    tree=json_values,
    command=st.sampled_from(["json", "karpathy", "coco", "visual_genome", "urls"]),
    keys=st.sampled_from(DOCUMENT_KEYS),
    first=st.booleans(),
)
def test_any_json_ends_in_shards_or_in_one_line(tmp_path_factory, tree, command, keys, first):
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    write(folder, {"0.png": photo(0), "d/0.png": photo(0), "d/0.json": json.dumps({"url": "http://x/0.png"})})
    entries = [tree, GOOD_ENTRY] if first else [GOOD_ENTRY, tree]
    options = ["--images", str(folder / "d")] if command == "urls" else []
    for number, document in enumerate((tree, entries if keys is None else dict.fromkeys(keys, entries))):
        write(folder, {"a.json": json.dumps(document)})
        out = folder / f"out{number}"
        code = main([command, str(folder / "a.json"), "--out", str(out), "--workers", "1", *options])
        assert code in (0, 2)
        assert (out / "index.json").exists() == (code == 0)
        assert not (out / ".prepare").exists()


def test_the_tokenizer_learns_no_special_marks(tmp_path):
    pack(tmp_path / "0.tar", [("a.txt", b"\xef\xbb\xbf a cat \xe2\x80\x8b"), ("._a.txt", b"mac"), ("b.txt", b"dog")])
    write(tmp_path, {"._0.tar": b"mac"})
    assert list(read_captions(tmp_path)) == ["a cat", "dog"]
