"""Builds the Dockerfile and runs its image where there is no Docker: `python scripts/dockerfile.py`.

Every instruction is carried out as Docker would, in a root file system of its own (debootstrap, unshare, chroot; Linux,
as root). The base image is the one thing that is not Docker's: for `python:X.Y-slim-SUITE`, which is Debian's suite
with a Python built by hand, stands Debian's suite with Debian's Python, and it must be of the same X.Y.

How the host reaches its package index (pip's settings, proxies, certificates) is lent to RUN as environment variables
and mounts that are gone afterwards. Nothing of it stays in the image.

DIALECT_IMAGE_DIR  where base systems, pip's cache and images are kept  (default /var/tmp/dialect-image)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
DIR = Path(os.environ.get("DIALECT_IMAGE_DIR") or "/var/tmp/dialect-image")  # noqa: S108 - root's own, see _own_folder
TOOLS = ("debootstrap", "unshare", "nsenter", "chroot")
BASE = re.compile(r"python:(?P<python>\d+\.\d+)-slim-(?P<suite>[a-z]+)")
PACKAGES = "python3,python3-venv,ca-certificates"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LENT = re.compile(r"(PIP_\w+|(HTTPS?|NO|ALL)_PROXY|(SSL|REQUESTS|CURL)_(CERT_FILE|CA_BUNDLE))", re.IGNORECASE)


class Failure(Exception):
    """What keeps us from going on: a sentence for whoever called."""


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    line: int
    name: str
    flags: dict[str, str]
    rest: str

    def words(self) -> list[str]:
        """The arguments, of the JSON form or the plain one."""
        return self.json() or shlex.split(self.rest)

    def json(self) -> list[str] | None:
        """The arguments of the JSON (exec) form; None for any other."""
        if not self.rest.startswith("["):
            return None
        try:
            words = json.loads(self.rest)
        except ValueError:
            return None
        return words if all(isinstance(word, str) for word in words) else None


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, in order."""
    instructions = []
    begun: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        first = first if begun else number
        begun.append(line.strip().removesuffix("\\").strip())
        if line.rstrip().endswith("\\"):
            continue
        name, _, rest = " ".join(begun).partition(" ")
        begun = []
        flags = {}
        while match := re.match(r"--([a-z-]+)=(\S+)\s*", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        instructions.append(Instruction(first, name.upper(), flags, rest))
    return instructions


class Ignored:
    """The rules of a .dockerignore: the last one that fits a path, or a folder above it, decides."""

    def __init__(self, text: str) -> None:
        self._rules = []
        for line in text.splitlines():
            pattern = line.strip()
            if pattern and not pattern.startswith("#"):
                wanted = pattern.startswith("!")
                self._rules.append((wanted, _pattern(pattern.removeprefix("!").strip("/"))))

    def __call__(self, path: PurePosixPath) -> bool:
        above = [str(part) for part in (path, *path.parents)][:-1]
        ignored = False
        for wanted, pattern in self._rules:
            if any(pattern.fullmatch(part) for part in above):
                ignored = not wanted
        return ignored


def _pattern(glob: str) -> re.Pattern[str]:
    """Go's filepath.Match, and `**` for any number of folders."""
    out = ""
    for part in re.findall(r"\*\*/?|\*|\?|\[\^?[^]]+\]|.", glob):
        if part.startswith("**"):
            out += "(?:.*/)?" if part.endswith("/") else ".*"
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(part, part if len(part) > 1 else re.escape(part))
    return re.compile(out)


# --- running in a root file system ------------------------------------------------------------------------------

# The mounts live in a namespace of their own and vanish with the last process in it, so that no later removal of the
# folder reaches the real /dev. The process ends up as number 1, as in a container: signals it does not handle are lost.
ENTER = r"""
set -eu
root=$1 read_only=$2; shift 2
mount --bind "$root" "$root"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
while [ "$1" != -- ]; do
  case $1 in
    file) mkdir -p "$(dirname "$root$3")"; touch "$root$3" ;;
    folder) mkdir -p "$root$3" ;;
  esac
  mount --bind "$2" "$root$3"
  shift 3
done
shift
[ "$read_only" = no ] || mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Image:
    """A root file system, and how to start what is in it."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    workdir: str = "/"
    user: tuple[int, int] = (0, 0)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()
    healthcheck_flags: dict[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    stop_signal: str = "SIGTERM"
    labels: dict[str, str] = field(default_factory=dict)

    def arguments(
        self,
        command: Sequence[str] | None = None,
        *,
        volumes: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[str]:
        """A command line that does what `docker run --read-only --tmpfs /tmp --cap-drop ALL` does.

        `command` stands for CMD; `volumes` says what is mounted where; the rest of the system is read-only.
        """
        mounts = []
        for inside, outside in (volumes or {}).items():
            self._fill(inside, outside)
            mounts += ["folder", str(outside), inside]
        process = [*self.entrypoint, *(self.command if command is None else command)]
        return self._enter(process, mounts=mounts, environment=environment, read_only=True, unprivileged=True)

    def healthcheck_arguments(self, pid: int, environment: Mapping[str, str] | None = None) -> list[str]:
        """A command line that runs HEALTHCHECK beside the process with this number, which runs in this image."""
        return [
            *("nsenter", "--target", str(pid), "--mount", "--pid", "--root"),
            *self._become(self.healthcheck, environment, unprivileged=True),
        ]  # fmt: skip

    def run(self, process: Sequence[str], *, caches: Iterable[str], kept: Path) -> None:
        """RUN. Raises Failure when it fails."""
        environment, mounts = _lent()
        for target in caches:
            cache = kept / target.strip("/").replace("/", "-")
            cache.mkdir(parents=True, exist_ok=True)
            mounts += ["folder", str(cache), target]
        for shared in ("/etc/resolv.conf", "/etc/hosts"):
            mounts += ["file", shared, shared]
        arguments = self._enter(process, mounts=mounts, environment=environment)
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL)  # noqa: S603 - the Dockerfile's own commands
        if done.returncode:
            raise Failure(f"the command ended with status {done.returncode}: {shlex.join(process)}")

    def inside(self, path: str) -> Path:
        """Where a path of the image is, seen from outside."""
        return self.root / os.path.normpath(os.path.join("/", self.workdir, path)).lstrip("/")

    def _enter(
        self,
        process: Sequence[str],
        *,
        mounts: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        read_only: bool = False,
        unprivileged: bool = False,
    ) -> list[str]:
        return [
            *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--"),
            *("sh", "-c", ENTER, "sh", str(self.root), "yes" if read_only else "no", *mounts, "--"),
            *self._become(process, environment, unprivileged=unprivileged),
        ]  # fmt: skip

    def _become(
        self, process: Sequence[str], environment: Mapping[str, str] | None, *, unprivileged: bool
    ) -> list[str]:
        become = []
        if unprivileged:
            uid, gid = self.user
            become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
            become += ["--bounding-set=-all", "--inh-caps=-all"]
        values = {"HOME": "/root", **self.environment, **(environment or {})}
        set_values = [f"{name}={value}" for name, value in values.items()]
        return [*become, "env", "--ignore-environment", f"--chdir={self.workdir}", *set_values, *process]

    def _fill(self, inside: str, outside: Path) -> None:
        """What Docker does to a new volume: it gets what the image has there, with its owner."""
        outside.mkdir(parents=True, exist_ok=True)
        if not any(outside.iterdir()):
            _call("cp", "--archive", f"{self.inside(inside)}/.", str(outside))


def _lent() -> tuple[dict[str, str], list[str]]:
    """How this host reaches its package index: variables, and mounts for the files that they name."""
    values = {name: value for name, value in os.environ.items() if LENT.fullmatch(name)}
    listed = _call(sys.executable, "-m", "pip", "config", "list")
    for scope, name, quoted in re.findall(r"^(\w+)\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if scope in ("global", "install"):
            values.setdefault(f"PIP_{name.upper().replace('-', '_')}", quoted)
    for name in ("PIP_CONFIG_FILE", "PIP_CACHE_DIR", "PIP_NO_CACHE_DIR"):  # read above; the image has its own
        values.pop(name, None)
    mounts = []
    for number, name in enumerate(values):
        outside = Path(values[name])
        if outside.is_absolute() and outside.exists():
            values[name] = f"/tmp/lent-{number}"  # noqa: S108 - a mount of its own, gone with the process
            mounts += ["folder" if outside.is_dir() else "file", str(outside), values[name]]
    return values, mounts


def _call(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True)  # noqa: S603 - arguments are ours
    if done.returncode:
        raise Failure(f"{shlex.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# --- building ---------------------------------------------------------------------------------------------------


def build(context: Path = ROOT, folder: Path = DIR) -> Image:
    """Build `context`/Dockerfile and return its last stage. Raises Failure."""
    import fcntl  # tests import this module on systems that have none

    if os.geteuid() != 0:
        raise Failure("building the image without Docker takes root: chroot and mounts need it.")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise Failure(f"{', '.join(missing)} not found: apt-get install debootstrap debian-archive-keyring util-linux")
    _own_folder(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write into the same folders
        return _Build(context, folder).run()


def _own_folder(folder: Path) -> None:
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise Failure(f"{folder} belongs to another user: set DIALECT_IMAGE_DIR to a folder of your own.")


class _Build:
    def __init__(self, context: Path, folder: Path) -> None:
        self._context = context
        self._folder = folder
        ignore = context / ".dockerignore"
        self._ignored = Ignored(ignore.read_text() if ignore.exists() else "")
        self._stages: dict[str, Image] = {}
        self._image: Image | None = None
        self._arguments: dict[str, str] = {}

    def run(self) -> Image:
        for instruction in parse((self._context / "Dockerfile").read_text()):
            begun = time.monotonic()
            act = getattr(self, f"_{instruction.name.lower()}", None)
            if act is None:
                raise Failure(f"line {instruction.line}: scripts/dockerfile.py does not know {instruction.name}")
            print(f"{instruction.name} {instruction.rest[:100]}", file=sys.stderr, flush=True)  # noqa: T201
            try:
                act(instruction)
            except Failure as failure:
                raise Failure(f"Dockerfile, line {instruction.line}: {failure}") from failure
            if (taken := time.monotonic() - begun) >= 1:
                print(f"  {taken:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        return self._current

    @property
    def _current(self) -> Image:
        if self._image is None:
            raise Failure("there is no FROM before it")
        return self._image

    def _from(self, instruction: Instruction) -> None:
        self._known(instruction, ())
        match instruction.rest.split():
            case [base]:
                name = "last"
            case [base, as_, name] if as_.upper() == "AS":
                pass
            case _:
                raise Failure(f"FROM {instruction.rest} is not understood")
        image = self._stages.get(base) or self._base(base)
        root = self._folder / "stages" / name
        if root.exists():
            _call("rm", "--recursive", "--force", "--one-file-system", str(root))
        root.parent.mkdir(exist_ok=True)
        _call("cp", "--archive", "--reflink=auto", str(image.root), str(root))
        self._image = self._stages[name] = replace(image, root=root)

    def _base(self, name: str) -> Image:
        match = BASE.fullmatch(name)
        if match is None:
            raise Failure(f"{name} has no stand-in here, only python:X.Y-slim-SUITE has")
        root = self._folder / f"base-{match['suite']}"
        if not root.exists():
            partial = root.with_suffix(".partial")
            _call("rm", "--recursive", "--force", "--one-file-system", str(partial))
            # A namespace of its own, because an interrupted debootstrap leaves /proc mounted inside the folder.
            _call(
                *("unshare", "--mount", "--propagation", "private", "--"),
                *("debootstrap", "--variant=minbase", f"--include={PACKAGES}", match["suite"], str(partial)),
            )
            _call("chroot", str(partial), "apt-get", "clean")
            for link in ("python", "python3"):
                (partial / "usr/local/bin" / link).symlink_to("/usr/bin/python3")
            partial.rename(root)  # a folder of this name is always a whole one
        python = _call("chroot", str(root), "/usr/local/bin/python", "--version").split()[-1]
        if not python.startswith(f"{match['python']}."):
            raise Failure(f"{name} has Python {match['python']}, but Debian {match['suite']} has {python}")
        return Image(root)

    def _arg(self, instruction: Instruction) -> None:
        name, _, default = instruction.rest.partition("=")
        self._arguments[name] = default.strip("\"'")

    def _env(self, instruction: Instruction) -> None:
        values = dict(word.partition("=")[::2] for word in self._filled(instruction).words())
        self._set(environment={**self._current.environment, **values})

    def _label(self, instruction: Instruction) -> None:
        values = dict(word.partition("=")[::2] for word in self._filled(instruction).words())
        self._set(labels={**self._current.labels, **values})

    def _workdir(self, instruction: Instruction) -> None:
        self._set(workdir=os.path.normpath(os.path.join(self._current.workdir, self._filled(instruction).rest)))
        self._current.inside(".").mkdir(parents=True, exist_ok=True)

    def _user(self, instruction: Instruction) -> None:
        match = re.fullmatch(r"(\d+):(\d+)", instruction.rest)
        if match is None:
            raise Failure("USER is understood as numbers only: UID:GID")
        self._set(user=(int(match[1]), int(match[2])))

    def _copy(self, instruction: Instruction) -> None:
        self._known(instruction, ("from",))
        *sources, target = self._filled(instruction).words()
        stage = instruction.flags.get("from")
        if stage is not None and stage not in self._stages:
            raise Failure(f"there is no stage {stage}")
        into_folder = target.endswith("/") or len(sources) > 1
        for source in sources:
            base = self._stages[stage].root if stage else self._context
            path = base / source.lstrip("/")
            if not path.exists() or (stage is None and path.is_file() and self._ignored(PurePosixPath(source))):
                raise Failure(f"{source} does not exist, or .dockerignore leaves it out")
            destination = self._current.inside(target)
            if path.is_dir():
                self._copy_folder(path, destination, PurePosixPath(source), filtered=stage is None)
            else:
                destination = destination / path.name if into_folder else destination
                destination.parent.mkdir(parents=True, exist_ok=True)
                _call("cp", "--archive", str(path), str(destination))
                os.chown(destination, 0, 0)

    def _copy_folder(self, source: Path, target: Path, relative: PurePosixPath, *, filtered: bool) -> None:
        target.mkdir(parents=True, exist_ok=True)
        if not filtered:
            _call("cp", "--archive", f"{source}/.", str(target))
            return
        for path in sorted(source.iterdir()):
            inner = relative / path.name
            if path.is_dir():
                self._copy_folder(path, target / path.name, inner, filtered=True)
            elif not self._ignored(inner):
                _call("cp", "--archive", str(path), str(target / path.name))
                os.chown(target / path.name, 0, 0)
        if not any(target.iterdir()):
            target.rmdir()

    def _run(self, instruction: Instruction) -> None:
        self._known(instruction, ("mount",))
        caches = []
        if mount := instruction.flags.get("mount"):
            options = dict(part.partition("=")[::2] for part in mount.split(","))
            if options.get("type") != "cache":
                raise Failure("of RUN --mount only type=cache is understood")
            caches.append(options["target"])
        process = instruction.json() or ["/bin/sh", "-c", instruction.rest]
        image = replace(self._current, environment={**self._arguments, **self._current.environment})
        image.run(process, caches=caches, kept=self._folder / "cache")

    def _volume(self, instruction: Instruction) -> None:
        self._set(volumes=(*self._current.volumes, *instruction.words()))

    def _expose(self, instruction: Instruction) -> None:
        self._set(ports=(*self._current.ports, *map(int, instruction.words())))

    def _stopsignal(self, instruction: Instruction) -> None:
        self._set(stop_signal=instruction.rest)

    def _healthcheck(self, instruction: Instruction) -> None:
        name, _, rest = instruction.rest.partition(" ")
        words = Instruction(instruction.line, name, {}, rest.strip()).json()
        if name != "CMD" or words is None:
            raise Failure('HEALTHCHECK is understood as CMD ["..."] only')
        self._known(instruction, ("interval", "timeout", "start-period", "start-interval", "retries"))
        self._set(healthcheck=tuple(words), healthcheck_flags=instruction.flags)

    def _entrypoint(self, instruction: Instruction) -> None:
        self._set(entrypoint=self._exec_form(instruction), command=())

    def _cmd(self, instruction: Instruction) -> None:
        self._set(command=self._exec_form(instruction))

    def _exec_form(self, instruction: Instruction) -> tuple[str, ...]:
        words = instruction.json()
        if words is None:
            raise Failure(f'{instruction.name} must be of the form ["..."]: a shell between would keep signals back')
        return tuple(words)

    def _known(self, instruction: Instruction, flags: Iterable[str]) -> None:
        if unknown := set(instruction.flags) - set(flags):
            raise Failure(f"scripts/dockerfile.py does not know {instruction.name} --{', --'.join(unknown)}")

    def _filled(self, instruction: Instruction) -> Instruction:
        """With `$NAME` and `${NAME}` of ARG and ENV put in."""
        values = {**self._arguments, **self._current.environment}
        rest = re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: values.get(match[1] or match[2], ""), instruction.rest)
        return replace(instruction, rest=rest)

    def _set(self, **values: object) -> None:
        self._image = replace(self._current, **values)  # type: ignore[arg-type] # the names are those of Image


def main() -> None:
    """Build, and say where the image is and how large."""
    try:
        image = build()
        base = BASE.search((ROOT / "Dockerfile").read_text())
        size, beside = (
            int(_call("du", "--summarize", "--block-size=1M", str(root)).split()[0])
            for root in (image.root, DIR / f"base-{base['suite'] if base else ''}")
        )
    except Failure as failure:
        sys.exit(str(failure))
    print(f"{image.root}: {size} MB, {size - beside} of them above the base system")  # noqa: T201


if __name__ == "__main__":
    main()
