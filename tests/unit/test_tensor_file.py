"""Tensor files: safetensors' own reader gets back every tensor, regions read as the slices they name, and no way doubles memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from triptych.launch.checkpoints import tensor_file
from triptych.launch.checkpoints.tensor_file import read_region, write_tensors

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any dtype and 0 to 3 dimensions, some empty; contiguous, transposed, cut out of a larger one, strided or expanded."""
    shape = draw(st.lists(st.integers(0, 7), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    larger = [2 * size + 1 for size in shape]
    values = torch.randint(-300, 300, larger, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "cut out", "strided", "expanded"]))
    if layout == "transposed":
        return values.movedim(0, -1) if shape else values
    if layout == "expanded":
        return values[:1].expand(larger) if shape else values
    step = 2 if layout == "strided" else 1
    cut = values[tuple(slice(step // 2, step // 2 + step * size, step) for size in shape)]
    return cut.contiguous() if layout == "contiguous" else cut


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


@given(st.dictionaries(NAMES, tensors(), max_size=5), st.integers(8, 200))
@settings(deadline=None, max_examples=300)
def test_the_library_reads_what_was_written(named: dict[str, torch.Tensor], block_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "BLOCK_BYTES", block_bytes)
        path, theirs = Path(folder, "ours"), Path(folder, "theirs")
        size, digest = write_tensors(path, named)
        content = path.read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
        loaded = load_file(path)
        assert loaded.keys() == named.keys()
        for name, tensor in named.items():
            assert_same(loaded[name], tensor)
        with safe_open(path, framework="pt") as file:
            for name, tensor in named.items():
                assert_same(file.get_tensor(name), tensor)
        save_file({name: tensor.contiguous().clone() for name, tensor in named.items()}, theirs)
        assert entries(content) == entries(theirs.read_bytes())


BYTES = {"64": 8, "32": 4, "16": 2}
"""By the end of a dtype's name in the format."""


def entries(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor's dtype, shape and bytes, by the format's description. Values begin at a multiple of their size."""
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    found = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        begin, end = entry["data_offsets"]
        assert (8 + length + begin) % BYTES.get(entry["dtype"][-2:], 1) == 0
        found[name] = (entry["dtype"], entry["shape"], content[8 + length + begin : 8 + length + end])
    return found


@given(tensors(), st.data(), st.integers(1, 200))
@settings(deadline=None, max_examples=300)
def test_a_region_reads_as_the_slice(tensor: torch.Tensor, data: st.DataObject, block_bytes: int) -> None:
    bounds = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in tensor.shape]
    expected = tensor[tuple(slice(*pair) for pair in bounds)]
    whole = torch.zeros([size + 2 for size in expected.shape], dtype=tensor.dtype)
    target = whole[tuple(slice(1, 1 + size) for size in expected.shape)]  # not contiguous
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "READ_BYTES", block_bytes)
        write_tensors(Path(folder, "file"), {"x": tensor})
        read_region(Path(folder, "file"), "x", [low for low, _ in bounds], target)
    assert_same(target, expected)
    target.zero_()
    assert not whole.any()  # nothing beside the region was written


def test_blocks_are_bounded_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)
    one_long_row = torch.arange(2000.0).view(2, 1000)[:, ::2]
    for tensor in (torch.arange(1000.0).view(1, 1000), one_long_row, one_long_row.T, torch.arange(1000.0).view(250, 4)[:, :3]):
        blocks = list(tensor_file._blocks(tensor))
        assert all(block.nbytes <= 64 for block in blocks)
        assert len(blocks) <= 2 * -(-tensor.nbytes // 64) + tensor.shape[0]
        assert {block.untyped_storage().data_ptr() for block in blocks} == {tensor.untyped_storage().data_ptr()}
        assert torch.equal(torch.cat([block.flatten() for block in blocks]), tensor.flatten())


def test_parameters_are_written_too(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    write_tensors(tmp_path / "file", {"x": parameter})
    assert torch.equal(load_file(tmp_path / "file")["x"], parameter)
    read_region(tmp_path / "file", "x", [1, 0], parameter[:2])


MEASURE = """
import sys
from pathlib import Path
import torch
from triptych.launch.checkpoints.tensor_file import read_region, write_tensors

def peak_bytes():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

rows, path = int(sys.argv[2]), Path(sys.argv[3])
held = torch.ones(rows, 16)
part = {"contiguous": held, "columns": held[:, :8], "rows": held[rows // 2 :]}[sys.argv[4]]
write_tensors(path.with_name("warm"), {"x": torch.ones(8)})  # what the first use of the libraries takes is not the tensor's
read_region(path.with_name("warm"), "x", [0], torch.ones(8))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far
before = peak_bytes()
if sys.argv[1] == "save":
    write_tensors(path, {"x": part})
else:
    read_region(path, "x", [rows - len(part), 16 - part.shape[1]], part)
    assert part.sum() == 2 * part.numel()
print(peak_bytes() - before)
"""


def added_peak(kind: str, rows: int, path: Path, layout: str) -> int:
    """Bytes by which a new process's peak memory grows over what it holds, a [rows, 16] fp32 tensor."""
    done = subprocess.run([sys.executable, "-c", MEASURE, kind, str(rows), str(path), layout], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def check_memory(rows: int, folder: Path) -> None:
    """What saving and loading add to the peak is one block and a little, whatever the size."""
    limits = {"save": 16 << 20, "load": 64 << 20}  # two blocks
    save_file({"x": torch.full((rows, 16), 2.0)}, folder / "whole")
    for layout in ("contiguous", "columns", "rows"):
        for kind, path in (("save", folder / "saved"), ("load", folder / "whole")):
            added = added_peak(kind, rows, path, layout)
            assert added < limits[kind], f"{kind} {layout}: {added / 1e6:.0f} MB"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read and reset in Linux' /proc")
def test_no_second_copy_in_memory(tmp_path: Path) -> None:
    check_memory(2_500_000, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read and reset in Linux' /proc")
def test_no_second_copy_of_a_gigabyte(tmp_path: Path) -> None:
    check_memory(16_000_000, tmp_path)
