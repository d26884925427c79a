"""Every setting of the service, from a file, the environment under ``NOWCAST_`` or the options of `nowcast serve`."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from nowcast_proto.errors import InvalidRequest, UnreadableFile
from nowcast_proto.tensors import Limits
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nowcast_service.runtime.container import memory_limit

DEFAULT_PORT = 8500
_GIB = 2**30
_OWN = 2**29
"""What the process takes for itself, libraries and predictor, before it holds anything for anybody."""

Size = Annotated[ByteSize, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

OTHERS = frozenset(
    "NOWCAST_" + name
    for name in (
        # read by the command line, the client and the example job
        *("CA_FILE", "CACHE", "DATA", "ENGINE_STATE", "MODE", "URL", "WEIGHTS_URL"),
        # by docker-compose.yml
        *("BASE_IMAGE", "BUILD_IMAGE", "BUILD_NETWORK", "IMAGE", "PUBLISH_PORT", "TORCH_ARGS", "TRAIN_STEPS"),
        *("MEMORY", "CPUS", "ENV_FILE", "KEYS_FILE"),
        # by the tests
        *("CHROMIUM", "COMPOSE", "HELM", "OFFICIAL_IMAGE", "REQUIRE", "SHARED"),
    )
)
"""Variables of this prefix that are no settings of the service."""
_SERVICE_LINK = re.compile(
    r"NOWCAST(_\w+)?_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)"
)
"""What Kubernetes sets in every pod beside a Service whose name begins with ``nowcast``."""


def default_budget() -> ByteSize:
    """8 GiB, or three quarters of what the machine or container has beyond the process's own needs, if that is less."""
    limit = memory_limit()
    return ByteSize(8 * _GIB if limit is None else min(8 * _GIB, max(2**26, (limit - _OWN) * 3 // 4)))


class Settings(BaseSettings):
    """Settings of one service process; sizes take units (``512MiB``), times are seconds."""

    model_config = SettingsConfigDict(env_prefix="NOWCAST_", env_ignore_empty=True, frozen=True, extra="ignore")

    # Where it listens
    host: str = Field(default="127.0.0.1", description="Address to bind; loopback unless told otherwise.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=DEFAULT_PORT, description="TCP port to bind; 0 takes a free one."
    )
    unix_socket: Path | None = Field(
        default=None, description="Listen on this unix socket instead of TCP; only its owner may connect."
    )
    port_file: Path | None = Field(
        default=None, description="Write the bound URL to this file once the socket listens, for port 0."
    )
    parent_fd: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="File descriptor inherited from a parent process; when its other end closes, the parent is gone "
        "and the service ends at once.",
    )
    tls_certificate: Path | None = Field(default=None, description="PEM certificate chain; turns TLS on.")
    tls_key: Path | None = Field(default=None, description="PEM private key of the certificate.")
    allow_anonymous: bool = Field(
        default=False, description="Serve without keys on an address that is not loopback. Say so only on purpose."
    )

    # Who may call
    api_key: SecretStr | None = Field(
        default=None, description="One key for everyone, tenant `default`. Hashed on start, never logged."
    )
    api_key_hashes: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Comma-separated `tenant:hash` pairs as `nowcast key` prints them."
    )
    api_keys_file: Path | None = Field(
        default=None, description="File with one `tenant:hash` per line; `#` starts a comment."
    )

    # What it predicts with
    predictor: str | None = Field(
        default=None,
        description="Predictor when a request names none; what the checkpoint is for when absent, "
        "`linear` when there is no checkpoint either.",
    )
    checkpoint: str | None = Field(
        default=None, description="Checkpoint when a request names none: a registered name or a path on this machine."
    )
    device: str = Field(default="auto", description="Device to predict on: `auto`, `cpu`, `cuda` or `cuda:0`.")
    precision: Literal["float32", "tf32", "bf16"] = Field(
        default="float32",
        description="Precision of the wide matrix products: `float32`, `tf32` (a CPU takes float32) or `bf16`.",
    )
    engine_memory: Size = Field(
        default=ByteSize(_GIB),
        description="Bytes a prediction may take on the device beyond snapshots and answer; a network that does not "
        "fit is told how much it needs.",
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="CPU threads of one prediction; 0 takes as many as the machine or container has processors.",
    )

    # How much it holds
    budget: Size = Field(
        default_factory=default_budget,
        description="Bytes all histories, uploads and answers may take together; 8 GiB, or three quarters of what the "
        "machine or container has beyond 512 MiB, where that is less.",
    )
    tenant_budget: Size = Field(default=ByteSize(8 * _GIB), description="The same for the sessions of one key.")
    session_budget: Size = Field(default=ByteSize(8 * _GIB), description="The same for one session.")
    max_sessions: Annotated[int, Field(ge=1)] = Field(default=256, description="Sessions held at once.")
    max_sessions_per_key: Annotated[int, Field(ge=1)] = Field(default=128, description="Sessions one key may hold.")
    session_expiry: Positive = Field(
        default=3600.0, description="Seconds of idleness after which a session is dropped."
    )
    evict_after: NotNegative = Field(
        default=60.0, description="Seconds of idleness after which a session may be dropped to make room for another."
    )
    results_per_session: Annotated[int, Field(ge=1, le=16)] = Field(
        default=2, description="Answers a session keeps, so that they can be fetched again; also its nowcasts at once."
    )

    max_trainings: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=256, description="Trainings that are shown to people; the oldest ended ones make room for new ones."
    )
    archive: Path | None = Field(
        default=None, description="SQLite file that keeps the trainings which are shown; none are kept without it."
    )
    max_watchers: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=64, description="Pages and terminals that may watch at once."
    )

    # How much it does of what a spec asks for
    spec_seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = Field(
        default=2.5,
        description="Seconds of processor time for the neural graph of one spec, plus one per 10^9 weights; it is "
        "computed in a process of its own.",
    )
    spec_memory: Size = Field(
        default=ByteSize(256 * 2**20), description="Bytes that may take, plus one per 16 weights."
    )

    # How much it does at once
    max_queue: Annotated[int, Field(ge=1)] = Field(
        default=16, description="Nowcasts admitted at once, the running one included; more are answered 429."
    )
    max_queue_per_key: Annotated[int, Field(ge=1)] = Field(default=16, description="The same for one key.")
    max_uploads: Annotated[int, Field(ge=1)] = Field(
        default=32, description="Request bodies received at once; more are answered 429."
    )
    max_connections: Annotated[int, Field(ge=1)] = Field(
        default=512,
        description="Connections at once; where one more comes, the oldest that serves nobody has to go.",
    )
    default_deadline: Positive = Field(
        default=600.0, description="Seconds a nowcast may take, waiting included, when the request says nothing."
    )
    max_wait: NotNegative = Field(
        default=60.0, description="Most seconds one `?wait=` is honoured; the client asks again."
    )
    upload_idle: Positive = Field(
        default=30.0,
        description="Seconds without progress after which an upload is given up (it can be resumed), and the bound on "
        "all else a client may keep waiting for: a head, the rest of a refused body, the reading of an answer.",
    )
    shutdown_grace: Positive = Field(
        default=30.0, description="Seconds after SIGTERM within which the service has finished and is gone."
    )

    # What it believes of a peer
    max_header: Size = Field(default=ByteSize(8 * 2**20), description="Cap on a stream's header.")
    max_json: Size = Field(default=ByteSize(8 * 2**20), description="Cap on a JSON body.")
    max_tensors: Annotated[int, Field(ge=1)] = Field(default=100_000, description="Cap on tensors in one stream.")
    max_snapshots: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=64, description="Cap on snapshots in one stream."
    )
    max_tensor: Size = Field(default=ByteSize(32 * _GIB), description="Cap on one tensor.")
    max_body: Size = Field(default=ByteSize(256 * _GIB), description="Cap on one whole stream.")

    # How it is watched
    ready_timeout: Positive = Field(default=5.0, description="Seconds the forward pass behind `/readyz` may take.")
    stall_after: Positive = Field(
        default=300.0, description="Seconds one nowcast may run before `/readyz` calls the queue stuck."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines for people or for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")

    @field_validator("api_key_hashes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 8:
            raise ValueError("a key needs at least 8 characters; `nowcast key` makes a good one")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if not self.unix_socket and not self.has_keys and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"refusing to serve {self.host} without keys: set NOWCAST_API_KEY, NOWCAST_API_KEY_HASHES or "
                "NOWCAST_API_KEYS_FILE, bind 127.0.0.1, or set NOWCAST_ALLOW_ANONYMOUS=1 if that is what you want"
            )
        return self

    @model_validator(mode="after")
    def _known(self) -> Settings:
        known = {f"NOWCAST_{name.upper()}" for name in type(self).model_fields}
        for name in sorted(os.environ):
            upper = name.upper()
            if not upper.startswith("NOWCAST_") or upper in known | OTHERS or _SERVICE_LINK.fullmatch(upper):
                continue
            near = difflib.get_close_matches(upper, known, 1, 0.0)
            raise ValueError(f"{name} is not a setting; the nearest one is {near[0]}")
        return self

    @classmethod
    def read(cls, file: Path | None = None, /, **given: Any) -> Settings:
        """The settings of a file, over them the environment's, over them those given.

        Raises:
            InvalidRequest: One of them cannot be, which is named.
            UnreadableFile: The file cannot be read.
        """
        return cls.traced(file, **given)[0]

    @classmethod
    def traced(cls, file: Path | None = None, /, **given: Any) -> tuple[Settings, dict[str, str]]:
        """What `read` returns, and where each setting came from: ``default``, ``file``, ``environment`` or ``flag``.

        Raises:
            InvalidRequest: One of them cannot be, which is named.
            UnreadableFile: The file cannot be read.
        """
        filed = cls._filed(file) if file else {}
        set_there = {name.upper() for name, value in os.environ.items() if value}
        origins = dict.fromkeys(cls.model_fields, "default") | dict.fromkeys(filed, "file")
        origins |= {name: "environment" for name in cls.model_fields if f"NOWCAST_{name.upper()}" in set_there}
        origins |= dict.fromkeys(given, "flag")
        values = {name: value for name, value in filed.items() if origins[name] == "file"} | given
        try:
            return cls(**values), origins
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False)[0]
            said = first["msg"].removeprefix("Value error, ")
            name = next((str(part) for part in first["loc"]), "").lower().removeprefix("nowcast_")
            shown = "" if "key" in name else f"={str(first['input'])[:60]!r}"
            where = f"{file}: {name}" if origins.get(name) == "file" else f"NOWCAST_{name.upper()}"
            raise InvalidRequest(f"{where}{shown}: {said}" if name else said, remedy="see docs/operations.md") from exc

    @classmethod
    def _filed(cls, file: Path) -> dict[str, Any]:
        """The settings of a TOML file, as the environment would say them, so that both are read alike."""
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as exc:
            raise UnreadableFile(f"{file}: {exc.strerror or exc}") from exc
        except ValueError as exc:  # not TOML, or not UTF-8
            raise InvalidRequest(f"{file} is not TOML: {exc}", remedy="see docs/operations.md") from exc
        for name, value in table.items():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, cls.model_fields, 1, 0.0)
                raise InvalidRequest(f"{file}: {name} is not a setting; the nearest one is {near[0]}")
            if isinstance(value, dict) or (isinstance(value, list) and name != "api_key_hashes"):
                raise InvalidRequest(f"{file}: {name} is a table or a list; a setting is one value: {name} = …")
        said = {name: _said(value) for name, value in table.items()}
        return {name: value for name, value in said.items() if value}  # empty is not set, as in the environment

    @property
    def has_keys(self) -> bool:
        """Whether calls need a key."""
        return bool(self.api_key or self.api_key_hashes or self.api_keys_file)

    @property
    def limits(self) -> Limits:
        """The caps a decoder holds a stream to."""
        return Limits(
            max_header_bytes=int(self.max_header),
            max_tensors=self.max_tensors,
            max_snapshots=self.max_snapshots,
            max_tensor_bytes=int(self.max_tensor),
            max_body_bytes=int(self.max_body),
        )


def _said(value: object) -> str:
    """A TOML value as an environment variable would say it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_loopback(host: str) -> bool:
    """Whether an address or host name only reaches this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
