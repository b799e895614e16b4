"""What we rely on in other libraries' insides, in one room.

What this package teaches: a public function keeps its promise from one release to the next; the name of an argument
deep inside may not. transformers 5.24 renamed `past_key_values` to `cache`, and a model that looked for the old name
took every decode step for the beginning of a text. So a thing is recognised by what it *is*, not by what it is called,
and what is not found is an error that names the version. Nothing else in this repository names

    language_models.py    transformers: the cache among a model's arguments and outputs, where the decoder layers are,
                          position ids, the attention interface, embed_scale
    pytorch.py            torch: oneDNN's own order of a matrix, an assertion that does not wait for a GPU, which
                          weights DistributedDataParallel leaves alone and FSDP2 splits
    towers.py             open_clip, timm, CLIP: patch tokens and grids of features, a vision tower alone, what a name's
                          weights were trained on, pictures' settings, QuickGELU
    versions.py           which versions work

It imports nothing of ours but the error.
"""

# ruff: noqa: F401, I001  (the names by which the rest of the repository calls what is in here)
from flamingo.interop.compat.language_models import (
    arguments_of, as_output, attention_name, cache_argument, cache_of, cache_under_its_old_name, check_length,
    check_that_text_grows, eager_attention, embedding_scale, find_cache, find_decoder_layers, general_settings,
    is_quantized, is_repacked, max_positions, name_adapters, note_attention, position_table, predicts_the_next_token,
    quiet, register_attention, requested_attention, sdpa, set_attention, set_training, takes_position_ids, tokens_read,
    try_quantization, unquantized_parameters, without_quantization,
)  # fmt: skip
from flamingo.interop.compat.pytorch import (
    can_shard, check_values, data_parallel, default_dtype, fetch_before, fully_shard_around, has_onednn, is_sharded,
    onednn_linear, onednn_order, without_onednn, without_onednn_warning,
)  # fmt: skip
from flamingo.interop.compat.towers import (
    has_class_token, has_text_of_transformers, hugging_face_patches, open_clip_image_and_patches, open_clip_patches,
    open_clip_transform, open_clip_without_text, timm_config, timm_patches, trained_with_quick_gelu,
)  # fmt: skip
from flamingo.interop.compat.versions import WORKING, check_versions, installed, range_of, unlike, with_version
