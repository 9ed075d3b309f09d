"""Which columns of the metadata of an image folder hold the image and the caption; the same in all three formats."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.metadata import NAMES, metadata_columns


def metadata(folder, name, header):
    """File with the columns and one row."""
    path = folder / name
    row = dict.fromkeys(header, "x")
    if name.endswith("jsonl"):
        path.write_text(json.dumps(row) + "\n")
    elif name.endswith("csv"):
        path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({column: [value] for column, value in row.items()}), path)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("header", "option", "image"),
    [
        (["file_name", "text"], None, "file_name"),
        (["label", "caption", "file_name"], None, "file_name"),
        (["image_file_name", "text"], None, "image_file_name"),
        (["photo_file_name", "text"], None, "photo_file_name"),
        (["mask_file_name", "image_file_name", "text"], None, "image_file_name"),
        (["mask_file_name", "file_name", "text"], None, "file_name"),
        (["file_name", "views_file_names", "text"], None, "file_name"),
        (["file_name", "title"], "title", "file_name"),
        (["file_name", "text", "title"], "title", "file_name"),
    ],
)
def test_the_column_of_the_image_is_found(tmp_path, name, header, option, image):
    columns = metadata_columns(metadata(tmp_path, name, header), option)
    assert (columns.image, columns.caption) == (image, ("text", "caption") if option is None else (option,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("header", "option", "message"),
    [
        (["file_name", "title"], None, "no column 'text' or 'caption'; it has: file_name, title: name the column of"),
        (["file_name", "title"], "heading", "no column 'heading'; it has: file_name, title: name the column of the"),
        (["image", "text"], None, "no column 'file_name' or 'NAME_file_name'; it has: image, text"),
        (["file_names", "text"], None, "lists of files (file_names), and a caption of several images is not read"),
        (["a_file_names", "text"], None, "lists of files (a_file_names), and a caption of several images is not read"),
        (["a_file_name", "b_file_name", "text"], None, "several columns of files (a_file_name, b_file_name): choo"),
    ],
)
def test_metadata_without_one_image_and_caption_say_what_to_do(tmp_path, name, header, option, message):
    path = metadata(tmp_path, name, header)
    with pytest.raises(SourceError) as caught:
        metadata_columns(path, option)
    assert str(caught.value).startswith(f"{path} has {message}")
    assert str(caught.value).endswith("--caption_column") == ("title" in header)


def test_keys_may_be_absent_in_the_first_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a"}\n7\n{"file_name": "b", "caption": "x"}\n')
    assert metadata_columns(tmp_path / "metadata.jsonl").image == "file_name"
