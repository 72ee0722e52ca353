"""What goes on beside the measured chat: uploads, images and pushes, or people who log in.

`python -m bench.beside FOLDER` plays Google for push, prints the environment that leads a server there, and then does
what the lines on its standard input say: a JSON task begins it, `stop` ends it and is answered by what was done. It
runs at a low priority: it stands for other machines, and must not delay the load generator beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import orjson
from PIL import Image, ImageFilter

from bench import world
from tests.support.firebase import FakeGoogle

What = Literal["files", "logins"]

LOGINS_AT_ONCE = 50
PHOTOS_AT_ONCE = 2
LARGE_BYTES = 10 * 1024 * 1024
LARGE_EVERY_SECONDS = 0.5
OFFLINE = 10
"""People who are away and get pushes."""
PUSHED_MESSAGES_PER_SECOND = 20
PASSWORD = "correct horse battery staple"
NUMBERS_FROM = 9_000_000


class Crowd:
    """Those who do it, and how often they have."""

    def __init__(self, google: FakeGoogle, port: int) -> None:
        self.google = google
        self.port = port
        self.api = world.Api(port, at_once=LOGINS_AT_ONCE)
        self.counts: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._pushed_before = len(google.pushed)

    async def begin(self, what: What) -> None:
        """Make the accounts and start."""
        works = await (self._files() if what == "files" else self._logins())
        self._tasks = [asyncio.create_task(work) for work in works]

    async def end(self) -> dict[str, int]:
        """Stop, and tell how often what was done.

        Raises SetupFailed and others when it went wrong.
        """
        failed = [task for task in self._tasks if task.done()]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.api.http.aclose()
        for task in failed:
            task.result()  # none ends by itself but by an error
        self.counts["pushes"] = len(self.google.pushed) - self._pushed_before
        return dict(self.counts)

    async def _files(self) -> list[Coroutine[Any, Any, None]]:
        owner, sender, *away = [await self._account() for _ in range(2 + OFFLINE)]
        chats: list[int] = []
        for number, person in enumerate(away):
            made = await self.api.call("POST", "/chats/personal", sender.token, json={"user_id": person.id})
            chats.append(made["id"])
            device = {"kind": "token", "token": f"device-{person.id}-{number}"}
            await self.api.call("PUT", "/push/device", person.token, json=device)
        photo = _photo()
        works = [self._upload(owner, photo, "photo.jpg", "image/jpeg", "photos", 0) for _ in range(PHOTOS_AT_ONCE)]
        large = os.urandom(LARGE_BYTES)
        works.append(self._upload(owner, large, "large.bin", "application/octet-stream", "files", LARGE_EVERY_SECONDS))
        return [*works, self._say(sender, chats)]

    async def _upload(
        self, owner: world.Person, body: bytes, name: str, media_type: str, what: str, every: float
    ) -> None:
        while True:
            pause = asyncio.create_task(asyncio.sleep(every))
            await self.api.call("POST", "/messages/upload", owner.token, files={"file": (name, body, media_type)})
            self.counts[what] += 1
            await pause

    async def _say(self, sender: world.Person, chats: list[int]) -> None:
        while True:
            pause = asyncio.create_task(asyncio.sleep(1 / PUSHED_MESSAGES_PER_SECOND))
            chat = random.choice(chats)
            body = {"content": "are you there?"}
            await self.api.call("POST", f"/chats/{chat}/messages", sender.token, json=body)
            self.counts["messages to people who are away"] += 1
            await pause

    async def _logins(self) -> list[Coroutine[Any, Any, None]]:
        number = NUMBERS_FROM + random.randrange(100_000)
        body = {"phone": f"+7998{number:07d}", "password": PASSWORD, "username": f"login_{number}"}
        await self.api.call("POST", "/auth/register", json=body)
        return [self._log_in(body["phone"]) for _ in range(LOGINS_AT_ONCE)]

    async def _log_in(self, phone: str) -> None:
        while True:
            await self.api.call("POST", "/auth/token", data={"username": phone, "password": PASSWORD})
            self.counts["logins"] += 1

    async def _account(self) -> world.Person:
        return await self.api.register(NUMBERS_FROM + random.randrange(900_000))


def _photo() -> bytes:
    """What a phone takes: 12 megapixels, some megabytes of JPEG."""
    noise = Image.effect_noise((1000, 750), 80).filter(ImageFilter.GaussianBlur(1)).resize((4000, 3000))
    image = Image.merge("RGB", (noise, noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM), noise))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=92)
    return target.getvalue()


async def _serve(folder: Path) -> None:
    google = FakeGoogle(folder)
    await google.start()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)

    def answer(what: object) -> None:
        sys.stdout.buffer.write(orjson.dumps(what) + b"\n")
        sys.stdout.flush()

    answer({**google.environment, "FIREBASE_CREDENTIALS_PATH": str(google.credentials_path)})
    crowd: Crowd | None = None
    while line := await lines.readline():
        try:
            if line.strip() == b"stop":
                answer(await crowd.end() if crowd is not None else {})
                crowd = None
            else:
                task = orjson.loads(line)
                crowd = Crowd(google, task["port"])
                await crowd.begin(task["what"])
                answer({})
        except Exception as error:
            answer({"problem": f"{type(error).__name__}: {error}"})
    with contextlib.suppress(AssertionError):
        await google.stop()


def main() -> int:
    """Serve the lines on standard input."""
    os.nice(10)
    serve: Callable[[Path], Coroutine[Any, Any, None]] = _serve
    asyncio.run(serve(Path(sys.argv[1])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
