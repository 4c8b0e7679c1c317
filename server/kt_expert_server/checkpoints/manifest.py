"""What a checkpoint says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from kt_expert_proto.lora import LayerLora

from kt_expert_server.adapters.run_config import RunConfig
from kt_expert_server.errors import InvalidRequest

FORMAT_VERSION = 4


@dataclass(frozen=True, slots=True)
class MemberMark:
    """Of one rank: the snapshot holds the effects of this trainer's requests up to here, and of no others."""

    instance: str
    request_id: int


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter of the run: what has to be made before its tensors can be read into it."""

    name: str
    lora: tuple[LayerLora, ...]
    trainable: bool
    maker: str  # the instance that made it


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files` maps names to sha256. `members` is by rank, as text, since JSON has no other keys."""

    format_version: int
    run: str
    owner: str  # identity that opened the run
    model_digest: str  # of the base model's experts
    step: int
    writes: dict[str, int]  # by adapter: the highest number of those the run's members count writes with
    sequence: int  # counts the snapshots of a run
    automatic: bool  # made by the server on its own, and pruned by it
    restart_point: bool  # no gradients were under way: a run can go on from here after the server's death
    members: dict[str, MemberMark]
    author: MemberMark | None  # who asked for it
    config: RunConfig
    adapters: tuple[AdapterRecord, ...]  # by name
    files: dict[str, str]
    size_bytes: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Raises InvalidRequest for a manifest this version cannot read."""
        try:
            fields = json.loads(raw)
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise InvalidRequest(f"the checkpoint has format {version}, this server reads {FORMAT_VERSION}")
            config = fields.pop("config")
            lora = tuple(LayerLora(**entry) for entry in config.pop("lora"))
            members = {rank: MemberMark(**mark) for rank, mark in fields.pop("members").items()}
            author = fields.pop("author")
            adapters = tuple(
                AdapterRecord(**each | {"lora": tuple(LayerLora(**entry) for entry in each["lora"])})
                for each in fields.pop("adapters")
            )
            return cls(
                config=RunConfig(lora=lora, **config),
                adapters=adapters,
                members=members,
                author=None if author is None else MemberMark(**author),
                **fields,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"the checkpoint's manifest cannot be read: {error!r}") from error
