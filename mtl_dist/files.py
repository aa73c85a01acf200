"""Files and folders that appear as a whole or not at all, and files that are known by their hashes."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mtl_dist.config import UserError, refusing

SUMS = "sha256sums"  # of the other files in a folder; `sha256sum -c` reads it as well


def sha256_of(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Lists the hashes of these files."""
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def faults(folder: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a folder that has a list of their hashes; nothing, if it is whole."""
    try:
        listed = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError:
        return [f"{SUMS} is missing"]
    found = []
    for name in names:
        try:
            if f"{sha256_of(folder / name)}  {name}\n" not in listed:
                found.append(f"{name} is damaged: its SHA-256 is another")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def drafts(name: str) -> tuple[str, str]:
    """What stands beside a folder for a moment: the new one, not yet whole, and the old one, not yet gone."""
    return f"{name}.tmp", f"{name}.old"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of another one; if it cannot be filled, nothing changes."""
    new, old = (folder.parent / name for name in drafts(folder.name))
    try:
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(parents=True)
        yield new
        readable = new.stat().st_mode & 0o666  # safetensors' files are not, whatever the umask says
        for path in (*new.rglob("*"), new):
            mode = path.stat().st_mode
            if mode | readable != mode:
                path.chmod(stat.S_IMODE(mode | readable))
            sync(path)
        if folder.exists():
            if old.exists():
                shutil.rmtree(old)
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        put_back(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def rewriting(path: Path) -> Iterator[Path]:
    """A draft to write, with the suffix of the file whose place it then takes; a reader sees the one or the other."""
    draft = path.with_name(f"draft-{path.name}")
    with refusing(f"cannot write {path}"):
        yield draft
        draft.replace(path)


def put_back(folder: Path) -> None:
    """Undoes what a process did that was killed when it had moved the old folder away and not yet put the new one."""
    old = folder.parent / drafts(folder.name)[1]
    if old.exists() and not folder.exists():
        old.rename(folder)
