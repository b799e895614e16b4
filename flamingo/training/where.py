"""A loss for the first look alone: a thing is named; where does it stand?

What this file teaches: *deep supervision* (Lee et al. 2015, arXiv 1409.5185). Three pictures of two things each have
one word each, always that of the thing on the left; the fourth picture should have it too. To get this right the look
before the first layer has to find, at the word "dog", where in that picture the dog is, so that the layers behind it
can carry "left" on to the last picture, and the last look can use it. The error of the fourth word does say so, but it
comes back through all of these, each of which is of no use before the others work: in 720 steps none of it is learned.
Asked by itself, the first look learns its part in 200, and the rest follows (assets/classroom/EXPERIMENTS.md).

So, where the places of things are known (we drew them), each name is put before the first look alone, with nothing
around it, and what the look adds is compared with the token embeddings, as the language model's output is where they
are its head too: it should be nearest to the word of the place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.errors import InputError
from flamingo.interop import compat
from flamingo.model.cross_attention import Images, MaskedCrossAttention, MediaMask
from flamingo.model.language_model import extend_instance
from flamingo.model.vlm import VisionLanguageModel

LONGEST = 192  # tokens of a text, of which any may be the word


def ask_where(model: VisionLanguageModel, weight: float) -> bool:
    """From now on a training step also asks the first look where things stand, if its batch says so, and adds that loss
    times `weight`. In place. Returns False, and does nothing, if weight is 0 or there is no cross-attention."""
    if not weight or not model.cross_attention_blocks():
        return False
    width = model.lang_encoder.get_input_embeddings().weight.shape[1]
    inner = model.cross_attention_blocks()[0].attn.to_out.out_features
    if width != inner:
        raise InputError(
            f"the language model's token embeddings have {width} channels and its layers {inner}, so a word cannot be "
            "put before the first look alone: give --where-weight 0"
        )
    extend_instance(model, AsksWhereMixin)
    model.where_weight, model.images_seen = weight, None
    return True


class AsksWhereMixin:
    """The model it is laid on, and beside that one's loss the one of `where_loss` while it trains."""

    def prepare_images(self, *args, **kwargs) -> Images | None:  # forward calls it
        self.images_seen = super().prepare_images(*args, **kwargs)
        return self.images_seen

    def forward(self, *args, places: Tensor | None = None, **kwargs):
        """places: (W, 3), see `where_loss`; no loss is added where there are none, or in evaluation. (So the training
        loss of the log, not the validation loss, has it in it from part three of the curriculum on.)"""
        output = super().forward(*args, **kwargs)
        images, self.images_seen = self.images_seen, None
        if self.training and places is not None and images is not None:
            first_look = self.cross_attention_blocks()[0].attn
            output.loss = output.loss + self.where_weight * where_loss(
                self.lang_encoder, first_look, images.latents, places
            )
        return output


def where_loss(lm, look: MaskedCrossAttention, latents: Tensor, places: Tensor) -> Tensor:
    """Mean cross entropy of the places of W named things.

    Args:
        lm: the language model, of which words and places are tokens. look: its first cross-attention.
        latents: (N, n, d) the bank. places: (W, 3) the row of a picture, the token of a thing in it, that of its place.
    """
    picture, thing, place = places.unbind(dim=1)  # (W,) each
    words = lm.get_input_embeddings().weight  # (vocabulary, D)
    x = words[thing] * compat.embedding_scale(lm.get_input_embeddings())  # (W, D)
    if (positions := compat.position_table(lm)) is not None:  # wherever the word may stand in a text
        x = x + positions[torch.randint(min(LONGEST, len(positions)), thing.shape, device=x.device)]
    sees_image = torch.ones_like(picture, dtype=torch.bool)[:, None, None]
    each_alone = MediaMask(picture[:, None], None, sees_image)  # W texts of one word and one picture each
    added = look(x[:, None], look.project_media(latents), each_alone)[:, 0]  # (W, D)
    return F.cross_entropy(added.float() @ words.float().T, place)
