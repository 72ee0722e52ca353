"""Files and bodies that nobody sends in good faith, each with the answer that they must get.

`files(script)` plants a script wherever a browser might look for one, so that a test can see whether it ever runs.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

from tests.support.images import animation, image, png_bomb

MARK = b"alert('of-hostile-make')"
"""The script of those who do not care which. No answer of the server may hold it, files for saving aside."""


class Refused(NamedTuple):
    """An error, to the code."""

    status: int
    code: str


class Kept(NamedTuple):
    """Taken as it is, and only ever handed out for saving."""

    kind: str = "file"


class Encoded(NamedTuple):
    """Taken for its pixels: what is handed out is another file."""

    media_type: str


Answer = Refused | Kept | Encoded

NO_IMAGE = Refused(422, "invalid_image")
TOO_MANY_PIXELS = Refused(422, "image_too_large")
EMPTY = Refused(422, "file_empty")
BAD_BODY = Refused(422, "invalid_upload")
KEPT = Kept()


@dataclass(frozen=True)
class HostileFile:
    """A file, what its sender says of it, and what comes of it as an upload and as an avatar."""

    make: Callable[[], bytes]
    name: str
    claims: str
    upload: Answer
    avatar: Answer = NO_IMAGE


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(*chunks: bytes, tail: bytes = b"") -> bytes:
    """A good PNG with chunks behind its header and bytes behind its end."""
    good = image()
    end_of_header = 8 + 25
    return good[:end_of_header] + b"".join(chunks) + good[end_of_header:] + tail


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _jpeg(*segments: bytes, tail: bytes = b"") -> bytes:
    """A good JPEG with segments behind its start."""
    good = image("JPEG")
    return good[:2] + b"".join(segments) + good[2:] + tail


def _zip(**members: bytes) -> bytes:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return output.getvalue()


def _gif_javascript(script: bytes, height: int = 1) -> bytes:
    """A GIF of 10,799 pixels a row: its width reads `/*`, and what stands behind its pictures ends the comment."""
    good = image("GIF", (10_799, height))
    assert good[6:8] == b"/*"
    return good + b"*/=1;" + script + b"//"


def _gif_frames(frames: int, size: tuple[int, int] = (1, 1)) -> bytes:
    """A GIF of so many pictures, 20 bytes each."""
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x01\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    return head + frame * frames + b";"


def _gif_bomb(width: int, height: int) -> bytes:
    """A GIF of one colour, packed by LZW as well as it goes."""
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + (
        b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02D\x01\0;"
    )  # fmt: skip


def _animated(kind: str, frames: int, size: tuple[int, int], **options: Any) -> bytes:
    pictures = [Image.new("RGB", size, (number % 256, number // 256, 9)) for number in range(frames)]
    output = io.BytesIO()
    pictures[0].save(output, kind, save_all=True, append_images=pictures[1:], duration=20, **options)
    return output.getvalue()


def _apng_claim(frames: int) -> bytes:
    return _png(_chunk(b"acTL", struct.pack(">II", frames, 0)))


def _jpeg_claim(width: int, height: int) -> bytes:
    """A JPEG whose header claims a size that its data does not have."""
    good = bytearray(image("JPEG"))
    at = good.index(b"\xff\xc0")
    good[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(good)


def _webp_claim(width: int, height: int) -> bytes:
    """An extended WebP (VP8X) of that size, with the picture of a small one."""
    picture = image("WEBP")[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (width - 1).to_bytes(3, "little")
    extended += (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(extended) + len(picture)) + b"WEBP" + extended + picture


def scans(count: int, size: tuple[int, int]) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each makes the decoder walk over all of it."""
    good = image("JPEG", size, progressive=True)
    at = good.rindex(b"\xff\xda")
    return good[:-2] + good[at:-2] * count + b"\xff\xd9"


def _exif(*entries: tuple[int, int, int, int], next_ifd: int = 0) -> bytes:
    """An EXIF segment of raw entries: tag, type, count, value or offset."""
    table = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    table += b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", next_ifd)
    return _segment(0xE1, b"Exif\0\0" + table)


def _zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(megabytes)) + packer.flush()


def _html(script: bytes) -> bytes:
    return b"<!doctype html><html><head><title>x</title></head><body><script>" + script + b"</script></body></html>"


def _svg(script: bytes) -> bytes:
    text = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9' onload=\"%s\"><script>%s</script></svg>"
    return text % (script, script)


def _xhtml(script: bytes) -> bytes:
    text = b"<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'><body><script>%s</script></body></html>"
    return text % script


def _mhtml(script: bytes) -> bytes:
    return (
        b"MIME-Version: 1.0\r\nContent-Type: multipart/related; boundary=m; type=text/html\r\n\r\n--m\r\n"
        b"Content-Type: text/html\r\nContent-Location: http://x/\r\n\r\n" + _html(script) + b"\r\n--m--\r\n"
    )


def _pdf(script: bytes) -> bytes:
    action = b"<</S/JavaScript/JS(" + script.replace(b"(", rb"\(").replace(b")", rb"\)") + b")>>"
    return (
        b"%PDF-1.7\n1 0 obj<</Type/Catalog/Pages 2 0 R/OpenAction " + action + b">>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%%EOF\n"
    )


def _pdf_javascript(script: bytes) -> bytes:
    """A PDF for readers that look for its start in the first kilobyte, and a script for those who run it."""
    return script + b"\n/*" + _pdf(script) + b"*/"


def _jpeg_javascript(script: bytes) -> bytes:
    """A JPEG of Latin letters: the length of its first segment reads `/*`, and a remark ends the comment."""
    length = int.from_bytes(b"/*", "big")
    segment = b"\xff\xe0/*" + b"JFIF\0\1\1\0\0\1\0\1\0\0".ljust(length - 2, b"\0")
    good = image("JPEG")
    return good[:2] + segment + _segment(0xFE, b"*/=1;" + script + b"/*") + good[2:] + b"*/"


def _xml_stylesheet(script: bytes) -> bytes:
    return (
        b"<?xml version='1.0'?><?xml-stylesheet type='text/xsl' href='#s'?>"
        b"<!DOCTYPE d [<!ATTLIST xsl:stylesheet id ID #REQUIRED>]><d><xsl:stylesheet id='s' version='1.0' "
        b"xmlns:xsl='http://www.w3.org/1999/XSL/Transform'><xsl:template match='/'><html><script>" + script
        + b"</script></html></xsl:template></xsl:stylesheet></d>"
    )  # fmt: skip


def _png_text(script: bytes) -> bytes:
    output, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Comment", _html(script).decode())
    Image.new("RGB", (64, 48)).save(output, "PNG", pnginfo=info)
    return output.getvalue() + _html(script)


def scripted(script: bytes = MARK) -> dict[str, HostileFile]:
    """Files with a script in them, for browsers to find. Some are good images."""
    html, svg = _html(script), _svg(script)
    make: Callable[[bytes], Callable[[], bytes]] = lambda data: lambda: data  # noqa: E731
    return {
        "a good GIF that is JavaScript": HostileFile(
            lambda: _gif_javascript(script), "a.gif", "image/gif", Encoded("image/gif"), Encoded("image/webp")
        ),
        "a good JPEG that is JavaScript": HostileFile(
            lambda: _jpeg_javascript(script), "a.jpg", "application/javascript",
            Encoded("image/jpeg"), Encoded("image/webp"),
        ),
        "a good JPEG with a zip behind": HostileFile(
            lambda: _jpeg(tail=_zip(**{"index.html": html})), "a.jpg", "image/jpeg",
            Encoded("image/jpeg"), Encoded("image/webp"),
        ),
        "a good JPEG with HTML in its EXIF": HostileFile(
            lambda: _jpeg(_segment(0xE1, b"Exif\0\0" + html)), "a.jpg", "image/jpeg",
            Encoded("image/jpeg"), Encoded("image/webp"),
        ),
        "a good PNG with HTML in its text and behind it": HostileFile(
            lambda: _png_text(script), "a.png", "image/png", Encoded("image/png"), Encoded("image/webp")
        ),
        "a good WebP with HTML in its XMP": HostileFile(
            lambda: image("WEBP", exif=b"Exif\0\0" + html, xmp=html), "a.webp", "image/webp",
            Encoded("image/webp"), Encoded("image/webp"),
        ),
        "a good PNG called evil.html that claims text/html": HostileFile(
            lambda: _png_text(script), "evil.html", "text/html", Encoded("image/png"), Encoded("image/webp")
        ),
        "a good JPEG called photo.jpg.js": HostileFile(
            lambda: _jpeg_javascript(script), "photo.jpg.js", "text/javascript",
            Encoded("image/jpeg"), Encoded("image/webp"),
        ),
        "HTML": HostileFile(make(html), "page.html", "text/html", KEPT),
        "HTML called jpg": HostileFile(make(html), "a.jpg", "text/html", NO_IMAGE),
        "HTML that claims image/png": HostileFile(make(html), "a.html", "image/png", NO_IMAGE),
        "HTML that claims image/gif in capitals": HostileFile(make(html), "a.html", "IMAGE/GIF", NO_IMAGE),
        "HTML that claims nothing": HostileFile(make(html), "page", "", KEPT),
        "HTML that claims video/mp4": HostileFile(make(html), "a.mp4", "video/mp4", KEPT),
        "HTML called photo.jpg.html": HostileFile(make(html), "photo.jpg.html", "text/html", KEPT),
        "HTML called page.html.jpg": HostileFile(make(html), "page.html.jpg", "text/html", NO_IMAGE),
        "HTML called page.html and a NUL and .png": HostileFile(make(html), "page.html\0.png", "text/html", NO_IMAGE),
        "HTML called page.png and a NUL and .html": HostileFile(make(html), "page.png\0.html", "text/html", KEPT),
        "HTML in UTF-16": HostileFile(
            lambda: b"\xff\xfe" + html.decode().encode("utf-16-le"), "page.htm", "text/html; charset=utf-16", KEPT
        ),
        "HTML in UTF-7": HostileFile(
            lambda: b"+ADw-script+AD4-" + script + b"+ADw-/script+AD4-", "a.txt", "text/html; charset=utf-7", KEPT
        ),
        "XHTML": HostileFile(lambda: _xhtml(script), "page.xhtml", "application/xhtml+xml", KEPT),
        "MHTML": HostileFile(lambda: _mhtml(script), "page.mhtml", "multipart/related", KEPT),
        "XML with a stylesheet that is a script": HostileFile(
            lambda: _xml_stylesheet(script), "feed.xml", "application/xml", KEPT
        ),
        "JavaScript": HostileFile(make(script), "a.js", "text/javascript", KEPT),
        "a style sheet": HostileFile(lambda: b"body{background:red}", "a.css", "text/css", KEPT),
        "SVG": HostileFile(make(svg), "a.svg", "image/svg+xml", NO_IMAGE),
        "SVG called png": HostileFile(lambda: b"<?xml version='1.0'?>" + svg, "a.png", "image/png", NO_IMAGE),
        "SVG called txt": HostileFile(make(svg), "a.txt", "text/plain", KEPT),
        "SVG, zipped": HostileFile(lambda: gzip.compress(svg), "a.svgz", "application/octet-stream", KEPT),
        "PDF with a script": HostileFile(lambda: _pdf(script), "a.pdf", "application/pdf", KEPT),
        "PDF that is JavaScript": HostileFile(lambda: _pdf_javascript(script), "a.pdf", "text/javascript", KEPT),
        "PDF that claims to be an image": HostileFile(lambda: _pdf(script), "a.pdf", "image/jpeg", NO_IMAGE),
        "a page with HTML behind a PDF": HostileFile(lambda: _pdf(script) + html, "a.pdf", "text/html", KEPT),
        "an archive of Java": HostileFile(
            lambda: _zip(**{"META-INF/MANIFEST.MF": b"Main-Class: x"}), "a.jar", "application/java-archive", KEPT
        ),
        "a zip that claims a picture in it": HostileFile(
            lambda: _zip(**{"../../../../tmp/escaped.html": html}), "a.zip", "application/zip", KEPT
        ),
        "a program for Windows": HostileFile(lambda: b"MZ" + os.urandom(100), "CON", "application/x-msdownload", KEPT),
        "a shell script": HostileFile(lambda: b"#!/bin/sh\nreboot\n", "run.sh", "text/x-sh", KEPT),
        "a film with HTML in it": HostileFile(
            lambda: b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + html, "a.mp4", "text/html", Kept("video")
        ),
        "a song with HTML in it": HostileFile(
            lambda: b"ID3\4\0\0\0\0\0\0" + html, "a.mp3", "text/html", Kept("audio")
        ),
    }  # fmt: skip


def _cut(kind: str) -> bytes:
    noise = Image.frombytes("RGB", (120, 90), os.urandom(120 * 90 * 3))
    output = io.BytesIO()
    noise.save(output, kind)
    return output.getvalue()


def _truncated() -> dict[str, HostileFile]:
    found: dict[str, HostileFile] = {}
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        for name, part in [("its first 16 bytes", 0), ("a fifth", 0.2), ("half", 0.5), ("nine tenths", 0.9)]:

            def make(kind: str = kind, part: float = part) -> bytes:
                data = _cut(kind)
                return data[: max(16, int(len(data) * part))]

            media_type = f"image/{kind.lower()}"
            found[f"{kind}: {name} of it"] = HostileFile(make, f"a.{kind.lower()}", media_type, NO_IMAGE)
    return found


def broken() -> dict[str, HostileFile]:
    """What claims to be an image and is none that this server decodes."""
    other = ["BMP", "TIFF", "ICO", "ICNS", "EPS", "PPM", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "MSP", "SPIDER"]
    modes = {"ICNS": "RGBA", "MSP": "1", "SPIDER": "F"}

    def saved(kind: str) -> bytes:
        output = io.BytesIO()
        Image.new(modes.get(kind, "RGB"), (64, 64)).save(output, kind)
        return output.getvalue()

    masks = {
        f"{kind} called png": HostileFile(functools.partial(saved, kind), "a.png", "image/png", NO_IMAGE)
        for kind in other
    }
    photoshop = b"8BPS\0\1\0\0\0\0\0\0\0\3\0\0\0\x10\0\0\0\x10\0\x08\0\3" + bytes(100)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/escaped) (w) file\n"
    return {
        **_truncated(),
        **masks,
        "a BMP that says so": HostileFile(lambda: image("BMP"), "a.bmp", "image/bmp", NO_IMAGE),
        "a TIFF that says so": HostileFile(lambda: image("TIFF"), "a.tiff", "image/tiff", NO_IMAGE),
        "an icon that says so": HostileFile(lambda: image("ICO"), "a.ico", "image/x-icon", NO_IMAGE),
        "a Photoshop file called jpg": HostileFile(lambda: photoshop, "a.jpg", "image/jpeg", NO_IMAGE),
        "PostScript that starts a program": HostileFile(lambda: postscript, "a.jpg", "image/jpeg", NO_IMAGE),
        "a TIFF of 2^31 pixels a side called jpg": HostileFile(
            lambda: b"II*\0\x08\0\0\0\2\0" + struct.pack("<HHIIHHIIL", 256, 4, 1, 2**31, 257, 4, 1, 2**31, 0),
            "a.jpg", "image/jpeg", NO_IMAGE,
        ),
        "a JPEG header and a zip": HostileFile(
            lambda: b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"PK\3\4" * 50, "a.jpg", "image/jpeg", NO_IMAGE
        ),
        "a GIF header and JavaScript": HostileFile(
            lambda: b"GIF89a/*" + bytes(20) + b"*/=1;" + MARK + b"//", "a.gif", "image/gif", NO_IMAGE
        ),
        "nothing but a PNG's signature": HostileFile(
            lambda: b"\x89PNG\r\n\x1a\n", "a.png", "image/png", NO_IMAGE
        ),
        "a RIFF that is no WebP": HostileFile(
            lambda: b"RIFF\x24\0\0\0WEBPVP8 " + bytes(30), "a.webp", "image/webp", NO_IMAGE
        ),
        "noise called png": HostileFile(lambda: os.urandom(5000), "a.png", "image/png", NO_IMAGE),
        "nothing at all": HostileFile(lambda: b"", "a.png", "image/png", EMPTY),
        "an empty text": HostileFile(lambda: b"", "a.txt", "text/plain", EMPTY),
        "base64 of a PNG": HostileFile(lambda: base64.b64encode(image()), "a.png", "image/png", NO_IMAGE),
    }  # fmt: skip


def bombs() -> dict[str, HostileFile]:
    """Small files that are large when opened."""
    large = TOO_MANY_PIXELS
    jpeg, png, gif, webp = "image/jpeg", "image/png", "image/gif", "image/webp"
    good_png, good_jpeg, good_webp = Encoded(png), Encoded(jpeg), Encoded(webp)
    return {
        "PNG: 81 megapixels in 10 KB": HostileFile(lambda: png_bomb(9000, 9000), "a.png", png, large, large),
        "PNG: 900 megapixels": HostileFile(lambda: png_bomb(30_000, 30_000), "a.png", png, large, large),
        "PNG: a claim of 2^31 pixels a side": HostileFile(
            lambda: b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", b"\x7f\xff\xff\xff" * 2 + b"\x08\2\0\0\0")
            + _chunk(b"IDAT", zlib.compress(b"")),
            "a.png", png, large, large,
        ),
        "PNG: a line of 24 million pixels": HostileFile(lambda: png_bomb(24_000_000, 1), "a.png", png, large, large),
        "GIF: 4 gigapixels": HostileFile(lambda: _gif_bomb(65_535, 65_535), "a.gif", gif, large, large),
        "JPEG: a claim of 4 gigapixels": HostileFile(lambda: _jpeg_claim(65_500, 65_500), "a.jpg", jpeg, large, large),
        "WebP: a claim of 2^48 pixels": HostileFile(
            lambda: _webp_claim(2**24, 2**24), "a.webp", webp, NO_IMAGE, NO_IMAGE
        ),
        "WebP: 81 megapixels": HostileFile(
            lambda: image("WEBP", (9000, 9000), lossless=True, method=0), "a.webp", webp, large, large
        ),
        "GIF: 101 pictures": HostileFile(lambda: animation(101), "a.gif", gif, large, large),
        "GIF: 10,000 pictures": HostileFile(lambda: _gif_frames(10_000), "a.gif", gif, large, large),
        "GIF: 400,000 pictures": HostileFile(lambda: _gif_frames(400_000), "a.gif", gif, large, large),
        "GIF: 90 pictures of 2 megapixels": HostileFile(
            lambda: _gif_frames(90, (2000, 1000)), "a.gif", gif, large, large
        ),
        "PNG: a claim of 2^31 pictures": HostileFile(lambda: _apng_claim(2**31 - 1), "a.png", png, large, large),
        "PNG: 300 pictures": HostileFile(lambda: _animated("PNG", 300, (8, 8)), "a.png", png, large, large),
        "WebP: 300 pictures": HostileFile(
            lambda: _animated("WEBP", 300, (8, 8), lossless=True), "a.webp", webp, large, large
        ),
        "PNG: 200 MB of nothing in zTXt": HostileFile(
            lambda: _png(_chunk(b"zTXt", b"Comment\0\0" + _zeros(200))), "a.png", png, NO_IMAGE
        ),
        "PNG: 200 MB of nothing in iTXt": HostileFile(
            lambda: _png(_chunk(b"iTXt", b"Comment\0\1\0\0\0" + _zeros(200))), "a.png", png, NO_IMAGE
        ),
        "PNG: 200 MB of nothing in iCCP": HostileFile(
            lambda: _png(_chunk(b"iCCP", b"profile\0\0" + _zeros(200))), "a.png", png, NO_IMAGE
        ),
        "PNG: 200 texts of 1 MB": HostileFile(
            lambda: _png(*[_chunk(b"zTXt", b"C%d\0\0" % n + _zeros(1)) for n in range(200)]), "a.png", png, NO_IMAGE
        ),
        "PNG: 200 MB behind the last line": HostileFile(
            lambda: _png_longer(200), "a.png", png, good_png, good_webp
        ),
        "JPEG: EXIF that leads to itself": HostileFile(
            lambda: _jpeg(_exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), next_ifd=8)), "a.jpg", jpeg, good_jpeg, good_webp
        ),
        "JPEG: EXIF of 4 GB": HostileFile(
            lambda: _jpeg(_exif((0x010F, 2, 0xFFFFFFFF, 8), (0x0112, 12, 0x1FFFFFFF, 8))), "a.jpg", jpeg,
            good_jpeg, good_webp,
        ),
        "JPEG: 5,000 entries of EXIF that overlap": HostileFile(
            lambda: _jpeg(_exif(*[(number, 2, 60_000, 8) for number in range(5000)])), "a.jpg", jpeg,
            good_jpeg, good_webp,
        ),
        "JPEG: 6 MB of EXIF": HostileFile(
            lambda: _jpeg(*[_segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 100), "a.jpg", jpeg, good_jpeg, good_webp
        ),
        "JPEG: a colour profile of 255 parts of noise": HostileFile(
            lambda: _jpeg(*[_segment(0xE2, b"ICC_PROFILE\0" + bytes([n + 1, 100]) + os.urandom(65_000))
                            for n in range(100)]),
            "a.jpg", jpeg, good_jpeg, good_webp,
        ),
        "WebP: 5 MB of EXIF": HostileFile(
            lambda: image("WEBP", exif=b"Exif\0\0" + bytes(5_000_000)), "a.webp", webp, good_webp, good_webp
        ),
        "JPEG: 3,000 scans of 24 megapixels": HostileFile(
            lambda: scans(3000, (6000, 4000)), "a.jpg", jpeg, NO_IMAGE
        ),
    }  # fmt: skip


def _png_longer(megabytes: int) -> bytes:
    """A small PNG whose pixels go on for long after its last line."""
    head = struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    data = packer.compress(bytes(48 * (64 * 3 + 1)))
    data += b"".join(packer.compress(bytes(1_000_000)) for _ in range(megabytes)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def files() -> dict[str, HostileFile]:
    """All of them, by name."""
    return {**scripted(), **broken(), **bombs()}


# --- names ------------------------------------------------------------------------------------------------------

NAMES: dict[str, tuple[bytes, str]] = {
    "up and away": (b"../../etc/passwd", "passwd"),
    "up as Windows has it": (b"..\\..\\boot.ini", "boot.ini"),
    "up, with slashes of both kinds": (b"..\\../..\\/x.txt", "x.txt"),
    "an absolute path": (b"/etc/shadow", "shadow"),
    "a drive": (b"C:\\Windows\\win.ini", "win.ini"),
    "a share": (b"\\\\host\\share\\x.txt", "x.txt"),
    "escaped by percent signs": (b"%2e%2e%2f%2e%2e%2fpasswd", "%2e%2e%2f%2e%2e%2fpasswd"),
    "UTF-8 that is too long": (b"..\xc0\xaf..\xc0\xafpasswd", "..\ufffd\ufffd..\ufffd\ufffdpasswd".strip(".")),
    "a NUL": (b"a\0b.txt", "ab.txt"),
    "a line feed": (b"a\nSet-Cookie: x=y", "aSet-Cookie: x=y"),
    "from right to left": ("\u202egpj.exe".encode(), "gpj.exe"),
    "nothing": (b"", "file"),
    "a dot": (b".", "file"),
    "dots": (b"...", "file"),
    "spaces": (b"   ", "file"),
    "a slash": (b"/", "file"),
    "a device": (b"CON", "CON"),
    "a stream of NTFS": (b"a.txt::$DATA", "a.txt::$DATA"),
    "more than 255 bytes": ("é".encode() * 300 + b".jpeg.txt", "é" * 125 + ".txt"),
    "quotes": (b"a;b\\\"c'd.txt", "a;b\"c'd.txt"),
    "a file of the server": (b"dialect.db", "dialect.db"),
    "its folder for what comes in": (b"incoming", "incoming"),
}
"""Names as they stand in the body, and as people see them."""


# --- bodies -----------------------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
END = b"\r\n--b--\r\n"


def form(data: bytes, name: bytes = b"a.bin", claims: str = "application/octet-stream") -> bytes:
    """A body with one file, and a name that is not escaped."""
    kind = f"Content-Type: {claims}\r\n".encode() if claims else b""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n' + kind + b"\r\n"
    return head + data + END


@dataclass(frozen=True)
class HostileBody:
    """A body for the door of uploads. For avatars, which take no texts, what is `kept` is no image."""

    content_type: str
    make: Callable[[], bytes | Iterable[bytes]]
    answer: Answer = BAD_BODY


def _body(*pieces: bytes, content_type: str = FORM, answer: Answer = BAD_BODY) -> HostileBody:
    return HostileBody(content_type, lambda: b"".join(pieces), answer)


def _headers(extra: bytes) -> bytes:
    return PART.replace(b"\r\n\r\n", b"\r\n" + extra + b"\r\n")


def bodies() -> dict[str, HostileBody]:
    """Bodies that are not one file in one part."""
    long = b"b" * 10_000
    inner = b'--i\r\nContent-Disposition: file; filename="x.html"\r\n\r\n' + _html(MARK) + b"\r\n--i--\r\n"
    nested = _headers(b"Content-Type: multipart/mixed; boundary=i\r\n")
    return {
        "no body": _body(),
        "no boundary": _body(PART, b"x", END, content_type="multipart/form-data"),
        "an empty boundary": _body(PART, b"x", END, content_type='multipart/form-data; boundary=""'),
        "a boundary of 71 letters": _body(b"--" + long[:71], content_type=f"multipart/form-data; boundary={'b' * 71}"),
        "a boundary of 10 KB": _body(
            b"--" + long + PART[3:] + b"x\r\n--" + long + b"--\r\n",
            content_type=f"multipart/form-data; boundary={long.decode()}",
        ),
        "another boundary": _body(PART, b"x", END, content_type="multipart/form-data; boundary=c"),
        "JSON": _body(b'{"file": "x"}', content_type="application/json"),
        "no type": _body(b"x", content_type=""),
        "a form": _body(b"file=x", content_type="application/x-www-form-urlencoded"),
        "multipart/mixed": _body(PART, b"x", END, content_type="multipart/mixed; boundary=b"),
        "the end is missing": _body(PART, b"x"),
        "half of the end": _body(PART, b"x\r\n--b-"),
        "nothing but an end": _body(b"--b--\r\n"),
        "headers that do not end": _body(PART[:-2]),
        "a field, not a file": _body(b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx', END),
        "a field called otherwise": _body(PART.replace(b'"file"', b'"avatar"'), b"x", END),
        "no name": _body(PART.replace(b'name="file"; ', b""), b"x", END),
        "no disposition": _body(b"--b\r\nContent-Type: text/plain\r\n\r\nx", END),
        "an unknown field and a file": _body(
            b'--b\r\nContent-Disposition: form-data; name="chat_id"\r\n\r\n1\r\n', PART, b"x", END
        ),
        "a file and an unknown field": _body(
            PART, b'x\r\n--b\r\nContent-Disposition: form-data; name="chat_id"\r\n\r\n1', END
        ),
        "two files": _body(PART, b"x\r\n", PART, b"y", END),
        "100,000 parts": _body(b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 100_000, END),
        "100,000 empty files": _body((PART + b"\r\n") * 100_000, END),
        "a thousand headers": _body(_headers(b"X-A: b\r\n" * 1000), b"x", END),
        "100,000 headers": _body(_headers(b"X-A: b\r\n" * 100_000), b"x", END),
        "a header of 1 MB": _body(_headers(b"X-A: " + bytes(1_000_000).replace(b"\0", b"b") + b"\r\n"), b"x", END),
        "the name of a header of 1 MB": _body(_headers(b"X" * 1_000_000 + b": b\r\n"), b"x", END),
        "a file name of 100 KB": _body(PART.replace(b"a.txt", b"a" * 100_000), b"x", END),
        "a broken header": _body(b"--b\r\n\xff\xfe\0: x\r\n\r\nx", END),
        "a header without a colon": _body(_headers(b"nonsense\r\n"), b"x", END),
        "a preamble of 10 MB": _body(b"x" * 10_000_000 + b"\r\n", PART, b"x", END),
        "a preamble of 10 MB of line ends": _body(b"\r\n" * 5_000_000, b"x", PART, b"x", END, answer=KEPT),
        "10 MB of hyphens": _body(b"-" * 10_000_000),
        "10 MB of half boundaries": _body(PART, b"\r\n--" * 2_500_000),
        "a body packed by gzip": _body(gzip.compress(PART + bytes(20_000_000) + END)),
        # What follows is a file, if an odd one.
        "an empty file": _body(PART, END, answer=EMPTY),
        "base64 by Content-Transfer-Encoding": _body(
            _headers(b"Content-Transfer-Encoding: base64\r\n"), base64.b64encode(_html(MARK)), END, answer=KEPT
        ),
        "multipart in multipart": _body(nested, inner, END, answer=KEPT),
        "an epilogue of 10 MB": _body(PART, b"x", END, b"--b\r\n" + b"x" * 10_000_000, answer=KEPT),
        "a second name behind the first": _body(
            PART.replace(b'filename="a.txt"', b'filename="b.jpg"; filename="../../a.txt"'), b"x", END, answer=KEPT
        ),
        "a disposition twice": _body(
            _headers(b'Content-Disposition: form-data; name="other"; filename="b"\r\n'), b"x", END
        ),
    }  # fmt: skip
