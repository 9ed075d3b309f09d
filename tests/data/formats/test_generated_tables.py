"""Thousands of small generated tables: what the `csv` module wrote, lines without quoting, and aligned columns."""

import csv
import io
import random

import pytest

from eve_ds.data.formats.tables import Columns, Row, Table

FILES = 400
COLUMNS = [
    ["image", "caption"],
    ["caption", "image"],
    ["caption", "image", "split"],
    ["split", "caption", "image"],
    ["image", "split", "caption"],
]
IMAGES = ["d/{}.jpg", "photo {}.PNG", "https://host/{}?size=2"]
TEXT = [
    "a dog",
    'a 5" pipe',
    'he said "hi"',
    "it's",
    "Ünï",
    " ",
    "\\",
    '\\"',
    '"',
    "[x]",
    "1.jpg of two",
    "carriage\rreturn",
]
QUOTED_TEXT = [*TEXT, "red, blue", "x;y", "a|b", "tab\there", "line\nend", "line\r\nend", "\n\n", '"all"']


def words(rng, parts):
    return rng.choice(["", " "]).join(rng.choice(parts) for _ in range(rng.randint(1, 4)))


def records(rng, image, parts):
    return [
        {"image": image.format(number), "caption": f"c{words(rng, parts)}", "split": rng.choice(["train", "", "val"])}
        for number in range(rng.randint(1, 4))
    ]


def read(path, text, delimiter):
    path.write_bytes(text.encode())
    table = Table(path, Columns("image", "caption"), delimiter)
    return [row if isinstance(row, Row) else (row.image, *row.captions) for row in table]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_csv_wrote_is_read(tmp_path, image, quoting, end):
    rng = random.Random(f"{image} {quoting} {end}")
    for _ in range(FILES // 2):
        delimiter, columns = rng.choice(",;|\t"), rng.choice(COLUMNS)
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        rows = records(rng, image, QUOTED_TEXT)
        writer.writerows([columns, *([row[name] for name in columns] for row in rows)])
        expected = [(row["image"], row["caption"]) for row in rows]
        assert read(tmp_path / "a.csv", file.getvalue(), delimiter) == expected, file.getvalue()


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_without_quoting_are_read_by_their_lines(tmp_path, image, end):
    rng = random.Random(f"{image} {end}")
    for _ in range(FILES):
        delimiter, columns = rng.choice(",;|\t"), rng.choice(COLUMNS)
        rows = records(rng, image, TEXT)
        for row in rows:  # a caption may begin with a quote, but one that ends with a quote too is a quoted field
            row["caption"] = rng.choice(["", '"']) + row["caption"].rstrip('" ') + "."
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        text = "".join(delimiter.join(fields) + end for fields in lines)
        expected = [(row["image"], row["caption"]) for row in rows]
        assert read(tmp_path / "a.csv", text, delimiter) == expected, text


@pytest.mark.parametrize("delimiter", [",", "|", ";", "\t"])
def test_white_space_around_fields_is_no_text(tmp_path, delimiter):
    """Tables that people align; reference: the same fields without the padding."""
    rng = random.Random(delimiter)
    spaces = ["", " ", "  "] if delimiter == "\t" else ["", " ", " \t"]
    for _ in range(FILES):
        columns, rows = rng.choice(COLUMNS), records(rng, IMAGES[0], [*QUOTED_TEXT[:6], f"x{delimiter} y", '", "'])
        lines = [columns]
        for row in rows:
            quoted = row["caption"].replace('"', '""')
            lines.append([f'"{quoted}"' if name == "caption" else row[name] for name in columns])
        pad = (f"{rng.choice(spaces)}{{}}{rng.choice(spaces)}").format
        text = "".join(delimiter.join(map(pad, fields)) + "\n" for fields in lines)
        expected = [(row["image"], row["caption"]) for row in rows]
        assert read(tmp_path / "a.csv", text, delimiter) == expected, text
