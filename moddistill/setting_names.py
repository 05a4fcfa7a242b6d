"""Suggestions for settings that do not exist, among them the names that other trainers use."""

import difflib
from collections.abc import Iterable, Sequence

from moddistill.errors import UserError

# The names of our settings in other trainers.
_OTHER_NAMES = {
    "student": "model model_path model_name_or_path base_model student_model",
    "teacher": "teacher_model teacher_path teacher_model_name_or_path",
    "vision": "vision_tower vision_encoder mm_vision_tower image_encoder",
    "trainable": "trainable_params trainable_parameters freeze",
    "steps": "max_steps num_steps train_steps num_train_steps total_steps",
    "epochs": "num_epochs num_train_epochs",
    "batch_size": "batch bs global_batch_size train_batch_size per_device_train_batch_size",
    "grad_accum_steps": "accumulate gradient_accumulation_steps accum_steps accumulation_steps",
    "log_every": "logging_steps log_interval log_freq",
    "save_every": "save_steps save_interval checkpoint_every checkpoint_steps",
    "dtype": "precision mixed_precision compute_dtype bf16 fp16",
    "remat": "gradient_checkpointing activation_checkpointing remat_policy",
    "scan": "scan_layers",
    "data.template": "conversation_template chat_template conv_template conv_mode conv_version",
    "data.max_length": "seq_len seq_length max_len max_seq_len max_seq_length model_max_length",
    "data.packing": "packed sample_packing neat_packing use_packing",
    "data.workers": "num_workers dataloader_num_workers",
    "path": "data_path data_file train_file dataset dataset_path",
    "images": "image_root image_folder image_dir",
    "optim.lr": "learning_rate",
    "optim.b1": "beta1 adam_beta1",
    "optim.b2": "beta2 adam_beta2",
    "optim.eps": "epsilon adam_eps adam_epsilon",
    "optim.weight_decay": "wd decay",
    "optim.warmup_ratio": "warmup warmup_steps warmup_fraction",
    "optim.clip_norm": "grad_clip clip_grad max_grad_norm gradient_clipping gradient_clip_norm",
    "mesh.data": "dp data_parallel",
    "mesh.tensor": "tp tensor_parallel tensor_parallel_size model_parallel mesh.model",
    "mesh.expert": "ep expert_parallel expert_parallel_size",
    "distillation.kd_weight": "kl_weight kd_alpha alpha distill_weight distillation_weight",
    "preference.kind": "loss_type dpo_loss_type preference_loss",
    "preference.beta": "dpo_beta",
    "router.load_balance_weight": "aux_loss_weight aux_loss_coef router_aux_loss_coef "
    "balance_weight balance_loss_weight",
    "router.z_weight": "z_loss z_loss_weight z_loss_coef router_z_weight router_z_loss_coef",
    "logits_chunk_size": "chunk_size loss_chunk_size",
    "moe.num_experts": "experts n_experts num_local_experts",
    "moe.top_k": "topk num_experts_per_tok experts_per_token",
}
_SYNONYMS = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}


def nearest_setting(setting: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'optim.lr'?)` for the likely one of `known`, or an empty string.

    All are dotted names. Tries in this order: what other trainers call the setting, within the part
    that `setting` names if that part exists; the same name in another part; a similar spelling.
    """
    known = list(known)
    *parts, name = setting.split(".")
    prefix = "".join(f"{part}." for part in parts)
    is_part = any(each.startswith(prefix) for each in known)
    other = _SYNONYMS.get(".".join((*parts[-1:], name))) or _SYNONYMS.get(name)
    same = [each for each in known if f".{each}".endswith(f".{other or name}")]
    if other and is_part:
        same = [each for each in same if each.startswith(prefix)]
    # Prefer the nearest part, such as the same stage of a recipe.
    same.sort(key=lambda each: ("heldout" in each, -_shared(each.split("."), parts)))
    inside = [each.removeprefix(prefix) for each in known if each.startswith(prefix)]
    best = (
        same
        or [prefix + each for each in difflib.get_close_matches(name, inside)]
        or difflib.get_close_matches(setting, known, cutoff=0.8)
    )
    return f" (did you mean {best[0]!r}?)" if best else ""


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the number of parts that agree between two names."""
    return sum(x == y for x, y in zip(a, b, strict=False))


def unknown_setting(origin: str, setting: str, known: Iterable[str]) -> UserError:
    """Returns the error for a dotted name not in `known`, with the nearest one or the choices."""
    known = list(known)
    hint = nearest_setting(setting, known)
    if not hint:
        part = setting.rpartition(".")[0]
        inside = [each.removeprefix(f"{part}.") for each in known if each.startswith(f"{part}.")]
        names = dict.fromkeys(each.split(".")[0] for each in inside or known)
        hint = f"; expected one of {', '.join(names)}"
    return UserError(f"{origin}.{setting} is not a setting{hint}")
