"""The options of a download: img2dataset's own, under its names, as the flags of the commands that download."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]
_HOW = {
    "processes_count",
    "thread_count",
    "timeout",
    "retries",
    "enable_wandb",
    "wandb_project",
    "distributor",
    "subjob_size",
    "max_shard_retry",
    "incremental_mode",
}
"""Options that decide how a download goes, not what comes of it."""


@dataclass(frozen=True)
class DownloadOptions:
    """What img2dataset takes, with defaults that suit embedding.

    Args:
        input_format: how the list is written, where its name does not tell
        url_col: the column of URLs, where its name does not tell
        caption_col: the column of captions, where its name does not tell; none for no captions
        save_additional_columns: columns to keep, as a,b; where not given, all that can become metadata; none for none
        output_format: how pictures are stored; `clip-index embed` reads the first three
        number_sample_per_shard: URLs a shard; where not given, 1000, or 10000 from 100,000 URLs on
        image_size: pixels that resize_mode aims at
        resize_mode: what becomes of the proportions; keep_ratio makes the shorter side image_size
        resize_only_if_bigger: enlarge smaller pictures too
        upscale_interpolation: how pictures are enlarged
        downscale_interpolation: how pictures are made smaller
        encode_format: what resized pictures are written as
        encode_quality: of jpg and webp from 0 to 100, of png the compression from 0 to 9
        skip_reencode: write all pictures anew, those too that need no resizing
        disable_all_reencoding: keep the bytes of all pictures, unread
        min_image_size: leave out pictures whose shorter side is smaller
        max_image_area: leave out pictures of more pixels
        max_aspect_ratio: leave out pictures that are longer by more than this
        bbox_col: a column of boxes to blur
        extract_exif: no column with what cameras write into pictures
        compute_hash: the checksum that becomes a column
        verify_hash: a column of checksums and their kind, as md5,md5; pictures of others are left out
        processes_count: processes, each with a shard at a time; where not given, one a core
        thread_count: downloads at once, in each process
        timeout: seconds to wait for a server
        retries: how often to try again
        user_agent_token: what names you to servers
        disallowed_header_directives: words of X-Robots-Tag that forbid a picture, as noai,noindex; none ignores them
        max_shard_retry: how often to try a shard again that could not be written
        oom_shard_count: digits of a shard's number
        incremental_mode: incremental goes on where an earlier run stopped, overwrite begins anew
        distributor: what spreads the shards
        subjob_size: shards that pyspark gets at once
        enable_wandb: report to Weights & Biases
        wandb_project: its project there
    """

    input_format: Literal[
        "auto", "csv", "csv.gz", "tsv", "tsv.gz", "json", "json.gz", "jsonl", "jsonl.gz", "txt", "txt.gz", "parquet"
    ] = "auto"
    url_col: str | None = None
    caption_col: str | None = None
    save_additional_columns: str | None = None
    output_format: Literal["webdataset", "files", "parquet", "tfrecord", "dummy"] = "webdataset"
    number_sample_per_shard: int | None = None
    image_size: int = 384
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio"
    resize_only_if_bigger: bool = True
    upscale_interpolation: Interpolation = "lanczos"
    downscale_interpolation: Interpolation = "area"
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int | None = None
    skip_reencode: bool = True
    disable_all_reencoding: bool = False
    min_image_size: int = 0
    max_image_area: float | None = None
    max_aspect_ratio: float | None = None
    bbox_col: str | None = None
    extract_exif: bool = True
    compute_hash: Literal["sha256", "sha512", "md5", "none"] = "sha256"
    verify_hash: str | None = None
    processes_count: int | None = None
    thread_count: int = 32
    timeout: int = 10
    retries: int = 1
    user_agent_token: str | None = None
    disallowed_header_directives: str | None = None
    max_shard_retry: int = 1
    oom_shard_count: int = 5
    incremental_mode: Literal["incremental", "overwrite"] = "incremental"
    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing"
    subjob_size: int = 1000
    enable_wandb: bool = False
    wandb_project: str = "img2dataset"

    def check(self) -> None:
        """Raise UsageError for a number that makes no sense."""
        from clip_index.types import UsageError  # numpy comes with it: --help does without

        least = {"number_sample_per_shard": 1, "image_size": 1, "processes_count": 1, "thread_count": 1, "timeout": 1}
        least |= {"retries": 0, "max_shard_retry": 0, "oom_shard_count": 1, "subjob_size": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"--{name} {value}: expected {smallest} or more")
        verified = self.words("verify_hash")
        if verified is not None and (len(verified) != 2 or verified[1] != self.compute_hash):
            raise UsageError(f"--verify_hash {self.verify_hash}: expected a column and {self.compute_hash}, as a,b")

    def words(self, name: str) -> list[str] | None:
        """An option that is a list, as a list: `a,b`, `[a,b]` and `["a","b"]` mean the same, `none` is empty."""
        value = getattr(self, name)
        if value is None:
            return None
        words = [word.strip(" '\"") for word in value.strip(" []()").split(",")]
        return [word for word in words if word and value != "none"]

    def deciding(self) -> dict[str, Any]:
        """The options that decide which files a download makes, and what is in them."""
        return {name: value for name, value in asdict(self).items() if name not in _HOW}

    def arguments(self) -> dict[str, Any]:
        """What img2dataset gets; its own defaults stand for what is not given."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given |= {name: self.words(name) for name in ("verify_hash", "disallowed_header_directives") if name in given}
        if self.compute_hash == "none":
            given["compute_hash"] = None
        if self.encode_format == "png" and self.encode_quality is None:
            given["encode_quality"] = 6  # the default of img2dataset is one of jpg
        return {**given, "incremental_mode": "incremental"}
