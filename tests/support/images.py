"""Images for tests, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

GPS_LATITUDE = 2


def image(kind: str = "PNG", size: tuple[int, int] = (64, 48), colour: Any = (200, 30, 30), **options: Any) -> bytes:
    """A picture of one colour."""
    output = io.BytesIO()
    mode = "RGBA" if len(colour) == 4 else "RGB"
    Image.new(mode, size, colour).save(output, kind, **options)
    return output.getvalue()


def photo_with_place(orientation: int = 6, size: tuple[int, int] = (640, 480)) -> bytes:
    """A JPEG as a phone makes it: lying on its side, with the place where it was taken."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "SECRETMAKER"
    gps = exif.get_ifd(0x8825)
    gps[1], gps[GPS_LATITUDE] = "N", (55.0, 45.0, 7.0)
    return image("JPEG", size, exif=exif)


def animation(frames: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A GIF."""
    pictures = [Image.new("RGB", size, (number % 256, number // 256, 90)) for number in range(frames)]
    output = io.BytesIO()
    pictures[0].save(output, "GIF", save_all=True, append_images=pictures[1:], duration=50)
    return output.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A small file that claims, and holds, a huge picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" * ((width + 7) // 8 + 1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
