"""What a file is, by its content alone: puremagic's signatures, and what no signature tells.

That is whether a container of film and sound holds a film or only sound, sound without a header of its own, and what a
zip is the shape of. Nothing here decodes anything; images are told by decoding them, elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import puremagic

from app.db.schemas import FileKind

OCTETS = "application/octet-stream"
HEAD_BYTES = 8192
TAIL_BYTES = 1024 * 1024
"""The names in a zip stand at its end. Large programs for phones have thousands of them."""
STEPS_MAX = 1000
"""Boxes of a container that are looked at. A file could be made of nothing else."""
MEDIA_TYPE_MAX = 127
"""What the database has room for."""


def detect(file: BinaryIO) -> tuple[str, FileKind]:
    """Media type and kind of a file, whatever its bytes. Images are told by decoding them: here they are octets.

    Reads its first 8 KiB, of a zip its last MiB, of a film no more than the headers of 1,000 boxes.
    """
    head = file.read(HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return _zip_type(head, _tail(file)), "file"
    if sound := _bare_sound(head):
        return sound, "audio"
    subtype, tracks = _container(file, head)
    if "video" in tracks:
        return f"video/{subtype}", "video"
    if "audio" in tracks:
        # There is no audio/quicktime.
        return f"{'video' if subtype == 'quicktime' else 'audio'}/{subtype}", "audio"
    return _by_signature(head)


def _by_signature(head: bytes) -> tuple[str, FileKind]:
    try:
        media_type = puremagic.from_string(head, mime=True).lower()
    except (puremagic.PureError, ValueError):
        return OCTETS, "file"
    if media_type.startswith("video/"):
        return media_type, "video"
    if media_type.startswith("audio/"):
        return media_type, "audio"
    if media_type.startswith("image/") or "/" not in media_type or not media_type.isascii():
        return OCTETS, "file"
    return (media_type, "file") if len(media_type) <= MEDIA_TYPE_MAX else (OCTETS, "file")


# --- containers -------------------------------------------------------------------------------------------------


def _container(file: BinaryIO, head: bytes) -> tuple[str, set[str]]:
    """The subtype of a container of film and sound, and which of the two its tracks are."""
    if head.startswith(b"OggS"):
        codecs = list(_ogg_codecs(head))
        return "ogg", {track for track, starts in OGG_CODECS.items() if any(map(starts.match, codecs))}
    if head.startswith(EBML):
        found = _find(file, _ebml_element, (EBML, DOC_TYPE))
        subtype = "webm" if any(name.startswith(b"webm") for name in found) else "x-matroska"
        tracks = _find(file, _ebml_element, (SEGMENT, TRACKS, TRACK_ENTRY, TRACK_TYPE))
        return subtype, {MATROSKA_TRACKS.get(track[:1], "") for track in tracks}
    brand = head[8:12] if head[4:8] == b"ftyp" else b"qt  " if head[4:8] in OLD_QUICKTIME else b""
    if brand in SOUND_BRANDS:
        return "mp4", {"audio"}  # a picture for each chapter is a track of film, and does not make a film of a book
    if not brand:
        return "", set()
    handlers = _find(file, _mp4_box, (b"moov", b"trak", b"mdia", b"hdlr"))
    return MP4_BRANDS.get(brand[:3], "mp4"), {MP4_HANDLERS.get(handler[8:12], "") for handler in handlers}


OGG_CODECS = {
    "audio": re.compile(rb"OpusHead|\x01vorbis|\x7fFLAC|Speex   "),
    "video": re.compile(rb"\x80theora|BBCD\x00|OVP80|\x01video"),
}
"""By how a stream's first packet begins."""


def _ogg_codecs(head: bytes) -> Iterator[bytes]:
    """How each stream begins: their first pages stand before all others (RFC 3533 section 4)."""
    at = 0
    while head[at : at + 4] == b"OggS" and len(head) > at + 26 and head[at + 5] & 2:
        lengths = head[at + 27 : at + 27 + head[at + 26]]
        at += 27 + len(lengths)
        yield head[at : at + 8]
        at += sum(lengths)


class _Part(NamedTuple):
    """The header of a box of MP4, or of an element of EBML."""

    name: bytes
    header: int
    """Its length in bytes, never 0."""
    size: int | None
    """Of what follows the header; None: all there is."""


def _find(file: BinaryIO, read: Callable[[bytes], _Part | None], path: tuple[bytes, ...]) -> list[bytes]:
    """How the parts at `path` begin, from part to part within parts; what cannot be read ends the search."""
    steps = iter(range(STEPS_MAX))

    def walk(at: int, end: int, path: tuple[bytes, ...]) -> Iterator[bytes]:
        for _ in steps:
            if at >= end:
                return
            file.seek(at)
            part = read(file.read(16))
            if part is None:
                return
            body = at + part.header
            at = end if part.size is None else min(end, body + part.size)
            if part.name == path[0]:
                if path[1:]:
                    yield from walk(body, at, path[1:])
                else:
                    file.seek(body)
                    yield file.read(max(0, min(16, at - body)))

    return list(walk(0, file.seek(0, os.SEEK_END), path))


OLD_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
"""How films began before there was `ftyp`."""
SOUND_BRANDS = (b"M4A ", b"M4B ", b"M4P ")
MP4_BRANDS = {b"3gp": "3gpp", b"3g2": "3gpp2", b"qt ": "quicktime"}
MP4_HANDLERS = {b"vide": "video", b"soun": "audio"}


def _mp4_box(data: bytes) -> _Part | None:
    """ISO/IEC 14496-12 section 4.2."""
    if len(data) < 8:
        return None
    size, header = int.from_bytes(data[:4], "big"), 8
    if size == 1:
        size, header = int.from_bytes(data[8:16], "big"), 16
    elif size == 0:
        return _Part(data[4:8], header, None)
    return _Part(data[4:8], header, size - header) if size >= header else None


EBML, DOC_TYPE = b"\x1a\x45\xdf\xa3", b"\x42\x82"
SEGMENT, TRACKS, TRACK_ENTRY, TRACK_TYPE = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\x83"
MATROSKA_TRACKS = {b"\x01": "video", b"\x02": "audio"}


def _ebml_element(data: bytes) -> _Part | None:
    """RFC 8794 sections 4 to 6."""
    name = 9 - data[0].bit_length() if data else 9  # as many bytes as its first one has leading zeros, and one
    if name > 4 or len(data) <= name:
        return None
    length = 9 - data[name].bit_length()
    if length > 8 or len(data) < name + length:
        return None
    size = int.from_bytes(data[name : name + length], "big") & ((1 << 7 * length) - 1)
    unknown = size == (1 << 7 * length) - 1
    return _Part(data[:name], name + length, None if unknown else size)


# --- sound without a header of its own ----------------------------------------------------------------------------


SOUND = {rb"ID3[\x02-\x04]": "audio/mpeg", rb"#!AMR\n": "audio/amr", rb"#!AMR-WB\n": "audio/amr-wb"}
"""How sound begins of which puremagic knows nothing, or not always."""


def _bare_sound(head: bytes) -> str:
    for start, media_type in SOUND.items():
        if re.match(start, head):
            return media_type
    for frame_bytes, media_type in ((_mp3_frame, "audio/mpeg"), (_aac_frame, "audio/aac")):
        # Twelve bits are no signature: text in UTF-16 has nearly the same. A second frame where the first ends is one.
        first = frame_bytes(head[:7])
        if first and frame_bytes(head[first : first + 7]):
            return media_type
    return ""


MP3_KBIT = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
"""By whether it is MPEG-1, and by the index in the header."""
MP3_HERTZ = {3: (44100, 48000, 32000, 0), 2: (22050, 24000, 16000, 0), 0: (11025, 12000, 8000, 0), 1: (0, 0, 0, 0)}
"""By the version (MPEG-1, 2, 2.5, none), and by the index in the header."""


def _mp3_frame(data: bytes) -> int:
    """The length of the frame of MPEG audio, layer III, that begins here; 0 when none does."""
    bits = int.from_bytes(data[:4], "big")
    version = bits >> 19 & 3
    kbit, hertz = MP3_KBIT[version == 3][bits >> 12 & 15], MP3_HERTZ[version][bits >> 10 & 3]
    if bits >> 21 != 0x7FF or bits >> 17 & 3 != 1 or not kbit or not hertz:
        return 0
    return (144_000 if version == 3 else 72_000) * kbit // hertz + (bits >> 9 & 1)


def _aac_frame(data: bytes) -> int:
    """The length of the ADTS frame that begins here; 0 when none does."""
    bits = int.from_bytes(data[:7], "big")
    if bits >> 44 != 0xFFF or bits >> 41 & 3 or bits >> 34 & 15 > 12:
        return 0
    return bits >> 13 & 0x1FFF


# --- zips ---------------------------------------------------------------------------------------------------------


ODF = re.compile(rb"application/(vnd\.oasis\.opendocument\.[a-z-]{1,60}|epub\+zip)")
OOXML = {
    b"word/": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    b"xl/": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    b"ppt/": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
}


def _zip_type(head: bytes, tail: bytes) -> str:
    if head[8:10] == b"\0\0" and head[30:38] == b"mimetype":  # first, and not packed: for those who look at heads
        begin = 38 + int.from_bytes(head[28:30], "little")
        said = head[begin : begin + int.from_bytes(head[22:26], "little")]
        if ODF.fullmatch(said):
            return said.decode()
    names = set(_zip_names(tail))
    if b"[Content_Types].xml" in names:
        for folder, media_type in OOXML.items():
            if any(name.startswith(folder) for name in names):
                return media_type
    if b"AndroidManifest.xml" in names:
        return "application/vnd.android.package-archive"
    return "application/java-archive" if b"META-INF/MANIFEST.MF" in names else "application/zip"


def _zip_names(tail: bytes) -> Iterator[bytes]:
    """The names in a zip. `zipfile` keeps half a kilobyte of each and takes half a second for the worst that fits."""
    end = tail.rfind(b"PK\x05\x06")
    at = end - int.from_bytes(tail[end + 12 : end + 16], "little")
    while 0 <= at < end and tail[at : at + 4] == b"PK\x01\x02":
        name, extra, comment = (int.from_bytes(tail[at + n : at + n + 2], "little") for n in (28, 30, 32))
        yield tail[at + 46 : at + 46 + name]
        at += 46 + name + extra + comment


def _tail(file: BinaryIO) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
    return file.read()
