"""Decodes one image in a process of its own, which may use little memory and time: `python -m app.core.image_worker`.

Reads a job (JSON) from standard input, writes new files beside each other and what it found (JSON) to standard output.
Whatever a hostile image does, it does here: the server sees an exit status. Files are encoded afresh, so that nothing
but pixels survives: no EXIF, no place, no script that a browser might find.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
REFUSED = 3
"""Exit status: the image is to blame, and the text on standard output says why."""
STORAGE_FAILED = 4
"""Exit status: the files could not be read or written, and the text on standard output says why."""
OF_THE_IMAGE = (None, errno.EINVAL, errno.ENOMEM)
"""Numbers of OSErrors for which an image is to blame: Pillow's own have none, a broken file sends its reader to before
the start, and a large one meets the bound on memory."""


@dataclass(slots=True)
class Job:
    """What to make of which file."""

    source: str
    target: str
    """Path of the new file; smaller ones get `.<edge>` behind it."""
    max_pixels: int
    max_frames: int
    edges: list[int]
    """Longest edges of smaller copies, in WebP."""
    cpu_seconds: int
    memory_bytes: int
    """Of address space."""
    square: bool = False
    """Cut the smaller copies to a square, and make no large one: an avatar."""


@dataclass(slots=True)
class Decoded:
    """What an image turned out to be."""

    media_type: str
    width: int
    height: int
    blurhash: str


class RefusedImage(Exception):
    """The image cannot be taken: a code and a sentence."""


def limit_process(job: Job) -> None:
    """Give this process little to do harm with. Elsewhere than on Linux only the server's own deadline bounds it."""
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)  # people who chat come first
    for kind, soft, hard in (
        (resource.RLIMIT_AS, job.memory_bytes, job.memory_bytes),
        (resource.RLIMIT_CPU, job.cpu_seconds, job.cpu_seconds + 1),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        # Some systems know the limit and do not let it be set.
        with contextlib.nullcontext() if sys.platform == "linux" else contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (soft, hard))


def work(job: Job) -> Decoded:
    """Decode, turn upright, encode afresh, make smaller copies.

    Raises RefusedImage, and OSError when the files cannot be read or written.
    """
    from PIL import Image, ImageFile, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # our own bound, below, is lower and looks before anything is decoded
    try:
        with Image.open(job.source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > job.max_pixels or max(width, height) > 65_000:
                raise RefusedImage(
                    "image_too_large", f"An image has at most {job.max_pixels // 1_000_000} million pixels."
                )
            # A phone's JPEG may bring a second picture (depth, light): MPO, of which the first is the photo.
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            frames = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
            if frames > job.max_frames:
                raise RefusedImage("image_too_large", f"An animation has at most {job.max_frames} pictures.")
            if frames * width * height > job.max_pixels * 4:
                raise RefusedImage("image_too_large", "The animation has too many pixels in all.")
            if job.square:
                image.draft(None, (2 * max(job.edges), 2 * max(job.edges)))  # a JPEG need not be decoded whole
            image.load()
            if frames > 1 and not job.square:
                first = _save_animation(image, kind, job.target)
            else:
                looks = _Looks(image)
                first = _plain(image, "RGBA" if image.has_transparency_data else "RGB")
                # One copy of the picture lives at a time from here on: 25 megapixels are 100 MB.
                image.close()
                looks.apply(first)
                if not job.square:
                    ImageFile.MAXBLOCK = 2 * first.width * first.height  # else a JPEG of noise does not fit its buffer
                    _save(first, kind, job.target)
        for edge in job.edges:
            if job.square:
                copy = ImageOps.fit(first, (edge, edge), Image.Resampling.LANCZOS)
            else:
                scale = min(1.0, edge / max(first.size))
                size = (max(1, round(first.width * scale)), max(1, round(first.height * scale)))
                copy = first.resize(size, Image.Resampling.LANCZOS)
            _write(copy, f"{job.target}.{edge}", "WEBP", quality=80, method=4)
        return Decoded(MEDIA_TYPES[kind], first.width, first.height, _blurhash(first))
    except RefusedImage:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_IMAGE:
            raise
        # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, MemoryError, ...
        raise RefusedImage("invalid_image", "This is not an image that can be read.") from error


def _plain(image: Any, mode: str) -> Any:
    """A copy of a picture, of which nothing but its pixels is left."""
    if image.mode.startswith("I"):
        image = _in_eight_bits(image)
    copy = image.convert(mode) if image.mode != mode else image.copy()
    copy.info.clear()
    return copy


def _in_eight_bits(image: Any) -> Any:
    """16 bits of grey in 8, where `convert` would make white of all but the darkest."""
    wide = image.convert("I")
    grey = wide.point([value >> 8 for value in range(65_536)], "L")
    grey.info.clear()
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(wide.point([0 if value == clear else 255 for value in range(65_536)], "L"))
    return grey


class _Looks:
    """How a file wants its pictures to be shown: which way up, and in which colours."""

    def __init__(self, image: Any) -> None:
        """`image`: its first picture, decoded."""
        from PIL.ExifTags import Base

        self._orientation = 1
        with contextlib.suppress(Exception):  # EXIF that cannot be read: what it says is lost, the picture is not
            self._orientation = image.getexif().get(Base.Orientation, 1)
        self._profile: bytes = image.info.get("icc_profile") or b""
        self._to_srgb: Any = None

    def apply(self, picture: Any) -> None:
        """Turn a plain picture upright, and bring it to sRGB; plain it stays. All of one file have the same mode."""
        from PIL import ImageOps
        from PIL.ExifTags import Base

        if self._orientation in range(2, 9):
            picture.getexif()[Base.Orientation] = self._orientation
            ImageOps.exif_transpose(picture, in_place=True)
        if self._profile:
            self._recolour(picture)
        picture.info.clear()

    def _recolour(self, picture: Any) -> None:
        from PIL import ImageCms

        try:
            if self._to_srgb is None:
                self._to_srgb = ImageCms.buildTransform(
                    io.BytesIO(self._profile), ImageCms.createProfile("sRGB"), picture.mode, picture.mode
                )
            ImageCms.applyTransform(picture, self._to_srgb, inPlace=True)
        except (ImageCms.PyCMSError, OSError, ValueError):
            self._profile = b""  # a broken profile: colours as they are


def _save(image: Any, kind: str, target: str) -> None:
    match kind:
        case "JPEG":
            _write(image, target, "JPEG", quality=88, optimize=True, progressive=True)
        case "WEBP":
            _write(image, target, "WEBP", quality=88, method=4)
        case _:
            _write(image, target, kind, optimize=kind == "PNG" and image.width * image.height < 4_000_000)


class _Output(io.BufferedWriter):
    """A file that hides its number: to that, Pillow writes once without looking at how much was taken, and of a JPEG
    for which the disk has no room half would pass for a whole one."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def _write(image: Any, path: str, kind: str, **options: Any) -> None:
    with _Output(io.FileIO(path, "w")) as file:
        image.save(file, kind, **options)


def _save_animation(image: Any, kind: str, target: str) -> Any:
    """Encode all pictures of an animation afresh; the first of them."""
    from PIL import ImageSequence

    looks = _Looks(image)
    durations: list[int] = []
    pictures = []
    for frame in ImageSequence.Iterator(image):
        picture = _plain(frame, "RGBA")
        durations.append(int(frame.info.get("duration") or 100))  # not before: a WebP tells it once it is decoded
        looks.apply(picture)
        pictures.append(picture)
    options: dict[str, Any] = {"quality": 80} if kind == "WEBP" else {"disposal": 2} if kind == "GIF" else {}
    if (loop := image.info.get("loop")) is not None:  # a GIF that does not say so plays once
        options["loop"] = int(loop)
    _write(
        pictures[0], target, kind, save_all=True, append_images=pictures[1:], duration=durations, **options
    )  # fmt: skip
    return pictures[0]


def _blurhash(image: Any) -> str:
    """https://blurha.sh: a few colours, in a short text, to show until the picture is there."""
    import blurhash

    small = image.resize((32, 32)).convert("RGB")
    pixels = [[small.getpixel((x, y)) for x in range(32)] for y in range(32)]
    wide = image.width >= image.height
    return str(blurhash.encode(pixels, components_x=4 if wide else 3, components_y=3 if wide else 4))


def main() -> int:
    """Do the one job. Exits 0, `REFUSED` or `STORAGE_FAILED`, or as the kernel sees fit."""
    job = Job(**json.load(sys.stdin))
    limit_process(job)
    try:
        found = asdict(work(job))
    except RefusedImage as refused:
        code, detail = refused.args
        sys.stdout.write(json.dumps({"code": code, "detail": detail}))
        return REFUSED
    except OSError as error:
        sys.stdout.write(error.strerror or str(error))
        return STORAGE_FAILED
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
