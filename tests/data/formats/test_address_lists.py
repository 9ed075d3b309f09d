"""Lists of addresses without a header row: which column is which, and captions with delimiters."""

import pytest

from eve_ds.data.formats.address_lists import AddressList
from eve_ds.data.formats.tables import Row

ONE, TWO, THREE = (f"http://host/{number}?size=2" for number in (1, 2, 3))


def read(folder, text, suffix):
    path = folder / f"list{suffix}"
    path.write_bytes(text.encode())
    return [row.problem if isinstance(row, Row) else (row.image, *row.captions) for row in AddressList(path)]


@pytest.mark.parametrize("scheme", ["http", "HTTP", "Https"])
@pytest.mark.parametrize("delimiter", ["\t", ","])
@pytest.mark.parametrize("address_first", [True, False])
def test_the_column_of_addresses_is_found(tmp_path, scheme, delimiter, address_first):
    pairs = [(f"{scheme}://host/{number}", caption) for number, caption in enumerate(["a dog", "[a cat] sits", "it's"])]
    lines = [delimiter.join(pair if address_first else pair[::-1]) for pair in pairs]
    assert read(tmp_path, "\n".join(lines), ".tsv" if delimiter == "\t" else ".csv") == pairs


@pytest.mark.parametrize("address_first", [True, False])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(("delimiter", "sign"), [(",", "','"), ("\t", r"'\t'")])
def test_a_caption_with_delimiters_is_counted_and_never_cut(tmp_path, address_first, first, delimiter, sign):
    fields = [("a dog", ONE), (delimiter.join(["a dog", " asleep"]), TWO), ("a cat", THREE)]
    fields = fields[first:] + fields[:first]
    lines = [delimiter.join(pair[::-1] if address_first else pair) for pair in fields]
    too_long = f"more than 2 fields (quote captions with {sign} in them)"
    expected = [too_long if address == TWO else (address, caption) for caption, address in fields]
    assert read(tmp_path, "\n".join(lines), ".txt") == expected


@pytest.mark.parametrize("quoted", ['"a dog, asleep"', ' "a dog, asleep" ', '"a dog\nruns, fast"', '"a\n\n""dog"""'])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("header", [True, False])
def test_a_quoted_caption_may_have_delimiters_and_line_ends(tmp_path, quoted, delimiter, header):
    caption = quoted.strip()[1:-1].replace('""', '"')
    first = delimiter.join(["caption", "url"]) + "\n" if header else ""
    text = f"{first}{quoted}{delimiter}{ONE}\na cat{delimiter}{TWO}\n"
    assert read(tmp_path, text, ".txt") == [(ONE, caption), (TWO, "a cat")]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("address_first", [True, False])
def test_a_lone_carriage_return_is_text(tmp_path, header, address_first):
    pairs = [("caption", "url")] * header + [("a dog\rruns\rfast", ONE), ("a cat", TWO)]
    text = "".join("\t".join(pair[::-1] if address_first else pair) + "\n" for pair in pairs)
    assert read(tmp_path, text, ".tsv") == [(ONE, "a dog\rruns\rfast"), (TWO, "a cat")]


def test_further_columns_behind_tabs_are_left_out(tmp_path):
    """Conceptual Captions with labels: caption, address, labels, their ids, confidences."""
    lines = [
        "\t".join((caption, address, "a,b", "/m/1,/m/2", ".5,.1")) for caption, address in [("x", ONE), ("y", TWO)]
    ]
    assert read(tmp_path, "\n".join(lines), ".tsv") == [(ONE, "x"), (TWO, "y")]


@pytest.mark.parametrize("address_first", [True, False])
def test_commas_separate_two_fields_where_most_captions_have_commas(tmp_path, address_first):
    pairs = [("a dog, asleep", ONE), ("red, blue", TWO), ("a cat", THREE)]
    lines = [",".join(pair[::-1] if address_first else pair) for pair in pairs]
    too_long = "more than 2 fields (quote captions with ',' in them)"
    assert read(tmp_path, "\n".join(lines), ".csv") == [too_long, too_long, (THREE, "a cat")]
