"""Caps for input of unknown origin: sizes of files, images, captions, archives and lists, each with its reason.

A cap is far above what honest data needs. What exceeds one is counted or refused by name, so that a single hostile or
damaged file can neither fill the memory nor stop a run. :mod:`eve_ds.reading` applies the caps of files and of JSON.
"""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30

# ---------------------------------------------------------------------------------------------------------- images

IMAGE_PIXELS = 89_478_485
"""Pixels of one image: the default of Pillow, a quarter of a gigabyte as RGB."""
IMAGE_BYTES = 256 * MIB
"""Bytes of one encoded image: as many as IMAGE_PIXELS take as uncompressed RGB."""

# -------------------------------------------------------------------------------------------------------- captions

CAPTION_CHARACTERS = 10_000
"""Characters of one caption. A model reads some dozens of tokens; a megabyte takes seconds to tokenize."""
ROW_CHARACTERS = 131_072
"""Characters of one row of a table, the default of :mod:`csv` for a field. A quote without an end, or a file without a
line end, would otherwise take the rest of the file."""
ROW_LINES = 100
"""Lines of one row of a table."""
MESSAGE_CHARACTERS = 300
"""Characters of input that a message repeats."""

# ------------------------------------------------------------------------------------------------------- JSON, files

JSON_DEPTH = 100
"""Levels of lists and objects in a JSON document."""
JSON_DIGITS = 300
"""Digits of a number in a JSON document."""
SMALL_JSON_BYTES = 256 * MIB
"""Bytes of a JSON file that a program wrote about other files, such as an index of shards or a configuration."""
ANNOTATION_BYTES = 4 * GIB
"""Bytes of one annotation file, which is parsed in memory."""
RECORD_BYTES = 4 * GIB
"""Bytes of a file of records, such as metrics or predictions, which is parsed in memory."""
CONFIG_BYTES = MIB
"""Bytes of a configuration."""
CONFIG_VALUES = 10_000
"""Keys and values of a configuration, with aliases expanded; the largest preset has some hundred."""
CONFIG_BASES = 20
"""Configurations that extend one another."""
METADATA_BYTES = 16 * MIB
"""Bytes of the text or the metadata of one sample."""

HEADER_BYTES = 100 * 10**6
"""Bytes of the JSON header of a safetensors file, as in the library of that name."""
PICKLE_BYTES = 64 * MIB
"""Bytes of the pickle in a file of torch.save, which names its tensors; their values are not in it."""
TUPLE_ITEMS = 100_000
"""Items of a tuple in such a pickle, those of tuples in it included."""
POINTER_BYTES = 4096
"""Bytes of a file that holds the name of another one."""
TOKENS = 10_000_000
"""Token IDs of a vocabulary, forty times the largest published one."""
TOKENIZER_BYTES = 256 * MIB
"""Bytes of one file of a tokenizer."""
TOKENIZER_DEPTH = 30
"""Levels of lists and objects in a tokenizer.json: a library that is not ours walks through them."""
LAYERS = 1000
"""Layers of a foreign checkpoint."""

# --------------------------------------------------------------------------------------------------- tars and shards

SAMPLE_BYTES = GIB
"""Bytes of one sample in a shard, headers included; the reads of one system call end at 2 GiB."""
SAMPLE_MEMBERS = 1000
"""Members of one sample in a shard."""
TAR_RECORD_BYTES = MIB
"""Bytes of an extension header of a tar, which holds a long name or pax records."""
TAR_DAMAGE_BYTES = IMAGE_BYTES
"""Bytes of a tar that are searched for the next valid header after damage: an image whose header is lost."""
ARCHIVE_RATIO = 20
"""Unpacked bytes of a compressed archive, as a multiple of its own size: images hardly compress."""
ARCHIVE_SMALL_BYTES = 64 * MIB
"""Unpacked bytes that an archive of any size may have."""
SHARDS = 1_000_000
"""Shards of one source: a thousand times a thousand samples in each is more than any published set."""
INDEX_BYTES = 2 * GIB
"""Bytes of an index of shards, with some five for each sample."""
SHARD_SAMPLES = 10_000_000
"""Samples that an index may give for one shard."""
