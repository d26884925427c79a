"""API keys: hashed at rest, compared in constant time, one tenant each."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from nowcast_proto.errors import Unauthorized, UnreadableFile

from nowcast_service.settings import Settings

ANONYMOUS = "anonymous"
"""Tenant of every call when no keys are set."""
_ENTRY = re.compile(r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?P<hash>[0-9a-f]{64})")


def hash_key(key: str) -> str:
    """SHA-256 of a key, 64 hex digits. Keys are random and long, so nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A fresh random key of 256 bits."""
    return "nc_" + secrets.token_urlsafe(32)


@dataclass(frozen=True)
class KeyRing:
    """Who may call.

    Attributes:
        entries: (tenant, hash) pairs; a tenant may have several keys, so that one can be replaced without a gap.
    """

    entries: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> KeyRing:
        """Gather the keys the settings name.

        Raises:
            UnreadableFile: The key file is missing, or an entry is malformed.
        """
        entries = list(_parse(settings.api_key_hashes, "NOWCAST_API_KEY_HASHES"))
        if settings.api_keys_file is not None:
            try:
                lines = settings.api_keys_file.read_text().splitlines()
            except OSError as exc:
                raise UnreadableFile(f"key file {settings.api_keys_file} cannot be read: {exc.strerror}") from exc
            stripped = (line.split("#", 1)[0].strip() for line in lines)
            entries += _parse((line for line in stripped if line), str(settings.api_keys_file))
        if settings.api_key is not None:
            entries.append(("default", hash_key(settings.api_key.get_secret_value())))
        if settings.has_keys and not entries:
            raise UnreadableFile("keys are asked for, but none is listed", remedy="add one with `nowcast key`")
        return cls(tuple(entries))

    @property
    def tenants(self) -> int:
        """How many tenants there are; all callers are one where no keys are set."""
        return len({tenant for tenant, _ in self.entries}) or 1

    def tenant(self, authorization: str | None) -> str:
        """The tenant a request's ``Authorization`` value belongs to.

        Every stored hash is compared, in constant time each, whichever matches.

        Raises:
            Unauthorized: Keys are set and this is not one of them.
        """
        if not self.entries:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("the request carries no key", expected="Authorization: Bearer <key>")
        presented = hash_key(key.strip())
        found: str | None = None
        for tenant, stored in self.entries:
            if hmac.compare_digest(presented, stored):
                found = tenant
        if found is None:
            raise Unauthorized("the key is not known here", remedy="check NOWCAST_API_KEY, or ask for a new key")
        return found


def _parse(lines: Iterable[str], origin: str) -> list[tuple[str, str]]:
    entries = []
    for line in lines:
        match = _ENTRY.fullmatch(line)
        if match is None:
            # The line itself is not repeated: it may be a key somebody pasted in the clear.
            raise UnreadableFile(
                f"{origin} has an entry that is not tenant:hash",
                expected="a tenant, a colon and 64 hex digits",
                remedy="make entries with `nowcast key --tenant NAME`",
            )
        entries.append((match["tenant"], match["hash"]))
    return entries
