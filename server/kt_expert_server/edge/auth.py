"""Who is calling, and what that identity may do.

A token file has a line for each token: an identity, its scopes joined by commas (train, admin), and the token. Lines that begin
with # are comments. A token is compared by its digest, so that how long a comparison takes tells nothing about it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_expert_server.errors import InvalidRequest, NotAuthenticated, NotPermitted
from kt_expert_server.members.run import NOBODY
from kt_expert_server.names import check_name

TRAIN, ADMIN = "train", "admin"
_SCOPES = {TRAIN, ADMIN}
_HEADER, _SCHEME = "authorization", "Bearer "
_LEAST_TOKEN_LETTERS = 16
_LOCAL_PEERS = ("unix:", "ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]")

Metadata = Iterable[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Grant:
    identity: str
    scopes: frozenset[str]


class Authenticator:
    """Without tokens everybody who reaches the port is the same nobody, and only this machine may administer."""

    def __init__(self, grants: dict[str, Grant] | None = None) -> None:
        self._grants = grants

    @classmethod
    def from_file(cls, path: Path) -> Authenticator:
        """Raises InvalidRequest for a file that cannot be read, that others may read, or whose lines make no sense."""
        try:
            if stat.S_IMODE(os.stat(path).st_mode) & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
                raise InvalidRequest(f"--token-file {path} can be read or changed by others; chmod 600 it")
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--token-file {path} cannot be read: {error}") from error
        grants: dict[str, Grant] = {}
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                token, grant = _grant(path, number, line.split())
                grants[_digest(token)] = grant
        if not grants:
            raise InvalidRequest(f"--token-file {path} holds no token; write lines of identity, scopes and token")
        return cls(grants)

    @property
    def asks_for_tokens(self) -> bool:
        return self._grants is not None

    def trainer(self, metadata: Metadata, peer: str) -> str:
        """The identity of a call that trains. Raises NotAuthenticated or NotPermitted."""
        del peer
        return self._identity(metadata, TRAIN)

    def admin(self, metadata: Metadata, peer: str) -> str:
        """The identity of a call that concerns the whole server. Raises NotAuthenticated or NotPermitted."""
        if self._grants is None and not peer.startswith(_LOCAL_PEERS):
            raise NotPermitted("without tokens this call is answered to this machine alone; start the server with --token-file")
        return self._identity(metadata, ADMIN)

    def _identity(self, metadata: Metadata, scope: str) -> str:
        if self._grants is None:
            return NOBODY
        given = next((str(value) for key, value in metadata if key == _HEADER), "")
        if not given.startswith(_SCHEME):
            raise NotAuthenticated("this server asks for a token; set KT_EXPERT_TOKEN_FILE to a file that holds it")
        grant = self._grants.get(_digest(given.removeprefix(_SCHEME)))
        if grant is None:
            raise NotAuthenticated("this server does not know the token; is it of another server, or was it taken back?")
        if scope not in grant.scopes:
            raise NotPermitted(f"the token of {grant.identity!r} has the scopes {sorted(grant.scopes)}, this needs {scope!r}")
        return grant.identity


def _grant(path: Path, number: int, words: list[str]) -> tuple[str, Grant]:
    what = f"--token-file {path}, line {number}"
    if len(words) != 3:
        raise InvalidRequest(f"{what} has {len(words)} words, expected an identity, scopes joined by commas, and a token")
    identity, scopes, token = words
    wrong = set(scopes.split(",")) - _SCOPES
    if wrong:
        raise InvalidRequest(f"{what} names the scopes {sorted(wrong)}, expected some of {sorted(_SCOPES)}")
    if len(token) < _LEAST_TOKEN_LETTERS:
        raise InvalidRequest(f"{what} has a token of {len(token)} letters, expected at least {_LEAST_TOKEN_LETTERS}")
    return token, Grant(check_name("identity", identity), frozenset(scopes.split(",")))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
