"""Named architectures: published Qwens with CLIP ViT-L/14-336, LLaVA models, tests and demo.

A published decoder has more embedding rows than its tokenizer has tokens; `<image>` is the first id
after them.
"""

import dataclasses

from moddistill.errors import invalid, not_one_of
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig
from moddistill.models.vocabulary import IdRanges

QWEN_VOCAB = 151_646  # Qwen1.5 and Qwen2
QWEN2_5_VOCAB = 151_665
QWEN3_VOCAB = 151_669

CLIP_L_336 = VisionConfig(
    image_size=336,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=24,
    num_heads=16,
)
# Published without the last of its 27 layers, whose input LLaVA-NeXT selects.
SIGLIP_SO400M_384 = VisionConfig(
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=26,
    num_heads=16,
    select_layer=-1,
    activation="gelu_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def _qwen(
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tie_word_embeddings: bool,
    vocab_size: int = 151_936,
    rope_theta: float = 1e6,
    tokens: int = QWEN_VOCAB,
) -> ModelConfig:
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        real_ids=((0, tokens),),
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=rope_theta,
        tie_word_embeddings=tie_word_embeddings,
    )
    return ModelConfig(decoder, CLIP_L_336, "mlp2x_gelu", "vicuna", image_token_id=tokens)


def _qwen3(*sizes: int, tie_word_embeddings: bool) -> ModelConfig:
    """A `_qwen` with heads of width 128 and norms of query and key in place of biases."""
    config = _qwen(*sizes, tie_word_embeddings=tie_word_embeddings, tokens=QWEN3_VOCAB)
    decoder = dataclasses.replace(config.decoder, head_dim=128, qkv_bias=False, qk_norm=True)
    return dataclasses.replace(config, decoder=decoder)


def _llava(language: ModelConfig, vision: VisionConfig = CLIP_L_336) -> ModelConfig:
    """A published LLaVA: a Qwen with this vision encoder and Qwen's conversation format."""
    return dataclasses.replace(language, vision=vision, template="chatml")


def _small(
    decoder: tuple[int, int, int, int, int], vision: VisionConfig | None, vocab: int
) -> ModelConfig:
    """A model for tests and the demo; ids come from its tokenizer."""
    width, mlp, layers, heads, kv_heads = decoder
    config = DecoderConfig(
        vocab_size=vocab,
        real_ids=((0, vocab),),
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
    )
    return ModelConfig(config, vision, "mlp2x_gelu", "vicuna", vocab)


_TINY_TOWER = VisionConfig(
    image_size=28,
    patch_size=14,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    select_layer=-1,
)
_DEMO_TOWER = VisionConfig(
    image_size=48,
    patch_size=8,
    hidden_size=96,
    intermediate_size=288,
    num_layers=3,
    num_heads=4,
    select_layer=-1,
)

PRESETS: dict[str, ModelConfig] = {
    # Hidden size, intermediate size, layers, heads, key/value heads. Embeddings have 151,936 rows,
    # those of Qwen2-7B and Qwen2.5-7B 152,064.
    "qwen1.5-0.5b": _qwen(1024, 2816, 24, 16, 16, tie_word_embeddings=True),
    "qwen1.5-1.8b": _qwen(2048, 5504, 24, 16, 16, tie_word_embeddings=False),
    "qwen1.5-4b": _qwen(2560, 6912, 40, 20, 20, tie_word_embeddings=False, rope_theta=5e6),
    "qwen1.5-7b": _qwen(4096, 11008, 32, 32, 32, tie_word_embeddings=False),
    "qwen2-0.5b": _qwen(896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "qwen2-1.5b": _qwen(1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "qwen2-7b": _qwen(3584, 18944, 28, 28, 4, tie_word_embeddings=False, vocab_size=152_064),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, tie_word_embeddings=True, tokens=QWEN2_5_VOCAB),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, tie_word_embeddings=True, tokens=QWEN2_5_VOCAB),
    "qwen2.5-7b": _qwen(
        3584, 18944, 28, 28, 4, tie_word_embeddings=False, vocab_size=152_064, tokens=QWEN2_5_VOCAB
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, tie_word_embeddings=False),
    # Named as on the hub, so that a hub name finds them.
    "llava-interleave-qwen-0.5b-hf": _llava(
        _qwen(1024, 2816, 24, 16, 16, tie_word_embeddings=True, vocab_size=152_000),
        SIGLIP_SO400M_384,
    ),
    "llava-interleave-qwen-7b-hf": _llava(
        _qwen(4096, 11008, 32, 32, 32, tie_word_embeddings=False, vocab_size=152_000),
        SIGLIP_SO400M_384,
    ),
    "long-llava-qwen2-7b": _llava(
        _qwen(3584, 18944, 28, 28, 4, tie_word_embeddings=False, vocab_size=152_064, rope_theta=1e9)
    ),
    "tiny": _small((16, 32, 4, 4, 2), _TINY_TOWER, 320),
    "tiny-teacher": _small((32, 64, 2, 4, 2), _TINY_TOWER, 320),
    "demo-teacher": _small((96, 288, 3, 4, 4), _DEMO_TOWER, 512),
    "demo-teacher-language": _small((96, 288, 3, 4, 4), None, 512),
    "demo-language": _small((64, 192, 4, 4, 2), None, 512),
}


def preset(name: str) -> ModelConfig:
    """The architecture of that name; UserError for an unknown name."""
    if name not in PRESETS:
        raise not_one_of("preset", name, PRESETS)
    return PRESETS[name]


def with_vocabulary(config: ModelConfig, real_ids: IdRanges, image_token: int) -> ModelConfig:
    """The architecture fitted to a tokenizer; UserError if one of its ids has no embedding row."""
    ids = real_ids[-1][1]
    if ids > config.decoder.vocab_size:
        expected = f"at most {config.decoder.vocab_size} ids, the rows of the model's embedding"
        raise invalid("tokenizer", ids, expected)
    decoder = dataclasses.replace(config.decoder, real_ids=real_ids)
    return dataclasses.replace(config, decoder=decoder, image_token_id=image_token)
