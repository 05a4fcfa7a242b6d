import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.convert.upcycling import upcycle_model
from moddistill.data.tokenizer import load_tokenizer, train_bpe
from moddistill.distributed.sharding import unbox
from moddistill.models.batch import padded_batch
from moddistill.models.vlm import Vlm, abstract_params
from moddistill.storage.model_folder import read_model_config, save_model
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf
from tests.data import qwen_ranks


@pytest.fixture(scope="session")
def small_tokenizer():
    """A tokenizer of up to 300 ids, and `<image>` after them."""
    return train_bpe(["what colour is the shape? a red circle, no triangle. yes no " * 3], 300)


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory):
    """The tokenizer of Qwen1.5 and Qwen2 with its real ids, and `<image>` after them."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen_ranks.write_tokenizer_json(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def torch_logits():
    """Returns a function for the float32 logits of a torch model."""
    torch.load_module()

    def compute(model, tokens, images=None, config=None):
        inputs = {"input_ids": torch.tensor(tokens).long()}
        if images is not None:
            scaled = images[:, 0].astype(np.float64) / 255
            normal = (scaled - np.array(config.vision.mean)) / np.array(config.vision.std)
            inputs["pixel_values"] = torch.tensor(normal.transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            return model(**inputs).logits.numpy()

    return compute


@pytest.fixture(scope="session")
def model_logits():
    """Returns a function for the float32 logits of a model folder."""

    def compute(folder, tokens, images=None):
        model, params = load(folder)
        lengths = np.full(len(tokens), tokens.shape[1])
        batch = padded_batch(np.asarray(tokens, np.int32), lengths, images=images)
        return np.asarray(
            jax.jit(lambda p, b: Vlm.logits(model.apply({"params": p}, b)))(params, batch)
        )

    return compute


@pytest.fixture(scope="session")
def random_inputs():
    """Returns a function for two rows of tokens, each with an image if the model is multimodal."""

    def make(config, length=9):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.decoder.real_ids[-1][1], (2, length), np.int32)
        if config.vision is None:
            return tokens, None
        patches = np.full((2, config.vision.patches), config.image_token_id, np.int32)
        size = config.vision.image_size
        images = rng.integers(0, 256, (2, 1, size, size, 3), np.uint8)
        return np.concatenate([tokens[:, :3], patches, tokens[:, 3:]], axis=1), images

    return make


@pytest.fixture(scope="session")
def random_params():
    """Returns a function for normal parameters of an architecture, without compiling anything."""

    def make(config):
        rng = np.random.default_rng(0)
        shapes = unbox(abstract_params(config))
        return jax.tree.map(
            lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), shapes
        )

    return make


def perturb(folder, out, tokenizer):
    """Adds noise to all parameters, so that the experts differ."""
    config = read_model_config(folder)
    params = load(folder)[1]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    scale = [0.3 * np.std(x) + 0.02 for x in leaves]
    leaves = [
        x + s * rng.standard_normal(x.shape, np.float32) for x, s in zip(leaves, scale, strict=True)
    ]
    save_model(out, config, jax.tree.unflatten(tree, leaves), tokenizer, {})
    return config


@pytest.fixture(scope="session")
def sparse(tmp_path_factory, small_tokenizer):
    """Returns a function for folder, export and config of a sparse student."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp("sparse")
            # A head of its own, since one that is the embedding repeats the last token.
            text = hf.Text(num_layers=4, tied=False, head_dim=16 if "Qwen3" in name else 0)
            vision = hf.siglip_config() if "SigLIP" in name else hf.clip_config()
            model = hf.llava(text.config(), vision, small_tokenizer.image_id)
            source = hf.save(model, root / "hf", small_tokenizer)
            import_model(str(source), root / "dense")
            upcycle_model(root / "dense", root / "copies", ExpertConfig())
            config = perturb(root / "copies", root / "student", small_tokenizer)
            export_model(root / "student", root / "out", max_shard_size=100_000)
            made[name] = root / "student", root / "out", config
        return made[name]

    return make
