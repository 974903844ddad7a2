"""Logits on disk: what is read is what was written but for its rounding, and damage never passes for an answer."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import LeanfitError
from pipeline.layers import logit_cache
from pipeline.layers.logit_cache import (
    ABOUT,
    INDEX,
    ROWS,
    LogitCache,
    LogitCacheError,
    bytes_needed,
    compact,
    largest_top_k,
    row_keys,
    row_type,
    write,
)
from pipeline.memory.measure import measure_peak

CLASSES = 11


def samples(count=6, length=5, seed=0):
    return {"input_ids": torch.randint(0, CLASSES, (count, length), generator=torch.Generator().manual_seed(seed))}


def answer(inputs):
    """Logits [B, T, V] that depend on each sample alone."""
    ids = inputs["input_ids"]
    rows = torch.stack([ids.cumsum(-1).double() * (v + 1) % 7.3 - 3 for v in range(CLASSES)], -1)
    return rows.float()


def cut(inputs, *places):
    return {name: tensor[list(places)] for name, tensor in inputs.items()}


def recorded(directory, *batches, top_k=None, forward=answer):
    write(directory, {"for": "a test"}, batches, forward, top_k)
    return LogitCache(directory)


@pytest.mark.parametrize("top_k", [None, 1, 4, CLASSES, 99])
def test_samples_are_read_back_in_any_order_and_batch(top_k, tmp_path):
    given_in = samples()
    cache = recorded(tmp_path / "c", cut(given_in, 0, 1, 2, 3), cut(given_in, 4, 5), top_k=top_k)
    wanted = answer(given_in)
    for places in ([5, 0, 3], [2], [1, 1], range(6)):
        logits, classes = cache.read(cut(given_in, *places))
        assert logits.dtype == torch.float32
        expected = wanted[list(places)]
        if top_k in (1, 4):
            expected, best = expected.topk(top_k, -1)
            torch.testing.assert_close(classes, best)
        else:
            assert classes is None
        torch.testing.assert_close(logits, expected - expected.amax(-1, keepdim=True), atol=2**-9, rtol=0)


def test_what_is_read_lies_in_memory_that_is_measured(tmp_path):
    given_in = samples()
    cache = recorded(tmp_path / "c", given_in, top_k=3)
    with measure_peak("cpu") as peak:
        held = cache.read(given_in)
    assert peak.bytes == sum(tensor.nbytes for tensor in held)


@given(
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.floats(-6, 3),
    st.integers(0, 2**32),
)
def test_rounding_is_that_of_float16_below_the_largest(dtype, magnitude, seed):
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = (logits * 10**magnitude + 10 ** (magnitude + 1)).to(dtype)
    below = logits.double() - logits.double().amax(-1, keepdim=True)
    stored = torch.from_numpy(compact(logits, None)["logits"].astype(np.float64))
    # half a unit in the last of 11 bits (and float32's own rounding of the difference), or of the smallest subnormal
    allowed = below.abs() * (2**-11 + 2**-20) + logits.double().abs() * 2**-23 + 2**-25
    assert ((stored - below).abs() <= allowed).all()
    assert (stored.amax(-1) == 0).all()


def test_huge_logits_stay_finite_and_no_number_is_refused(tmp_path):
    logits = torch.tensor([[3e38, 0.0, -3e5], [1e5, 1e5 - 1, 0.0]])
    rows = compact(logits, None)["logits"].astype(np.float64)
    assert np.isfinite(rows).all()
    assert rows[1].tolist() == [0, -1, np.finfo(np.float16).min]
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits[0, 1] = bad
        with pytest.raises(LeanfitError, match="NaN or infinity among the teacher's logits"):
            recorded(tmp_path / "c", {"x": torch.zeros(2, 1)}, forward=lambda inputs: logits)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("classes", "size"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (10**6, 4)], ids=str)
def test_classes_take_the_smallest_integer_that_holds_them(classes, size):
    kind = row_type((), classes, 1)
    assert kind["ids"].itemsize == size
    logits = torch.zeros(1, classes)
    logits[0, -1] = 1
    assert compact(logits, 1)["ids"].item() == classes - 1
    assert row_type((7,), classes, None).itemsize == 7 * classes * 2
    assert row_type((7,), classes, classes + 1).names == ("logits",)


def test_a_sample_that_comes_again_is_stored_once_and_a_batch_of_such_is_not_run(tmp_path):
    given_in, calls = samples(), []

    def forward(inputs):
        calls.append(len(inputs["input_ids"]))
        return answer(inputs)

    epochs = [cut(given_in, 0, 1, 1), cut(given_in, 2, 0), cut(given_in, 1, 2), cut(given_in, 2, 3)]
    cache = recorded(tmp_path / "c", *epochs, forward=forward)
    assert len(cache) == 4
    assert calls == [3, 2, 2]
    logits, _ = cache.read(cut(given_in, 3, 1))
    torch.testing.assert_close(logits, answer(cut(given_in, 3, 1)).sub(answer(cut(given_in, 3, 1)).amax(-1, True)),
                               atol=2**-9, rtol=0)  # fmt: skip


def test_images_have_one_row_of_logits_each(tmp_path):
    images = {"pixel_values": torch.randn(5, 1, 4, 4)}
    cache = recorded(tmp_path / "c", images, forward=lambda inputs: inputs["pixel_values"].flatten(1), top_k=3)
    logits, classes = cache.read(cut(images, 4, 2))
    assert logits.shape == classes.shape == (2, 3)
    torch.testing.assert_close(classes, images["pixel_values"][[4, 2]].flatten(1).topk(3, -1).indices)


def test_a_sample_that_was_not_recorded_is_an_error(tmp_path):
    images = {"pixel_values": torch.randn(4, 1, 4, 4)}
    cache = recorded(tmp_path / "c", images, forward=lambda inputs: inputs["pixel_values"].flatten(1))
    flipped = {"pixel_values": images["pixel_values"].clone()}
    flipped["pixel_values"][2] = flipped["pixel_values"][2].flip(-1)
    with pytest.raises(LogitCacheError, match="1 of a batch's 4 samples were not recorded"):
        cache.read(flipped)
    for other in (images["pixel_values"].double(), images["pixel_values"].reshape(4, 4, 1, 4)):
        with pytest.raises(LogitCacheError, match="4 of a batch's 4"):
            cache.read({"pixel_values": other})
    with pytest.raises(LogitCacheError, match="not recorded"):
        cache.read({**images, "attention_mask": torch.ones(4, 1)})


def test_keys_look_at_each_sample_alone_whatever_its_layout_in_memory():
    images = torch.randn(3, 2, 4, 4)
    keys = row_keys({"pixel_values": images})
    assert len(set(keys.tolist())) == 3
    assert (row_keys({"pixel_values": images.to(memory_format=torch.channels_last)}) == keys).all()
    assert row_keys({"pixel_values": images[1:2]}) == keys[1]
    assert (row_keys({"b": images, "a": images[:, 0]}) == row_keys({"a": images[:, 0], "b": images})).all()
    for dtype in (torch.bool, torch.bfloat16, torch.int64):
        assert len(row_keys({"x": torch.ones(3, 2).to(dtype)})) == 3


@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([(), (7,)]), st.integers(2, 400))
def test_the_largest_top_k_that_fits_is_named(free, rows, shape, classes):
    wanted = max((k for k in range(1, classes) if bytes_needed(rows, shape, classes, k) <= free), default=0)
    assert largest_top_k(free, rows, shape, classes) == wanted


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_bytes_that_were_foretold_are_those_on_disk(top_k, tmp_path):
    cache = recorded(tmp_path / "c", samples(), top_k=top_k)
    held = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir()}
    assert held[ROWS] + held[INDEX] == bytes_needed(6, (5,), CLASSES, top_k)
    assert cache.bytes == sum(held.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "c"
    recorded(directory, samples(), top_k=3)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([ROWS, INDEX, ABOUT]), st.integers(0, 10**6), st.integers(1, 255))
def test_no_altered_byte_goes_unseen(whole, tmp_path_factory, name, place, change):
    altered = bytearray(whole[name])
    altered[place % len(altered)] ^= change
    try:
        same = name == ABOUT and json.loads(bytes(altered)) == json.loads(whole[name])  # another kind of blank
    except ValueError:
        same = False
    directory = tmp_path_factory.mktemp("c")
    for file, content in {**whole, name: bytes(altered)}.items():
        (directory / file).write_bytes(content)
    if same:
        LogitCache(directory).verify()
        return
    with pytest.raises(LogitCacheError):
        LogitCache(directory).verify()


@pytest.mark.parametrize("name", [ROWS, INDEX, ABOUT])
@pytest.mark.parametrize("change", ["gone", "empty", "half", "one byte less", "one byte more", "a directory"])
def test_files_of_another_size_are_refused_at_once(name, change, whole, tmp_path):
    for file, content in whole.items():
        (tmp_path / file).write_bytes(content)
    path, content = tmp_path / name, whole[name]
    path.unlink()
    if change == "a directory":
        path.mkdir()
    elif change != "gone":
        new = {"empty": b"", "half": content[: len(content) // 2], "one byte less": content[:-1]}
        path.write_bytes(new.get(change, content + b"x"))
    with pytest.raises(LogitCacheError):
        LogitCache(tmp_path)


@pytest.mark.parametrize("said", ["[]", "3", "null", "{}", '{"about": 1, "layout": 2, "notes": 3, "digest": "x"}'])
def test_what_is_no_record_is_refused(said, whole, tmp_path):
    for file, content in {**whole, ABOUT: said.encode()}.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(LogitCacheError):
        LogitCache(tmp_path)


def test_a_row_that_is_altered_while_it_is_open_is_seen_when_it_is_read(tmp_path):
    cache = recorded(tmp_path / "c", samples())
    with (tmp_path / "c" / ROWS).open("r+b") as file:
        file.seek(3)
        file.write(b"\x7f")
    cache.read(cut(samples(), 1, 2))
    with pytest.raises(LogitCacheError, match=r"1 of 2 rows of rows\.bin were altered"):
        cache.read(cut(samples(), 1, 0))


def test_a_cache_is_there_whole_or_not_at_all(tmp_path):
    recorded(tmp_path / "c", samples())
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}

    def broken():
        yield samples(seed=1)
        assert (tmp_path / ".c.partial" / ROWS).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c", {}, broken(), answer, None)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    left = tmp_path / ".c.partial"
    left.mkdir()
    (left / ROWS).write_bytes(b"x" * 1000)
    with pytest.raises(LogitCacheError):
        LogitCache(tmp_path / "c")
    recorded(tmp_path / "c", samples()).verify()
    assert not left.exists()


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logit_cache, "_flush", full)
    with pytest.raises(LeanfitError, match=r"logits cannot be written to .*No space left on device"):
        recorded(tmp_path / "c", samples())
    assert list(tmp_path.iterdir()) == []


def test_samples_of_other_shapes_do_not_share_a_cache(tmp_path):
    with pytest.raises(LeanfitError, match="samples must be alike"):
        recorded(tmp_path / "c", samples(length=5), samples(length=6))
