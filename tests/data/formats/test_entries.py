"""Entries name their file and number; JSON files may be documents or lines, and image folders are probed."""

import json
import tarfile

import pytest

from eve_ds.config import ConfigError
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.entries import Entry, list_entries, read_json
from eve_ds.data.formats.images import PROBES_BEFORE_DOUBLING, first_existing, probe_step, require_some_image, spread
from eve_ds.data.formats.sniff import sniff


def test_errors_of_sources_are_errors_of_the_configuration():
    assert issubclass(SourceError, ConfigError)


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        (7, lambda entry: entry.text("a"), "must be an object"),
        ({"a": ""}, lambda entry: entry.text("a"), r"a \(''\) must be a non-empty string or a whole number"),
        ({"a": True}, lambda entry: entry.text("a"), r"a \(True\) must be a non-empty string or a whole number"),
        ({"a": 5}, lambda entry: entry.file_name("a"), r"a \(5\) must be a non-empty string"),
        ({"a": ["x", 1]}, lambda entry: entry.texts("a"), r"a \(\['x', 1\]\) must be a string or a list of strings"),
        ({"label": "maybe"}, lambda entry: entry.label(), r"label \('maybe'\) must be true or false"),
    ],
)
def test_a_bad_field_is_one_line_with_its_place(content, read, message):
    with pytest.raises(SourceError, match=rf"^a\.json entry 3: {message}$"):
        read(Entry(content, "a.json entry 3"))


def test_fields_are_converted():
    entry = Entry({"id": 7, "one": "x", "many": ["x", ""], "label": "TRUE"}, "here")
    assert (entry.text("id"), entry.texts("one"), entry.texts("many")) == ("7", ("x",), ("x", ""))
    assert (entry.label(), Entry({}, "here").label()) == (True, None)


def test_entries_are_numbered_within_their_file(tmp_path):
    (tmp_path / "list.json").write_text('[{"a": 1}, {"a": 2}]')
    (tmp_path / "lines.json").write_text('{"a": 3}\n\n{"a": 4}\n')
    found = list(list_entries([tmp_path / "list.json", tmp_path / "lines.json"]))
    assert [entry.get("a") for entry in found] == [1, 2, 3, 4]
    assert [entry.where for entry in found] == [
        f"{tmp_path}/{f}.json entry {i}" for f in ("list", "lines") for i in (0, 1)
    ]
    (tmp_path / "number.json").write_text("7")
    with pytest.raises(SourceError, match=r"number\.json must be a list of entries, not a number"):
        list(list_entries([tmp_path / "number.json"]))
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(
        SourceError, match=r"object\.json must be a list of entries, not an object with the keys \(none\)"
    ):
        list(list_entries([tmp_path / "object.json"]))


@pytest.mark.parametrize("end", ["\x85", "\u2028"])
def test_json_lines_end_at_line_feeds_alone(tmp_path, end):
    documents = [{"a": f"one{end}two"}, {"a": "three"}]
    text = "\r\n".join(json.dumps(tree, ensure_ascii=False) for tree in documents)
    (tmp_path / "lines.json").write_bytes(text.encode())
    assert read_json(tmp_path / "lines.json") == documents


def test_bytes_that_are_not_utf8_are_refused_or_kept(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf["\xff"]')
    assert read_json(path, "keep") == ["\udcff"]
    with pytest.raises(SourceError, match=r"annotation file .*a\.json cannot be read: 'utf-8' codec"):
        read_json(path)


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"questions": []}, "vqav2"),
        ({"annotations": []}, "vqav2"),
        ({"images": []}, "karpathy"),
        ([{"identifier": "dev-1-0-0"}], "nlvr2"),
        ([{"image": "a.jpg"}], "json"),
    ],
)
def test_a_format_is_recognized_by_its_content(tmp_path, tree, name):
    (tmp_path / "a.json").write_text(json.dumps(tree))
    assert sniff(tmp_path / "a.json") == name
    assert sniff(tmp_path) == "nlvr"


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".txz", ".tar.xz", ""])
def test_an_archive_is_recognized_whatever_its_name(tmp_path, suffix):
    archive = tmp_path / f"nlvr{suffix}"
    with tarfile.open(archive, "w:xz" if suffix.endswith("xz") else "w:gz" if suffix == ".tgz" else "w") as tar:
        tar.addfile(tarfile.TarInfo("dev.json"))
    assert sniff(archive) == "nlvr"


def test_a_json_file_with_the_name_of_an_archive_is_no_archive(tmp_path):
    (tmp_path / "x.tar.json").write_text('[{"image": "a.jpg"}]')
    assert sniff(tmp_path / "x.tar.json") == "json"
    with pytest.raises(SourceError, match=r"gone\.tar cannot be read"):
        sniff(tmp_path / "gone.tar")


@pytest.mark.parametrize("before", ["\n", "\r\n\r\n", " \n", "\ufeff\n", ""], ids=ascii)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_blank_lines_among_json_lines_are_no_entries(tmp_path, before, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(f'{before}{{"image": "a.jpg"}}\n\n{{"image": "b.jpg"}}\n\n'.encode())
    assert [item.content["image"] for item in list_entries([path])] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("text", ["[]", "3", "[3]", "{}"])
def test_a_file_without_a_known_form_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=r"a\.json is in no known form: a list of entries, VQAv2's questions"):
        sniff(tmp_path / "a.json")


def test_an_image_folder_passes_if_one_probed_image_exists(tmp_path):
    (tmp_path / "b.jpg").touch()
    assert first_existing(tmp_path, ("a.jpg", "b.jpg", "c.jpg")) == tmp_path / "b.jpg"
    assert first_existing(tmp_path, ("a.jpg", "c.jpg")) == tmp_path / "c.jpg"
    later = (tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg"))
    require_some_image(later, "x.json")
    assert list(later) == [tmp_path / "c.jpg"], "no path is looked at after the first that exists"
    require_some_image([], "x.json")
    with pytest.raises(SourceError, match=r"x\.json: none of 2 probed images exists .*a\.jpg\): set the folder of the"):
        require_some_image([tmp_path / "a.jpg", tmp_path / "c.jpg"], "x.json")
    assert [probe_step(total) for total in (1, 20, 45)] == [1, 1, 2]


@pytest.mark.parametrize("total", [1, 1000, 1001, 5000, 200_000])
def test_probes_are_spread_over_a_list_of_unknown_length(total):
    """All of the first are taken. Later distances are small relative to what stands before."""
    taken = list(spread(range(total)))
    assert taken[:PROBES_BEFORE_DOUBLING] == list(range(min(total, PROBES_BEFORE_DOUBLING)))
    ends = zip(taken, [*taken[1:], total], strict=True)
    assert all(after - before <= (before + 1) / PROBES_BEFORE_DOUBLING + 1 for before, after in ends)
    assert len(taken) <= PROBES_BEFORE_DOUBLING * total.bit_length()
    assert list(spread([])) == []
