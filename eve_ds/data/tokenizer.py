"""Tokenizers: any Hugging Face fast tokenizer, or a lower-case BPE tokenizer trained on captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eve_ds.config import ConfigError
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer_folder import as_config_error, load_pretrained, read_tokenizer_file

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""Special tokens in the order of their IDs in tokenizers trained here. Other tokenizers use another order, so read IDs
from the tokenizer."""
SHIPPED = ("scenes",)
CONTINUATION = "##"
"""Prefix of a piece that does not start a word, so that the token of a whole word is the word itself."""
MAX_ALPHABET = 1000
"""Number of characters, the most frequent ones, that get a token, or a quarter of the vocabulary if that is
more; others become [UNK]."""
PROBE = "Aa0 ~!é猫👍\u200d"
"""Text that a tokenizer must encode before a run starts; hardly any vocabulary has all of its characters."""

_NORMALIZER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
_PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()
_HAN = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
"""Chinese has no spaces: without this, a clause would be one word. As in BERT, each character is a word."""


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """Load `scenes` (shipped), a `tokenizer.json`, a folder written by `save_pretrained`, or a Hub name.

    Raises:
        ConfigError: the tokenizer does not exist, is not a fast tokenizer, lacks a special token, hides words behind
            another special token, cannot encode a text, or does not encode text as [CLS] text [SEP].
    """
    path = Path(name_or_path)
    if str(name_or_path) in SHIPPED:
        resource = resources.files("eve_ds") / "data" / "synthetic" / f"{name_or_path}_tokenizer.json"
        tokenizer = _wrap(Tokenizer.from_str(resource.read_text(encoding="utf-8")))
    elif path.suffix == ".json":
        with as_config_error(f"tokenizer file {path} cannot be used"):
            tokenizer = _wrap(_with_special_tokens(path))
    else:
        tokenizer = load_pretrained(str(name_or_path))
    with as_config_error(f"tokenizer '{name_or_path}' cannot encode a text"):
        _check(tokenizer, str(name_or_path))
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer (Sennrich et al. 2016) on captions: NFKC, lower case, words and punctuation separated.

    Each Chinese character is a word. A tokenizer trained without any does not separate them.

    Special tokens get the IDs 0 to 4 in the order of :data:`SPECIAL_TOKENS`. The result does not depend on the order of
    the captions. The vocabulary is smaller than `vocab_size` if the captions contain no more pairs to merge.

    Raises:
        ConfigError: no captions, or `vocab_size` is too small for the characters of the captions.
    """
    words = Counter(
        word for caption in captions for word, _ in _PRE_TOKENIZER.pre_tokenize_str(_NORMALIZER.normalize_str(caption))
    )
    if not words:
        raise ConfigError("captions to train the tokenizer on are empty; provide at least one word")
    tokenizer = Tokenizer(_train_bpe(_separate_han(words), vocab_size))
    tokenizer.normalizer = _NORMALIZER
    with_han = pre_tokenizers.Sequence([_PRE_TOKENIZER, _HAN])
    tokenizer.pre_tokenizer = with_han if _has_han(words) else _PRE_TOKENIZER
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION, cleanup=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return _wrap(tokenizer)


def _has_han(words: Iterable[str]) -> bool:
    characters = "".join({char for word in words for char in word})
    return len(_HAN.pre_tokenize_str(f"a{characters}")) > 1


def _separate_han(words: Counter[str]) -> Counter[str]:
    """Counted words with each Chinese character as a word."""
    separated = Counter[str]()
    for word, count in words.items():
        for piece, _ in _HAN.pre_tokenize_str(word):
            separated[piece] += count
    return separated


def _train_bpe(words: Counter[str], vocab_size: int) -> models.BPE:
    """Train a BPE model on counted words; its token IDs depend on the counts only.

    The trainer numbers continuation pieces in the order of a randomly seeded hash map and breaks ties by number.
    Therefore it receives these pieces as special tokens; the returned model treats them as ordinary tokens.
    """
    characters = Counter[str]()
    for word, count in words.items():
        characters.update(dict.fromkeys(word, count))
    most = max(MAX_ALPHABET, vocab_size // 4)
    alphabet = sorted(sorted(characters, key=lambda char: (-characters[char], char))[:most])
    kept = set(alphabet)
    pieces = sorted({CONTINUATION + char for word in words for char in word[1:] if char in kept})
    reserved = [*SPECIAL_TOKENS.values(), *pieces]
    if vocab_size < len(reserved) + len(alphabet):
        raise ConfigError(
            f"vocab_size ({vocab_size}) must be at least {len(reserved) + len(alphabet)}: the special tokens and the "
            "characters of the captions, at the start of words and inside"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=reserved,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    trained = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix=CONTINUATION))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator((" ".join([word] * count) for word, count in words.items()), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return models.BPE(model["vocab"], merges, unk_token="[UNK]", continuing_subword_prefix=CONTINUATION)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _with_special_tokens(path: Path) -> Tokenizer:
    tokenizer = read_tokenizer_file(path)
    missing = [token for token in SPECIAL_TOKENS.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise ConfigError(
            f"tokenizer file {path} has no {', '.join(missing)}; give the folder written by save_pretrained, "
            "which names its special tokens"
        )
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    missing = [key for key in SPECIAL_TOKENS if getattr(tokenizer, key) is None]
    if missing:
        raise ConfigError(f"tokenizer '{name}' has no {', '.join(missing)}; masked signal modeling needs all of them")
    mask = tokenizer.mask_token
    same = [key for key in SPECIAL_TOKENS if key != "mask_token" and getattr(tokenizer, key) == mask]
    if same:
        raise ConfigError(
            f"tokenizer '{name}' has {mask} as mask_token and as {same[0]}: a hidden word needs a token of its own"
        )
    CaptionEncoder(tokenizer, max_length=len(PROBE)).encode(PROBE)
    ids = tokenizer("a")["input_ids"]
    if len(ids) < 3 or ids[0] != tokenizer.cls_token_id or ids[-1] != tokenizer.sep_token_id:
        raise ConfigError(
            f"tokenizer '{name}' does not put {tokenizer.cls_token} before and {tokenizer.sep_token} after a text; "
            "give it a post-processor that does"
        )
