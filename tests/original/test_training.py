"""Five steps of tuning as recorded: with the down blocks, and without them as the original effectively trains."""

import pytest
import torch

from .comparing import assert_within
from .training import replayed, trained_blocks, training

NEEDS = ("facts.json",)


def test_losses_gradients_and_tuned_weights_are_reproduced(recording, run):
    assert_within(training(recording, run))
    assert not recording.unread(run)


def test_what_the_original_left_untouched_is_what_the_blocks_leave_out(recording, run):
    """With gradient checkpointing its down blocks get no gradient; `adapter.blocks: [mid, up]` is that, said aloud."""
    settings = recording.run(run)
    expected = ["mid", "up"] if settings["gradient_checkpointing"] else ["down", "mid", "up"]
    assert trained_blocks(recording, run) == expected
    replay = replayed(recording, run, checkpointing=False)
    names = recording.facts["trainable"]["names"]
    assert len(names) == settings["n_trainable_tensors"]
    untouched = [name for name in names if name not in replay.gradients]
    assert sorted(untouched) == sorted(settings["tensors_never_changed"])
    for name in names:
        final = recording.take(run, f"final.{name}")
        assert torch.equal(final, replay.first[name]) == (name in untouched), name
        assert torch.equal(replay.last[name], replay.first[name]) == (name in untouched), name


def test_our_gradient_checkpointing_changes_nothing(recording):
    """It reaches the down blocks too: the same losses and weights as the original's WITHOUT checkpointing."""
    runs = [name for name in recording.runs if not recording.run(name)["gradient_checkpointing"]]
    if not runs:
        pytest.skip("this recording has no run without gradient checkpointing")
    assert_within(training(recording, runs[0], checkpointing=True))
