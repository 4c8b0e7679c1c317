"""Tokens of a test's server: files of them, and what a call carries."""

from __future__ import annotations

from pathlib import Path


def token_of(name: str) -> str:
    """The token of that identity, wherever a test's server knows it."""
    return f"{name}-0123456789abcdef"


def write_tokens(path: Path, **scopes: str) -> Path:
    """A token file for identities and their scopes."""
    path.write_text("".join(f"{name} {scope} {token_of(name)}\n" for name, scope in scopes.items()))
    path.chmod(0o600)
    return path


def bearer(name: str) -> list[tuple[str, str]]:
    """Metadata of a call by that identity."""
    return [("authorization", f"Bearer {token_of(name)}")]
