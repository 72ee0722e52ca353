"""What files are, told by their content. Those of `tests/files/media` are of FFmpeg: silence and one colour."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile

import pytest

from app.services.file_types import HEAD_BYTES, STEPS_MAX, TAIL_BYTES, detect
from tests.support.servers import ROOT

MEDIA = ROOT / "tests" / "files" / "media"
SOUND = {
    "16k.mp3": "audio/mpeg",
    "8k.mp3": "audio/mpeg",
    "aac-42.mp4": "audio/mp4",
    "aac-fragments.mp4": "audio/mp4",
    "aac.3gp": "audio/3gpp",
    "aac.m4a": "audio/mp4",
    "aac.mka": "audio/x-matroska",
    "aac.mov": "video/quicktime",
    "aac.mp4": "audio/mp4",
    "amr.3gp": "audio/3gpp",
    "bare.mp3": "audio/mpeg",
    "flac.oga": "audio/ogg",
    "id3.mp3": "audio/mpeg",
    "opus-live.webm": "audio/webm",
    "opus.ogg": "audio/ogg",
    "opus.webm": "audio/webm",
    "pcm.wav": "audio/wave",
    "voice.aac": "audio/aac",
    "voice.amr": "audio/amr",
    "vorbis.ogg": "audio/ogg",
    "xing.mp3": "audio/mpeg",
}
FILMS = {
    "film-fast.mp4": "video/mp4",
    "film.3gp": "video/3gpp",
    "film.mkv": "video/x-matroska",
    "film.mov": "video/quicktime",
    "film.mp4": "video/mp4",
    "film.webm": "video/webm",
}
WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
SHEET = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
SLIDES = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
TEXT = "application/vnd.oasis.opendocument.text"
OCTETS = ("application/octet-stream", "file")


def of(data: bytes) -> tuple[str, str]:
    """Media type and kind of bytes."""
    return detect(io.BytesIO(data))


def media(name: str) -> bytes:
    """A file of `tests/files/media`."""
    return (MEDIA / name).read_bytes()


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box of MP4."""
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def track(handler: bytes) -> bytes:
    """A track, as far as it matters."""
    return box(b"trak", box(b"tkhd", bytes(84)), box(b"mdia", box(b"hdlr", bytes(8), handler, bytes(13))))


def page(packet: bytes, flags: int = 2) -> bytes:
    """A page of Ogg with one packet."""
    return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([1, len(packet)]) + packet


def packed(*names: str, method: int = zipfile.ZIP_DEFLATED, **contents: bytes) -> bytes:
    """A zip."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", method) as archive:
        for name in names:
            archive.writestr(name, b"some text " * 20)
        for name, data in contents.items():
            archive.writestr(name, data)
    return output.getvalue()


def document(media_type: str) -> bytes:
    """A document as OpenOffice began it: what it is stands in front, readable."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr("mimetype", media_type)
        archive.writestr("content.xml", b"<x/>", zipfile.ZIP_DEFLATED)
        archive.writestr("META-INF/manifest.xml", b"<x/>", zipfile.ZIP_DEFLATED)
    return output.getvalue()


def test_every_sample_is_named() -> None:
    assert {path.name for path in MEDIA.iterdir()} == {*SOUND, *FILMS}


# --- sound and film -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_what_has_only_sound_is_audio(name: str) -> None:
    assert of(media(name)) == (SOUND[name], "audio")


@pytest.mark.parametrize("name", FILMS)
def test_what_has_a_picture_is_a_video(name: str) -> None:
    assert of(media(name)) == (FILMS[name], "video")


def test_tracks_are_found_behind_all_that_a_phone_recorded() -> None:
    for handler, expected in ((b"soun", ("audio/mp4", "audio")), (b"vide", ("video/mp4", "video"))):
        recorded = struct.pack(">I4sQ", 1, b"mdat", 16 + 50_000) + bytes(50_000)
        head = box(b"ftyp", b"mp42\0\0\0\0isommp42") + box(b"free", bytes(3000)) + recorded
        assert of(head + box(b"moov", box(b"mvhd", bytes(100)), track(handler))) == expected
        assert of(head + struct.pack(">I4s", 0, b"moov") + track(b"soun") + track(handler)) == expected
    assert of(box(b"wide") + box(b"mdat", b"x") + box(b"moov", track(b"vide"))) == ("video/quicktime", "video")


def test_the_pictures_of_chapters_make_no_film_of_a_book() -> None:
    book = box(b"ftyp", b"M4B \0\0\0\0isom") + box(b"moov", track(b"soun"), track(b"text"), track(b"vide"))
    assert of(book) == ("audio/mp4", "audio")


def test_pictures_in_a_container_of_films_are_no_films() -> None:
    for brand in (b"heic", b"hevc", b"avif", b"avis", b"mif1"):
        for rest in (box(b"meta", bytes(50)), box(b"moov", track(b"pict"))):
            assert of(box(b"ftyp", brand, bytes(4), brand) + rest) == OCTETS, brand


def test_one_picture_among_the_streams_of_an_ogg_makes_it_a_film() -> None:
    sound, film = page(b"OpusHead\1\1"), page(b"\x80theora\3\2\1")
    assert of(page(b"fishead\0") + sound) == ("audio/ogg", "audio")
    assert of(sound + film + page(b"data", flags=0)) == ("video/ogg", "video")
    assert of(sound + page(b"data", flags=0) + film) == ("audio/ogg", "audio")  # another one, behind
    assert of(page(b"\0\0\0\0")) == ("application/ogg", "file")


def test_sound_by_amr_says_how_wide_it_is() -> None:
    assert of(b"#!AMR-WB\n" + bytes(50)) == ("audio/amr-wb", "audio")


@pytest.mark.parametrize("start", ["fffa9064", "fff39064", "fff29064", "ffe39064", "ffe29064", "fff84c"])
def test_the_look_of_one_frame_is_not_yet_sound(start: str) -> None:
    assert of(bytes.fromhex(start) + b"some text " * 500) == OCTETS


def test_text_in_utf_16_is_no_sound() -> None:
    assert of("\ufeff<script>alert(1)</script>".encode("utf-16-le") * 500)[1] == "file"


def test_a_film_is_told_by_its_start_if_its_tracks_cannot_be_found() -> None:
    assert of(box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + os.urandom(4096)) == ("video/mp4", "video")
    assert of(media("film.webm")[:40])[0] != "audio/webm"
    assert of(b"") == OCTETS


# --- zips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (packed("a.txt", "b.txt"), "application/zip"),
        (packed("a.txt", "b.txt", method=zipfile.ZIP_STORED), "application/zip"),
        (packed("word/a.txt"), "application/zip"),
        (packed("[Content_Types].xml", "_rels/.rels", "word/document.xml"), WORD),
        (packed("docProps/app.xml", "xl/workbook.xml", "[Content_Types].xml"), SHEET),
        (packed("_rels/.rels", "ppt/presentation.xml", "[Content_Types].xml"), SLIDES),
        (packed("[Content_Types].xml", "Metadata/x.xml"), "application/zip"),
        (packed("META-INF/MANIFEST.MF", "a/B.class"), "application/java-archive"),
        (
            packed("META-INF/MANIFEST.MF", "classes.dex", "AndroidManifest.xml"),
            "application/vnd.android.package-archive",
        ),
        (document(TEXT), TEXT),
        (document("application/vnd.oasis.opendocument.spreadsheet"), "application/vnd.oasis.opendocument.spreadsheet"),
        (document("application/epub+zip"), "application/epub+zip"),
        (document("text/html"), "application/zip"),
        (document("application/xhtml+xml"), "application/zip"),
        (packed(method=zipfile.ZIP_STORED, **{"a.docx": packed("[Content_Types].xml", "word/x")}), "application/zip"),
    ],
)
def test_a_zip_is_what_is_in_it(data: bytes, expected: str) -> None:
    assert of(data) == (expected, "file")


def test_the_names_of_a_large_program_are_all_looked_at() -> None:
    names = [f"res/drawable-xxhdpi-v4/abc_picture_{number}.png" for number in range(4000)]
    assert of(packed(*names, "AndroidManifest.xml"))[0] == "application/vnd.android.package-archive"


# --- whatever the bytes -------------------------------------------------------------------------------------------


class _Counted(io.BytesIO):
    """Bytes that know how often, and how much, they were read."""

    reads = taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads += 1
        self.taken += len(data)
        return data


def test_spoilt_and_cut_files_are_told_all_the_same() -> None:
    chance = random.Random(7)
    samples = [media(name) for name in (*SOUND, *FILMS)]
    samples += [document(TEXT), packed("[Content_Types].xml", "word/document.xml")]
    for _ in range(3000):
        data = bytearray(chance.choice(samples))
        for _ in range(chance.randint(0, 8)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        media_type, kind = of(bytes(data[: chance.randint(0, 2 * len(data))]))
        assert kind in ("audio", "video", "file")
        assert len(media_type) <= 127
        assert not media_type.startswith("image/")


@pytest.mark.parametrize(
    "data",
    [
        box(b"ftyp", b"isom\0\0\2\0isom") + box(b"free") * 500_000,
        box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", box(b"trak") * 500_000),
        box(b"ftyp", b"isom\0\0\2\0isom") + b"\0\0\0\0moov" * 200_000,
        b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\xff" + b"\xec\x80" * 500_000,
        b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\xff\x16\x54\xae\x6b\xff\xae\xff" * 100_000,
        page(b"OpusHead") * 100_000,
    ],
    ids=["boxes", "tracks", "boxes without end", "elements", "elements within elements", "streams"],
)
def test_a_file_of_nothing_but_boxes_costs_little(data: bytes) -> None:
    file = _Counted(data)
    detect(file)
    assert file.reads <= 3 * STEPS_MAX
    assert file.taken <= HEAD_BYTES + 3 * STEPS_MAX * 16


def test_of_a_zip_no_more_than_its_ends_is_read() -> None:
    file = _Counted(packed("a") + bytes(3 * TAIL_BYTES))
    assert detect(file) == ("application/zip", "file")
    assert file.taken == HEAD_BYTES + TAIL_BYTES
