"""Links, files, presets, settings, flags and make targets that the pages name exist."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

import eve_ds
from eve_ds.config import load_config, presets
from eve_ds.config.tree import Config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "ds_configs", "kernels", "experiments")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
OTHER_PROGRAMS = {"--num_accelerators", "--hostfile", "--nproc_per_node"}
"""Flags of `deepspeed` and `torchrun`, and below of `img2dataset` and pip."""
OTHER_PROGRAMS |= {"--url_list", "--input_format", "--url_col", "--caption_col", "--output_format", "--output_folder"}
OTHER_PROGRAMS |= {"--image_size", "--resize_mode", "--no-deps"}
OTHER_PROGRAMS |= {"--ntasks-per-node", "--distribution"}
TOP_LEVEL = ("eve_ds", "launcher", "ds_configs", "kernels", "tests", "experiments", "docs")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(text):
    """Code blocks and code spans of a page, as one string per block or span."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text):
    """Fragments that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def settings(model, prefix=""):
    """Dotted names of all settings below a pydantic model."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from settings(kind, f"{prefix}{name}.")


@pages
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked.read_text(encoding="utf-8")), target


@pages
def test_named_files_exist(page):
    for text in code(TEXTS[page]):
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(TOP_LEVEL)})/[\w./-]*", text):
            assert (ROOT / path).exists() or page.name == "CHANGELOG.md", path


@pages
def test_named_presets_load(page):
    for text in code(TEXTS[page]):
        for name in re.findall(r"--config (\S+)", text):
            assert name in presets() or load_config(str(ROOT / name))


@pages
def test_named_settings_exist(page):
    if page.is_relative_to(ROOT / "experiments"):
        pytest.skip("reports of experiments name settings of their time")
    known = {*settings(Config), "model.safetensors"}
    sections = "|".join(Config.model_fields)
    for text in code(TEXTS[page]):
        for name in re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z_.]+\b(?!\()", text):
            assert name in known, name


@pages
def test_named_flags_and_make_targets_exist(page):
    sources = [
        *(ROOT / "launcher").rglob("*.py"),
        *(ROOT / "eve_ds").rglob("*.py"),
        *(ROOT / "experiments").rglob("*.py"),
    ]
    known = set(re.findall(r'"(--\w+)"', "".join(file.read_text(encoding="utf-8") for file in sources)))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for text in code(TEXTS[page]):
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]+", text)) <= known | OTHER_PROGRAMS, text
        assert set(re.findall(r"\bmake ([a-z][\w-]*)", text)) <= targets, text


def test_readme_is_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 130


def test_citation_and_changelog_name_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == eve_ds.__version__
    assert f"## {eve_ds.__version__}" in TEXTS[ROOT / "CHANGELOG.md"]
