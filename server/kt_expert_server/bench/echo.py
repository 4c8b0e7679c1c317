"""`python -m kt_expert_server.bench.echo FD`: sends back what comes on one connection to a listening socket it was given. Each
message is its length in eight bytes and as many bytes."""

from __future__ import annotations

import socket
import sys

LENGTH_BYTES = 8


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    connection, _ = listening.accept()
    listening.close()
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(0))
    while header := connection.recv(LENGTH_BYTES, socket.MSG_WAITALL):
        size = int.from_bytes(header, "little")
        if len(memory) < size:
            memory = memoryview(bytearray(size))
        received = 0
        while received < size:
            received += connection.recv_into(memory[received:size])
        connection.sendall(memory[:size])


if __name__ == "__main__":
    main()
