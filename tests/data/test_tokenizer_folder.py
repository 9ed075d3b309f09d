"""Tokenizers of other people: names that are paths, and the Hub with and without a network."""

import os
import socket
import time

import pytest
from huggingface_hub import constants

from eve_ds.config import ConfigError
from eve_ds.data import tokenizer_folder
from eve_ds.data.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Calls of the Hub's download, which returns a folder with a tokenizer."""
    calls = []
    train_tokenizer(["a red circle"], 60).save_pretrained(tmp_path / "snapshot")

    def download(name, **options):
        calls.append((name, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(tokenizer_folder, "model_info", lambda name, timeout: calls.append("reached"))
    monkeypatch.setattr(tokenizer_folder, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("name", ["bert", "owner/bert", "owner/bert-base_v1.0", "9/9", "a" * 96])
def test_a_name_of_the_hub_is_downloaded_without_code_and_pickles(hub, name):
    assert (
        load_tokenizer(name)("a red circle").input_ids
        == train_tokenizer(["a red circle"], 60)("a red circle").input_ids
    )
    download = {"allow_patterns": ["*.json", "*.txt", "*.model"], "local_files_only": False}
    assert hub == ["reached", (name, download)]


PATHS = [
    "./a",
    "../a/b",
    "/a",
    "/a/b",
    "~/a",
    "~",
    ".",
    "..",
    "",
    " ",
    "a/b/c",
    "a/",
    "a//b",
    "a\\b",
    "a b",
    "a\nb",
    "a\0b",
]
PATHS += [
    "-a",
    "a" * 97,
    "here/missing",
    "here/../a",
    "here/owner",
    "a/..",
    "ä",
    "a:b",
    "hf://a",
    "https://a/b",
    "*",
    "file",
]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_never_sent_to_the_hub(hub, name, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(name)
    assert hub == []
    assert "\n" not in str(caught.value).replace(name, "")


def test_a_folder_is_read_before_a_name(hub, tmp_path):
    train_tokenizer(["a red circle"], 60).save_pretrained(tmp_path / "owner/bert")
    load_tokenizer("owner/bert")
    assert hub == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("how", ["no name server", "no answer", "refused"])
def test_without_a_network_the_error_comes_soon(monkeypatch, tmp_path, how):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def resolve(host, port, *_, **__):
        if how == "no name server":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", silent if how == "no answer" else 1))]

    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = server.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(tokenizer_folder, "HUB_SECONDS", 0.5)
        started = time.monotonic()
        with pytest.raises(
            ConfigError, match=r"no tokenizer of this name could be loaded .*name a folder, or run `hf down"
        ):
            load_tokenizer("nobody/nothing")
    assert time.monotonic() - started < 8


def test_a_cached_tokenizer_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--owner--bert/snapshots/abc"
    train_tokenizer(["a red circle"], 60).save_pretrained(snapshot)
    os.makedirs(tmp_path / "models--owner--bert/refs")
    (tmp_path / "models--owner--bert/refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name is resolved"))
    assert load_tokenizer("owner/bert")("a red circle").input_ids[0] == 2


@pytest.mark.parametrize(
    ("normalizer", "growth"),
    [
        (None, 1),
        ({"type": "Lowercase"}, 1),
        ({"type": "Replace", "pattern": {"String": "``"}, "content": '"'}, 1),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, 1),
        ({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, 2),
        ({"type": "Replace", "pattern": {"String": ""}, "content": "ab"}, 3),
        ({"type": "Replace", "pattern": {"String": "ab"}, "content": "x" * 7}, 4),
        ([{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 10, 1024),
    ],
)
def test_the_growth_of_a_text_is_bounded(normalizer, growth, monkeypatch):
    tree = {
        "normalizer": {"type": "Sequence", "normalizers": normalizer} if isinstance(normalizer, list) else normalizer
    }
    monkeypatch.setattr(tokenizer_folder, "GROWTH", growth)
    tokenizer_folder._check_document(tree)
    monkeypatch.setattr(tokenizer_folder, "GROWTH", growth - 1)
    with pytest.raises(ValueError, match=f"could make a text {growth:,} times as long"):
        tokenizer_folder._check_document(tree)
