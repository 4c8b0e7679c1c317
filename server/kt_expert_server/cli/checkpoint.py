"""kt-expert checkpoint: what lies in a server's state directory, and whether adapters are served as they were trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_expert_server.adapter_files.export import experts_of, per_expert
from kt_expert_server.adapter_files.files import read_adapter, write_adapter
from kt_expert_server.adapter_files.fused import fused
from kt_expert_server.adapter_files.merge import DEQUANTIZE, REQUANTIZE, merge
from kt_expert_server.adapter_files.model import base_of_adapter
from kt_expert_server.adapter_files.readers import READERS
from kt_expert_server.adapter_files.verify import verdicts
from kt_expert_server.checkpoints.filesystem import LocalFilesystem
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.errors import InvalidRequest, ServerError
from kt_expert_server.model.memory_plan import format_bytes
from kt_expert_server.names import check_name

_WRITERS = {"export-adapter": per_expert, "import-adapter": fused}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="the server's --state-dir, for ls, verify and rm")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("ls", help="list them")
    for name, text in (("verify", "read every file and compare its digest"), ("rm", "remove them")):
        action = actions.add_parser(name, help=text)
        action.add_argument("names", nargs="*" if name == "verify" else "+", metavar="NAME")
    verify = actions.add_parser("verify-adapter", help="what PEFT, vLLM and SGLang make of an exported adapter")
    verify.add_argument("adapter", type=Path, metavar="DIR")
    verify.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model")
    verify.add_argument(
        "--against", type=Path, metavar="DIR", help="the adapter as it was trained (default: DIR by PEFT's rules)"
    )
    verify.add_argument("--readers", default=",".join(READERS), help="some of %(default)s, separated by commas")
    merged = actions.add_parser("merge", help="write the model with an adapter merged into it, as the checkpoint is")
    merged.add_argument("adapter", type=Path, metavar="DIR")
    merged.add_argument("out", type=Path, metavar="OUT")
    merged.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model")
    merged.add_argument(
        "--quantized", choices=(DEQUANTIZE, REQUANTIZE), default="", help="what becomes of a model in fp8 or mxfp4: "
        "written in bf16 as a whole, or what the adapter changes rounded to codes again"
    )  # fmt: skip
    imported = actions.add_parser("import-adapter", help="write an adapter in PEFT's fused form, which trainers go on with")
    imported.add_argument("adapter", type=Path, metavar="DIR", help="kt-kernel's, or one with names per expert")
    imported.add_argument("out", type=Path, metavar="OUT")
    imported.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model")
    export = actions.add_parser("export-adapter", help="write an adapter with names per expert, which serving engines read")
    export.add_argument(
        "adapter", type=Path, metavar="DIR", help="PEFT's, or one with kt-kernel's fused_expert_lora.safetensors"
    )
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model")


def run(options: argparse.Namespace) -> int:
    """1 where a checkpoint is damaged, or an adapter is served in another way than it was trained."""
    if options.action == "verify-adapter":
        return _verify_adapter(options)
    if options.action == "merge":
        written = merge(read_adapter(options.adapter), options.model, options.out, options.quantized)
        print(f"wrote {options.out}: {written.changed} tensors with the adapter in them, read back")
        if written.about_rounding():
            print(written.about_rounding())
        return 0
    if options.action in _WRITERS:
        write = _WRITERS[options.action]
        write_adapter(options.out, *write(read_adapter(options.adapter), base_of_adapter(options.model)))
        print(f"wrote {options.out}")
        return 0
    if options.state_dir is None or not options.state_dir.is_dir():
        raise InvalidRequest(f"--state-dir {options.state_dir} is not a directory")
    store = CheckpointStore(LocalFilesystem(options.state_dir))
    match options.action:
        case "ls":
            return _list(store)
        case "verify":
            return _verify(store, options.names or store.names())
    for name in options.names:
        store.remove(check_name("checkpoint", name))
        print(f"removed {name}")
    return 0


def _verify_adapter(options: argparse.Namespace) -> int:
    names = [name for name in options.readers.split(",") if name]
    unknown = [name for name in names if name not in READERS]
    if unknown or not names:
        raise InvalidRequest(f"--readers has {options.readers!r}, expected some of {', '.join(READERS)}")
    base, files = base_of_adapter(options.model), read_adapter(options.adapter)
    trained = experts_of(read_adapter(options.against) if options.against else files, base)
    found = verdicts(files, base, trained, names)
    for name, sentence in found.items():
        print(f"{name}: {sentence or 'as trained'}")
    return int(any(found.values()))


def _list(store: CheckpointStore) -> int:
    for name in store.names():
        try:
            manifest = store.manifest(name)
        except ServerError as error:
            print(f"{name}: {error}")
            continue
        kind = "automatic" if manifest.automatic else "saved by its trainer"
        print(f"{name}: run {manifest.run}, step {manifest.step}, {format_bytes(manifest.size_bytes)}, {kind}")
    return 0


def _verify(store: CheckpointStore, names: list[str]) -> int:
    damaged = 0
    for name in names:
        try:
            _, tensors = store.read(check_name("checkpoint", name))
            print(f"{name}: whole, {len(tensors)} tensors")
        except ServerError as error:
            damaged = 1
            print(f"{name}: {error}")
    return damaged
