"""What these tests need of the machine. Whoever chooses them (`make deployment`) wants them run: nothing is skipped."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.dockerfile import ROOT, Failure, Image, build
from tests.support.databases import SECRET_KEY
from tests.support.servers import PATIENCE, Server, environment, killed_at_the_end

CONTEXT = ("Dockerfile", ".dockerignore", "requirements.txt", "alembic.ini", "alembic", "app")
FORGOTTEN = {
    ".env": "SECRET_KEY=planted-secret",
    ".git/config": "planted-secret",
    ".secret_key": "planted-secret",
    "dialect.db": "planted-secret",
    "dialect.db-wal": "planted-secret",
    "serviceAccountKey.json": "planted-secret",
    "uploads/1/photo": "planted-secret",
    "app/.env": "planted-secret",
    "app/dialect.db": "planted-secret",
    "app/core/serviceAccountKey.json": "planted-secret",
    "app/__pycache__/config.cpython-313.pyc": "planted-secret",
}
"""What lies about in the folder of somebody who has run the server there."""


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image, built from a folder in which somebody has run a server."""
    context = tmp_path_factory.mktemp("context")
    for name in CONTEXT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, context / name)
    for name, text in FORGOTTEN.items():
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(text)
    try:
        return build(context)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)


class Container(Server):
    """A server in the image: number 1 of its own processes, which is the one that gets signals."""

    @property
    def pid(self) -> int:
        """Its number outside."""
        [child] = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(child)

    def signal(self, number: int) -> None:
        """Send a signal to the server, as Docker does."""
        os.kill(self.pid, number)


StartContainer = Callable[..., Container]


@pytest.fixture
def start_container(image: Image, tmp_path: Path) -> Iterator[StartContainer]:
    """Starts containers of the image: `start_container("migrate", SOME="setting")`; /data is kept between them."""
    with killed_at_the_end() as started:

        def start(*command: str, **settings: str) -> Container:
            arguments = image.arguments(
                command or None,
                volumes={"/data": tmp_path / "volume"},
                environment={"SECRET_KEY": SECRET_KEY, "HOST": "127.0.0.1", **settings},
            )
            log_path = tmp_path / f"container-{len(started)}.log"
            container = Container(arguments, cwd=tmp_path, env=environment(), log_path=log_path)
            started.append(container)
            return container

        yield start


def end(container: Container, number: int = signal.SIGTERM) -> int:
    """Stop a container as Docker does; its exit code."""
    container.signal(number)
    return container.wait(PATIENCE)
