"""Images as the worker makes them: what is kept of a picture, and what is not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms, ImageSequence

from app.core.image_worker import Decoded
from app.services.image_service import ImageService
from tests.support.databases import make_settings

SECRET = b"SECRETMAKER"


async def decode(folder: Path, data: bytes, **settings: Any) -> tuple[Decoded, bytes]:
    """What becomes of an image: what is said of it, and the new file."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(data)
    decoded = await ImageService(make_settings(**settings)).photo(source, target)
    return decoded, target.read_bytes()


# --- pixels -----------------------------------------------------------------------------------------------------


def grey_in_16_bits() -> Image.Image:
    """A slope from black to white, 256 pixels wide."""
    return Image.frombytes("I;16", (256, 2), b"".join(bytes([7, value]) for value in range(256)) * 2)


async def test_a_grey_picture_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    output = io.BytesIO()
    grey_in_16_bits().save(output, "PNG")
    _, data = await decode(tmp_path, output.getvalue())
    with Image.open(io.BytesIO(data)) as picture:
        assert [picture.getpixel((x, 1)) for x in range(256)] == [(x, x, x) for x in range(256)]


async def test_what_is_clear_in_a_grey_picture_of_16_bits_stays_so(tmp_path: Path) -> None:
    output = io.BytesIO()
    grey_in_16_bits().save(output, "PNG", transparency=100 * 256 + 7)
    _, data = await decode(tmp_path, output.getvalue())
    with Image.open(io.BytesIO(data)) as picture:
        assert [x for x in range(256) if picture.getpixel((x, 0)) != (x, x, x, 255)] == [100]
        assert picture.getpixel((100, 0)) == (100, 100, 100, 0)


async def test_an_animation_in_grey_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    output = io.BytesIO()
    slope = grey_in_16_bits()
    slope.save(output, "PNG", save_all=True, append_images=[slope.transpose(Image.Transpose.ROTATE_180)], duration=50)
    _, data = await decode(tmp_path, output.getvalue())
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.getpixel((9, 0)) == (9, 9, 9, 255)
        picture.seek(1)
        assert picture.getpixel((9, 0)) == (246, 246, 246, 255)


# --- animations -------------------------------------------------------------------------------------------------


def animation_with_all(kind: str) -> bytes:
    """Three pictures, red on the left and black on the right, with everything beside that a file of its kind can hold.

    They lie on their side, and a profile says that what is called red is green.
    """
    pictures = [Image.new("RGB", (20, 10)) for _ in range(3)]
    for number, picture in enumerate(pictures):
        picture.paste((255, 0, 0), (0, 0, 10, 10))
        picture.paste((0, 0, 90 * number), (14, 5, 17, 8))  # or they would be one
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, SECRET.decode()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = srgb.replace(b"rXYZ", b"-XYZ").replace(b"gXYZ", b"rXYZ").replace(b"-XYZ", b"gXYZ")
    more: dict[str, Any] = {"comment": SECRET} if kind == "GIF" else {"exif": exif, "icc_profile": profile}
    if kind == "WEBP":
        more |= {"xmp": b"<x>" + SECRET + b"</x>", "lossless": True}
    output = io.BytesIO()
    pictures[0].save(output, kind, save_all=True, append_images=pictures[1:], duration=[50, 60, 70], loop=3, **more)
    assert SECRET in output.getvalue()
    return output.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
async def test_of_an_animation_nothing_but_its_pictures_and_their_times_is_left(tmp_path: Path, kind: str) -> None:
    _, data = await decode(tmp_path, animation_with_all(kind))
    assert SECRET not in data
    with Image.open(io.BytesIO(data)) as picture:
        assert {"exif", "xmp", "icc_profile", "comment"} & picture.info.keys() == set()
        assert picture.info["loop"] == 3
        assert [frame.info["duration"] for frame in _loaded(picture)] == [50, 60, 70]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
async def test_every_picture_of_an_animation_is_upright_and_in_srgb(tmp_path: Path, kind: str) -> None:
    decoded, data = await decode(tmp_path, animation_with_all(kind))
    with Image.open(io.BytesIO(data)) as picture, Image.open(tmp_path / "target.320") as small:
        assert (decoded.width, decoded.height) == picture.size == small.size == (10, 20)
        shown = [frame.convert("RGB") for frame in [*_loaded(picture), small]]
    for frame in shown:
        # The picture has been turned to the right: what was on the left is at the top. WebP is not exact.
        top, bottom = frame.getpixel((5, 3)), frame.getpixel((8, 18))
        assert isinstance(top, tuple)
        assert isinstance(bottom, tuple)
        assert top[1] > 200 > 60 > max(top[0], top[2], *bottom), (top, bottom)


async def test_an_animation_that_plays_once_does_not_play_for_ever(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (16, 16), (number, 0, 0)) for number in (0, 99)]
    output = io.BytesIO()
    pictures[0].save(output, "GIF", save_all=True, append_images=pictures[1:], duration=50)
    _, data = await decode(tmp_path, output.getvalue())
    assert b"NETSCAPE" not in data


def _loaded(picture: Image.Image) -> list[Image.Image]:
    return [frame.copy() for frame in ImageSequence.Iterator(picture)]
