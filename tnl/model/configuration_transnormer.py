"""TransnormerConfig: what a published config.json may hold, and nothing else."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

OURS = (
    "vocab_size",
    "decoder_embed_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "hidden_dim",
    "glu_dim",
    "linear_act_fun",
    "norm_type",
    "linear_use_lrpe_list",
    "bias",
    "no_scale_embedding",
    "add_bos_token",
    "use_cache",
    "init_std",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# Nothing else of a config.json reaches transformers: keys such as auto_map or _attn_implementation lead to code of others.
SHARED = ("architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", "_name_or_path")


class TransnormerConfig(PretrainedConfig):
    """Sizes and switches of a TransNormerLLM, under their published names (shared by the 385M, 1B, 7B and their relatives)."""

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
    }

    vocab_size: int = 64000
    decoder_embed_dim: int = 1024
    """D: width of the residual stream."""
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    hidden_dim: int = 1024
    """E: width of q, k, v and u, over all heads."""
    glu_dim: int = 2816
    """Width inside the GLU; -1 means D."""
    linear_act_fun: str = "silu"
    """Activation of q and k; a word that is none means the identity."""
    norm_type: str = "simplermsnorm"
    """simplermsnorm; anything else means nn.LayerNorm."""
    linear_use_lrpe_list: list[int] | None = None
    """1 for every layer with LRPE; empty: the published key linear_use_lrpe, for every layer."""
    bias: bool = False
    no_scale_embedding: bool = False
    """True: the embedding is not multiplied by sqrt(D)."""
    add_bos_token: bool = False
    use_cache: bool = True
    init_std: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        every_layer = int(bool(kwargs.pop("linear_use_lrpe", 0)))
        super().__post_init__(**kwargs)
        if not self.linear_use_lrpe_list:
            self.linear_use_lrpe_list = [every_layer] * self.decoder_layers
        if self.glu_dim == -1:
            self.glu_dim = self.decoder_embed_dim
        self.check()

    def check(self) -> None:
        """Raise ValueError where the sizes contradict each other."""
        sizes = ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "hidden_dim", "glu_dim")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it needs to be a positive integer")
        if self.hidden_dim % self.decoder_attention_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} cannot be split over {self.decoder_attention_heads} heads")
        if len(self.linear_use_lrpe_list or []) != self.decoder_layers:
            raise ValueError(
                f"linear_use_lrpe_list has {len(self.linear_use_lrpe_list or [])} entries; decoder_layers is {self.decoder_layers}"
            )
        if any(self.linear_use_lrpe_list or []) and self.decoder_embed_dim != self.hidden_dim:
            raise ValueError(f"LRPE needs decoder_embed_dim = hidden_dim (found {self.decoder_embed_dim} and {self.hidden_dim})")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        allowed = {key: value for key, value in config_dict.items() if key in (*OURS, *SHARED, "linear_use_lrpe")}
        return super().from_dict(allowed, **kwargs)
