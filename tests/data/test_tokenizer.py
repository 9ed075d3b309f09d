import json
import random
import re
from collections import Counter
from importlib import resources
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.questions import Questions
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.synthetic.statements import Statements
from eve_ds.data.tokenizer import load_tokenizer, train_tokenizer

CAPTIONS = [
    "A man rides a brown horse, slowly.",
    "Two horses ride across a field in the rain",
    "the Café's brown dog; the rain...",
    "a riding man and a raining field",
]


@pytest.fixture(scope="module")
def scenes_tokenizer():
    return load_tokenizer("scenes")


def test_special_tokens_have_the_first_ids(scenes_tokenizer):
    for tokenizer in (scenes_tokenizer, train_tokenizer(CAPTIONS, 200)):
        assert tokenizer.pad_token_id == 0
        assert tokenizer.unk_token_id == 1
        assert tokenizer.cls_token_id == 2
        assert tokenizer.sep_token_id == 3
        assert tokenizer.mask_token_id == 4
        assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]


def test_scenes_tokenizer_has_one_token_per_word(scenes_tokenizer):
    assert len(scenes_tokenizer) <= 256
    texts = [text for level in ("easy", "hard") for index in range(1500) for text in texts_of(level, index)]
    words = {word for text in texts for word in text.replace("?", " ?").split()}
    assert len(words) > 50
    for word in words:
        assert scenes_tokenizer.tokenize(word) == [word]
    for text in texts[:300]:
        expected = ["[CLS]", *text.replace("?", " ?").split(), "[SEP]"]
        assert scenes_tokenizer.convert_ids_to_tokens(scenes_tokenizer(text).input_ids) == expected


def texts_of(level, index):
    question = Questions(level, split="val")[index]
    return [
        Scenes(level, split="val")[index].caption,
        question.question,
        question.answer,
        Statements(level)[index].text,
    ]


def scenes_corpus():
    """Yield the corpus of the shipped tokenizer: captions, questions with answers, and statements of both levels."""
    for level in ("easy", "hard"):
        scenes, questions, statements = Scenes(level), Questions(level), Statements(level)
        for index in range(6000):
            yield scenes[index].caption
            yield f"{questions[index].question} {questions[index].answer}"
            yield statements[index].text


def test_shipped_tokenizer_equals_one_trained_on_its_corpus():
    trained = train_tokenizer(scenes_corpus(), 256)
    shipped = (resources.files("eve_ds") / "data" / "synthetic" / "scenes_tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(trained.backend_tokenizer.to_str()) == json.loads(shipped)


def test_training_does_not_depend_on_the_order_of_captions():
    shuffled = CAPTIONS * 3
    random.Random(0).shuffle(shuffled)
    first = train_tokenizer(CAPTIONS * 3, 120).backend_tokenizer.to_str()
    for _ in range(5):
        assert train_tokenizer(iter(shuffled), 120).backend_tokenizer.to_str() == first


@pytest.mark.parametrize(
    "text", ["low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3, " ".join(CAPTIONS).lower()]
)
def test_every_merge_joins_the_most_frequent_pair(text):
    """Replay the merges on independently counted pairs; equally frequent pairs may come in any order."""
    counts = Counter(re.findall(r"\w+|[^\w\s]", text))
    words = {word: [word[0], *("##" + char for char in word[1:])] for word in counts}
    model = json.loads(train_tokenizer([text], 1000).backend_tokenizer.to_str())["model"]
    for merge in map(tuple, model["merges"]):
        pairs = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        assert pairs[merge] == max(pairs.values())
        for pieces in words.values():
            for i in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[i : i + 2]) == merge:
                    pieces[i : i + 2] = [pieces[i] + pieces[i + 1].removeprefix("##")]
    assert all(pieces == [word] for word, pieces in words.items())


def test_decoding_restores_the_text_except_case_and_width():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    for caption in CAPTIONS[1], CAPTIONS[3], "rain dog Horse field", "brown \N{FULLWIDTH LATIN SMALL LETTER A} man":
        expected = caption.lower().replace("\N{FULLWIDTH LATIN SMALL LETTER A}", "a")
        assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True) == expected
    assert tokenizer.tokenize("dog, cafe") == ["dog", ",", *tokenizer.tokenize("cafe")]


def test_unknown_characters_become_unk_and_unknown_words_become_pieces(scenes_tokenizer):
    assert scenes_tokenizer.unk_token_id in scenes_tokenizer("a \N{SNOWMAN} circle").input_ids
    pieces = scenes_tokenizer.tokenize("starling")
    assert len(pieces) > 1
    assert "".join(piece.removeprefix("##") for piece in pieces) == "starling"


def test_mask_token_in_text_is_encoded_as_the_mask(scenes_tokenizer):
    ids = scenes_tokenizer("a [MASK] circle").input_ids
    assert ids[2] == scenes_tokenizer.mask_token_id


def test_saved_folder_and_file_load_the_same_tokenizer(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 150)
    tokenizer.save_pretrained(tmp_path / "folder")
    tokenizer.backend_tokenizer.save(str(tmp_path / "alone.json"))
    for path in (tmp_path / "folder", str(tmp_path / "folder"), tmp_path / "alone.json"):
        loaded = load_tokenizer(path)
        assert loaded(CAPTIONS).input_ids == tokenizer(CAPTIONS).input_ids
        assert loaded.mask_token_id == tokenizer.mask_token_id


def test_training_refuses_empty_captions_and_too_small_a_vocabulary():
    with pytest.raises(ConfigError, match="captions to train the tokenizer on are empty"):
        train_tokenizer(["", "  "], 100)
    with pytest.raises(ConfigError, match=r"vocab_size \(20\) must be at least \d+: the special tokens and the"):
        train_tokenizer(CAPTIONS, 20)
    least = len(train_tokenizer(["ab"], 100)) - 1  # specials, a, b, ##b and, merged, ab
    assert len(train_tokenizer(["ab"], least)) == least
    with pytest.raises(ConfigError, match=rf"vocab_size \({least - 1}\) must be at least {least}"):
        train_tokenizer(["ab"], least - 1)


def test_characters_beyond_the_alphabet_limit_are_unknown(monkeypatch):
    monkeypatch.setattr("eve_ds.data.tokenizer.MAX_ALPHABET", 2)
    tokenizer = train_tokenizer(["aab", "ab", "abz"], 11)  # a quarter of the vocabulary is 2 as well
    assert "[UNK]" in tokenizer.tokenize("z")
    assert tokenizer.tokenize("ab") == ["ab"]


def test_errors_name_unusable_tokenizers(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer file .*absent\.json cannot be read"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer file .*broken\.json cannot be read"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match=r"tokenizer folder .*nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer '.*empty' is not 'scenes', a tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(ConfigError, match=r"plain\.json has no \[PAD\], \[CLS\], \[SEP\], \[MASK\]; give the folder"):
        load_tokenizer(tmp_path / "plain.json")


def test_tokenizers_without_mask_or_template_are_refused(tmp_path):
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **specials).save_pretrained(tmp_path / "no_mask")
    with pytest.raises(ConfigError, match="has no mask_token; masked signal modeling needs all of them"):
        load_tokenizer(tmp_path / "no_mask")
    PreTrainedTokenizerFast(tokenizer_object=plain, **specials, mask_token="[MASK]").save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"does not put \[CLS\] before and \[SEP\] after a text"):
        load_tokenizer(tmp_path / "bare")


CHINESE = ["一只猫在桌子上", "一只狗在桌子下。", "两只猫和 a red ball"]


def test_each_chinese_character_is_a_word():
    """As BERT's own tokenizer divides them; a word of Latin letters beside them stays whole."""
    tokenizer = train_tokenizer([*CHINESE, *CAPTIONS], 400)
    for text in (*CHINESE, "猫red狗", "ab猫", "猫, 狗"):
        words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        bert = normalizers.BertNormalizer(lowercase=False, strip_accents=False).normalize_str(text)
        assert words == [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(bert)]
    assert tokenizer.tokenize("桌子上的猫 a red ball") == ["桌", "子", "上", "[UNK]", "猫", "a", "red", "ball"]


def test_a_tokenizer_trained_without_chinese_characters_is_as_before():
    before = json.loads(train_tokenizer(CAPTIONS, 200).backend_tokenizer.to_str())
    assert before["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    korean = json.loads(train_tokenizer(["고양이 한 마리", "ねこ"], 200).backend_tokenizer.to_str())
    assert korean["pre_tokenizer"] == {"type": "BertPreTokenizer"}


def test_a_large_vocabulary_takes_the_characters_of_chinese():
    characters = [chr(0x4E00 + number) for number in range(1500)]
    tokenizer = train_tokenizer(characters, 8000)
    assert "[UNK]" not in tokenizer.tokenize("".join(characters))
    assert tokenizer.tokenize(f"{characters[7]}{characters[1400]}") == [characters[7], characters[1400]]


def bert(tmp_path, vocabulary, **settings):
    """Folder of a tokenizer as Google published it: vocab.txt beside settings."""
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")
    named = {"tokenizer_class": "BertTokenizer", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    return tmp_path


WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_vocabulary_of_lines_is_read(tmp_path, ends):
    folder = bert(tmp_path, WORDPIECES)
    (folder / "vocab.txt").write_bytes(ends.join(WORDPIECES).encode())
    assert load_tokenizer(folder).convert_ids_to_tokens(load_tokenizer(folder)("A cat 猫").input_ids) == [
        *("[CLS]", "a", "cat", "[UNK]", "[SEP]"),
    ]


def test_a_tokenizer_that_fails_at_an_unknown_word_is_refused(tmp_path):
    """It encodes "a", and would end the run at the first word that it does not know."""
    folder = bert(tmp_path, [word for word in WORDPIECES if word != "[UNK]"])
    with pytest.raises(ConfigError, match=r"cannot encode a text: WordPiece error: Missing \[UNK\] token"):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_be_copied_to_a_worker_is_refused(tmp_path):
    tree = json.loads(train_tokenizer(CAPTIONS, 100).backend_tokenizer.to_str())
    tree["model"]["vocab"]["rain"] = tree["model"]["vocab"]["man"]
    (tmp_path / "twice.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"twice\.json cannot be used: .* out of vocabulary"):
        load_tokenizer(tmp_path / "twice.json")


@pytest.mark.parametrize("other", ["unk_token", "sep_token", "pad_token", "cls_token"])
def test_a_mask_token_with_another_meaning_is_refused(tmp_path, other):
    """A mask that is also the end of each text would make hidden words look like ends."""
    word = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}[other]
    folder = bert(tmp_path, WORDPIECES, mask_token=word)
    message = rf"has \{word[:-1]}\] as mask_token and as {other}: a hidden word needs a token of its own"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(folder)


def test_one_token_may_end_and_pad_texts(tmp_path):
    assert load_tokenizer(bert(tmp_path, WORDPIECES, pad_token="[SEP]")).pad_token_id == 3


def test_the_reason_of_a_library_is_shown_on_one_line(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDPIECES))
    with pytest.raises(ConfigError, match=r"from one of: \(1\) a `tokenizers` library serialization file") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
