"""Rows that `--where COLUMN=VALUE` takes, in every command that has the option."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from photo_sets import one_line, photo, prepare, write

from eve_ds.cli.prepare import build_parser, main
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.where import EVERY_ROW, Where

ROWS = [
    {"split": "train", "lang": "en", "fold": 1, "ok": True},
    {"split": "test", "lang": "en", "fold": 2, "ok": False},
    {"split": "restval", "lang": "de", "fold": None, "ok": True},
    {"split": "train", "lang": "de", "fold": 1, "ok": False},
]
"""Row N describes image N."""


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], [0, 1, 2, 3]),
        (["split=train"], [0, 3]),
        (["split=train", "split=restval"], [0, 2, 3]),
        (["split=train", "lang=de"], [3]),
        (["split= train "], [0, 3]),
        (["fold=1"], [0, 3]),
        (["fold="], [2]),
        (["ok=true"], [0, 2]),
        (["ok=True"], [0, 2]),
    ],
)
def test_values_of_a_column_are_alternatives_and_columns_hold_together(conditions, expected):
    where = Where.of(text.split("=") for text in conditions)
    assert [number for number, row in enumerate(ROWS) if where.holds(row)] == expected


@pytest.mark.parametrize("cell", ["1", "1.0", " 1 ", 1, 1.0])
def test_a_whole_number_has_one_text(cell):
    assert Where.of([("fold", "1")]).holds({"fold": cell})


def test_a_value_that_no_row_has_is_named(tmp_path):
    for value in ("dev", ""):
        with pytest.raises(SourceError) as error:
            Where.of([("split", "train"), ("split", value)]).require_values(ROWS, tmp_path / "a.csv")
        expected = f"a.csv has no row with split={value}; it has: train (2), test (1), restval (1)"
        assert str(error.value).endswith(expected)
    EVERY_ROW.require_values([], tmp_path)


def table(folder, suffix):
    rows = [{"image": f"{n}.png", "caption": f"caption {n}", **row} for n, row in enumerate(ROWS)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    elif suffix == ".json":
        write(folder, {"a.json": json.dumps(rows)})
    else:
        lines = [rows[0], *(["" if cell is None else str(cell) for cell in row.values()] for row in rows)]
        write(folder, {"a.csv": "".join(",".join(line) + "\n" for line in lines)})
    return folder / f"a{suffix}"


def image_folder(folder, suffix):
    file = table(folder, suffix)
    if suffix == ".json":
        rows = [{"file_name": row.pop("image"), **row} for row in json.loads(file.read_text())]
        write(folder, {"metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    elif suffix == ".csv":
        write(folder, {"metadata.csv": file.read_text().replace("image", "file_name", 1)})
    else:
        read = pyarrow.parquet.read_table(file).rename_columns(["file_name", "caption", *ROWS[0]])
        pyarrow.parquet.write_table(read, folder / "metadata.parquet")
    return folder


def addresses(folder, suffix):
    for n in range(len(ROWS)):
        write(folder / "downloads/00000", {f"{n}.png": photo(n), f"{n}.txt": "x", f"{n}.json": f'{{"url": "{n}.png"}}'})
    file = table(folder, suffix)
    if suffix == ".parquet":
        read = pyarrow.parquet.read_table(file).rename_columns(["url", "caption", *ROWS[0]])
        pyarrow.parquet.write_table(read, file)
    else:
        file.write_text(file.read_text().replace("image", "url"))
    return file


COMMANDS = {
    "table": (table, [".csv", ".parquet"], []),
    "json": (table, [".json"], []),
    "imagefolder": (image_folder, [".csv", ".json", ".parquet"], []),
    "urls": (addresses, [".csv", ".json", ".parquet"], ["--images", "downloads"]),
}


def arguments(folder, command, suffix):
    write(folder, {f"{n}.png": photo(n) for n in range(len(ROWS))})
    make, _, options = COMMANDS[command]
    return command, make(folder, suffix), *options


KINDS = [(command, suffix) for command, (_, suffixes, _) in COMMANDS.items() for suffix in suffixes]


@pytest.mark.parametrize(("command", "suffix"), KINDS)
def test_every_command_takes_the_rows_of_the_condition(tmp_path, monkeypatch, capsys, command, suffix):
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path, command, suffix)
    code, pairs, reasons = prepare(tmp_path / "out", *given, "--where", "split=train", "--where", "split=restval")
    assert (code, pairs, reasons) == (0, {n: f"caption {n}" for n in (0, 2, 3)}, {})
    assert prepare(tmp_path / "fold", *given, "--where=fold=1", "--where=lang=en")[1] == {0: "caption 0"}
    capsys.readouterr()
    assert prepare(tmp_path / "none", *given, "--where", "split=dev")[0] == 2
    assert one_line(capsys).endswith("has no row with split=dev; it has: train (2), test (1), restval (1)")
    assert prepare(tmp_path / "all", *given)[1] == {n: f"caption {n}" for n in range(4)}


@pytest.mark.parametrize("command", ["table", "imagefolder", "urls"])
def test_a_column_that_a_table_lacks_is_named(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path, command, ".csv")
    assert prepare(tmp_path / "out", *given, "--where", "part=train")[0] == 2
    assert "has no column 'part' for --where; it has: " in one_line(capsys)


def test_a_finished_folder_is_not_taken_for_that_of_another_condition(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path, "table", ".csv")
    assert prepare(tmp_path / "out", *given, "--where", "split=train")[0] == 0
    capsys.readouterr()
    again = map(str, (*given, "--out", tmp_path / "out", "--where", "split=test"))
    assert main([*again]) == 2
    assert "another source" in one_line(capsys)


@pytest.mark.parametrize("text", ["split", "=train"])
def test_a_condition_without_a_column_or_a_sign_is_refused(capsys, text):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["table", "a.csv", "--out", "x", "--where", text])
    assert caught.value.code == 2
    assert "must be COLUMN=VALUE, such as split=train" in capsys.readouterr().err
