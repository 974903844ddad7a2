"""Memory that runs out on one of two ranks."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from pipeline import checkpoints
from pipeline.composing import compose
from tests.parallelism.test_parity import COMMON, assert_same_weights, outcome, train, two
from tests.parallelism.test_shards import alone, single
from tests.ranks import made_by_ranks
from tests.test_fitting import Ends

__all__ = ["alone"]  # a fixture

RUN = ["precision=64-true", *two("ddp"), "trainer.checkpoint_every=5", "fit.on_oom=adapt"]


@pytest.mark.slow
def test_a_copy_whose_memory_ends_saves_the_last_whole_step_and_one_device_goes_on_from_there(tmp_path_factory, alone):
    cut = made_by_ranks(__file__, 2, tmp_path_factory)
    assert checkpoints.step(cut / "checkpoints" / "last.ckpt") == 12
    train(cut, compose([*COMMON, *single(RUN)]), resume=True)
    losses, weights = outcome(cut)
    expected, one = alone(RUN)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    assert_same_weights(weights, one, 1e-10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_is_full = int(os.environ["RANK"]) == 1
    # The other one loses the connection.
    error = torch.OutOfMemoryError if one_is_full else RuntimeError
    callbacks = [Ends(12, torch.OutOfMemoryError("no room"))] if one_is_full else []
    with contextlib.suppress(error):
        train(Path(sys.argv[2]), compose([*COMMON, *RUN]), callbacks=callbacks)
        raise SystemExit("it went on")
