"""Ulysses for the models of Hugging Face's transformers, through their table of attention functions.

`UlyssesSPAttentionHF.register_with_transformers` puts an instance of the class in the place of "sdpa" or of a flash
attention. From then on every model with that implementation is given parts of sequences: the layers work on this rank's
tokens, and each attention exchanges them for the whole sequence and a part of the heads (`exchange`).

The mask that a model makes sees this rank's tokens only, so it is not used. What it stands for is made anew for the
whole sequence, from what every rank's part says: causality by the module, documents packed into a row by
`position_ids` that do not go on, padding by the diagonal of the rank's own mask, sliding windows by the argument.
Attention that is none of these is refused when it is registered. (Upstream drops the mask, and with it padding, packing
and windows.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.exchange import HeadPlan, Move, exchange, gather_lengths, spans, swap

__all__ = ["UlyssesSPAttentionHF"]

_HEADS, _TOKENS = 1, 2
"""Dimensions of query, key and value: [batch, heads, tokens, size]. Cores return [batch, tokens, heads, size]."""
_PER_HEAD_ARGUMENTS = ("position_bias", "s_aux", "cache")


class _Part:
    """An attention module as a core sees it: with this rank's number of query heads per key-value head."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class UlyssesSPAttentionHF(nn.Module):
    """An attention function of transformers over sequences that ranks share; made by `register_with_transformers`.

    Args:
        attn: the attention function that it stands for.
        process_group: the ranks that share each sequence.
        seq_length_is_variable: ask for every rank's number of tokens at each call, and let them differ; otherwise all
            have the same.
        disable_in_eval: models in eval mode get whole sequences on every rank.
        batch_size, attn_head_count, attn_head_size, kv_head_count, num_hidden_layers, local_seq_length,
            global_seq_length: upstream's; what a call gives counts.
    """

    def __init__(
        self,
        attn: Callable[..., Any],
        batch_size: int | None,
        attn_head_count: int,
        attn_head_size: int,
        kv_head_count: int,
        num_hidden_layers: int,
        process_group: Any,
        seq_length_is_variable: bool = False,
        local_seq_length: int | None = None,
        global_seq_length: int | None = None,
        disable_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self.attn = attn
        self.process_group = process_group
        self.seq_length_is_variable = seq_length_is_variable
        self.disable_in_eval = disable_in_eval
        HeadPlan.of(attn_head_count, kv_head_count, ds_comm.get_world_size(process_group))

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attend, as transformers calls it; collective over the group.

        Args:
            query, key, value: [batch, heads, this rank's tokens, size].
            attention_mask: the model's mask of these tokens, for their padding only.
            kwargs: `position_ids` of these tokens in the whole sequence is required.
        Returns:
            (output [batch, this rank's tokens, heads, size], attention weights or None), as the core's.
        Raises:
            ValueError: no position_ids, a cache of earlier tokens, or arguments that have a part for each head.
        """
        if self.disable_in_eval and not module.training:
            return self.attn(module, query, key, value, attention_mask, *args, **kwargs)
        positions = self._checked(module, query, key, kwargs)
        group, rank = self.process_group, ds_comm.get_rank(self.process_group)
        ranks, length = ds_comm.get_world_size(group), query.shape[_TOKENS]
        lengths = (length,) * ranks
        if self.seq_length_is_variable:
            lengths = gather_lengths(group, length, query.device, "ulysses lengths")
        plan = HeadPlan.of(query.shape[_HEADS], key.shape[_HEADS], ranks)
        positions, valid = self._whole(positions, _unpadded(attention_mask, query), lengths)
        apart = [Move(_HEADS, heads, _TOKENS, lengths) for heads in (plan.queries, plan.keys, plan.keys)]
        query, key, value = exchange(group, [query, key, value], apart, "ulysses qkv")
        if (heads := plan.key_of_query(rank)) is not None:
            index = torch.tensor(heads, device=key.device)
            key, value = key.index_select(_HEADS, index), value.index_select(_HEADS, index)
        part = _Part(module, query.shape[_HEADS] // key.shape[_HEADS])
        mask = self._mask(module, positions, valid, kwargs)
        kwargs["position_ids"] = positions
        output, weights = self.attn(part, query, key, value, mask, *args, **kwargs)
        back = Move(1, spans(lengths), 2, plan.num_queries())
        return exchange(group, [output], [back], "ulysses output")[0], weights

    def _checked(self, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The position ids; ValueError for what a part of a sequence does not go with."""
        positions = kwargs.get("position_ids")
        if positions is None:
            raise ValueError(
                f"{type(module).__name__} was called without position_ids, and a rank's part of a sequence does not say"
                " where it begins; add them to the batch, as UlyssesSPDataLoaderAdapter does"
            )
        if query.shape[_TOKENS] != key.shape[_TOKENS]:
            raise ValueError(
                f"{type(module).__name__} has {query.shape[_TOKENS]} new tokens and {key.shape[_TOKENS]} keys: a cache"
                " does not go with sequences that ranks share; set use_cache=False, or generate in eval mode with"
                " disable_in_eval=True"
            )
        if given := [name for name in _PER_HEAD_ARGUMENTS if kwargs.get(name) is not None]:
            raise ValueError(f"{type(module).__name__} uses {given[0]}, which Ulysses does not split over ranks")
        assert isinstance(positions, Tensor)
        return positions

    def _whole(self, positions: Tensor, valid: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Position ids and padding of the whole sequence, as one message: [..., tokens] and [batch, tokens]."""
        ranks = len(lengths)
        mine = [positions.to(torch.int64), valid.to(torch.int64)]
        shapes = [[(*part.shape[:-1], length) for part in mine] for length in lengths]
        found = swap(self.process_group, [mine] * ranks, shapes, "ulysses positions")
        whole = [torch.cat([parts[at] for parts in found], dim=-1) for at in range(2)]
        return whole[0], whole[1].bool()

    def _mask(self, module: nn.Module, positions: Tensor, valid: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The core's mask of the whole sequence; None where causality (or nothing) is all of it."""
        padded = not bool(valid.all())
        if _is_flash(getattr(self.attn, "__name__", "")):
            return valid if padded else None  # documents and windows are arguments there
        rows = positions[0] if positions.dim() == 3 else positions
        starts = (torch.diff(rows, dim=-1) != 1) & valid[:, 1:]
        length, window = rows.shape[-1], kwargs.get("sliding_window")
        packed, windowed = bool(starts.any()), window is not None and window < length
        if not (padded or packed or windowed):
            return None
        place = torch.arange(length, device=rows.device)
        distance = place[:, None] - place[None, :]
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        allowed = valid[:, None, :] & (distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool))
        if packed:
            document = nn.functional.pad(starts.cumsum(-1), (1, 0))
            allowed = allowed & (document[:, :, None] == document[:, None, :])
        if window is not None and windowed:
            allowed = allowed & (distance < window) & (distance > -window)
        return allowed[:, None]

    @staticmethod
    def register_with_transformers(
        model_name_or_path: Any,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int | None,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """Let the ranks of groups of `sequence_parallel_size` share sequences in transformers' attention; collective.

        Args:
            model_name_or_path: the model, or the name or folder of one.
            core_attn_implementation: "sdpa" or a flash attention, which attends on each rank. Every model of the
                process with this implementation is meant.
            micro_batch_size, max_length: upstream's; without effect.
            seq_length: tokens of every sequence, where `seq_length_is_variable` is False.
            disable_in_eval: models in eval mode get whole sequences on every rank.
        Returns:
            The mpu for `deepspeed.initialize(mpu=...)`; None for a size of 1.
        Raises:
            ConfigConflictError: the model uses another implementation, or sizes do not divide.
            DeepSpeedConfigError: an implementation, a kind of attention or a number of heads that cannot be split.
        """
        if sequence_parallel_size == 1:
            return None
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        _check_core(core_attn_implementation, ALL_ATTENTION_FUNCTIONS)
        config = _config_of(model_name_or_path, core_attn_implementation)
        _check_layers(config, core_attn_implementation)
        if not seq_length_is_variable and (seq_length is None or seq_length % sequence_parallel_size):
            raise ConfigConflictError(
                f"seq_length is {seq_length} and seq_length_is_variable False; expected a multiple of the"
                f" {sequence_parallel_size} ranks that share a sequence, or seq_length_is_variable=True"
            )
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        try:
            HeadPlan.of(heads, key_heads, sequence_parallel_size)
        except ValueError as error:
            raise DeepSpeedConfigError(str(error)) from None
        parallel_state_sp.initialize_sequence_parallel(sequence_parallel_size)
        core = ALL_ATTENTION_FUNCTIONS[core_attn_implementation]
        ALL_ATTENTION_FUNCTIONS[core_attn_implementation] = UlyssesSPAttentionHF(
            core.attn if isinstance(core, UlyssesSPAttentionHF) else core,
            batch_size=micro_batch_size,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=key_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=parallel_state_sp.get_sequence_parallel_group(),
            seq_length_is_variable=seq_length_is_variable,
            local_seq_length=None if seq_length is None else seq_length // sequence_parallel_size,
            global_seq_length=seq_length,
            disable_in_eval=disable_in_eval,
        )
        return parallel_state_sp

    @staticmethod
    def unregister() -> None:
        """Give transformers its own attention functions back."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
            if isinstance(function, UlyssesSPAttentionHF):
                ALL_ATTENTION_FUNCTIONS[name] = function.attn


def _is_flash(name: str) -> bool:
    return "flash" in name


def _unpadded(mask: Any, query: Tensor) -> Tensor:
    """Which of this rank's tokens are no padding, by a model's mask of them: [batch, tokens]."""
    batch, length = query.shape[0], query.shape[_TOKENS]
    if not isinstance(mask, Tensor):
        return torch.ones(batch, length, dtype=torch.bool, device=query.device)
    own = mask[:, -length:] if mask.dim() == 2 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
    return (own.bool() if mask.dim() == 2 or mask.dtype == torch.bool else own == 0).expand(batch, length)


def _check_core(name: str, functions: Any) -> None:
    if name not in functions or not (name == "sdpa" or _is_flash(name)) or name.startswith("paged|"):
        raise DeepSpeedConfigError(
            f"core_attn_implementation is {name!r}; Ulysses splits sdpa and flash attentions:"
            f" {', '.join(key for key in functions if key == 'sdpa' or (_is_flash(key) and '|' not in key))}"
        )


def _config_of(model: Any, core: str) -> Any:
    """The text config of a model or of its name; ConfigConflictError for a model with another implementation."""
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    config = getattr(model, "config", None)
    if config is None:
        raise DeepSpeedConfigError(
            f"{type(model).__name__} has no config; expected a model of transformers or its name"
        )
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if config._attn_implementation != core:
        raise ConfigConflictError(
            f"the model's attn_implementation is {config._attn_implementation!r}, but core_attn_implementation is"
            f" {core!r}; load the model with attn_implementation={core!r}, or make them equal"
        )
    return config


def _check_layers(config: Any, core: str) -> None:
    """Refuse kinds of attention that cannot be made anew from position ids, padding and windows."""
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if "linear" in kind or "chunked" in kind}
    if not kinds and getattr(config, "attention_chunk_size", None):
        kinds = {"chunked_attention"}
    if kinds:
        raise DeepSpeedConfigError(
            f"{getattr(config, 'model_type', 'this model')} has layers of {', '.join(sorted(kinds))}, which need more"
            " than a part of the heads; Ulysses serves full and sliding-window attention"
        )
