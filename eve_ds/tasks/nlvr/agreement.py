"""Judgment of statements by agreement: likelihood of each word of the statement beside the image.

A classifier on class tokens has to learn from the labels alone that a word must match something in the image. With
balanced statements, neither text nor image gives a gradient before the two are multiplied. Masked signal modeling has
learned the match already: beside a caption whose words are all hidden, the image gives every word a likelihood at each
place (:mod:`eve_ds.tasks.features.words`), and looking up the words of the statement there is a product of image and
text. For word j of the statement and place n of the hidden caption,

    a_j = log sum over n of p(word_j at n)
    b_j = log sum over n of p(word_j at n) p(word_j+1 at n+1)

A small Transformer over the statement reads a and b of each image beside the words, which determine what must agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config
from eve_ds.model.eve import MoEFactory
from eve_ds.tasks.classification import ClassifierOutput
from eve_ds.tasks.features.words import HiddenWords, Template, WordHead, WordModel, inner_words
from eve_ds.tasks.task import task_section

LEAST = -8.0
"""Log-likelihoods below it count alike: they carry no information for words that no pre-training caption has."""
NUM_LAYERS = 2
"""Layers of the Transformer over the statement."""


class AgreementHead(WordHead):
    """The text head of pre-training, and a Transformer of half the backbone's width over the statement.

    Args:
        config: configuration with `model` and `task`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        model, num_images = config.model, task_section(config).num_images
        width = model.hidden_size // 2
        self.word = nn.Linear(model.hidden_size, width)
        self.agreement = nn.Linear(2 * num_images, width)
        self.image = nn.Linear(num_images * model.hidden_size, width)
        self.place = nn.Parameter(torch.zeros(model.text_length, width))
        layer = nn.TransformerEncoderLayer(
            width, model.num_attention_heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.layers = nn.TransformerEncoder(layer, NUM_LAYERS, norm, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, 2)

    def draw_weights(self) -> None:
        """Draw the new weight matrices from torch's default generator with variance 1 / inputs; biases stay 0.

        The backbone's initializer range suits its own widths; with it, agreement has little effect, having few inputs.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not name.startswith("text_head."):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, words: Tensor, agreement: Tensor, images: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2).

        Args:
            words: (B, L, D) embeddings of the statement.
            agreement: (B, L, 2 I).
            images: (B, I * D) states of the images as a whole.
            attention_mask: (B, L) bool.
        """
        tokens = self.word(words) + self.place[: words.shape[1]] + self.agreement(agreement)
        first = tokens[:, :1] + self.image(images)[:, None]  # [CLS] gets the states of the images as a whole
        tokens = torch.cat([first, tokens[:, 1:]], dim=1)
        states = self.layers(tokens, src_key_padding_mask=~attention_mask)
        logits: Tensor = self.classifier(states[:, 0])
        return logits


class AgreementModel(WordModel):
    """Judgment of a statement about I images: two logits, false and true.

    Args:
        config: configuration with `model` and `task`.
        moe_cls: makes the MoE of a layer.
        template: hidden caption of one length.
    """

    def __init__(self, config: Config, moe_cls: MoEFactory, template: Template) -> None:
        super().__init__(config, moe_cls, template)
        self.head: AgreementHead = AgreementHead(config)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor | None = None
    ) -> ClassifierOutput:
        """(B, I, 3, H, W), (B, L) int64, (B, L) bool -> logits (B, 2); `targets` are ignored."""
        hidden = self.hidden_words(pixel_values.flatten(0, 1), self.template.lengths[0])
        fits = self.agreement(hidden, input_ids, attention_mask).permute(0, 2, 1, 3).flatten(2)  # (B, L, 2 I)
        words, _ = self.words(input_ids)
        dtype = hidden.class_state.dtype
        images = hidden.class_state.reshape(len(pixel_values), -1)
        logits = self.head(words.to(dtype), fits.to(dtype), images, attention_mask)
        return ClassifierOutput(logits, hidden.moe, hidden.num_tokens)

    def agreement(self, hidden: HiddenWords, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, I, L, 2) fp32, a and b of every word for each image: -1 for LEAST, 1 for certain, 0 at special tokens.

        Args:
            hidden: predictions for B * I images.
            input_ids: (B, L) int64.
            attention_mask: (B, L) bool, True = real token.
        """
        embedding, bias = self.words(input_ids)
        states, log_partition = (
            part.float().unflatten(0, (len(input_ids), -1)) for part in (hidden.states, hidden.log_partition)
        )
        products = torch.einsum("bind,bld->binl", states, embedding)
        likelihood = products + bias.mT[:, None] - log_partition  # (B, I, N, L)
        alone = likelihood.logsumexp(dim=2)
        pairs = (likelihood[:, :, :-1, :-1] + likelihood[:, :, 1:, 1:]).logsumexp(dim=2)
        fits = _scaled(torch.stack([alone, F.pad(pairs, (0, 1))], dim=-1))
        return fits * inner_words(input_ids, attention_mask)[:, None, :, None]


def _scaled(likelihood: Tensor) -> Tensor:
    """Log-likelihoods on the scale where LEAST and below is -1, and 0 (certain) is 1."""
    return likelihood.clamp(min=LEAST) * (-2 / LEAST) + 1
