"""Trained weights by name: the shipped checkpoints, and the published ones fetched from their authors' repository.

A published file is downloaded once into the cache folder (``NOWCAST_CACHE``, else ``~/.cache/nowcast``), resumed where
a connection broke, and taken only when its content has the git blob id it has in the repository. It is checked again
each time it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from nowcast_proto.errors import NotFound, Unavailable, UnreadableFile

from nowcast_service.nino.checkpoint import Checkpoint, load_checkpoint
from nowcast_service.weights.download import Progress, download, locked

log = logging.getLogger(__name__)

SHIPPED = {
    "nowcast-h64": "ships with Nowcast, for any model; trained by this project",
    "nowcast-h32": "the same before it was widened and refined on trainings that overfit",
}
"""The checkpoints that ship with the package, the default first, and one line about each."""
DEFAULT = next(iter(SHIPPED))
"""What the service predicts with where nothing else is asked for."""
OWNER, REPOSITORY, REVISION, FOLDER = "SamsungSAILMontreal", "nino", "main", "checkpoints"
BASE_URL = f"https://raw.githubusercontent.com/{OWNER}/{REPOSITORY}/{REVISION}/{FOLDER}"
"""Where the published files lie; ``NOWCAST_WEIGHTS_URL`` names a mirror instead."""


@dataclass(frozen=True, slots=True)
class Published:
    """One published file.

    Attributes:
        name: What it is called here, the file's stem.
        blob: Git blob id, SHA-1 of ``blob <size>\\0`` and the content.
        about: One line about it.
        sha256: SHA-256 of the content, where known.
    """

    name: str
    blob: str
    about: str
    sha256: str | None = None

    @property
    def filename(self) -> str:
        return f"{self.name}.pt"


PUBLISHED = {
    entry.name: entry
    for entry in (
        Published("nino", "4a43e3037e3664e92f8870f57bcbecb64d41779c", "NiNo for models with the GPT-2 vocabulary"),
        Published("nino_h32", "38641d42ae9acacf3b68d0642e6dfc8eecf46cd5", "the same, 32 wide"),
        Published("nino_towers4", "25baa88e96d0e46224e2e2eaaf00086f9ef5d818", "the same, with 4 towers"),
        Published("nino_mlp", "85a9fd37ba53abf51133d48de5b28eb941dcd87f", "WNN+, edge-wise, no graph"),
        Published("nino_mlp_h32", "a83b66987a4ed9c16076a4b05b6134cdb97dd26e", "the same, 32 wide"),
        Published(
            "nino_no_posw",
            "b391c24c036ac0883dcc2c4be61f5938f2dd7030",
            "NiNo for any model and vocabulary",
            "2e2186e4a0e50193080eb9074648786ef25cd5ac3149a7df790127fe41101620",
        ),
    )
}


def cache_folder() -> Path:
    """``NOWCAST_CACHE``, or ``~/.cache/nowcast``."""
    return Path(os.environ.get("NOWCAST_CACHE") or Path.home() / ".cache" / "nowcast")


def base_url() -> str:
    """``NOWCAST_WEIGHTS_URL``, or the authors' repository."""
    return os.environ.get("NOWCAST_WEIGHTS_URL") or BASE_URL


def shipped_path(name: str = DEFAULT) -> Path:
    """The file of a shipped checkpoint."""
    return Path(str(importlib.resources.files("nowcast_service") / "checkpoints" / f"{name}.safetensors"))


def names() -> tuple[str, ...]:
    """All registered names, the shipped ones first."""
    return (*SHIPPED, *PUBLISHED)


def cached_path(name: str, cache: Path | None = None) -> Path:
    """Where a published file lies once it is fetched."""
    return (cache or cache_folder()) / _published(name).filename


def resolve_checkpoint(reference: str | Path, *, fetch: bool = True, progress: Progress | None = None) -> Checkpoint:
    """Load a checkpoint by path or registered name; registered names come first.

    Args:
        reference: A name of `names`, or the path of a file.
        fetch: Whether a published file that is not in the cache is downloaded.
        progress: Called as a download goes on.

    Raises:
        NotFound: Neither a file nor a registered name; or a published one not yet fetched, with ``fetch`` false.
        UnreadableFile: The file is damaged.
        InvalidCheckpoint: It is no checkpoint that can be evaluated.
        Unavailable: It could not be downloaded.
    """
    name = str(reference)
    if name in SHIPPED:
        return replace(load_checkpoint(shipped_path(name)), source=name)
    if name in PUBLISHED:
        path = cached_path(name)
        if not path.exists():
            if not fetch:
                raise NotFound(
                    f"checkpoint {name!r} is not in {path.parent}", remedy=f"run `nowcast weights pull {name}` first"
                )
            pull(name, progress=progress)
        verify(path, PUBLISHED[name])
        return replace(load_checkpoint(path), source=name)
    path = Path(reference)
    if not path.exists() and not path.suffix and os.sep not in name:
        raise NotFound(
            f"checkpoint {name!r} is neither a file nor a registered name", expected="a path, or " + ", ".join(names())
        )
    return load_checkpoint(path)


def blob_id(path: Path) -> str:
    """Git blob id of a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, entry: Published) -> None:
    """Check that a file is the published one.

    Raises:
        UnreadableFile: It is not, and what it seems to be.
    """
    try:
        found = blob_id(path)
        if found == entry.blob and entry.sha256:  # SHA-1 alone does not withstand a forger
            with path.open("rb") as file:
                strong = hashlib.file_digest(file, "sha256").hexdigest()
            if strong != entry.sha256:
                raise UnreadableFile(f"{path} has SHA-256 {strong}", expected=entry.sha256, remedy=_again(path, entry))
        with path.open("rb") as file:
            head = file.read(256).lstrip().lower()
    except OSError as exc:
        raise UnreadableFile(f"{path} cannot be read: {exc.strerror}", remedy="check the folder") from exc
    if found == entry.blob:
        return
    if head.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not the file"
    elif head.startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "is a web page, not the file"
    else:
        what = f"has git blob id {found}"
    raise UnreadableFile(f"{path} {what}", expected=f"git blob id {entry.blob}", remedy=_again(path, entry))


def pull(
    name: str,
    *,
    url: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    timeout: float = 30.0,
    pause: float = 0.5,
) -> Path:
    """Fetch a published file into the cache, once.

    Args:
        name: A name of `PUBLISHED`.
        url: Base URL; see `base_url`.
        cache: Cache folder; see `cache_folder`.
        progress: Called with (bytes so far, bytes in all or None).
        timeout: Seconds without a byte after which a connection counts as broken.
        pause: Seconds before the second attempt in a row that brought nothing; doubles with each further one.

    Returns:
        The verified file.

    Raises:
        NotFound: No such name, or the server has no such file.
        Unavailable: The server cannot be reached, or keeps breaking off.
        UnreadableFile: What came is not the published file, or the cache cannot be written.
        TooLarge: What comes is larger than any checkpoint.
    """
    entry = _published(name)
    target = cached_path(name, cache)
    address = f"{(url or base_url()).rstrip('/')}/{entry.filename}"
    if not address.startswith(("http://", "https://")):
        raise Unavailable(f"weights URL {address!r} is not http(s)", remedy="correct NOWCAST_WEIGHTS_URL")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.part")) as part:
            if target.exists() and blob_id(target) == entry.blob:  # another process may have brought it meanwhile
                return target
            resumed = part.seek(0, os.SEEK_END) > 0
            download(address, part, progress, timeout=timeout, pause=pause)
            temporary = Path(part.name)
            try:
                verify(temporary, entry)
            except UnreadableFile:
                part.truncate(0)
                if not resumed:
                    raise
                # The remains of an earlier attempt may be at fault: once more, from the beginning.
                log.warning("what was resumed of %s is not the published file, fetching all of it", entry.filename)
                download(address, part, progress, timeout=timeout, pause=pause)
                verify(temporary, entry)
            os.fsync(part.fileno())
            os.replace(temporary, target)
    except UnreadableFile as exc:
        raise UnreadableFile(
            f"{address}: what came is not the published file: {exc.message}",
            expected=exc.expected,
            remedy="try again later, or set NOWCAST_WEIGHTS_URL to a mirror you trust",
        ) from exc
    except OSError as exc:
        raise UnreadableFile(
            f"cache {target.parent} cannot be written: {exc.strerror or exc}", remedy="set NOWCAST_CACHE"
        ) from exc
    return target


def _published(name: str) -> Published:
    if name not in PUBLISHED:
        raise NotFound(f"there are no published weights {name!r}", expected="one of " + ", ".join(PUBLISHED))
    return PUBLISHED[name]


def _again(path: Path, entry: Published) -> str:
    return f"delete {path} and run `nowcast weights pull {entry.name}`"
