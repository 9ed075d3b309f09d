"""EVE as a model of transformers, with the methods that its Trainer, peft and accelerate call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import ModelOutput
from transformers.utils.loading_report import LoadStateDictInfo

from eve_ds import ops
from eve_ds.export.hf.config import EveConfig
from eve_ds.export.hf.weights import finish_loading, stacked_weights
from eve_ds.model.embeddings import vocabulary_matrix
from eve_ds.model.eve import EVE, BackboneOutput
from eve_ds.model.experts import Experts
from eve_ds.model.stream import pad

IGNORED = -100
"""Label of a token that no loss counts, as everywhere in transformers."""


@dataclass
class EveModelOutput(ModelOutput):
    """Encoded samples and requested predictions; S = image tokens (class token first), then text tokens."""

    loss: Tensor | None = None
    """() fp32 sum of the losses of masked words, if `labels` were passed, and of masked patches; None for neither."""
    last_hidden_state: Tensor | None = None
    """(B, S, D) states of tokens; zero for padding."""
    attention_mask: Tensor | None = None
    """(B, S) bool; True: a real token."""
    image_embedding: Tensor | None = None
    """(B, D) state of the class token; zero for a sample without an image; None without images."""
    text_embedding: Tensor | None = None
    """(B, D) state of [CLS]; None without text."""
    pixel_predictions: Tensor | None = None
    """(B, N_masked, P * P * 3) predictions in the form of `pixel_target` of the config."""
    token_logits: Tensor | None = None
    """(M, V) logits of masked tokens."""
    image_features: Tensor | None = None
    """(B, D) fp32 of norm 1, of images alone; only with the objective `itc`."""
    text_features: Tensor | None = None
    """(B, D) fp32 of norm 1, of texts alone; only with the objective `itc`."""
    temperature: Tensor | None = None
    """() fp32 divisor of the similarities of features."""
    matching_logits: Tensor | None = None
    """(B, 2) logits of no match and match, of pairs; only with the objective `itm`."""
    hidden_states: tuple[Tensor, ...] | None = None
    """(B, S, D) before the first block and after each block, without the final LayerNorm; zero for padding."""


class EveModel(PreTrainedModel):
    """EVE with backbone and the heads of its pre-training objectives; other heads are None.

    A model created from a config has the same random initialization as :class:`eve_ds.model.eve.EVE`.
    """

    config_class = EveConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "ImageEmbedding", "TextEmbedding", "DecoderBlock", "TextHead", "MatchingHeads"]  # noqa: RUF012

    def __init__(self, config: EveConfig) -> None:
        super().__init__(config)
        eve = EVE(config.to_model_config())
        # The parts of EVE instead of EVE itself, so that names have no additional prefix. No weights are tied: the text
        # head has no matrix, `forward` multiplies by the word embedding, and the matrix exists once.
        self.backbone, self.pixel_decoder, self.text_head = eve.backbone, eve.pixel_decoder, eve.text_head
        self.matching = eve.matching
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, Experts):
                module.names_each = False  # accelerate, peft and transformers look up parameters by these names
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: EVE has initialized its weights."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        visible_patch_ids: Tensor | None = None,
        visible_patch_mask: Tensor | None = None,
        masked_patch_ids: Tensor | None = None,
        masked_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EveModelOutput | tuple[Any, ...]:
        """Encode images (B, 3, H, W), text (B, L) int64, or pairs; predict masked parts for which there is a head.

        Arguments and errors of the first eight are those of :meth:`eve_ds.model.eve.EVE.predict`; masks can also be
        integers.

        Args:
            labels: (B, L) int64 words at the masked tokens of `input_ids`, and -100 elsewhere. Without
                `masked_token_ids`, the tokens with a label are predicted.
            inputs_embeds: must be None.
            output_attentions: must not be True: the attention kernels return no weights.
            output_hidden_states: whether to return the states between the blocks; None: as the config says.
            return_dict: False returns a tuple of the fields that are not None; None: as the config says.

        Raises:
            ValueError: a tensor of another shape or dtype, or an argument that is not available.
        """
        self._refuse(inputs_embeds, output_attentions, visible_patch_ids, masked_patch_ids)
        labels = self._checked_labels(labels, input_ids)
        _refuse_left_padding(input_ids, attention_mask)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        encoded = self.backbone(
            pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask, keep_states
        )
        if labels is not None and masked_token_ids is None:
            masked_token_ids = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        made = self._encodings(encoded, pixel_values, input_ids)
        made |= self._predictions(
            encoded, made["last_hidden_state"], visible_patch_ids, masked_patch_ids, masked_token_ids
        )
        losses = [
            self._word_loss(made.get("token_logits"), masked_token_ids, labels),
            self._pixel_loss(made.get("pixel_predictions"), pixel_values, image_mask, masked_patch_ids),
        ]
        asked = [loss for loss in losses if loss is not None]
        output = EveModelOutput(loss=torch.stack(asked).sum() if asked else None, **made)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _refuse(
        self,
        inputs_embeds: Tensor | None,
        output_attentions: bool | None,
        visible_patch_ids: Tensor | None,
        masked_patch_ids: Tensor | None,
    ) -> None:
        """Refuse arguments that other models of transformers take and this one cannot serve, or not alone."""
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds must be None: pass input_ids, which the text embedding looks up")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions (True) is not available: attention runs in fused kernels that return no weights; "
                "leave it out"
            )
        if masked_patch_ids is not None and visible_patch_ids is None:
            raise ValueError(
                "masked_patch_ids needs visible_patch_ids, since seen patches are not predicted: pass both"
            )

    def _checked_labels(self, labels: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
        """Return labels in int64, or refuse those that are not words of `input_ids`."""
        if labels is None:
            return None
        if self.text_head is None:
            raise ValueError(f"labels need mlm or joint among objectives ({', '.join(self.config.objectives)})")
        if input_ids is None or labels.shape != input_ids.shape:
            found = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of input_ids ({found})")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels ({labels.dtype}) must be int64: pass token ids, and -100 for tokens without a label"
            )
        return labels.long()

    def _encodings(
        self, encoded: BackboneOutput, pixel_values: Tensor | None, input_ids: Tensor | None
    ) -> dict[str, Any]:
        """Fields of the output that every batch has, and those of the heads for pairs."""
        layout, states = encoded.stream.layout, encoded.stream.padded()
        image = None if pixel_values is None else states[:, 0]
        text = None if input_ids is None else states[:, encoded.num_image_tokens]
        made: dict[str, Any] = {
            "last_hidden_state": states,
            "attention_mask": layout.mask,
            "image_embedding": image,
            "text_embedding": text,
            "hidden_states": tuple(pad(state, layout) for state in encoded.block_states) or None,
        }
        if self.matching is None:
            return made
        if image is None or text is None:
            names = ("image_features", "text_features", "temperature")
            return made | dict(zip(names, self.matching(image, text), strict=True))
        return made | {"matching_logits": None if self.matching.classifier is None else self.matching.classifier(text)}

    def _predictions(
        self,
        encoded: BackboneOutput,
        states: Tensor,
        visible_patch_ids: Tensor | None,
        masked_patch_ids: Tensor | None,
        masked_token_ids: Tensor | None,
    ) -> dict[str, Tensor]:
        """Predictions of masked patches and words, as far as the batch asks for them and a head exists."""
        made = {}
        if self.pixel_decoder is not None and masked_patch_ids is not None and visible_patch_ids is not None:
            made["pixel_predictions"] = self.pixel_decoder(encoded.stream, visible_patch_ids, masked_patch_ids)
        if self.text_head is not None and masked_token_ids is not None:
            text = states[:, encoded.num_image_tokens :]  # (B, L, D)
            vocabulary = vocabulary_matrix(self.get_input_embeddings())
            made["token_logits"] = self.text_head(text.flatten(0, 1)[masked_token_ids], vocabulary)
        return made

    def _word_loss(self, logits: Tensor | None, ids: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Mean cross entropy of the tokens with a label; 0 without any."""
        if logits is None or ids is None or labels is None:
            return None
        own = labels.flatten()[ids]
        total = F.cross_entropy(logits.float(), own, ignore_index=IGNORED, reduction="sum")
        return total / (own != IGNORED).sum().clamp(min=1)

    def _pixel_loss(
        self, predictions: Tensor | None, pixel_values: Tensor | None, image_mask: Tensor | None, ids: Tensor | None
    ) -> Tensor | None:
        """Mean squared error of the masked patches of samples with an image; 0 without any."""
        if predictions is None or pixel_values is None or ids is None:
            return None
        normalize = self.config.pixel_target == "normalized"
        errors = ops.masked_pixel_loss(pixel_values, predictions, ids, self.config.patch_size, normalize=normalize)
        present = torch.ones_like(errors) if image_mask is None else image_mask.unsqueeze(1).expand_as(errors)
        return (errors * present).sum() / present.sum().clamp(min=1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to embeddings (B, D)."""
        return self(pixel_values, return_dict=True).image_embedding

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode token IDs (B, L) int64 with an optional mask (B, L) to embeddings (B, D)."""
        return self(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).text_embedding

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding; the text head multiplies by the same matrix."""
        return self.backbone.text_embedding.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.backbone.text_embedding.word = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> None:
        """Return None: there is no matrix besides the word embedding."""
        return

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the bias of the text head too; biases of new words are 0.

        Without `mean_resizing`, new words are drawn with the deviation of the configuration. transformers leaves them
        to :meth:`_init_weights`, which draws nothing.
        """
        words = len(cast(Tensor, self.get_input_embeddings().weight))
        embeddings: Any = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not mean_resizing:
            embeddings.weight.data[words:].normal_(std=self.config.initializer_range)
        old = None if self.text_head is None else self.text_head.bias
        if self.text_head is not None and old is not None and len(old) != len(embeddings.weight):
            bias = old.new_zeros(len(embeddings.weight))
            kept = min(len(bias), len(old))
            bias[:kept] = old.detach()[:kept]
            self.text_head.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
        return embeddings

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Run every n-th block with `gradient_checkpointing_func` in training, or none; called by transformers."""
        self.gradient_checkpointing = enable
        self.backbone.checkpoint_blocks(gradient_checkpointing_func if enable else None, every_n_layers)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, dict[Any, Any]]:
        """Check the weights in `from_pretrained` and load them; until this step the model is on the meta device.

        The method of transformers draws missing weights at random and ignores unknown ones.

        Raises:
            ExportError: the weights are not those of the config.
        """
        is_base = expected_keys is None and not load_config.is_quantized  # and not an adapter
        if is_base:
            state_dict = stacked_weights(model, state_dict, checkpoint_files, load_config)
        loaded, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if is_base:
            finish_loading(model, loaded, str(load_config.pretrained_model_name_or_path))
        return loaded, offloaded


def _refuse_left_padding(input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse texts without their first token, which has the first position and the state of the whole text."""
    if input_ids is None or not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        return
    real = attention_mask == 1  # other values are refused by the backbone
    rows = (real.any(dim=-1) & ~real[..., :1].any(dim=-1)).nonzero()
    if len(rows):
        raise ValueError(
            f"attention_mask starts with 0 in row {rows[0].item()}: pad on the right (padding_side='right'), since "
            "positions are counted from [CLS]"
        )
