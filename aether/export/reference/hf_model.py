"""A network that Aether trained, for transformers: its parts in PyTorch first, then what `from_pretrained` asks for.

AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True), or AutoModelForMaskedLM, or
AutoModelForImageClassification. config.json has the facts of the network under `network`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput, MaskedLMOutput

from aether.export.reference.torch_model import network_of

_CACHE = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)  # the newer name first


class AetherConfig(PretrainedConfig):
    """What config.json says: `network`, the facts, and `aether`, the run that it is from."""

    model_type = "aether"
    keys_to_ignore_at_inference = [_CACHE]

    def __init__(self, network: dict[str, Any] | None = None, aether: dict[str, Any] | None = None, **others: Any):
        self.network, self.aether = network or {}, aether or {}
        usual = dict(hidden_size="width", num_hidden_layers="layers", num_attention_heads="heads")
        usual |= dict(vocab_size="vocab", max_position_embeddings="context", image_size="image_size")
        known = {name: self.network[fact] for name, fact in usual.items() if fact in self.network}
        super().__init__(**known | others)


class AetherPreTrainedModel(PreTrainedModel):
    """The network, with the head that its task has; its one table is input and, where the head is tied, output."""

    config_class = AetherConfig
    _supports_cache_class = True  # of transformers 4
    _no_split_modules = ["Block", "YatBlock", "ReLUBlock"]
    _keep_in_fp32_modules_strict = ["whitening"]

    def __init__(self, config: AetherConfig):
        super().__init__(config)
        self.model = network_of(config.network)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of ids, or the map of patches."""
        return self.model.patches if self.config.network["family"] == "vit" else self.model.embed

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, if it has an array of its own."""
        return self.model.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: a tied, scaled head would not follow."""
        if new_num_tokens in (None, self.model.embed.num_embeddings):
            return self.model.embed
        raise NotImplementedError("Networks of Aether keep their vocabulary.")


class AetherForCausalLM(AetherPreTrainedModel, GenerationMixin):
    """Continues text."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """(b, t) ids -> logits (b, t, vocab); loss where labels, the ids themselves, are given, -100 for none.

        Args:
          input_ids: ids.
          attention_mask: (b, t), 0 for padding; with a cache its length more.
          position_ids: (b, t); by default padding is not counted.
          cache: `DynamicCache`, to go on from; also under its older name.
          past_key_values: the older name.
          labels: (b, t).
          use_cache: whether to make a cache; by default when not training.
          logits_to_keep: of how many of the last positions there shall be logits, or of which ones; 0: all.
          return_dict: False for a tuple.
          kwargs: of the loss, such as num_items_in_batch.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and (not self.training if use_cache is None else use_cache):
            cache = DynamicCache()
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; it must be (b, t): use a dynamic cache."
            )
        hidden = self.model.hidden(input_ids, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            options = {k: v for k, v in kwargs.items() if k in ("num_items_in_batch", "shift_labels", "ignore_index")}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
        return out if return_dict else out.to_tuple()


class AetherForMaskedLM(AetherPreTrainedModel):
    """Fills in masked text."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """(b, t) ids -> logits (b, t, vocab), and the loss where labels are given, -100 for none."""
        logits = self.model(input_ids, attention_mask, position_ids)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        out = MaskedLMOutput(loss=loss, logits=logits)
        return out if return_dict else out.to_tuple()


class AetherForImageClassification(AetherPreTrainedModel):
    """Tells images apart."""

    main_input_name = "pixel_values"

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """(b, channels, h, w) -> logits (b, classes), and the loss where labels (b,) are given."""
        logits = self.model(pixel_values.to(self.dtype))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out if return_dict else out.to_tuple()
