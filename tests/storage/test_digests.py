"""Damage is found: one flipped bit anywhere in a model folder or a checkpoint."""

import json
import os
import random
import shutil
import subprocess

import jax
import jax.numpy as jnp
import optax
import pytest

import moddistill
from moddistill.data.tokenizer import load_tokenizer
from moddistill.storage import digests
from moddistill.storage.digests import (
    NAME,
    content_digest,
    read_digests,
    verify,
    write_digests,
)
from moddistill.storage.model_folder import read_model_config, read_source
from moddistill.training import checkpoint
from moddistill.training.state import State


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text("first")
    (folder / "below" / "b").write_bytes(bytes(1000))
    write_digests(folder, "import")
    return folder


@pytest.fixture
def model(tiny_models, tmp_path):
    return shutil.copytree(tiny_models["sparse"], tmp_path / "model")


@pytest.fixture
def run(tmp_path):
    """A checkpoint of step 2, and `resume()`, which restores it."""
    params = {"decoder/kernel": jax.random.normal(jax.random.key(0), (40, 50))}
    state = State(jnp.asarray(0), params, {}, optax.adamw(1.0).init(params), jnp.float32(1))
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", "a run") as checkpoints:
        state = state.replace(step=jnp.asarray(2))
        checkpoint.save(checkpoints, state, 16, checkpoint.Keep())

    def resume():
        with checkpoint.open_checkpoints(tmp_path / "checkpoints", "a run") as checkpoints:
            return checkpoint.restore(checkpoints, state)

    return tmp_path / "checkpoints", resume


def flip(file, number):
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[number // 8] ^= 1 << number % 8
    file.write_bytes(content)


def check_each_flip_is_named(folder, load, trials):
    """Flips random bits one at a time, half of them in files that are equally likely."""
    files = sorted(x for x in folder.rglob("*") if x.is_file() and x.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    rng = random.Random(0)
    for trial in range(trials):
        [file] = rng.choices(files, weights=sizes if trial % 2 else None)
        before = file.read_bytes()
        flip(file, rng.randrange(8 * len(before)))
        with pytest.raises(ValueError) as error:
            load()
        assert str(file.relative_to(folder)) in str(error.value)
        assert "\n" not in str(error.value)
        file.write_bytes(before)
    load()


@pytest.mark.slow
def test_flipped_bit_in_a_model_folder_is_found(model):
    check_each_flip_is_named(model, lambda: moddistill.load(model), trials=300)


def test_flipped_bit_in_a_checkpoint_is_found(run):
    folder, resume = run
    check_each_flip_is_named(folder / "2", resume, trials=300)


def test_flipped_bit_in_the_digests_is_found(folder):
    """One in every byte."""
    content = (folder / NAME).read_bytes()
    for byte in range(len(content)):
        number = 8 * byte + byte % 8
        flip(folder / NAME, number)
        with pytest.raises(ValueError, match=r"got one whose digests\.json has another sha256"):
            verify(folder)
        (folder / NAME).write_bytes(content)
    verify(folder)


@pytest.mark.parametrize("read", [read_model_config, read_source])
def test_description_is_checked_without_its_arrays(model, read):
    shutil.rmtree(model / "params")
    read(model)
    file = model / "model.json"
    file.write_text(file.read_text().replace('"by a test"', '"by a text"'))
    with pytest.raises(ValueError, match=r"train wrote it: model\.json does not match digests\.js"):
        read(model)


def test_tokenizer_of_a_model_folder_is_checked(model):
    vocab = json.loads((model / "tokenizer.json").read_text())
    vocab["added_tokens"][0]["content"] = "<|endoftexu|>"
    (model / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"wrote it: tokenizer\.json does not match digests\.json"):
        load_tokenizer(str(model))


def test_missing_added_and_truncated_files_are_found(folder):
    (folder / "a").unlink()
    (folder / "below" / "b").write_bytes(bytes(999))
    (folder / "c").touch()
    with pytest.raises(ValueError) as error:
        verify(folder, expected="another one")
    assert str(error.value) == (
        f"{folder}: expected another one, got one changed since import wrote it: a is missing, "
        "below/b does not match digests.json, c is not in digests.json"
    )


def test_many_damaged_files_are_one_line(folder):
    for number in range(9):
        (folder / f"extra {number}").touch()
    with pytest.raises(ValueError, match=r"extra 2 is not in digests\.json and 6 more$"):
        verify(folder)


def test_only_the_files_that_are_read_are_compared(folder):
    flip(folder / "a", 0)
    assert verify(folder, ["below/b"]).written_by == "import"
    with pytest.raises(ValueError, match="a does not match"):
        verify(folder, ["below/b", "a"])
    with pytest.raises(ValueError, match="c is missing"):
        verify(folder, ["c"])


def test_folder_without_digests_is_refused(model):
    (model / NAME).unlink()
    with pytest.raises(
        ValueError, match=r"/model: expected an undamaged folder, got one without digests\.json"
    ):
        moddistill.load(model)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"written_by": "import", "files": 3}', "[" * 9999]
)
def test_malformed_digests_are_refused(folder, content):
    (folder / NAME).write_text(content)
    with pytest.raises(ValueError, match=r"digests\.json has another sha256"):
        read_digests(folder)


def test_link_to_a_device_is_not_read(folder):
    """Reading it would not end."""
    (folder / "a").unlink()
    (folder / "a").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"wrote it: a does not match digests\.json"):
        verify(folder)


def test_digests_are_those_of_sha256sum(folder):
    lines = "".join(f"{digest}  {name}\n" for name, digest in read_digests(folder).files.items())
    done = subprocess.run(
        ["sha256sum", "-c"], input=lines, cwd=folder, capture_output=True, text=True
    )
    assert done.stdout == "a: OK\nbelow/b: OK\n"


@pytest.mark.parametrize("name", ["/proc/kmsg", "../a", "below/../../a"])
def test_digests_of_files_outside_the_folder_are_refused(name, folder, monkeypatch):
    monkeypatch.setattr(digests, "_list_files", lambda _: [name])
    monkeypatch.setattr(digests, "_sha256", lambda file, sync=False: "00")
    write_digests(folder, "import")
    with pytest.raises(ValueError, match=r"digests\.json has another sha256"):
        read_digests(folder)


def test_digests_of_unbounded_size_are_refused_without_reading_them(folder):
    os.truncate(folder / NAME, 2**31)
    with pytest.raises(ValueError, match=r"digests\.json has another sha256"):
        verify(folder)


def test_nothing_is_written_below_a_folder_with_digests(folder):
    digests.check_outside(folder, "--out")
    digests.check_outside(folder.parent / "other", "--out")
    for inside in (folder / "new", folder / "below" / "new" / "deeper"):
        with pytest.raises(ValueError, match=r"^--out: expected a folder outside of '.*/folder'"):
            digests.check_outside(inside, "--out")


def test_fingerprint_depends_only_on_the_content(folder, tmp_path):
    before = digests.fingerprint(folder)
    assert digests.fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before
    (folder / "a").write_text("second")
    write_digests(folder, "import")
    assert digests.fingerprint(folder) != before


def test_a_digest_of_content_depends_on_every_byte_and_name(folder):
    """Of a folder that has no digests, such as a download. Those of other tools are hidden."""
    (folder / "c").write_bytes(bytes(3 * 2**20))
    found = [content_digest(folder)]
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("of another tool")
    (folder / "link").symlink_to(folder / "below")
    (folder / "nothing").symlink_to(folder / "nowhere")
    assert content_digest(folder) == found[0]
    with (folder / "c").open("r+b") as file:
        file.seek(2**20 + 12345)
        file.write(b"1")
    found.append(content_digest(folder))
    (folder / "below" / "b").rename(folder / "below" / "d")
    found.append(content_digest(folder))
    (folder / "a").unlink()
    found.append(content_digest(folder))
    assert len(set(found)) == 4
