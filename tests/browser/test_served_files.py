"""A real browser opens what the server hands out, in every way it knows, and no script in it runs.

The same files with the same scripts are also served by a server that protects nobody: there each script must run, or
its silence elsewhere would mean nothing.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

import httpx
import pytest

from tests.support.chromium import Event, Tab
from tests.support.databases import ENGINES
from tests.support.hostile import FORM, Encoded, HostileFile, Refused, form, scripted
from tests.support.people import Json, Person, people
from tests.support.servers import Server
from tests.support.trap import Exposed, Trap, trap

pytestmark = pytest.mark.browser

NAMES = list(scripted())
SERVED = [name for name, file in scripted().items() if not isinstance(file.upload, Refused)]
AVATARS = [name for name, file in scripted().items() if not isinstance(file.avatar, Refused)]

RUNS_AS = {
    "a good GIF that is JavaScript": "text/html",  # whatever does not say that it is an image runs as a script
    "a good JPEG with HTML in its EXIF": "text/html",
    "a good JPEG with a zip behind": "text/html",
    "a good PNG with HTML in its text and behind it": "text/html",
    "a good WebP with HTML in its XMP": "text/html",
    "HTML that claims image/gif in capitals": "text/html",
    "HTML that claims image/png": "text/html",
    "HTML that claims video/mp4": "text/html",
    "MHTML": "text/html",  # as what it is, Chromium opens it only from a disk
    "SVG called png": "text/html",
    "SVG called txt": "text/html",
    "SVG, zipped": "image/svg+xml",
    "a zip that claims a picture in it": "text/html",
}
"""What a careless server would have to say of a file for its script to run, where that is not what its sender says."""
PDFS = ("PDF with a script", "PDF that claims to be an image")
"""Their script is for readers of PDF. Chromium's has no console, asks no server, but opens dialogs."""
NEVER_RUNS = {
    "HTML in UTF-7": "Chromium knows no UTF-7",
    "a program for Windows": "no script is in it",
    "a style sheet": "no script is in it; but it changes the page",
    "a shell script": "no browser runs it",
    "an archive of Java": "no browser runs it",
}
NAVIGATIONS = {"top", "iframe", "object", "embed", "blob"}
"""The ways that lead to a page of its own, or to a download."""
SCRIPTS = {"script", "module", "worker", "module-worker", "service-worker"}
"""The ways that ask for a script."""

HOST = """<!doctype html><title>host</title><link rel="stylesheet" href="{file}style"><body>
<iframe src="{file}iframe"></iframe> <object data="{file}object"></object> <embed src="{file}embed">
<img src="{file}img"> <video src="{file}video"></video> <audio src="{file}audio"></audio>
<script src="{file}script"></script> <script type="module" src="{file}module"></script>
<script>
const ended = worker => new Promise(resolve => {{ worker.onerror = worker.onmessage = resolve }});
async function rest() {{
  const blob = await (await fetch("{file}blob")).blob();
  const frame = document.createElement("iframe");
  frame.srcdoc = `<iframe src="${{URL.createObjectURL(blob)}}"></iframe>`;
  const shown = new Promise(resolve => {{ frame.onload = resolve }});
  document.body.append(frame);
  await Promise.all([
    shown,
    ended(new Worker("{file}worker")),
    ended(new Worker("{file}module-worker", {{type: "module"}})),
    navigator.serviceWorker.register("{file}service-worker").catch(() => null),
  ]);
  return {{
    width: document.images[0].naturalWidth,
    styled: getComputedStyle(document.body).backgroundColor == "rgb(255, 0, 0)",
  }};
}}
</script>"""
"""A page that uses a file in every way but one: going there."""
HOST_TYPE = "text/html; charset=windows-1252"
"""In this encoding, the start of a JPEG is letters."""

_marks = itertools.count(1)


def script(trap: Trap, mark: str) -> bytes:
    """A script that tells of itself in every way: where one is shut, or unknown, another may be open.

    It goes into JavaScript, attributes of HTML, XML, and PDF alike: no double quote, `<`, `&`, or lone bracket.
    """
    tell = f"'{trap.url}/ran?mark={mark}'.concat(String.fromCharCode(38),'stack=',escape(Error().stack))"
    return "".join(
        f"try{{{attempt}}}catch(e){{}}"
        for attempt in (
            f"console.log('{mark}')",
            # To wait for an answer keeps the page from having loaded before it came.
            f"x=new XMLHttpRequest();x.open('GET',{tell},false);x.send()",
            f"fetch({tell})",
            "postMessage(0)",
            f"alert('{mark}')",
            f"app.alert('{mark}')",
        )
    ).encode()


@dataclass
class Seen:
    """What a browser did with a file."""

    ran: set[str] = field(default_factory=set)
    """The ways in which its script ran, as consoles show."""
    told: set[str] = field(default_factory=set)
    """The same, as it told the trap."""
    dialogs: int = 0
    styled: bool = False
    width: int = 0
    """Of it as an image in a page, in pixels."""
    saved: set[str] = field(default_factory=set)
    """The ways in which it was saved to the disk instead of being shown."""
    copy: bytes | None = None
    """The bytes that were saved when it was gone to."""
    shown_as: str = ""
    """What was shown when it was gone to."""


@dataclass
class Watch:
    """A tab in which hostile files are opened, and the mark that their script leaves."""

    tab: Tab
    trap: Trap
    mark: str = field(default_factory=lambda: f"of-hostile-make-{next(_marks)}")

    def file(self, name: str) -> tuple[HostileFile, bytes]:
        """A file with that script in it, and its bytes."""
        file = scripted(script(self.trap, self.mark))[name]
        return file, file.make()

    async def open(self, address: str) -> Seen:
        """Use what is at an address in every way, and see what comes of it."""
        browser, begin, seen = self.tab.browser, len(self.tab.browser.events), Seen()
        saved = await self.tab.open(in_way(address, "top"))
        if saved is None:
            seen.shown_as = await self.tab.evaluate("document.contentType")
        else:
            seen.copy = saved.read_bytes()
        await self.tab.open(f"{origin_of(address)}/host?{quote(address)}")
        page = await self.tab.evaluate("rest()")
        seen.width, seen.styled = page["width"], page["styled"]
        await self.last_word()
        for event in browser.events[begin:]:
            if event.method == "Browser.downloadWillBegin":
                seen.saved.add(way_of(event.params["url"]))
            elif is_dialog(event, self.mark):
                seen.dialogs += 1
            elif is_line(event, self.mark):
                seen.ran.add(way_of(event.params["stackTrace"]["callFrames"][0]["url"]))
        seen.told = {way_of(told["stack"]) for told in self.trap.told if told["mark"] == self.mark}
        return seen

    async def last_word(self) -> None:
        """Let a script of ours run. Whoever has heard it has heard those before it."""
        browser, mark = self.tab.browser, f"{self.mark}-{next(_marks)}"
        await self.tab.evaluate(script(self.trap, mark).decode())
        await browser.wait_until(lambda: any(is_line(event, mark) for event in browser.events))
        await browser.wait_until(lambda: any(is_dialog(event, mark) for event in browser.events))
        assert mark in {told["mark"] for told in self.trap.told}


def is_line(event: Event, mark: str) -> bool:
    """Whether a script wrote its mark to a console."""
    return event.method == "Runtime.consoleAPICalled" and event.params["args"][0].get("value") == mark


def is_dialog(event: Event, mark: str) -> bool:
    """Whether a script showed its mark in a dialog."""
    return event.method == "Page.javascriptDialogOpening" and event.params["message"] == mark


def in_way(address: str, way: str) -> str:
    """An address that tells in which way a file is used, to be told by its script."""
    return f"{address}{'&' if '?' in address else '?'}way={way}"


def way_of(text: str) -> str:
    """Which way an address, or a trace with addresses, tells of."""
    found = re.search(r"[?&]way=([a-z-]+)", text)
    return found[1] if found else "blob" if "blob:" in text else text


def origin_of(address: str) -> str:
    """Scheme, host and port."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


def host_of(address: str) -> bytes:
    """A page that uses what is at an address."""
    return HOST.format(file=html.escape(in_way(address, ""))).encode()


@pytest.fixture(scope="session")
def careless() -> Iterator[Trap]:
    """A server that shows everything to everybody, and to which scripts tell that they ran."""
    with trap() as found:
        yield found


@pytest.fixture
def watch(tab: Tab, careless: Trap) -> Watch:
    """A tab for one file."""
    return Watch(tab, careless)


# --- what each script would do, were it let -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PDFS])
async def test_each_script_runs_where_nobody_stops_it(watch: Watch, careless: Trap, name: str) -> None:
    file, data = watch.file(name)
    address = f"{careless.url}/file"
    headers = {"Content-Type": RUNS_AS.get(name, file.claims)}
    if name == "SVG, zipped":
        headers["Content-Encoding"] = "gzip"
    careless.files["/file"] = Exposed(data, headers)
    careless.files["/host"] = Exposed(host_of(address), {"Content-Type": HOST_TYPE})
    seen = await watch.open(address)
    assert seen.ran == seen.told
    assert bool(seen.ran) == (name not in NEVER_RUNS)
    assert seen.styled == (name == "a style sheet")
    if name in ("HTML", "JavaScript"):
        assert seen.ran == (NAVIGATIONS if name == "HTML" else SCRIPTS)
        assert seen.dialogs


@pytest.mark.parametrize("name", PDFS)
async def test_the_script_of_a_pdf_opens_a_dialog_where_nobody_stops_it(
    watch: Watch, careless: Trap, name: str
) -> None:
    careless.files["/file"] = Exposed(watch.file(name)[1], {"Content-Type": "application/pdf"})
    await watch.tab.open(f"{careless.url}/file")
    events = watch.tab.browser.events
    await watch.tab.browser.wait_until(lambda: any(is_dialog(event, watch.mark) for event in events))
    # A tab that is closed before its dialog takes Chromium down with it.
    await watch.tab.browser.wait_until(lambda: any(event.method == "Page.javascriptDialogClosed" for event in events))


# --- what the server hands out --------------------------------------------------------------------------------------


@dataclass
class Scene:
    """An attacker, and somebody who opens what they send."""

    server: Server
    attacker: Person
    victim: Person

    async def upload(self, door: str, file: HostileFile, data: bytes) -> httpx.Response:
        """The attacker uploads a file."""
        headers = {**self.attacker.account.headers, "Content-Type": FORM}
        body = form(data, file.name.encode(), file.claims)
        return await self.attacker.client.post(f"/api/v1{door}", content=body, headers=headers)


@pytest.fixture
async def scene(shared_server: Server, tab: Tab) -> AsyncIterator[Scene]:
    """Both on a real server, to which the victim's browser brings their token, on whose own pages files are used.

    No browser does so by itself. A client that shows files on a page of the server's own could do no worse.
    """
    async with shared_server.client() as client:
        scene = Scene(shared_server, *await people(client, 2))

        def respond(url: str) -> bytes | Json:
            parts = urlsplit(url)
            return host_of(unquote(parts.query)) if parts.path == "/host" else scene.victim.account.headers

        await tab.intercept(shared_server.url, respond, HOST_TYPE)
        yield scene


@pytest.mark.parametrize("name", SERVED)
async def test_no_script_of_a_file_runs(watch: Watch, scene: Scene, name: str) -> None:
    file, data = watch.file(name)
    answer = await scene.upload("/messages/upload", file, data)
    assert answer.status_code == 201, answer.text
    uploaded = answer.json()
    await scene.attacker.send_files(await scene.attacker.personal(scene.victim), uploaded["kind"], uploaded)
    address = f"{scene.server.url}/api/v1/files/{uploaded['file_id']}"
    seen = await watch.open(address)
    if isinstance(file.upload, Encoded):
        assert seen == Seen(width=uploaded["width"], shown_as=file.upload.media_type)
        small = await watch.open(f"{address}/thumbnail")
        assert small == Seen(width=small.width, shown_as="image/webp")
        assert small.width
    else:
        assert seen == Seen(saved=NAVIGATIONS, copy=data)


@pytest.mark.parametrize("name", AVATARS)
async def test_no_script_of_an_avatar_runs(watch: Watch, scene: Scene, name: str) -> None:
    answer = await scene.upload("/users/me/avatar", *watch.file(name))
    assert answer.status_code == 200, answer.text
    for query, width in (("", 640), ("?size=small", 160)):
        seen = await watch.open(f"{scene.server.url}{answer.json()['avatar_url']}{query}")
        assert seen == Seen(width=width, shown_as="image/webp")


@pytest.mark.parametrize("shared_server", ENGINES[:1], indirect=True)
async def test_the_other_files_are_refused(watch: Watch, scene: Scene) -> None:
    for door, taken in (("/messages/upload", SERVED), ("/users/me/avatar", AVATARS)):
        for name in set(NAMES) - set(taken):
            answer = await scene.upload(door, *watch.file(name))
            assert answer.status_code == 422, (door, name)
