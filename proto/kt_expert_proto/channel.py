"""What both ends of a gRPC channel must agree on."""

from __future__ import annotations

from kt_expert_proto.header import MAX_MESSAGE_BYTES

SESSION_METHOD = "/kt_expert.v1.Session/Exchange"
# Trailing metadata of every error that is the server's own and not the network's: after how long the same may succeed, or 0.
RETRY_DELAY_KEY = "kt-expert-retry-delay-ms"

KEEPALIVE_TIME_MS = 30_000  # a peer whose host lost its power is noticed after this and the time-out
KEEPALIVE_TIMEOUT_MS = 20_000
_LEAST_PING_INTERVAL_MS = 10_000  # below the keepalive time: a server that expects fewer pings ends idle trainers

Options = tuple[tuple[str, int], ...]

_COMMON: Options = (
    ("grpc.max_receive_message_length", 8 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 8 * MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
)
CLIENT_OPTIONS: Options = (
    *_COMMON,
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # a repeated request must be recognised by its id, not sent by the library
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
SERVER_OPTIONS: Options = (
    *_COMMON,
    ("grpc.so_reuseport", 0),  # on by default, and then two servers silently share a port
    ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
    ("grpc.max_concurrent_streams", 256),
)
