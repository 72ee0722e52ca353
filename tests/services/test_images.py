"""Images as the worker makes them: what is kept of a picture, whose fault it is when there is none, who goes first."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms, ImageSequence

from app.core.errors import DialectError
from app.core.image_worker import Decoded
from app.services.image_service import ImageService
from tests.support.databases import make_settings
from tests.support.hostile import scans
from tests.support.images import animation, image

SECRET = b"SECRETMAKER"


async def decode(folder: Path, data: bytes, **settings: Any) -> tuple[Decoded, bytes]:
    """What becomes of an image: what is said of it, and the new file."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(data)
    decoded = await ImageService(make_settings(**settings)).photo(1, source, target)
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


# --- whose fault it is ------------------------------------------------------------------------------------------

OVERLOADED, DISK_FULL, NO_IMAGE = (503, "overloaded"), (503, "storage_unavailable"), (422, "invalid_image")


async def refusal(folder: Path, data: bytes, **settings: Any) -> tuple[int, str]:
    """How an image is refused."""
    with pytest.raises(DialectError) as refused:
        await decode(folder, data, **settings)
    if refused.value.status == 503:
        assert refused.value.retry_after
    return refused.value.status, refused.value.code


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """This process, and those it starts, may have so much of something."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def children() -> set[int]:
    """The processes that this one has started."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


async def new_child(before: set[int]) -> int:
    """Wait until there is one more."""
    while not (found := await asyncio.to_thread(children) - before):
        pass
    return found.pop()


@pytest.mark.parametrize(
    "data", [image("JPEG"), image("PNG"), image("WEBP"), animation(3)], ids=["JPEG", "PNG", "WEBP", "an animation"]
)
@pytest.mark.parametrize("full", ["target", "target.320"])
async def test_a_full_disk_is_no_fault_of_the_image(tmp_path: Path, data: bytes, full: str) -> None:
    (tmp_path / full).symlink_to("/dev/full")
    assert await refusal(tmp_path, data) == DISK_FULL


async def test_half_a_picture_for_which_the_disk_had_room_passes_for_none(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (300, 300), os.urandom(300 * 300 * 3))
    output = io.BytesIO()
    noise.save(output, "JPEG")
    source = output.getvalue()
    (tmp_path / "source").write_bytes(source)
    with limited(resource.RLIMIT_FSIZE, len(source) // 2), pytest.raises(DialectError) as refused:
        await ImageService(make_settings()).photo(1, tmp_path / "source", tmp_path / "target")
    assert refused.value.code == "storage_unavailable"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("SIGKILL", OVERLOADED), ("SIGTERM", OVERLOADED), ("SIGXCPU", NO_IMAGE), ("SIGSEGV", NO_IMAGE)],
)
async def test_a_worker_that_somebody_ends_says_nothing_about_the_image(
    tmp_path: Path, name: str, expected: tuple[int, str]
) -> None:
    before = children()
    answer = asyncio.create_task(refusal(tmp_path, image("JPEG", (2000, 2000))))
    os.kill(await new_child(before), signal.Signals[name])
    assert await answer == expected


async def test_an_image_that_a_busy_machine_does_not_get_to_may_be_sent_again(tmp_path: Path) -> None:
    before = children()
    answer = asyncio.create_task(refusal(tmp_path, image(), image_cpu_seconds=1, image_seconds=0.1))
    os.kill(await new_child(before), signal.SIGSTOP)
    assert await answer == OVERLOADED
    assert children() == before


async def test_no_file_to_be_had_for_a_worker_is_no_fault_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(image())
    os.close(lowest := os.dup(0))
    with limited(resource.RLIMIT_NOFILE, lowest), pytest.raises(DialectError) as refused:
        await ImageService(make_settings()).photo(1, tmp_path / "source", tmp_path / "target")
    assert (refused.value.status, refused.value.code) == OVERLOADED


@pytest.mark.parametrize(
    "bound", [{"image_cpu_seconds": 1}, {"image_memory_bytes": 128 * 1024**2}], ids=["its time", "its memory"]
)
async def test_an_image_that_takes_more_than_an_image_may_is_refused(tmp_path: Path, bound: dict[str, int]) -> None:
    data = scans(900, (3000, 2000)) if "image_cpu_seconds" in bound else image(size=(4000, 4000))
    assert await refusal(tmp_path, data, **bound) == NO_IMAGE


# --- who goes first ---------------------------------------------------------------------------------------------

ANN, BO, CY = 1, 2, 3


class Album:
    """Pictures of several people, under way to one server."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._folder = folder
        self._images = ImageService(make_settings(**settings))
        (folder / "source").write_bytes(image())
        self.done: list[int] = []
        """Whose pictures were decoded, in order."""

    async def send(self, user_id: int, number: int = 0) -> None:
        """One picture of somebody's."""
        await self._images.photo(user_id, self._folder / "source", self._folder / f"{user_id}-{number}")
        self.done.append(user_id)


async def test_whoever_sends_one_picture_waits_for_one_of_those_who_send_many(tmp_path: Path) -> None:
    album = Album(tmp_path)
    await asyncio.gather(*(album.send(user_id, number) for user_id in (ANN, BO) for number in range(3)), album.send(CY))
    assert album.done[:3] == [ANN, BO, CY]
    assert sorted(album.done) == [ANN] * 3 + [BO] * 3 + [CY]


async def test_the_line_for_images_is_full_of_people_and_not_of_pictures(tmp_path: Path) -> None:
    album = Album(tmp_path, image_queue=1)
    answers = await asyncio.gather(
        *(album.send(ANN, number) for number in range(4)), album.send(BO), album.send(CY), album.send(BO, 1),
        return_exceptions=True,
    )  # fmt: skip
    [refused] = [answer for answer in answers if answer is not None]
    assert isinstance(refused, DialectError)
    assert ((refused.status, refused.code), refused.retry_after) == (OVERLOADED, 5)
    assert sorted(album.done) == [ANN] * 4 + [BO] * 2
    await album.send(CY)
