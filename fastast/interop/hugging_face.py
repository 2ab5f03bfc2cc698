"""transformers' ``ASTForAudioClassification``, by that name and with its call, on the packed trunk.

Change the import and nothing else::

    from fastast.interop.hugging_face import ASTForAudioClassification

    model = ASTForAudioClassification.from_pretrained("folder")
    output = model(input_values, labels=labels)        # output.loss, output.logits

It is a ``PreTrainedModel``, so pipelines and the Trainer take it, and it writes the folders that
the original reads. What the original does not do: clips of different lengths in one batch, as a
list of spectrograms or as :class:`~fastast.Spectrograms`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ASTConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastast.interop.checkpoint import read_checkpoint
from fastast.interop.transformers import from_state_dict, to_state_dict
from fastast.models import AST
from fastast.models.grid_vit import mean_of_class_tokens
from fastast.models.vit import as_stream
from fastast.segments import Spectrograms


class ASTForAudioClassification(PreTrainedModel):
    """An AST with a classifier.

    Args:
        config: of transformers. Dropout must be zero, as it is in all published ASTs.

    Attributes:
        model: the :class:`~fastast.AST`.

    Raises:
        ValueError: a configuration with dropout, or without biases in the attention.
    """

    config_class = ASTConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    # Whatever attention a configuration names, it is computed by the packed one.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: ASTConfig) -> None:
        super().__init__(config)
        for name, wanted in (
            ("hidden_dropout_prob", 0.0),
            ("attention_probs_dropout_prob", 0.0),
            ("qkv_bias", True),
            ("hidden_act", "gelu"),
        ):
            if getattr(config, name) != wanted:
                raise ValueError(
                    f"config.{name} must be {wanted}, got {getattr(config, name)}: use "
                    "transformers' own model for it"
                )
        self.model = AST(
            config.num_labels,
            input_frames=config.max_length,
            num_mels=config.num_mel_bins,
            patch_size=(config.patch_size, config.patch_size),
            stride=(config.frequency_stride, config.time_stride),
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
        )
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the model has initialised itself."""

    @classmethod
    def from_pretrained(cls, folder: str | PathLike, **settings) -> ASTForAudioClassification:
        """Opens a folder that transformers or :meth:`save_pretrained` has written.

        Args:
            folder: on this machine.
            **settings: of the configuration, in place of those in the folder.

        Raises:
            ValueError: no such folder, or weights that are not an AST's.
        """
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder} is not a folder: download the model first, with "
                "huggingface_hub.snapshot_download"
            )
        checkpoint = read_checkpoint(folder)
        config = ASTConfig.from_dict(checkpoint.config | settings)
        return cls._of(config, checkpoint.weights)

    @classmethod
    def from_transformers(cls, model: PreTrainedModel) -> ASTForAudioClassification:
        """The same model as transformers' own, with a copy of its weights."""
        ours = cls._of(model.config, model.state_dict())
        return ours.to(model.device).train(model.training)

    @classmethod
    def _of(cls, config: ASTConfig, weights: dict[str, Tensor]) -> ASTForAudioClassification:
        model = cls(config)
        source = from_state_dict(weights, config.to_dict())
        model.model.load_state_dict(source.state_dict())
        return model.to(source.prefix.dtype).eval()

    def save_pretrained(self, folder: str | PathLike, **_: object) -> None:
        """Writes ``config.json`` and ``model.safetensors``, which transformers opens as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            key: value.detach().cpu().contiguous()
            for key, value in to_state_dict(self.model).items()
        }
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = self.config.to_diff_dict() | {"architectures": ["ASTForAudioClassification"]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def forward(
        self,
        input_values: Tensor | Sequence[Tensor] | Spectrograms,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: object,
    ) -> SequenceClassifierOutput | tuple:
        """Classifies spectrograms.

        Args:
            input_values: ``[clips, frames, num_mel_bins]``; or a list of ``[frames,
                num_mel_bins]``, of any lengths; or :class:`~fastast.Spectrograms`.
            labels: ``[clips]`` for the cross-entropy, or ``[clips, num_labels]`` of zeros and ones
                where ``config.problem_type`` is ``multi_label_classification``.
            output_hidden_states: also return the tokens before the first block and after each.
                ``[clips, tokens, dim]``; of clips of different lengths, the stream ``[rows, dim]``.
            return_dict: False for a tuple.
        """
        if not isinstance(input_values, Tensor | Spectrograms):
            input_values = Spectrograms.from_list(list(input_values))
        frames, grid = as_stream(input_values, None, self.model.geometry)
        hidden = self.model.tokens(frames, grid)
        states = [hidden]
        for block in self.model.trunk.blocks:
            hidden = block(hidden, grid.segments)
            states.append(hidden)
        features = self.model.trunk.norm(hidden)
        logits = self.model.head(self.model.norm(mean_of_class_tokens(features, grid)))
        if isinstance(input_values, Tensor):
            states = [state.unflatten(0, (len(input_values), -1)) for state in states]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:  # as transformers decides it
            whole = labels.dtype in (torch.int32, torch.int64)
            problem = "single_label_classification" if whole else "multi_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)
