"""TransNormerLLM as transformers knows it: published parameter names, a Cache that never grows, generate(), checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tnl.kernels.dispatch import Ops, ops
from tnl.kernels.reference import Mixer, Rows, simple_rms_norm
from tnl.model import convert
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.decay import log_decay
from tnl.model.layer import LayerWeights, decoder_layer
from tnl.model.state import TransnormerCache


class SimpleRMSNorm(nn.Module):
    """x rsqrt(mean(x^2) + eps): no weight (arXiv:2307.14995, eq. 7)."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return simple_rms_norm(x, self.eps)


def make_norm(config: TransnormerConfig, width: int) -> nn.Module:
    return SimpleRMSNorm() if config.norm_type == "simplermsnorm" else nn.LayerNorm(width)


class Lrpe(nn.Module):
    """Holds theta [H, 1, D / H]; always at least float32, since angles grow with the position."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(heads, 1, width // heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        index = torch.arange(self.theta.numel(), dtype=torch.float64, device=self.theta.device)
        self.theta.copy_((10000.0 ** (-2 * index / self.theta.numel())).view_as(self.theta))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lrpe:
        exact = self.theta.data
        super()._apply(fn, recurse)
        if self.theta.dtype.itemsize < 4 and not exact.is_meta:
            self.theta.data = exact.float().to(self.theta.device)
        return self


class TokenMixer(nn.Module):
    """The weights of the attention."""

    def __init__(self, config: TransnormerConfig, layer: int) -> None:
        super().__init__()
        D, E, H = config.decoder_embed_dim, config.hidden_dim, config.decoder_attention_heads
        self.position = (H, layer, config.decoder_layers)
        self.qkvu_proj = nn.Linear(D, 4 * E, bias=config.bias)
        self.out_proj = nn.Linear(E, D, bias=config.bias)
        self.norm = make_norm(config, E)
        self.lrpe = Lrpe(H, D) if config.linear_use_lrpe_list and config.linear_use_lrpe_list[layer] else None
        self.register_buffer("log_decay", log_decay(*self.position), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenMixer:
        super()._apply(fn, recurse)
        self.reset_decay(self.log_decay.device)
        return self

    def reset_decay(self, device: torch.device) -> None:
        """Make the decays anew: they are float32 whatever dtype the model is cast to."""
        self.log_decay = log_decay(*self.position).to(device)


class ChannelMixer(nn.Module):
    """The weights of the GLU."""

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__()
        D, G = config.decoder_embed_dim, config.glu_dim
        self.l1 = nn.Linear(D, G, bias=config.bias)
        self.l2 = nn.Linear(D, G, bias=config.bias)
        self.l3 = nn.Linear(G, D, bias=config.bias)


class TransnormerDecoderLayer(GradientCheckpointingLayer):
    """Weights of one layer; its arithmetic is `layer.decoder_layer`.

    glu_again: in training, the GLU is computed again in the backward pass, and nothing but its input is kept.
    """

    def __init__(self, config: TransnormerConfig, layer: int) -> None:
        super().__init__()
        self.number = layer
        self.glu_again = False
        self.activation = config.linear_act_fun
        self.token_mixer = TokenMixer(config, layer)
        self.channel_mixer = ChannelMixer(config)
        self.token_norm = make_norm(config, config.decoder_embed_dim)
        self.channel_norm = make_norm(config, config.decoder_embed_dim)

    def weights(self) -> LayerWeights:
        """The modules as they are now: an adapter may have wrapped them since the last call."""
        mixer, glu = self.token_mixer, self.channel_mixer
        return LayerWeights(
            token_norm=self.token_norm,
            qkvu_proj=mixer.qkvu_proj,
            mixer=Mixer(mixer.norm, self.activation, mixer.log_decay, None if mixer.lrpe is None else mixer.lrpe.theta),
            out_proj=mixer.out_proj,
            channel_norm=self.channel_norm,
            l1=glu.l1,
            l2=glu.l2,
            l3=glu.l3,
            number=self.number,
        )

    def forward(self, x: Tensor, state: Tensor | None, rows: Rows, ops: Ops) -> tuple[Tensor, Tensor]:
        if self.glu_again and self.training and torch.is_grad_enabled():
            ops = ops._replace(norm_glu=partial(ops.norm_glu, again=True))  # type: ignore[call-arg]  # of the training forms alone
        return decoder_layer(x, state, self.weights(), rows, ops)


class TransnormerPreTrainedModel(PreTrainedModel):
    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransnormerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Lrpe):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class TransnormerModel(TransnormerPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        self.backend = "auto"
        self.ops = ops("reference")
        self.scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.layers = nn.ModuleList(TransnormerDecoderLayer(config, i) for i in range(config.decoder_layers))
        self.final_norm = make_norm(config, config.decoder_embed_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def pick_kernels(self, backend: str | None = None, device: torch.device | None = None) -> None:
        """Take the kernels for the device (None: the weights') and the weights' dtype; `backend` as in dispatch.ops, None: as before."""
        self.backend = backend or self.backend
        weight, lrpe = self.embed_tokens.weight, any(self.config.linear_use_lrpe_list or [])
        head_dim = self.config.hidden_dim // self.config.decoder_attention_heads * (2 if lrpe else 1)
        self.ops = ops(self.backend, device or weight.device, weight.dtype, head_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransnormerModel:
        super()._apply(fn, recurse)
        self.pick_kernels()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, T] or [B, tokens before + T]: 0 where a token is padding, on either side
        position_ids: Tensor | None = None,  # [B, T]: where it restarts at 0, a new sequence begins (packed rows)
        past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None,  # [B, T, D], unscaled
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        dropout_keys: Tensor | None = None,  # [B, T] int32: what adapters' dropout masks are made of; None: drawn where it trains
        **kwargs: Any,  # shared: so many first tokens of the one row are the start of all its sequences, whose positions go on from there
    ) -> BaseModelOutputWithPast:
        """Returns last_hidden_state [B, T, D]. Padding does not exist for a row: it neither adds to the state nor decays it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * self.scale
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        cache = past_key_values if past_key_values is not None else TransnormerCache(len(self.layers)) if use_cache else None
        rows, order = arrange(x, attention_mask, position_ids, cache)
        if shared := kwargs.get("shared", 0):
            rows = sharing(rows, shared)
        if dropout_keys is None and self.training and x.shape[1] > 1:
            dropout_keys = torch.randint(-(2**31), 2**31, x.shape[:2], dtype=torch.int32, device=x.device)
        rows = rows._replace(dropout_keys=dropout_keys)
        hidden = [x]
        if order is not None:
            x = take(x, order)
        for i, layer in enumerate(self.layers):
            x, state = layer(x, cache.states[i] if cache is not None else None, rows, self.ops)
            if cache is not None:
                cache.states[i] = state
            if output_hidden_states and i + 1 < len(self.layers):
                hidden.append(x if order is None else take(x, order.argsort(1)))
        if cache is not None:
            cache.advance(x.shape[1], rows.lengths if rows.lengths is not None else torch.full_like(rows.positions[:, 0], x.shape[1]))
        x = self.final_norm(x)
        if order is not None:
            x = take(x, order.argsort(1))
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )


class TransnormerForCausalLM(TransnormerPreTrainedModel, GenerationMixin):
    """The language model: TransnormerModel and a head, tied to the embedding unless the config says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @property
    def backend(self) -> str:
        """Name of the kernels that run."""
        return self.model.ops.backend

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B, T], -100 where a token is not supervised
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,  # output_hidden_states, return_dict, dropout_keys, shared; num_items_in_batch: what the summed loss is divided by
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Arguments as TransnormerModel.forward. The loss is the usual shift by one; no sequence predicts the next one's first token."""
        as_dict = kwargs.pop("return_dict", None) is not False
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            output_hidden_states=kwargs.pop("output_hidden_states", None),
            dropout_keys=kwargs.pop("dropout_keys", None),
            shared=kwargs.pop("shared", 0),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(out.last_hidden_state[:, kept if isinstance(logits_to_keep, int) else logits_to_keep])
        loss = None
        if labels is not None:
            if position_ids is not None:
                labels = labels.masked_fill(sequence_starts(position_ids), -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states)
        return result if as_dict else result.to_tuple()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = TransnormerCache(self.config.decoder_layers)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What generate() hands to forward; a token that it has drawn is real, and needs no mask that the host would wait for."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        drawn = not kwargs.get("is_first_iteration") and inputs.get("past_key_values") is not None
        if drawn and inputs["input_ids"].shape[1] == 1:
            inputs.pop("attention_mask", None)
        return inputs

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a published folder, or one of ours, with no code but this: safetensors or pickled tensors, one file or shards.

        The key set and every shape are held against the config before a tensor is read. Takes transformers' keywords
        config, dtype (torch_dtype), device_map, max_memory, revision, and backend; trust_remote_code and other loading switches
        change nothing here, and those about a download (cache_dir, token ...) are refused for a repository. Raises ModelError (exit 4).
        """
        if model_args:
            raise TypeError("from_pretrained takes keyword arguments after the path")
        return convert.from_pretrained(cls, pretrained_model_name_or_path, **kwargs)


def arrange(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: TransnormerCache | None
) -> tuple[Rows, Tensor | None]:
    """Where each token stands, and the order [B, T] that puts a row's real tokens before its padding (None: as they are).

    Without a cache padding stays where it is, adding nothing (v = 0), as in the authors' code. With one, real tokens go first:
    so neither the state before them nor the one they leave decays over padding.
    """
    B, T = x.shape[:2]
    pos = torch.arange(T, device=x.device).expand(B, T)
    order = lengths = real = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < T:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it needs to be [{B}, {T}] (packed rows: position_ids)"
            )
        real = attention_mask[:, -T:].bool()
        if bool(real.all()):
            real = None
        elif cache is not None:
            order, lengths = (~real).int().argsort(dim=1, stable=True), real.sum(1)
            real = real.gather(1, order)
    if position_ids is None:
        positions = pos if cache is None or cache.seen is None else pos + cache.seen[:, None]
        return Rows(positions, None, real, lengths), order
    positions = position_ids.expand(B, T)
    if order is not None:
        positions = positions.gather(1, order)
    start = torch.where(sequence_starts(positions), pos, -1).cummax(1).values
    return Rows(positions, start, real, lengths), order


def sharing(rows: Rows, shared: int) -> Rows:
    """The row [1, T] whose first `shared` tokens every sequence behind them begins with: each starts from the state they leave.

    Raises ValueError for several rows, padding, or nothing behind those tokens.
    """
    behind = rows.positions[:, shared:]
    if len(behind) > 1 or rows.segment_start is None or rows.real is not None or not behind.numel():
        raise ValueError("sequences share their first tokens in one packed row alone: position_ids [1, T], T > shared, no padding")
    starts = torch.where(sequence_starts(behind), torch.arange(behind.shape[1], device=behind.device), 0)
    return rows._replace(segment_start=starts.cummax(1).values, shared=shared)


def sequence_starts(positions: Tensor) -> Tensor:
    """[B, T] bool: where a sequence begins, which is where positions are 0 or do not go on by 1."""
    starts = positions == 0
    starts[:, 1:] |= positions[:, 1:] != positions[:, :-1] + 1
    return starts


def take(x: Tensor, order: Tensor) -> Tensor:
    """x [B, T, D] with its tokens in `order` [B, T]."""
    return x.gather(1, order[..., None].expand_as(x))
