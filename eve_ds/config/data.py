"""Section `data`: sources, validation pairs, loading."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from eve_ds.config.section import FilePath, Fraction, PositiveInt, Section, Share, ShareBelowOne, expand_path, require
from eve_ds.printable import without_credentials


class SourceConfig(Section):
    """One source of the training mixture."""

    kind: Literal["scenes", "shards"]
    """`scenes`: generated scenes. `shards`: files."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight in the mixture, relative to the weights of the other sources."""
    modalities: Literal["pair", "image", "text", "any"] = "pair"
    """Content of the samples. `pair`: image and caption, both required. `image`, `text`: only the image or the caption;
    the other is ignored. `any`: the content of each sample."""
    shards: Annotated[str | list[str] | None, BeforeValidator(expand_path)] = None
    """`kind: shards`: paths or addresses (https://, s3://, gs://): tars, glob patterns, brace lists such as
    `cc3m-{00000..00331}.tar`, or a folder with an index.json."""
    level: Literal["easy", "hard"] = "easy"
    """`kind: scenes`: difficulty."""
    num_samples: PositiveInt = 1_000_000
    """`kind: scenes`: samples of one epoch."""
    seed: int = 0
    """`kind: scenes`: seed of the generator."""
    reading_order_share: Fraction = 0.0
    """`kind: scenes`: fraction of captions whose phrases are in reading order (row, then column, of the image before a
    flip) at the start of the run; phrases of other captions are in random order."""
    reading_order_samples: PositiveInt | None = None
    """`kind: scenes`: number of samples of the run over which `reading_order_share` falls linearly to 0; None: it stays
    constant. The count covers all sources, all ranks and unusable samples."""

    @field_serializer("shards", when_used="json")
    def _without_credentials(self, shards: str | list[str] | None) -> str | list[str] | None:
        """Addresses in written configurations, which go with checkpoints and exports."""
        if isinstance(shards, list):
            return [without_credentials(item) for item in shards]
        return None if shards is None else without_credentials(shards)

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        require(
            self.kind != "shards" or bool(self.shards),
            "kind 'shards' needs `shards`: name its files, or take kind 'scenes'",
        )
        for name in ("reading_order_share", "reading_order_samples"):
            value = getattr(self, name)
            require(
                self.kind == "scenes" or not value,
                f"{name} ({value}) is for sources of kind 'scenes', not '{self.kind}'; leave it out",
            )
        return self


class ValidationConfig(Section):
    """Held-out pairs; the losses on them are measured every `train.eval_every` steps and at the end of the run."""

    sources: list[SourceConfig] = []
    """Separate sources of pairs; their shards must not be in `data.sources`. Exclusive with `share`."""
    share: ShareBelowOne = 0.0
    """Fraction of the samples of `data.sources` to hold out. The choice depends on a hash of the key, so it is the same
    in every run with this value. Exclusive with `sources`."""
    num_samples: Annotated[int, Field(ge=2)] = 1024
    """Maximum number of pairs of an evaluation, over all ranks."""

    @model_validator(mode="after")
    def _check(self) -> ValidationConfig:
        require(
            bool(self.sources) != (self.share > 0),
            f"needs either sources ({len(self.sources)}) or a share ({self.share:g}): set one of them",
        )
        for source in self.sources:
            require(
                source.modalities == "pair",
                f"sources must hold pairs, not modalities '{source.modalities}': leave the source out",
            )
        return self


CACHE_BYTES = 2**37
"""Default of `data.cache_bytes`."""


class RemoteConfig(Section):
    """Requests for shards at addresses, such as https:// and s3://. A request that fails is repeated after .1 s,
    .2 s, ... up to 30 s, less a random part."""

    reads_ahead: Annotated[int, Field(ge=0, le=256)] = 16
    """Samples that each worker process requests before it needs them, at the same time."""
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds to wait for a connection, and for further bytes."""
    deadline_seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """Seconds after which a read that still fails ends the run, which can be resumed."""
    max_failed_share: Fraction = 0.5
    """Largest fraction of the last reads of a process, at least 200, whose first request failed; above it the run
    ends."""


class DataConfig(Section):
    """Training mixture, tokenizer, loading and augmentation."""

    sources: list[SourceConfig] = [SourceConfig(kind="scenes")]
    """Sources of the training mixture."""
    tokenizer: Annotated[str, BeforeValidator(expand_path)] = "scenes"
    """`scenes` (shipped), or a path or name of a Hugging Face fast tokenizer."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Data loader processes per rank; 0: the training process loads."""
    shuffle_buffer: PositiveInt = 1000
    """Number of consecutive samples that are shuffled together, in addition to the order of shards. Shuffling permutes
    indices, so no sample is held in memory."""
    crop_scale: tuple[Share, Share] = (1.0, 1.0)
    """Smallest and largest area of RandomResizedCrop, as fractions of the image; (1, 1) only resizes."""
    horizontal_flip: Fraction = 0.0
    """Probability of a horizontal flip. Images whose caption contains left or right are never flipped."""
    image_decoder: Literal["auto", "pillow", "simplejpeg"] = "auto"
    """Decoder of JPEG files in training. `simplejpeg` needs the extra `turbo`; `auto` takes it if it is installed. Both
    give the same pixels."""
    validation: ValidationConfig | None = None
    """Pairs for held-out losses; None: no held-out losses."""
    remote: RemoteConfig = RemoteConfig()
    """Requests for shards at addresses."""
    cache_dir: FilePath | None = None
    """Folder on a local disk of each machine for blocks of shards at addresses; processes share it. None: every sample
    is a request."""
    cache_bytes: Annotated[int, Field(ge=2**24, lt=2**63)] = CACHE_BYTES
    """Largest size of `cache_dir` in bytes; blocks that were not used for longest make room."""
    max_bad_share: Fraction = 0.01
    """Largest fraction of unusable samples on a rank, of at least 1,000 samples; above it the run stops."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        low, high = self.crop_scale
        require(low <= high, f"crop_scale ([{low:g}, {high:g}]) must be in ascending order: swap its two numbers")
        require(
            self.cache_dir is not None or self.cache_bytes == CACHE_BYTES,
            f"cache_bytes ({self.cache_bytes}) is for the blocks in cache_dir, which is not set: set it, or leave "
            "cache_bytes out",
        )
        return self
