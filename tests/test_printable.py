"""Text of unknown origin can neither start a log line of its own nor control a terminal."""

import html
import itertools
import logging
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from eve_ds import limits
from eve_ds.checkpoint.files import listed
from eve_ds.cli.command import complain
from eve_ds.cli.conversion_report import print_start
from eve_ds.export.start import DRAWN, StartReport
from eve_ds.log import get_logger
from eve_ds.printable import excerpt, markdown, printable, without_credentials

HOSTILE = {
    "line feed": ("a\n12:00:00 INFO saved", r"a\n12:00:00 INFO saved"),
    "carriage return": ("a\rb", r"a\rb"),
    "color": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    "title": ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    "single-byte escape": ("\x9b31m", r"\x9b31m"),
    "delete": ("a\x7f", r"a\x7f"),
    "null": ("a\0b", r"a\x00b"),
    "right to left": ("gnp.\u202etxt", r"gnp.\u202etxt"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "line separator": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "next line": ("a\x85b", r"a\x85b"),
    "invisible": ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
    "not UTF-8": ("a\udcff", r"a\udcff"),
}


ADDRESSES = {
    "https://user:secret@host/a.tar": "https://host/a.tar",
    "HTTPS://token@host:8080/a.tar": "HTTPS://host:8080/a.tar",
    "http://user:p@ss@host/a.tar": "http://host/a.tar",
    "https://host/a.tar?X-Amz-Credential=k&X-Amz-Signature=s#part": "https://host/a.tar",
    "https://host/a.tar#secret": "https://host/a.tar",
    "https://host/{00..10}.tar?sig=s": "https://host/{00..10}.tar",
    "s3://key:secret@bucket/a?.tar": "s3://bucket/a?.tar",
    "https://user:s@[::1]:80/a": "https://[::1]:80/a",
    "['https://u:p@h/a?s=1', 'https://h/b?s=2'] are": "['https://h/a', 'https://h/b'] are",
    "two https://u:p@h/a?s, https://u:p@h/b?s.": "two https://h/a, https://h/b.",
    "(as https://h/a?x=1&y=6, https://h/b?s=(1,2)!, https://h/c?)": "(as https://h/a, https://h/b, https://h/c)",
    "mail@host and a?b, 1://x@y": "mail@host and a?b, 1://x@y",
    "https://host/a@b.tar": "https://host/a@b.tar",
    "/data/a.tar?x": "/data/a.tar?x",
    "cannot read 'https://u:p@h/it's/a.tar?s=a's', nor \"https://h/b?s\"": "cannot read 'https://h/it's/a.tar', nor "
    '"https://h/b"',
    "https://user:p'ss@host/a.tar?sig=a'b\"c": "https://host/a.tar",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_addresses_in_a_text_are_shown_without_credentials(text, capsys):
    assert printable(text) == ADDRESSES[text]
    complain("prepare.py", text)
    get_logger().error("%s", text)
    assert capsys.readouterr().err.count(ADDRESSES[text]) >= 1


SPELLINGS = {
    "http://host/{}a.tar{}": ["", "my set/", "it's/", '"set"/', "ü ñ/", "x(1),[2]/", "a@b/", "100%25/", "{0..3}/"],
    "s3://bucket/{}a.tar": ["", "my set/", "it's/", "a?b/", "a@b/", "a#b/"],
}
SECRETS = [
    "SECRET",
    "a'SECRET",
    'a"SECRET"',
    "a SECRET",
    "a::SECRET",
    "{SECRET}",
    "a,SECRET",
    "a/SECRET",
    "?SECRET",
    "(SECRET)",
]
USERS = ["", *(f"user:{secret}@" for secret in SECRETS), "SECRET@", ":SECRET@", "user:p@SECRET@", "user:#SECRET@"]


@pytest.mark.parametrize("pattern", SPELLINGS)
def test_no_spelling_of_an_address_shows_credentials(pattern):
    for path, user, secret in itertools.product(SPELLINGS[pattern], USERS, SECRETS):
        query = f"?sig={secret}&b=1" if pattern.startswith("http") else ""
        shown = pattern.format(path, "")
        address = pattern.format(path, query).replace("://", f"://{user}")
        if re.search(r"user:.*[/?#]", user):  # a server would get another host
            shown = f"{pattern.partition('://')[0]}://..."
        assert without_credentials(address) == shown
        assert without_credentials(f"{address}::{address}") == f"{shown}::{shown}"
        assert without_credentials(f"/data/a?.tar::{address}") == f"/data/a?.tar::{shown}"


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text", ["a://" * 50_000, "https://" + "a" * 100_000, "https://a@" * 20_000, "x" * 100_000 + "://"]
)
def test_credentials_are_found_in_linear_time(text):
    printable(text)
    without_credentials(text)


@pytest.mark.parametrize("kind", HOSTILE)
def test_controls_are_escaped_wherever_text_is_shown(kind, capsys, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", False)  # pytest-xdist cannot transfer a report of surrogates
    text, escaped = HOSTILE[kind]
    assert printable(text) == listed([text]) == escaped
    complain("name", text)
    get_logger().warning("key %s", text)
    shown = capsys.readouterr().err.split("\n")
    assert shown[0] == f"name: {escaped}"
    assert shown[1].endswith(f"WARNING key {escaped}")
    assert shown[2:] == [""]


@pytest.mark.parametrize("text", ["", "plain", "a red circle", "übergroß", "红色的圆", "a\\n", "👍🏽", "é"])
def test_words_of_any_script_are_shown_as_they_are(text):
    assert printable(text) == text


def test_no_character_outside_the_escaped_categories_changes():
    for code in range(0x110000):
        char = chr(code)
        same = printable(char) == char
        assert same == (unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"})


def test_a_traceback_in_the_log_keeps_its_lines(capsys):
    try:
        raise ValueError("a\nb")
    except ValueError:
        get_logger().error("key %s", "x\ny", exc_info=True)
    shown = capsys.readouterr().err.split("\n")
    assert shown[0].endswith(r"ERROR key x\ny")
    assert shown[1] == "Traceback (most recent call last):"
    assert logging.getLogger("eve_ds") is get_logger()


SIGNS = st.text(alphabet="ab \t\n|`*_~[]()<>#!&;\\\\$:/.-+=1\x1b\u2028\"'", max_size=30)


@settings(max_examples=300)
@given(SIGNS)
@example("<script>alert(1)</script>")
@example("![a](http://x/y.png)")
@example("&lt;b&gt; &amp; \\| \\\\|")
@example("~~a~~ **b** `c|d` ``")
def test_markdown_shows_a_text_as_it_is(text):
    """In a cell of a table, a parser of Markdown finds the text and nothing else."""
    parser = MarkdownIt("gfm-like", {"linkify": False})
    page = parser.render(f"| {markdown('x' + text + 'x')} | b |\n| --- | --- |\n| {markdown('y' + text + 'y')} | d |\n")
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page, re.DOTALL)]
    assert cells == [f"x{printable(text)}x", "b", f"y{printable(text)}y", "d"]


@pytest.mark.parametrize("length", [0, 1, limits.MESSAGE_CHARACTERS, limits.MESSAGE_CHARACTERS + 1, 10**6])
def test_an_excerpt_is_short(length):
    text = "x" * length
    whole = length <= limits.MESSAGE_CHARACTERS
    assert excerpt(text) == (text if whole else "x" * limits.MESSAGE_CHARACTERS + " ...")


@pytest.mark.parametrize("kind", HOSTILE)
def test_reports_of_a_conversion_are_one_fact_per_line(kind, capsys):
    text, escaped = HOSTILE[kind]
    counts = {"tensors": 2, "parameters": 3, "bytes": 4, "sha256": "c0ffee", "experts": {text: 4}}
    report = StartReport(source=text, origins={text: DRAWN, "b": "file"}, notes=[f"left out: {text}"], **counts)
    print_start(report, Path("out"))
    assert capsys.readouterr().out.split("\n") == [
        f"out: initial weights, converted from {escaped}",
        f"tensors     2, of which 1 drawn: {escaped}",
        "parameters  3",
        f"experts     4 in layer {escaped}",
        "bytes       4",
        "sha256      c0ffee",
        f"note        left out: {escaped}",
        "",
    ]
