"""Decodes one image in a process of its own, which may use little memory and time: `python -m app.core.image_worker`.

Reads a job (JSON) from standard input, writes new files beside each other and what it found (JSON) to standard output.
Whatever a hostile image does, it does here: the server sees an exit status. Files are encoded afresh, so that nothing
but pixels survives: no EXIF, no place, no script that a browser might find.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
CPU_SECONDS = 10
MEMORY_BYTES = 1024**3
"""Of address space, most of it libraries: 25 megapixels with transparency are 100 MB, and a few copies live at once."""
REFUSED = 3
"""Exit status: the image is to blame, and the text on standard output says why."""


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


def limit_process() -> None:
    """Give this process little to do harm with. Elsewhere than on Linux only the server's own deadline bounds it."""
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)  # people who chat come first
    for kind, soft, hard in (
        (resource.RLIMIT_AS, MEMORY_BYTES, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS, CPU_SECONDS + 1),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        # Some systems know the limit and do not let it be set.
        with contextlib.nullcontext() if sys.platform == "linux" else contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (soft, hard))


def work(job: Job) -> Decoded:
    """Decode, turn upright, encode afresh, make smaller copies. Raises RefusedImage."""
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
            elif frames > 1:
                _save_animation(image, kind, job.target)
                image.seek(0)
            image.load()
            first = _upright(image, ImageOps)
        # One copy of the picture lives at a time from here on: 25 megapixels are 100 MB.
        if not job.square and frames == 1:
            ImageFile.MAXBLOCK = 2 * first.width * first.height  # else a JPEG of noise does not fit its buffer
            _save(first, kind, job.target)
        for edge in job.edges:
            if job.square:
                copy = ImageOps.fit(first, (edge, edge), Image.Resampling.LANCZOS)
            else:
                scale = min(1.0, edge / max(first.size))
                size = (max(1, round(first.width * scale)), max(1, round(first.height * scale)))
                copy = first.resize(size, Image.Resampling.LANCZOS)
            copy.save(f"{job.target}.{edge}", "WEBP", quality=80, method=4)
        return Decoded(MEDIA_TYPES[kind], first.width, first.height, _blurhash(first))
    except RefusedImage:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, MemoryError, ...
        raise RefusedImage("invalid_image", "This is not an image that can be read.") from error


def _transparent(image: Any) -> bool:
    return bool(image.has_transparency_data)


def _upright(image: Any, operations: Any) -> Any:
    """The first picture, turned as its EXIF says, in sRGB, with no metadata."""
    with contextlib.suppress(Exception):  # EXIF that cannot be read: what it says is lost, the picture is not
        operations.exif_transpose(image, in_place=True)
    mode = "RGBA" if _transparent(image) else "RGB"
    turned = image.convert(mode) if image.mode != mode else image.copy()
    image.close()
    if profile := turned.info.get("icc_profile"):
        turned = _to_srgb(turned, profile)
    turned.info.clear()
    return turned


def _to_srgb(image: Any, profile: bytes) -> Any:
    import io

    from PIL import ImageCms

    try:
        return ImageCms.profileToProfile(
            image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode=image.mode
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a broken profile: colours as they are


def _save(image: Any, kind: str, target: str) -> None:
    match kind:
        case "JPEG":
            image.save(target, "JPEG", quality=88, optimize=True, progressive=True)
        case "WEBP":
            image.save(target, "WEBP", quality=88, method=4)
        case _:
            image.save(target, kind, optimize=kind == "PNG" and image.width * image.height < 4_000_000)


def _save_animation(image: Any, kind: str, target: str) -> None:
    from PIL import ImageSequence

    durations: list[int] = []
    pictures = []
    for frame in ImageSequence.Iterator(image):
        durations.append(int(frame.info.get("duration") or 100))
        pictures.append(frame.convert("RGBA"))
    options: dict[str, Any] = {"quality": 80} if kind == "WEBP" else {"disposal": 2} if kind == "GIF" else {}
    pictures[0].save(
        target, kind, save_all=True, append_images=pictures[1:], duration=durations,
        loop=int(image.info.get("loop", 0)), **options,
    )  # fmt: skip


def _blurhash(image: Any) -> str:
    """https://blurha.sh: a few colours, in a short text, to show until the picture is there."""
    import blurhash

    small = image.resize((32, 32)).convert("RGB")
    pixels = [[small.getpixel((x, y)) for x in range(32)] for y in range(32)]
    wide = image.width >= image.height
    return str(blurhash.encode(pixels, components_x=4 if wide else 3, components_y=3 if wide else 4))


def main() -> int:
    """Do the one job. Exits 0, or `REFUSED`, or as the kernel sees fit."""
    limit_process()
    try:
        sys.stdout.write(json.dumps(asdict(work(Job(**json.load(sys.stdin))))))
    except RefusedImage as refused:
        code, detail = refused.args
        sys.stdout.write(json.dumps({"code": code, "detail": detail}))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
