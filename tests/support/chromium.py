"""A headless Chromium, told what to do over its DevTools protocol (chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.support.servers import PATIENCE, Server, environment
from tests.support.tools import require_tools

Json = dict[str, Any]
NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # root cannot have it, nor most machines of a CI
    "--remote-debugging-port=0",
    # It knows this machine alone: neither its makers' nor what a page would like to load from elsewhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-features=LocalNetworkAccessChecks",  # a page that `intercept` made could not ask this machine
    "--disable-gpu",
    "--disable-sync",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--window-size=1400,1000",
    "about:blank",
)
TOLD = ("Runtime.enable", "Log.enable", "Page.enable")
"""What each thing that opens shall tell of, as far as its kind knows it: pages, frames, workers."""
ATTACH: Json = {
    "autoAttach": True,
    "waitForDebuggerOnStart": True,  # so that nothing happens in it before somebody listens
    "flatten": True,
    "filter": [{"type": "browser_ui", "exclude": True}, {"type": "tab", "exclude": True}, {}],
}


UNTIL = """new Promise(resolve => {
  const look = () => { if (%s) { observer.disconnect(); resolve() } };
  const observer = new MutationObserver(look);
  observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  document.addEventListener("load", look, true);  // images come without a mutation
  look();
})"""


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """A Chromium that runs meanwhile: the address of its DevTools."""
    if not any(map(shutil.which, NAMES)):
        require_tools(NAMES[:1], "chromium")
    program = next(name for name in NAMES if shutil.which(name))
    process = Server(
        [program, f"--user-data-dir={folder / 'profile'}", *ARGUMENTS],
        cwd=folder,
        env=environment(),
        log_path=folder / "chromium.log",
    )
    try:
        yield process.wait_for_log(r"DevTools listening on (ws://\S+)")[1]
    finally:
        process.kill()


class Refusal(Exception):
    """Chromium does not do what it was told."""


@dataclass(frozen=True)
class Event:
    """Something that Chromium tells of, by itself or by a session with one of the things that are open."""

    method: str
    params: Json
    session: str


class Browser:
    """A conversation with Chromium, and all that it has told in it."""

    def __init__(self, connection: ClientConnection) -> None:
        self.events: list[Event] = []
        self.sessions: dict[str, str] = {}
        """Of what is open, by its id."""
        self.on_request: Callable[[Event], tuple[str, Json]] | None = None
        """Told of a request that Chromium holds back: the command that lets it go on, and its parameters."""
        self._connection = connection
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Json]] = {}
        self._changed = asyncio.Condition()

    async def do(self, method: str, session: str = "", **params: Any) -> Json:
        """Give a command; what came of it. Raises Refusal."""
        number = next(self._numbers)
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        command: Json = {"id": number, "method": method, "params": params}
        await self._connection.send(json.dumps({**command, "sessionId": session} if session else command))
        async with asyncio.timeout(PATIENCE):
            return await answer

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until what Chromium has told fulfils a condition."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(condition)

    async def wait_for(self, method: str, since: int, session: str = "", **params: Any) -> None:
        """Wait for an event, one of those since then; `params` are some of its own."""
        await self.wait_until(
            lambda: any(
                (event.method, event.session) == (method, session) and params.items() <= event.params.items()
                for event in self.events[since:]
            )
        )

    async def listen(self) -> None:
        """Hear what Chromium tells, until somebody cancels this."""
        async with asyncio.TaskGroup() as tasks:
            async for text in self._connection:
                message = json.loads(text)
                if "id" in message:
                    self._settle(message)
                    continue
                event = Event(message["method"], message["params"], message.get("sessionId", ""))
                if event.method == "Target.attachedToTarget":
                    tasks.create_task(self._attached(event))
                elif event.method == "Fetch.requestPaused":
                    assert self.on_request is not None
                    command, params = self.on_request(event)
                    tasks.create_task(self._try(command, requestId=event.params["requestId"], **params))
                elif event.method == "Page.javascriptDialogOpening":
                    tasks.create_task(self._try("Page.handleJavaScriptDialog", event.session, accept=True))
                async with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()

    def _settle(self, message: Json) -> None:
        answer = self._answers.pop(message["id"])
        if answer.done():  # nobody waits any more
            return
        if "error" in message:
            answer.set_exception(Refusal(message["error"]["message"]))
        else:
            answer.set_result(message["result"])

    async def _try(self, method: str, session: str = "", **params: Any) -> None:
        # What it is about may be gone by now.
        with contextlib.suppress(Refusal):
            await self.do(method, session, **params)

    async def _attached(self, event: Event) -> None:
        session = event.params["sessionId"]
        # Together: some things answer nothing before they are let go.
        await asyncio.gather(
            *(self._try(method, session) for method in TOLD),
            self._try("Target.setAutoAttach", session, **ATTACH),
            self._try("Runtime.runIfWaitingForDebugger", session),
        )
        async with self._changed:
            self.sessions[event.params["targetInfo"]["targetId"]] = session
            self._changed.notify_all()


@dataclass(frozen=True)
class Tab:
    """A tab, and the folder into which it saves."""

    browser: Browser
    session: str
    folder: Path

    async def open(self, url: str) -> Path | None:
        """Go to an address, and wait until all of it has come. Where it was saved, if it was not shown."""
        browser, begin = self.browser, len(self.browser.events)
        answer = await browser.do("Page.navigate", self.session, url=url)
        if answer.get("isDownload"):
            await browser.wait_until(lambda: any(event.params["url"] == url for event in self.downloads(begin)))
            [file] = [str(event.params["guid"]) for event in self.downloads(begin) if event.params["url"] == url]
            await browser.wait_for("Browser.downloadProgress", begin, guid=file, state="completed")
            return self.folder / file
        assert "errorText" not in answer, answer
        await browser.wait_for("Page.loadEventFired", begin, self.session)
        return None

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression, as soon as it has one."""
        answer = await self.browser.do(
            "Runtime.evaluate", self.session, expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression of the page is true."""
        await self.evaluate(UNTIL % condition)

    async def click(self, selector: str) -> None:
        """Click on an element, as soon as there is one."""
        await self.until(f"document.querySelector({selector!r})")
        await self.evaluate(f"document.querySelector({selector!r}).click()")

    async def fill(self, selector: str, text: str) -> None:
        """Type into a field, as soon as there is one, in place of what stands there, and leave it."""
        await self.until(f"document.querySelector({selector!r})")
        await self.evaluate(f"document.querySelector({selector!r}).select()")
        await self.browser.do("Input.insertText", self.session, text=text)
        await self.evaluate("document.activeElement.blur()")

    def complaints(self) -> list[str]:
        """The errors in its console, the browser's own included: what failed to load, what broke a policy."""
        return [
            str(event.params["entry"]["text"] if event.method == "Log.entryAdded" else event.params)
            for event in self.browser.events
            if event.method == "Runtime.exceptionThrown"
            or (event.method == "Runtime.consoleAPICalled" and event.params["type"] in ("error", "assert"))
            or (event.method == "Log.entryAdded" and event.params["entry"]["level"] == "error")
        ]

    async def intercept(self, origin: str, respond: Callable[[str], bytes | Json], content_type: str) -> None:
        """Hold back each request to an origin: `respond` tells what it gets, or goes out with besides its headers."""

        def on_request(event: Event) -> tuple[str, Json]:
            request = event.params["request"]
            found = respond(request["url"])
            if isinstance(found, bytes):
                headers = [{"name": "Content-Type", "value": content_type}]
                body = base64.b64encode(found).decode()
                return "Fetch.fulfillRequest", {"responseCode": 200, "responseHeaders": headers, "body": body}
            all_headers = {**request["headers"], **found}
            return "Fetch.continueRequest", {
                "headers": [{"name": name, "value": value} for name, value in all_headers.items()]
            }

        self.browser.on_request = on_request
        # Of the whole browser: a tab's own would miss workers, and frames in processes of their own.
        await self.browser.do("Fetch.enable", patterns=[{"urlPattern": f"{origin}/*"}])

    def downloads(self, since: int = 0) -> list[Event]:
        """What began to be saved."""
        return [event for event in self.browser.events[since:] if event.method == "Browser.downloadWillBegin"]


@contextlib.asynccontextmanager
async def new_tab(address: str, folder: Path, *, window: bool = False) -> AsyncIterator[Tab]:
    """A tab in a profile that nobody has used. Without a window, which costs much, it runs but paints nothing."""
    async with connect(address, max_size=None) as connection:
        browser = Browser(connection)
        listening = asyncio.create_task(browser.listen())
        try:
            await browser.do("Target.setAutoAttach", **ATTACH)
            profile = (await browser.do("Target.createBrowserContext"))["browserContextId"]
            await browser.do(
                "Browser.setDownloadBehavior",
                browserContextId=profile,
                behavior="allowAndName",
                downloadPath=str(folder),
                eventsEnabled=True,
            )
            target = {"url": "about:blank", "browserContextId": profile, "hidden": not window}
            opened = await browser.do("Target.createTarget", **target)
            await browser.wait_until(lambda: opened["targetId"] in browser.sessions)
            yield Tab(browser, browser.sessions[opened["targetId"]], folder)
            await browser.do("Target.disposeBrowserContext", browserContextId=profile)
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
