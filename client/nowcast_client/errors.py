"""What the client raises on top of the protocol's own errors.

The tree continues `nowcast_proto.errors`::

    NowcastError
    ├── AttachError            this model, optimizer or setting cannot be nowcast; raised by ``attach`` only
    ├── TransportError         the service could not be reached or the exchange broke off
    │   ├── ConnectFailed      nobody answers at the address
    │   ├── ConnectionCut      the connection ended in the middle of a request or a reply
    │   └── TimedOut           no progress within the deadline
    ├── BadReply               the service answered something that is no part of the protocol
    ├── PatchRefused           a nowcast that failed the checks made before the first weight is written
    └── HistoryLost            snapshots neither side holds any more

No httpx exception leaves `nowcast_client.wire.http`; each becomes one of these, with the original as its cause.
"""

from __future__ import annotations

from nowcast_proto.errors import NowcastError


class AttachError(NowcastError):
    code = "attach"


class TransportError(NowcastError):
    code = "transport"
    http_status = 503


class ConnectFailed(TransportError):
    code = "connect_failed"


class ConnectionCut(TransportError):
    code = "connection_cut"


class TimedOut(TransportError):
    code = "timed_out"


class BadReply(NowcastError):
    code = "bad_reply"
    http_status = 502


class PatchRefused(NowcastError):
    code = "patch_refused"


class HistoryLost(NowcastError):
    code = "history_lost"
