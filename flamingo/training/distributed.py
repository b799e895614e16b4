"""Training on several processes: what is copied, what is split, what is added up.

    torchrun --nproc-per-node 4 train.py                  the same run on four GPUs (or four processes of a CPU)
    torchrun --nproc-per-node 4 train.py --shard          for a language model that no GPU can hold beside the rest

What this file teaches: a Flamingo has two kinds of weights, and they want to be treated differently.

    what trains   is small. Every process has a copy, reads its share of the batch, and adds its gradient to those of
                  the others (DistributedDataParallel); so all copies make the same step and stay the same.
    what is       may be large, and never changes. With --shard every process keeps a piece of each layer; right before
    frozen        the layer is used the pieces are fetched from the others, and right after they are dropped
                  (`fully_shard`, FSDP2). There is no gradient to send back.

The loss is a mean over all labelled tokens of the step, whichever process they came to: each process has the sum of its
own losses divided by the number of all, so gradients are added up, not averaged. Hence the number of processes changes
nothing but rounding: a run may be resumed on more of them or fewer. (In the classroom it also changes the places in a
text that where.py draws, the weights of its words, and which texts joined.py sets end to end: those of a process.)
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.interop import compat
from flamingo.model.language_model import FlamingoLayer
from flamingo.model.vlm import VisionLanguageModel


def check(options: TrainingOptions, sets: Sequence) -> None:
    """Raises InputError for what several processes cannot do. sets: for training and validation."""
    if options.shard and ranks.count() == 1:
        raise InputError("--shard splits the frozen weights between processes: start several, with torchrun")
    fewest = min(options.batch_size, *(len(examples) for examples in sets if hasattr(examples, "__len__")))
    if ranks.count() > fewest:
        raise InputError(
            f"{ranks.count()} processes share {fewest} example(s) a step: start at most {fewest}, or raise "
            "--batch-size (it counts the examples of all processes together)"
        )


def for_training(model: VisionLanguageModel, place: torch.device, shard: bool) -> nn.Module:
    """What the loop calls in place of the model: forward as before, and backward adds up what the processes found.

    shard: split what is frozen. In place. Raises InputError if it cannot be split.
    """
    if ranks.count() == 1:
        return model
    if shard:
        shard_frozen_weights(model, place)
    together = compat.data_parallel(model, [name for name, p in model.named_parameters() if not p.requires_grad])
    together.register_comm_hook(None, _added_up)
    return together


def _added_up(_, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel would take the mean of the processes' gradients."""
    done = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return done.get_future().then(lambda future: future.value()[0])


def adding_up(together: nn.Module, now: bool) -> AbstractContextManager:
    """Around a backward pass. now: False while further batches of the same step follow, with the last of which the
    gradients of all are added up."""
    return together.no_sync() if isinstance(together, DistributedDataParallel) and not now else nullcontext()


def shard_frozen_weights(model: VisionLanguageModel, place: torch.device) -> None:
    """Split each decoder layer, the vision encoder and, together, all else that is frozen (token embeddings and head,
    which may be one matrix; norms). The new rows of the added tokens and all else that trains stay whole. In place.

    Raises InputError for a language model that trains: only frozen weights are split.
    """
    if model.trains_language_model:
        raise InputError("--shard splits what is frozen, and this language model trains: leave --shard out")
    fully_shard = compat.fully_shard_around({p for p in model.parameters() if p.requires_grad}, place.type)
    for layer in compat.find_decoder_layers(model.lang_encoder)[1]:
        fully_shard(layer.decoder_layer if isinstance(layer, FlamingoLayer) else layer)
    fully_shard(model.vision_encoder)
    # All else is needed from the first embedding to the head: it is fetched once for a forward and a backward pass.
    fully_shard(model, reshard_after_forward=False)
    compat.fetch_before(model, ("generate", "score_sequences"))
