"""Errors of the converter for folders that do not match."""

import json
import resource

import pytest

from moddistill.convert import importing
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf
from tests.convert.hf_folders import change_config, change_weights
from tools.convert_weights.__main__ import main


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def language(tmp_path, small_tokenizer):
    return hf.save(hf.Text(num_layers=2).model(), tmp_path / "hf", small_tokenizer)


def test_all_mismatched_tensors_are_listed(language, tmp_path):
    def spoil(state):
        del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
        gate = "model.layers.0.mlp.gate_proj.weight"
        state[gate] = state[gate][1:]
        return state | {"model.extra": state["model.embed_tokens.weight"][:2]}

    change_weights(language, spoil)
    with pytest.raises(ValueError, match="4 tensors do not fit the architecture") as error:
        import_model(str(language), tmp_path / "out")
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing model.layers.1.mlp.up_proj.weight (48, 32)",
        "missing model.norm.weight (32,)",
        "unexpected model.extra (2, 32)",
        "model.layers.0.mlp.gate_proj.weight has shape (47, 32), expected (48, 32)",
    ]
    assert not (tmp_path / "out").exists()


def test_position_embedding_of_another_shape_is_refused(tmp_path, small_tokenizer, language):
    vision = hf.save(hf.clip_tower(), tmp_path / "vision")
    name = "embeddings.position_embedding.weight"
    change_weights(vision, lambda state: state | {name: state[name][:4]})
    with pytest.raises(ValueError, match=rf"{name} has shape \(4, 24\), expected \(5, 24\)"):
        import_model(str(language), tmp_path / "out", vision=str(vision))


def test_tied_head_that_differs_from_the_embedding_is_an_error(language, tmp_path):
    def with_head(state):
        return state | {"lm_head.weight": state["model.embed_tokens.weight"]}

    change_weights(language, with_head)
    import_model(str(language), tmp_path / "same")
    change_weights(language, lambda state: state | {"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(
        ValueError, match=r"expected lm_head\.weight equal to model\.embed_tokens.*got other values"
    ):
        import_model(str(language), tmp_path / "out")


@pytest.mark.parametrize("extra", [{}, {"rope_scaling": None}])
def test_config_published_before_transformers_5_is_read(language, tmp_path, extra):
    """`rope_theta` is a top-level field; a complete config is read without the defaults."""
    file = language / "config.json"
    fields = json.loads(file.read_text())
    fields = {"rope_theta": fields.pop("rope_parameters")["rope_theta"]} | fields | extra
    file.write_text(json.dumps(fields))
    assert import_model(str(language), tmp_path / "out").decoder.rope_theta == 1e6
    change_config(language, rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="rope_type: expected 'default', got 'yarn'"):
        import_model(str(language), tmp_path / "scaled")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "llama"},
            r"model_type: expected one of qwen2, qwen3, .*llava.*, got 'llama'",
        ),
        ({"hidden_act": "relu"}, r"hidden_act: expected 'silu', got 'relu'"),
        ({"use_sliding_window": True}, r"use_sliding_window: expected False, got True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
            r"rope_type: expected 'default', got 'yarn'",
        ),
        (
            {"vocab_size": 10},
            r"vocab_size: expected at least \d+, the ids of the tokenizer, got 10",
        ),
    ],
)
def test_unsupported_config_is_an_error(language, tmp_path, fields, message):
    change_config(language, **fields)
    with pytest.raises(ValueError, match=message):
        import_model(str(language), tmp_path / "out")


def test_superfluous_and_missing_parts_are_errors(language, tmp_path, small_tokenizer):
    vision = hf.save(hf.clip_tower(), tmp_path / "vision")
    with pytest.raises(ValueError, match=r"^--hf: expected a language model; .* --vision, got "):
        import_model(str(vision), tmp_path / "out")
    with pytest.raises(ValueError, match="--vision: expected a CLIP or SigLIP model, got "):
        import_model(str(language), tmp_path / "out", vision=str(language))
    with pytest.raises(
        ValueError, match="--vision: expected the vision tower that the projector was trained with"
    ):
        import_model(str(language), tmp_path / "out", projector="mm_projector.bin")
    with pytest.raises(ValueError, match=r"template: expected one of .*, got 'chatml2'"):
        import_model(str(language), tmp_path / "out", template="chatml2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_token_index": 3},
            r"image_token_index: expected \d+, the id of <image> in the tokenizer, got 3",
        ),
        (
            {"vision_feature_select_strategy": "full"},
            "select_strategy: expected 'default' for clip_vision_model, .*, got 'full'",
        ),
        (
            {"vision_feature_layer": [-2, -1]},
            r"vision_feature_layer: expected one .*, got \[-2, -1\]",
        ),
        (
            {"text_config": {"model_type": "gemma"}},
            "text_config.model_type: expected one of 'qwen2', .*, got 'gemma'",
        ),
        (
            {"vision_config": {"model_type": "eva"}},
            "vision_config.model_type: expected one of 'clip_vision_model', .*, got 'eva'",
        ),
        ({"projector_hidden_act": "relu"}, r"expected \('gelu', True\), got \('relu', True\)"),
    ],
)
def test_unsupported_llava_config_is_an_error(tmp_path, small_tokenizer, changes, message):
    model = hf.llava(hf.Text().config(), hf.clip_config(), small_tokenizer.image_id)
    folder = hf.save(model, tmp_path / "hf", small_tokenizer)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        import_model(str(folder), tmp_path / "out")


def test_nonzero_shared_expert_is_refused(tmp_path, small_tokenizer):
    text = hf.sparse_text(hf.Text())
    folder = hf.save(
        hf.llava(text, hf.clip_config(), small_tokenizer.image_id), tmp_path / "hf", small_tokenizer
    )
    with pytest.raises(ValueError, match=r"expected zeros in .*shared_expert.*, got other weights"):
        import_model(str(folder), tmp_path / "out")


def test_hub_name_without_a_network_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"can be downloaded, got 'Qwen/Qwen2-0\.5B' \(.+\)"):
        import_model("Qwen/Qwen2-0.5B", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"expected an existing folder or a hub name .*, got 'no/such/folder'"
    ):
        import_model("no/such/folder", tmp_path / "out")


def test_hub_download_refused_by_a_proxy_is_an_error(tmp_path, monkeypatch):
    class ProxyError(Exception):
        """Stands for an error of the transport, which is neither OSError nor ValueError."""

    def refuse(*_, **__):
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"can be downloaded, got .* \(403 Forbidden\)"):
        import_model("Qwen/Qwen2-0.5B", tmp_path / "out")


def test_existing_output_folder_is_unchanged(language, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("text")
    with pytest.raises(
        ValueError, match="expected a new folder, or --overwrite, got one that exists"
    ):
        import_model(str(language), out)
    with pytest.raises(
        ValueError, match=r"/out: expected a new folder, .*, got one without digests"
    ):
        import_model(str(language), out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["precious"]
    import_model(str(language), tmp_path / "model")
    with pytest.raises(ValueError, match="got one that exists"):
        export_model(tmp_path / "model", language, max_shard_size=10**9)


def test_interrupted_conversion_leaves_no_output_folder(language, tmp_path, monkeypatch):
    def interrupt(placed):
        yield from placed[:3]
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(importing, "_with_progress", interrupt)
        import_model(str(language), out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_model(str(language), out)
    assert (out / "model.json").is_file()


def test_output_folder_that_contains_an_input_is_refused(language, tmp_path):
    with pytest.raises(ValueError, match=r"without inputs of this command, got one that contains"):
        import_model(str(language), language, overwrite=True)
    import_model(str(language), tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=r"without inputs of this command, got one that contains"):
        export_model(
            tmp_path / "run" / "model", tmp_path / "run", max_shard_size=10**9, overwrite=True
        )
    assert (tmp_path / "run" / "model" / "model.json").is_file()
    with pytest.raises(ValueError, match=r"without inputs of this command, got one that contains"):
        export_model(language, language, max_shard_size=10**9, overwrite=True)
    vision, projector = hf.save(hf.clip_tower(), tmp_path / "vision"), tmp_path / "p" / "p.bin"
    projector.parent.mkdir()
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, projector)
    with pytest.raises(ValueError, match=r"got one that contains '.*p\.bin'"):
        import_model(
            str(language),
            projector.parent,
            vision=str(vision),
            projector=str(projector),
            overwrite=True,
        )


def test_full_disk_is_an_error_that_names_the_file(language, tmp_path):
    """Files may not grow beyond 20 kB, which fails as a full disk does."""
    import_model(str(language), tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            ValueError, match="expected a disk with enough space, got 'File too large'"
        ):
            export_model(tmp_path / "model", tmp_path / "out", max_shard_size=10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model"]


def test_missing_untied_head_is_not_replaced_by_the_embedding(tmp_path, small_tokenizer):
    text = hf.Text(tied=False).config()
    folder = hf.save(
        hf.llava(text, hf.clip_config(), small_tokenizer.image_id), tmp_path / "hf", small_tokenizer
    )
    name = "language_model.lm_head.weight"
    change_weights(folder, lambda state: {k: x for k, x in state.items() if k != name})
    with pytest.raises(ValueError, match=rf"missing {name} \(320, 32\)"):
        import_model(str(folder), tmp_path / "out")


def test_overflow_of_the_export_dtype_is_an_error(language, tmp_path):
    def enlarge(state):
        state["model.norm.weight"][0] = 1e6
        return state

    change_weights(language, enlarge)
    import_model(str(language), tmp_path / "model")
    with pytest.raises(ValueError, match=r"range of float16, got .*; it fits bfloat16 or float32"):
        export_model(tmp_path / "model", tmp_path / "out", max_shard_size=10**9, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_commands_import_upcycle_export_and_inspect(language, tmp_path, capsys):
    """Commands of a user, from Hugging Face weights and back."""
    dense, sparse, out = (str(tmp_path / name) for name in ("model", "sparse", "out"))
    main(["import", "--hf", str(language), "--out", dense])
    main(
        ["upcycle", "--model", dense, "--num_experts", "3", "--placement", "(1,)", "--out", sparse]
    )
    main(["export", "--model", sparse, "--out", out, "--max_shard_size", "20KB"])
    assert "Qwen2MoeForCausalLM" in capsys.readouterr().out
    main(["inspect", sparse])
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"] == {"layers": [1], "num_experts": 3, "top_k": 2}
    assert facts["parameters"] == sum(facts["parts"].values()) > facts["activated"]
    assert sum(facts["dtypes"].values()) == facts["parameters"]
    main(["inspect", out])
    assert json.loads(capsys.readouterr().out)["holds"] == ["decoder"]
    with pytest.raises(
        SystemExit, match=r"error: .*: expected a new folder, or --overwrite, got one that"
    ):
        main(["import", "--hf", str(language), "--out", dense])
    with pytest.raises(SystemExit, match=r"error: max_shard_size: .*, got '20XB'"):
        main(["export", "--model", dense, "--out", out, "--max_shard_size", "20XB"])
