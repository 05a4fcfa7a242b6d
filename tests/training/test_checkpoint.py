import shutil

import chex
import jax.numpy as jnp
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from moddistill.training import checkpoint
from moddistill.training.checkpoint import Keep
from moddistill.training.state import State


def state_at(step, shape=(2, 3), frozen=0.0):
    """A state whose values tell its step."""
    params = {"projector/kernel": jnp.full(shape, 0.1 + step), "decoder/norm/scale": jnp.ones(2)}
    moments = optax.adamw(1.0).init(params)
    return State(
        jnp.asarray(step), params, {"vision/kernel": jnp.full(2, frozen)}, moments, jnp.float32(0.5)
    )


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1, 2 and 3, each after eight times as many rows."""
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, state_at(step, frozen=5.0), 8 * step, Keep())
    return tmp_path / "checkpoints"


def test_newest_state_comes_back_bit_for_bit(folder):
    with checkpoint.open_checkpoints(folder) as checkpoints:
        restored, next_row = checkpoint.restore(checkpoints, state_at(0, frozen=7.0))
    saved = state_at(3, frozen=7.0)  # frozen parameters are those of the state given
    chex.assert_trees_all_equal(restored, saved, strict=True)
    assert next_row == 24


def test_frozen_parameters_are_not_stored(folder):
    stored = ocp.checkpointables_metadata(folder / "3").metadata["state"]
    assert set(stored) == {"step", "params", "opt_state", "mean_loss"}
    assert not [name for name in stored["params"] if "vision" in name]


def test_only_the_newest_two_checkpoints_remain(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_checkpoint_that_was_not_finished_is_removed(folder, caplog):
    """As a process leaves them that is killed while Orbax writes, or before the digests."""
    (folder / "3").rename(folder / ".3.partial")
    (folder / ".4.partial.orbax-checkpoint-tmp").mkdir()
    with checkpoint.open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 2
        assert sorted(path.name for path in folder.iterdir()) == ["2"]
        state, _ = checkpoint.restore(checkpoints, state_at(0))
        checkpoint.save(checkpoints, state.replace(step=jnp.asarray(3)), 24, Keep())
    assert "checkpoint " in caplog.text and ".3.partial was not finished" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_checkpoint_interrupted_before_its_digests_is_not_resumed_from(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_digests", killed)
    with pytest.raises(KeyboardInterrupt), checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.save(checkpoints, state_at(4), 32, Keep())
    with checkpoint.open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 3
        checkpoint.restore(checkpoints, state_at(0))


@pytest.mark.parametrize("kept", [("2", "3"), ("3",)])
def test_damaged_checkpoint_names_the_way_out(folder, kept):
    for step in {"2", "3"} - set(kept):
        shutil.rmtree(folder / step)
    file = next((folder / "3" / "state").rglob("d/*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    start = {2: "resume from step 2", 1: "start from step 0"}[len(kept)]
    with checkpoint.open_checkpoints(folder) as checkpoints:
        message = f"checkpoints/3: expected an undamaged copy, or to remove this folder and {start}"
        message += f", got one changed since train wrote it: state/.*d/{file.name} does not match "
        with pytest.raises(ValueError, match=message):
            checkpoint.restore(checkpoints, state_at(0))
    shutil.rmtree(folder / "3")
    with checkpoint.open_checkpoints(folder) as checkpoints:
        assert checkpoints.latest == (2 if len(kept) == 2 else None)


def test_checkpoint_without_digests_is_refused(folder):
    (folder / "3" / "digests.json").unlink()
    with (
        checkpoint.open_checkpoints(folder) as checkpoints,
        pytest.raises(
            ValueError, match=r"3: expected .* resume from step 2, got one without digests\.json"
        ),
    ):
        checkpoint.restore(checkpoints, state_at(0))


def test_checkpoints_without_digests_are_not_removed(folder):
    """Numbered ones too, of another trainer."""
    (folder / "1").mkdir()
    (folder / "1" / "model.bin").touch()
    with checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.save(checkpoints, state_at(4), 32, Keep())
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "4"]


def test_error_while_saving_in_the_background_ends_the_run(folder):
    (folder / "4").write_text("in the way")
    with pytest.raises(OSError), checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.save(checkpoints, state_at(4), 32, Keep())


def test_new_folder_has_no_checkpoint(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest is None


def test_checkpoint_of_another_architecture_is_refused(folder):
    with (
        checkpoint.open_checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match=r"3 does not fit the architecture") as error,
    ):
        checkpoint.restore(checkpoints, state_at(0, shape=(2, 4)))
    assert "projector/kernel has shape (2, 3), expected (2, 4)" in str(error.value)


def test_position_may_be_beyond_32_bits(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        checkpoint.save(checkpoints, state_at(1), 2**40 + 1, Keep())
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoint.restore(checkpoints, state_at(0))[1] == 2**40 + 1
