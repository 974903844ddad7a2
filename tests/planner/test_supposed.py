import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.planner.supposed import Supposing


def test_copies_are_equal_to_their_source_and_to_one_another_and_to_nothing_else():
    with FakeTensorMode(), Supposing():
        source, other = torch.zeros(8), torch.zeros(8)
        copy, again = source.clone(), source.clone().clone()
        assert torch.equal(copy, again)
        assert torch.equal(source, copy)
        assert torch.equal(source, other)  # as the usual course would have it
        assert not torch.equal(copy, other)
        assert not torch.equal(copy, other.clone())
        assert not torch.equal(copy, torch.zeros(9))


def test_copies_of_what_is_gone_are_told_apart_though_its_storage_was_where_the_next_one_is():
    with FakeTensorMode(), Supposing():
        copies, keys = [], []
        for _ in range(50):
            source = torch.zeros(8)
            keys.append(source.untyped_storage()._cdata)
            copies.append(source.clone())
            del source
        assert len(set(keys)) < len(keys)  # else this test shows nothing
        assert not any(torch.equal(one, other) for i, one in enumerate(copies) for other in copies[:i])
