"""What a caption is: one definition of empty, the same for `prepare` and training, and captions as ordinary text."""

import io
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tars import write_tar
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eve_ds import limits
from eve_ds.config import SourceConfig
from eve_ds.data.caption_text import clean_caption, decode_caption
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.errors import BadSample
from eve_ds.data.masking import mask_tokens, sample_rng
from eve_ds.data.order import Place
from eve_ds.data.shards import find_shards
from eve_ds.data.sources import ShardsSource
from eve_ds.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from eve_ds.data.transforms import TrainTransform

INVISIBLE = [
    *("", " ", "\t\r\n", "\0", "\x1b", "\x7f", "\x85", "\xa0", "\xad", "\u034f", "\u115f", "\u1680", "\u180e"),
    *("\u2000\u200a", "\u200b", "\u200c", "\u200d", "\u200e\u200f", "\u2028\u2029", "\u202a", "\u202f", "\u2060"),
    *("\u2066", "\u2800", "\u3000", "\u3164", "\ufe0f", "\ufeff", "\uffa0", "\ufff9", "\U000e0020", "\U000e0100"),
    *("\ue000", "\ufeff \u200b\x00", "\u0301"),
]
INVISIBLE_CATEGORIES = {"Cc", "Cf", "Co", "Zs", "Zl", "Zp"}
PHOTO = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PHOTO, "PNG")


def trained_caption(folder, caption):
    """Caption that training reads from a shard, or the reason why it reads none."""
    folder.mkdir(exist_ok=True)
    path = write_tar(folder / "a.tar", [("a.png", PHOTO.getvalue()), ("a.txt", caption)])
    source = ShardsSource(
        SourceConfig(kind="shards", shards=str(path)), TrainTransform(8, (1.0, 1.0), 0.0, 0), find_shards(str(path))
    )
    try:
        return source.read(Place(source=0, epoch=0, shard=0, number=0, slot=0)).caption
    except BadSample as bad:
        return bad.reason
    finally:
        source.close()


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_caption_without_anything_to_read_is_empty_everywhere(tmp_path, text):
    assert clean_caption(text) == ""
    for caption in (text, text.encode()):
        with pytest.raises(BadSample, match="empty caption"):
            decode_caption(caption)
    assert trained_caption(tmp_path / "shards", text.encode()) == "missing caption"


@pytest.mark.parametrize(
    "edge", [text for text in INVISIBLE if text not in "\u034f\u115f\u2800\u3164\ufe0f\uffa0\u0301"]
)
@pytest.mark.parametrize(
    "caption", ["a cat", "7", "?", "猫", "👍", "❤\ufe0f", "👩\u200d👩\u200d👧", "é", "नमस्ते", "©", "_"]
)
def test_the_ends_of_a_caption_are_cleaned_and_its_inside_stays(edge, caption):
    if edge[:1] == "\U000e0100":  # a variation selector changes the character before it
        return
    assert clean_caption(f"{edge}{caption}{edge}") == caption
    assert decode_caption(f"{edge}{caption}{edge}".encode()) == caption


SIGNS = [
    *("\U0001fa77", "\U0001fae8", "\U0001fadc", "\U0001cc00", "\u0c5c"),  # Unicode 15 to 17: emoji, symbols, a letter
    *("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\U0001f3f3\ufe0f\u200d\U0001f308"),
    *("\u0d28\u0d4d\u200d", "\u0dc1\u0dca\u200d", "\u0915\u094d\u200c"),  # chillu of Malayalam, half forms
]


@pytest.mark.parametrize("sign", SIGNS, ids=ascii)
@pytest.mark.parametrize("edge", ["", " ", "\u200b", "\ufeff", "\r\n"])
def test_a_sign_keeps_its_invisible_parts_and_new_emoji_are_kept(sign, edge):
    for caption in (sign, f"a cat {sign}", f"{sign} a cat"):
        assert clean_caption(f"{edge}{caption}{edge}") == caption


@pytest.mark.parametrize(
    "text", ["\ufdd0", "\uffff", "\U0001fffe", "\U0010ffff", "\u2065", "\ufff0", "\U000e0fff"], ids=ascii
)
def test_code_points_without_use_are_nothing_to_read(text):
    assert clean_caption(text) == ""
    assert clean_caption(f"{text}a{text}") == "a"


@pytest.mark.parametrize("end", ["\u200d", "\u200c", "\U000e0067\U000e007f", "\U000e007f"], ids=ascii)
def test_invisible_parts_without_their_sign_are_removed(end):
    for caption in ("a", "\U0001f44d", "\u0915\u093e"):
        assert clean_caption(caption + end) == caption


@given(st.text(max_size=8))
def test_what_prepare_writes_is_what_training_reads(text):
    try:
        written = decode_caption(text)
    except BadSample:
        return
    assert clean_caption(written) == written
    assert unicodedata.category(written[0]) not in INVISIBLE_CATEGORIES
    assert unicodedata.category(written[-1]) not in INVISIBLE_CATEGORIES or written[-1] in "\u200c\u200d\U000e007f"
    assert written in text


@pytest.mark.parametrize("caption", [b"\xff", b"\xe9t\xe9", "\udcff", "a \ud800 cat", b"\xff\xfea\0"])
def test_bytes_that_are_not_utf8_are_counted(caption):
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        decode_caption(caption)


def test_html_entities_are_replaced_on_request_only():
    written = "salt &amp; pepper &#39;&eacute;t&eacute;&#39; &lt;b&gt; 5 &euro;&nbsp;"
    assert decode_caption(written) == written
    assert decode_caption(written, unescape_html=True) == "salt & pepper 'été' <b> 5 €"
    with pytest.raises(BadSample, match="empty caption"):
        decode_caption("&nbsp;&#8203;", unescape_html=True)


def test_a_long_caption_is_counted_before_it_is_written():
    longest = "x" * limits.CAPTION_CHARACTERS
    assert decode_caption(f" {longest}\n") == longest
    with pytest.raises(BadSample, match="caption longer than 10,000 characters"):
        decode_caption(longest + "x")


# ------------------------------------------------------------------------------------------------- as tokens


def split_at_spaces():
    """Tokenizer whose vocabulary holds its special tokens as words, and whose words end at white space only."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "a", "red", "<eod>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    named = dict(zip(SPECIAL_TOKENS, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"), strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, additional_special_tokens=["<eod>"])


@pytest.mark.parametrize("make", [lambda: load_tokenizer("scenes"), split_at_spaces], ids=["scenes", "white space"])
@pytest.mark.parametrize("form", ["{}", "a {} red", "{}{}", "a{}red", " {} ", "{} a {}"])
def test_special_tokens_in_a_caption_are_ordinary_text(make, form):
    tokenizer = make()
    encoder = CaptionEncoder(tokenizer, max_length=40)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for token in tokenizer.all_special_tokens:
        for written in (token, token.lower(), token.upper()):
            ids = encoder.encode(form.replace("{}", written))
            assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert not special & set(ids[1:-1].tolist())
            maskable = np.zeros(len(ids), dtype=bool)
            maskable[1:-1] = True
            chosen = mask_tokens(ids, maskable, 1.0, sample_rng(0, 0, "k"), mask_token_id=tokenizer.mask_token_id)
            assert not special & set(chosen.labels.tolist()), "a special token would be predicted"
    plain = tokenizer.convert_tokens_to_ids(["a", "red"])
    assert encoder.encode("a red")[1:-1].tolist() == plain


def test_a_written_special_token_has_the_pieces_of_its_letters():
    encoder = CaptionEncoder(load_tokenizer("scenes"), max_length=40)
    for token in SPECIAL_TOKENS.values():  # the tokenizer lowers letters, so this spelling is no special token
        assert encoder.encode(f"a {token} red").tolist() == encoder.encode(f"a {token.lower()} red").tolist()


def test_other_captions_are_encoded_as_by_the_tokenizer():
    tokenizer = load_tokenizer("scenes")
    encoder = CaptionEncoder(tokenizer, max_length=200)
    for caption in ("a large red circle top left", "Two [brackets] and <angles>", "", "x " * 50, "é 猫 \u200d"):
        assert encoder.encode(caption).tolist() == tokenizer(caption).input_ids


def test_a_megabyte_of_spaces_is_removed_in_linear_time():
    start = time.process_time()
    assert clean_caption("a" + " " * 2**20) == "a"
    assert time.process_time() - start < 3


def test_a_caption_of_a_megabyte_takes_no_time():
    encoder = CaptionEncoder(load_tokenizer("scenes"), max_length=24)
    words = "red circle " * 100_000
    started = time.process_time()
    ids = encoder.encode(words)
    assert time.process_time() - started < 1, "the whole caption would take seconds"
    assert ids.tolist() == encoder.encode(words[:1000]).tolist()
    assert len(encoder.encode("x" * 1_000_000)) == 24
