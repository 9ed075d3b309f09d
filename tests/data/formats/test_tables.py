"""Rows of CSV and TSV files: quotes as text or as quoting, wrong numbers of fields, missing values, hostile files."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eve_ds import limits
from eve_ds.data.caption_text import ABSENT_CELLS
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.tables import Columns, Row, Table

COLUMNS = Columns("image", "caption", None)
TOO_LONG = {
    ",": "more fields than the header (quote captions with ',' in them)",
    "\t": "more fields than the header (quote captions with '\\t' in them)",
}


def rows(folder, text, suffix=".csv", columns=COLUMNS, delimiter=None):
    path = folder / f"t{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(Table(path, columns, delimiter))


def pairs(found):
    return [row.problem if isinstance(row, Row) else (row.image, *row.captions) for row in found]


def table(delimiter, *captions):
    return "".join(f"{image}{delimiter}{text}\n" for image, text in (("image", "caption"), *enumerated(captions)))


def enumerated(captions):
    return [(f"{number}.jpg", caption) for number, caption in enumerate(captions)]


TEXT_WITH_QUOTES = [
    '"hello',
    'hello"',
    '"',
    '""hello',
    'a 5" pipe',
    '"hello" he said',
    'he said "hello"',
    '"a" and "b"',
    'one " two " three "',
    "it's",
]


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("caption", TEXT_WITH_QUOTES)
def test_a_quote_that_opens_no_field_is_text(tmp_path, delimiter, caption):
    captions = [caption, "a cat", caption, "a dog"]
    found = rows(tmp_path, table(delimiter, *captions), delimiter=delimiter)
    assert pairs(found) == enumerated(captions)


@pytest.mark.parametrize("first", TEXT_WITH_QUOTES)
@pytest.mark.parametrize("second", TEXT_WITH_QUOTES)
def test_two_quotes_in_different_rows_join_nothing(tmp_path, first, second):
    captions = [first, "between", second, "behind"]
    assert pairs(rows(tmp_path, table("\t", *captions), ".tsv")) == enumerated(captions)


captions_of_any_kind = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda text: text.strip() not in ABSENT_CELLS)


def test_rows_of_images_without_a_suffix_are_not_joined(tmp_path):
    text = 'image\tcaption\nx1\t"hello\nx2\tbetween\nx3\tworld"\n'
    assert pairs(rows(tmp_path, text, ".tsv")) == [("x1", '"hello'), ("x2", "between"), ("x3", 'world"')]


@given(st.lists(captions_of_any_kind, min_size=1, max_size=6), st.sampled_from([",", "\t", ";"]), st.booleans())
def test_what_csv_writes_is_read(tmp_path_factory, captions, delimiter, quote_all):
    """Independent reference: the writer of the standard library, which pandas uses."""
    if delimiter == "\t":  # a tab on a later line of a field looks like a row
        captions = [caption.replace("\t", "-") for caption in captions]
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
    writer.writerows([("image", "caption"), *enumerated(captions)])
    folder = tmp_path_factory.mktemp("csv", numbered=True)
    assert pairs(rows(folder, file.getvalue(), delimiter=delimiter)) == enumerated(captions)


@given(
    st.lists(captions_of_any_kind.filter(lambda text: not {*text} & {"\\", '"'}), min_size=1, max_size=6),
    st.sampled_from([",", ";"]),
    st.booleans(),
)
def test_what_spark_writes_is_read(tmp_path_factory, captions, delimiter, quote_all):
    """Quotes stand behind a backslash; reference: the writer of the standard library with this rule."""
    captions = [f'"x{caption}" {number}' for number, caption in enumerate(captions)]
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_NONNUMERIC
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, doublequote=False, escapechar="\\")
    writer.writerows([("image", "caption"), *enumerated(captions)])
    folder = tmp_path_factory.mktemp("csv", numbered=True)
    assert pairs(rows(folder, file.getvalue(), delimiter=delimiter)) == enumerated(captions)


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        (r'"a \"red\" cat, on a mat"', 'a "red" cat, on a mat'),
        (r'"\"\""', '""'),
        (r'"\"red\" in C:\\"', '"red" in C:' + "\\"),
        (r'"a 5\" pipe"', 'a 5" pipe'),
        (r"a 5\" pipe", r"a 5\" pipe"),
        (r"C:\new \ x", r"C:\new \ x"),
        (r'"C:\new, \ x"', r"C:\new, \ x"),
        (r'"a" \"b\"', r'"a" \"b\"'),
    ],
)
def test_a_backslash_escapes_quotes_of_a_quoted_field_alone(tmp_path, written, caption):
    text = f"image,caption\n0.jpg,{written}\n1.jpg,a dog\n"
    assert pairs(rows(tmp_path, text)) == [("0.jpg", caption), ("1.jpg", "a dog")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_marks_are_no_text(tmp_path, end, bom, last):
    text = end.join(["image,caption", "a.jpg,one", "", "b.jpg,two"]) + (end if last else "")
    assert pairs(rows(tmp_path, bom + text.encode())) == [("a.jpg", "one"), ("b.jpg", "two")]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_rows_with_too_many_or_too_few_fields_are_counted(tmp_path, delimiter):
    lines = [("image", "caption"), ("a.jpg", "a dog", " asleep"), ("b.jpg",), ("c.jpg", "whole"), ("", "no image")]
    lines += [("d.jpg", '"unpaired', "cut"), ("e.jpg", "trailing", "", "")]
    text = "\n".join(map(delimiter.join, lines))
    found = rows(tmp_path, text, delimiter=delimiter)
    assert pairs(found) == [
        TOO_LONG[delimiter],
        "malformed entry",
        ("c.jpg", "whole"),
        "malformed entry",
        TOO_LONG[delimiter],
        ("e.jpg", "trailing"),
    ]
    assert [row.number for row in found if isinstance(row, Row)] == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "cell", ["", " ", "nan", "NaN", "-nan", "None", "null", "NULL", "<NA>", "N/A", "n/a", "NA", "#N/A", "NaT", " nan "]
)
def test_missing_values_of_pandas_are_absent(tmp_path, cell):
    columns = Columns("image", "caption", "id")
    text = f"image,caption,id\na.jpg,{cell},1\n{cell},a cat,2\nb.jpg,a dog,{cell}\n"
    found = rows(tmp_path, text, columns=columns)
    assert pairs(found) == ["no caption", "malformed entry", ("b.jpg", "a dog")]
    assert found[2].image_id is None


def test_words_that_contain_a_missing_value_are_captions(tmp_path):
    captions = ["nan bread", "none", "Nan", "null island", "NAN"]
    assert pairs(rows(tmp_path, table(",", *captions))) == enumerated(captions)


def test_a_field_above_every_cap_ends_nothing(tmp_path):
    huge = "x" * (limits.ROW_CHARACTERS * 2 + 17)
    captions = [huge, "a", f'"{huge}"', "b", f'"{huge}', "c", "x," * 100_000, "d"]
    found = rows(tmp_path, table(",", *captions))
    used = [row for row in found if not isinstance(row, Row)]
    kept = [row for row in used if len(row.captions[0]) <= limits.CAPTION_CHARACTERS]
    assert pairs(kept) == [("1.jpg", "a"), ("3.jpg", "b"), ("5.jpg", "c"), ("7.jpg", "d")]
    assert len(found) == 8
    assert max(len(row.captions[0]) for row in used) <= limits.ROW_CHARACTERS


def test_a_quote_without_an_end_takes_a_bounded_number_of_lines(tmp_path):
    lines = "".join(f"line {number}\n" for number in range(1000))
    found = rows(tmp_path, f'image,caption\na.jpg,"open\n{lines}b.jpg,a cat\n')
    assert pairs(found)[0] == ("a.jpg", '"open')
    assert pairs(found)[-1] == ("b.jpg", "a cat")
    assert set(pairs(found)[1:-1]) == {"malformed entry"}


def test_a_nul_byte_makes_its_row_malformed(tmp_path):
    filler = "".join(f"{number}.jpg,a cat\n" for number in range(500))
    found = rows(tmp_path, f"image,caption\n{filler}x.jpg,a \0 cat\ny.jpg,a cat\n")
    assert pairs(found)[-2:] == ["malformed entry", ("y.jpg", "a cat")]


REFUSED = {
    "UTF-16": ("image,caption\na.jpg,x".encode("utf-16"), r"is UTF-16; this is not read: save it as UTF-8"),
    "UTF-16 without a mark": ("image,caption".encode("utf-16-le"), r"it has NUL bytes; this is not read: save it as"),
    "UTF-32": ("image,caption".encode("utf-32"), r"is UTF-16; this is not read|NUL bytes"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of Git LFS; .*: run `git lfs pull`"),
    "web page": (b"<!DOCTYPE html>\n<p>404", r"is a web page; this is not read: download the file again"),
    "Parquet": (b"PAR1\0\0", r"is Parquet; this is not read: give it to `prepare\.py table`, or a list of"),
    "Excel": (b"PK\x03\x04\0", r"is a zip archive or a spreadsheet; this is not read: unpack it, or save the sheet"),
    "gzip": (b"\x1f\x8b\x08", r"is compressed by gzip; this is not read: unpack it"),
    "CC3M": (
        b"a very typical bus station\thttp://x.invalid/a.jpg\nsierra\thttp://x.invalid/b.jpg\n",
        r"is a list of captions and addresses without a header, as CC3M and CC12M publish: give it to `prepare",
    ),
    "CC12M": (b"https://x.invalid/a.jpg\ta very typical bus station\n", r"as CC3M and CC12M publish: give it to `prep"),
    "empty": (b"", r"is empty; expected a header row with the columns image, caption"),
    "blank": (b"\n\n", r"has no column 'image'"),
    "semicolons": (b"image;caption\na.jpg;x\n", r"has no column 'image'; .* \(another delimiter\? --delimiter ';'\)"),
    "tabs": (b"image\tcaption\n", r"has no column 'image'; .*--delimiter '\\t'\)"),
    "other names": (b"file,text\n", r"has no column 'image'; it has: file, text$"),
    "no header row": (b"a.jpg,a dog\n", r"it has: a\.jpg, a dog \(no header row\? put the names of the columns before"),
    "no header row, caption first": (b"a dog,d/a.PNG\n", r"\(no header row\? put the names of the columns before"),
    "no header row, tabs": (b"a.jpg\ta dog\n", r"\(another delimiter\? --delimiter '\\t'; no header row\? put"),
    "a column twice": (b"image,caption,caption\n", r"has 2 columns 'caption': rename all but one"),
    "a long line": (b"x" * 1_000_000, r"has no column 'image'; it has: x+ \.\.\.$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_table_is_one_line(tmp_path, name):
    data, message = REFUSED[name]
    suffix = ".tsv" if name.startswith("CC") else ".csv"
    with pytest.raises(SourceError, match=message) as caught:
        rows(tmp_path, data, suffix)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    for text in (data, b"image,caption\n" + data, b'image,caption\na.jpg,"' + data):
        try:
            found = rows(folder, text)
        except SourceError:
            continue
        assert all(row.number and row.problem if isinstance(row, Row) else row.image and row.captions for row in found)


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("columns", [["caption", "image"], ["caption", "image", "x"], ["x", "caption", "image"]])
@pytest.mark.parametrize("image", ["{}.jpg", "x{}", "http://host/{}"])
@pytest.mark.parametrize("caption", ["a dog\nruns", "a dog\n\nruns\nfast", 'a "dog"\nruns\n', "a dog\r\nruns"])
def test_a_caption_of_several_lines_may_stand_before_its_image(tmp_path, delimiter, columns, image, caption):
    text = caption.replace('"', '""')
    cells = [{"caption": f'"{text}"', "image": image.format(number), "x": "z"} for number in range(2)]
    lines = [columns, *([row[name] for name in columns] for row in cells)]
    found = rows(tmp_path, "".join(delimiter.join(line) + "\n" for line in lines), delimiter=delimiter)
    assert pairs(found) == [(image.format(number), caption) for number in range(2)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("quoted", [True, False])
def test_a_lone_carriage_return_is_text_in_a_file_of_other_line_ends(tmp_path, end, delimiter, quoted):
    captions = ["a dog\rruns", "x\r\ry", "\rz"]
    cells = [f'"{caption}"' if quoted else caption for caption in captions]
    lines = [delimiter.join(pair) for pair in (("image", "caption"), *enumerated(cells))]
    found = rows(tmp_path, end.join([*lines, ""]), delimiter=delimiter)
    assert pairs(found) == enumerated(captions)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_lone_carriage_return_may_stand_beside_a_quoted_field(tmp_path, end):
    lines = ["image,caption,note", '0.jpg,"a dog, asleep",x\ry', '1.jpg,"a \rcat, ""red""",\r']
    assert pairs(rows(tmp_path, end.join([*lines, ""]))) == enumerated(["a dog, asleep", 'a \rcat, "red"'])


def test_line_feeds_in_quotes_are_text_in_a_file_of_carriage_returns(tmp_path):
    assert pairs(rows(tmp_path, 'image,caption\r0.jpg,"a\nb"\r1.jpg,"c\n"\r')) == enumerated(["a\nb", "c\n"])


def test_paths_and_ids_have_no_white_space_around_them(tmp_path):
    columns = Columns("image", "caption", "id")
    text = "caption | image | id\na dog | 1.jpg |  7\n a cat| d/a b.jpg | \n"
    found = rows(tmp_path, text, columns=columns, delimiter="|")
    assert [(row.image, row.image_id) for row in found] == [("1.jpg", "7"), ("d/a b.jpg", None)]


def test_a_row_counts_a_list_of_objects_as_malformed_and_an_empty_list_as_none(tmp_path):
    text = 'image,caption\n0.jpg,"[{\'raw\': \'a\'}]"\n1.jpg,[]\n2.jpg,"[""a"", ""b""]"\n'
    assert pairs(rows(tmp_path, text)) == ["malformed entry", ("1.jpg",), ("2.jpg", "a", "b")]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ("0.jpg", "it ends before the column caption"),
        (",a dog", "image is empty"),
        ("0.jpg,a \0 dog", "it has a NUL byte"),
        ('0.jpg,"[{""raw"": ""a""}]"', 'caption (\'[{"raw": "a"}]\') is a list of other values than texts'),
        ('0.jpg,"[0, 1]"', "caption ('[0, 1]') is a list of other values than texts"),
    ],
)
def test_a_malformed_row_says_what_is_wrong_with_it(tmp_path, row, detail):
    filler = "".join(f"{number}.jpg,a cat\n" for number in range(500))  # a NUL byte at the start is no text
    assert rows(tmp_path, f"image,caption\n{filler}{row}\n")[-1] == Row(501, "malformed entry", detail)
