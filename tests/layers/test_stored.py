"""Safetensors files, mapped: what safetensors reads, files that stay as they are, no memory for the whole of one."""

import json
import os
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.layers import stored

KINDS = [kind for kind in stored.DTYPES.values() if kind not in (torch.float8_e8m0fnu, torch.float8_e4m3fnuz)]


def written(path, tensors, pad=0):
    """A safetensors file by hand, its header longer by `pad` blanks than it need be."""
    entries, end = {}, 0
    for name, (kind, shape, size) in tensors.items():
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode() + b" " * pad
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    return path


def test_tensors_of_every_dtype_are_what_safetensors_reads(tmp_path):
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(0, 2, (5, 16), dtype=torch.uint8, generator=generator)
    tensors = {str(kind): bits.clone().view(kind) for kind in KINDS}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected, found = load_file(tmp_path / "model.safetensors"), stored.tensors(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys() == stored.shapes(tmp_path / "model.safetensors").keys()
    for name, shape in stored.shapes(tmp_path / "model.safetensors").items():
        assert shape.is_meta
        assert (found[name].dtype, found[name].shape) == (shape.dtype, shape.shape) == (
            expected[name].dtype, expected[name].shape,
        )  # fmt: skip
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("pad", range(4))
def test_a_header_of_any_length_may_come_before_them(tmp_path, pad):
    path = written(tmp_path / "model.safetensors", {"weight": ("F64", [3], 24)}, pad)
    with path.open("r+b") as stream:
        stream.seek(-24, os.SEEK_END)
        stream.write(torch.arange(3.0, dtype=torch.float64).numpy().tobytes())
    assert stored.tensors(path)["weight"].tolist() == [0, 1, 2]


def test_what_is_written_to_a_tensor_does_not_come_to_the_file(tmp_path):
    save_file({"weight": torch.ones(4)}, tmp_path / "model.safetensors")
    found = stored.tensors(tmp_path / "model.safetensors")["weight"]
    found.zero_()
    assert found.tolist() == [0] * 4
    assert stored.tensors(tmp_path / "model.safetensors")["weight"].tolist() == [1] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="memory is promised to mapped files elsewhere")
def test_a_file_that_is_larger_than_memory_is_opened(tmp_path):
    rows = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    path = written(tmp_path / "model.safetensors", {"weight": ("F32", [rows, 2**18], rows * 2**20)})
    with path.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(torch.tensor(1.5).numpy().tobytes())
    weight = stored.tensors(path)["weight"]
    assert weight.shape == (rows, 2**18)
    assert (weight[0, 0], weight[-1, -1]) == (0, 1.5)


def test_what_is_no_such_file_is_refused(tmp_path):
    whole = written(tmp_path / "model.safetensors", {"weight": ("F32", [2], 8)})
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1])
    (tmp_path / "other.safetensors").write_bytes(b"no header of any kind")
    for name in ("cut", "other"):
        with pytest.raises(SafetensorError):
            stored.tensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        stored.shapes(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="weight is of dtype F4"):
        stored.shapes(written(tmp_path / "model.safetensors", {"weight": ("F4", [4], 2)}))
