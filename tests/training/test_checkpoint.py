import errno
import shutil
from pathlib import Path

import chex
import jax.numpy as jnp
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from moddistill.errors import UserError
from moddistill.training import checkpoint
from moddistill.training.checkpoint import Keep
from moddistill.training.state import State

RUN = "00ff"


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
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", RUN) as checkpoints:
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, state_at(step, frozen=5.0), 8 * step, Keep())
    return tmp_path / "checkpoints"


def test_newest_state_comes_back_bit_for_bit(folder):
    with checkpoint.open_checkpoints(folder, RUN) as checkpoints:
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
    with checkpoint.open_checkpoints(folder, RUN) as checkpoints:
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
    with pytest.raises(KeyboardInterrupt), checkpoint.open_checkpoints(folder, RUN) as checkpoints:
        checkpoint.save(checkpoints, state_at(4), 32, Keep())
    with checkpoint.open_checkpoints(folder, RUN) as checkpoints:
        assert checkpoints.latest == 3
        checkpoint.restore(checkpoints, state_at(0))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete(file):
    file.unlink()


def make_folder(file):
    file.unlink()
    file.mkdir()


def restored_step(folder):
    with checkpoint.open_checkpoints(folder, RUN) as checkpoints:
        state, next_row = checkpoint.restore(checkpoints, state_at(0))
        assert next_row == 8 * int(state.step) == 8 * checkpoints.latest
        chex.assert_trees_all_equal(state.params, state_at(int(state.step)).params)
        return checkpoints.latest


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def make_file(folder):
    shutil.rmtree(folder)
    folder.touch()


def damages(checkpoint):
    """All damages of a checkpoint's files and folders, as (function, path)."""
    found = []
    for path in sorted(checkpoint.rglob("*")):
        kinds = [shutil.rmtree, empty, make_file]
        if path.is_file():
            kinds = [delete, make_folder] + [cut, zero, flip] * bool(path.stat().st_size)
        found += [(kind, path.relative_to(checkpoint)) for kind in kinds]
    return found


@pytest.mark.slow
def test_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(folder, caplog):
    """Each of its files and folders in turn."""
    whole = shutil.copytree(folder, folder.with_name("whole"))
    ways = damages(whole / "3")
    assert len(ways) >= 60
    for damage, name in ways:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        damage(folder / "3" / name)
        caplog.clear()
        assert restored_step(folder) == 2
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3.damaged"]
        assert f"{folder}/3: expected an undamaged checkpoint, got one" in caplog.text
        assert name.name in caplog.text or str(name) in caplog.text, (damage, name)


def test_steps_of_a_damaged_checkpoint_are_saved_again(folder):
    for _ in range(2):
        delete(next((folder / "3" / "state").rglob("d/*")))
        with checkpoint.open_checkpoints(folder, RUN) as checkpoints:
            checkpoint.restore(checkpoints, state_at(0))
            checkpoint.save(checkpoints, state_at(3, frozen=5.0), 24, Keep())
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "3.damaged"]
    assert restored_step(folder) == 3


def test_folder_of_damaged_checkpoints_only_is_an_error(folder):
    for step in ("2", "3"):
        (folder / step / "digests.json").unlink()
    message = "expected an undamaged checkpoint, or none to .*, got .* steps 3, 2: .*/3: expected"
    with (
        checkpoint.open_checkpoints(folder, RUN) as checkpoints,
        pytest.raises(ValueError, match=message),
    ):
        checkpoint.restore(checkpoints, state_at(0))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(), {5, 6}),
        (Keep(last=1), {6}),
        (Keep(last=1, every=2), {2, 4, 6}),
        (Keep(last=1, scores={1: 0.5, 2: 0.3, 3: 0.3, 6: float("nan")}), {2, 6}),
        (Keep(last=9, scores={9: 0.1}), {1, 2, 3, 4, 5, 6}),
    ],
)
def test_kept_checkpoints(keep, expected):
    assert keep.steps([1, 2, 3, 4, 5, 6]) == expected


def test_checkpoints_are_kept_by_policy(tmp_path):
    scores = {}
    with checkpoint.open_checkpoints(tmp_path, RUN) as checkpoints:
        for step in range(1, 8):
            scores[step] = abs(step - 2.1)
            checkpoint.save(checkpoints, state_at(step), 0, Keep(1, every=3, scores=dict(scores)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "6", "7"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: file 11: No space left on device [os_err"),
    ],
)
def test_full_disk_leaves_the_last_good_checkpoint(error, folder, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "write_digests", fail)
    message = "checkpoints: expected a disk with enough space, got 'No space left on device'"
    with (
        pytest.raises(UserError, match=message),
        checkpoint.open_checkpoints(folder, RUN) as checkpoints,
    ):
        checkpoint.save(checkpoints, state_at(4), 32, Keep())
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_checkpoints_without_digests_are_not_removed(folder):
    """Numbered ones too, of another trainer."""
    (folder / "1").mkdir()
    (folder / "1" / "model.bin").touch()
    with checkpoint.open_checkpoints(folder, RUN) as checkpoints:
        checkpoint.save(checkpoints, state_at(4), 32, Keep())
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "4"]


def test_error_while_saving_in_the_background_ends_the_run(folder):
    (folder / "4").write_text("in the way")
    with pytest.raises(OSError), checkpoint.open_checkpoints(folder, RUN) as checkpoints:
        checkpoint.save(checkpoints, state_at(4), 32, Keep())


def test_new_folder_has_no_checkpoint(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "none", RUN) as checkpoints:
        assert checkpoints.latest is None


def test_checkpoint_of_another_architecture_is_refused(folder):
    with (
        checkpoint.open_checkpoints(folder, RUN) as checkpoints,
        pytest.raises(ValueError, match=r"3 does not fit the architecture") as error,
    ):
        checkpoint.restore(checkpoints, state_at(0, shape=(2, 4)))
    assert "projector/kernel has shape (2, 3), expected (2, 4)" in str(error.value)


def test_position_may_be_beyond_32_bits(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c", RUN) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), 2**40 + 1, Keep())
    with checkpoint.open_checkpoints(tmp_path / "c", RUN) as checkpoints:
        assert checkpoint.restore(checkpoints, state_at(0))[1] == 2**40 + 1


@pytest.mark.parametrize("other", ["renamed", "of another run"])
def test_checkpoint_with_another_identity_is_not_resumed_from(folder, other, caplog, tmp_path):
    if other == "renamed":
        (folder / "3").rename(folder / "7")
    else:
        with checkpoint.open_checkpoints(tmp_path / "other", "11") as checkpoints:
            checkpoint.save(checkpoints, state_at(7), 56, Keep())
        (tmp_path / "other" / "7").rename(folder / "7")
        shutil.rmtree(folder / "3")
    assert restored_step(folder) == 2
    assert "/7: expected a checkpoint of {'step': 7, 'run': '00ff'}, got {" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["2", "7.damaged"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_damaged_checkpoint_takes_the_name_of_an_earlier_one(folder, make):
    make(folder / "3.damaged")
    delete(next((folder / "3").rglob("manifest.ocdbt")))
    assert restored_step(folder) == 2
    assert (folder / "3.damaged" / "digests.json").is_file()
