"""Whatever a file holds, reading it ends in tensors that lie inside it or in a ModelError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kt_expert_server.errors import ModelError
from kt_expert_server.model.safetensors_file import SafetensorsFile

FAST = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.integers(-3, 70) | st.integers() | st.floats() | st.none() | st.text(max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "U8", "F8_E4M3", "I64", "", 7]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
    }
)
HEADERS = st.dictionaries(st.text(max_size=5), ENTRIES | NUMBERS | st.lists(NUMBERS, max_size=2), max_size=3) | NUMBERS


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except ModelError:
        return
    with file:
        for info in file.tensors.values():
            assert 8 <= info.begin <= info.begin + info.size_bytes <= len(content)
            assert all(size >= 0 for size in info.shape)
            file.read_into(info, 0, memoryview(bytearray(info.size_bytes)))


@FAST
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "model.safetensors", content)


@FAST
@given(HEADERS, st.binary(max_size=80), st.integers(-2, 2))
@example({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12), 0)
@example({"a": {"dtype": "BF16", "shape": [float("inf")], "data_offsets": [0, 12]}}, bytes(12), 0)
@example({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}, bytes(4), 0)
def test_any_header(tmp_path: Path, header: Any, data: bytes, longer: int) -> None:
    text = json.dumps(header).encode()
    check(tmp_path / "model.safetensors", max(0, len(text) + longer).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("shape", [[1.5], ["1"], [True], [None], [[1]]])
def test_sizes_that_are_no_whole_numbers(tmp_path: Path, shape: list[object]) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ModelError, match="expected whole numbers"):
        SafetensorsFile(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 50_000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":1e999}', b"\xff{}"])
def test_json_that_is_hard_to_read(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match="damaged safetensors header"):
        SafetensorsFile(path)
