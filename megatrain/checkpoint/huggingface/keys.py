"""The keys of a Hugging Face config.json: each is read, or known to change no number, or an error.

Design choices:
- An unknown key is an error, unlike in transformers: a model that computes something else than its config.json says
  would train on without a complaint. Who knows better takes the key out of the file.
- Dropout counts as changing numbers: our model has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatrain.errors import InputError, bad_value

NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "attention_dropout": 0,
    "chunk_size_feed_forward": 0,
    "hidden_act": "silu",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
"""Keys that change the numbers, and the one value with which they don't."""

_RUNNING = """
_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _model_name_or_path _name_or_path
architectures attn_implementation dtype is_llama_config max_sequence_length model_type name_or_path pretraining_tp
torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
"""Names, versions, the dtype of files, how a program runs the model."""

_AROUND = """
bos_token_id decoder_start_token_id finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id
mask_token_id num_labels output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
return_dict return_dict_in_generate sep_token_id task_specific_params tokenizer_class unk_token_id
"""
"""Special tokens, labels of classifiers, what is given back beside the logits."""

_GENERATION = """
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens temperature
top_k top_p typical_p
"""
"""How text is generated."""

HARMLESS = {key for group in (_RUNNING, _AROUND, _GENERATION) for key in group.split()}
"""Keys that change no number of training, whatever they say."""


class Keys:
    """The keys of a JSON object; reading one takes it away. Null is as good as absent."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        """path: of the file. prefix: what comes before the object's own keys in it."""
        self.path, self.prefix = path, prefix
        self._values = dict(values)

    def pop(self, key: str) -> Any:
        """The value as it is in the file, or None."""
        return self._values.pop(key, None)

    def error(self, key: str, given: object, legal: str) -> InputError:
        """That the key can't have the value."""
        return bad_value(f"{self.path}: {self.prefix}{key}", json.dumps(given), legal)

    def integer_or_none(self, key: str) -> int | None:
        """A whole number, if there is one. Raises InputError."""
        value = self.pop(key)
        if value is None or type(value) is int:
            return value
        raise self.error(key, value, "a whole number is needed")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; `default` where there is none. Raises InputError."""
        value = self.integer_or_none(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, None, "a whole number is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; `default` where there is none. Raises InputError."""
        value = self.pop(key)
        value = default if value is None else value
        if type(value) is int or type(value) is float:
            return float(value)
        raise self.error(key, value, "a number is needed")

    def switch(self, key: str) -> bool:
        """True or false, which is also what absent means. Raises InputError."""
        value = self.pop(key)
        if value not in (None, False, True):
            raise self.error(key, value, "legal: false, true")
        return bool(value)

    def check_rest(self) -> None:
        """Raises InputError for a key that nobody has read and that may change the numbers."""
        for key, value in self._values.items():
            if value is None or key in HARMLESS:
                continue
            if key not in NEUTRAL:
                legal = "this program doesn't know the key, and it may change what the model computes; legal: null"
                raise self.error(key, value, legal)
            if value != NEUTRAL[key]:
                raise self.error(key, value, f"not expressible; legal: {json.dumps(NEUTRAL[key])}")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is none."""
    try:
        values = json.loads(path.read_bytes(), parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object")
    return values
