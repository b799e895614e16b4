"""Pretrains the classroom's language model: a small OPT that follows its context and looks names up in it.

What this file teaches: next-token prediction on documents, and where *in-context lookup* comes from. Having read

    dog zuki
    cat tavo
    dog ...

a language model continues with "zuki" by two attention heads in a row (an *induction head*, Olsson et al. 2022): the
first, at "zuki", takes down which token stood before it; the second, at the last "dog", looks for the place where "dog"
was taken down, and copies what stands there. A model of this size finds the two by chance, and late: after 400 steps it
got one name in ten right. `place_lookup_heads` puts them there to begin with (assets/classroom/EXPERIMENTS.md has the
figures); every weight is trained from there on.
"""

import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from flamingo.classroom import probes, scenes
from flamingo.classroom.documents import document, document_row, naming_lines
from flamingo.classroom.invented import SYLLABLES
from flamingo.training.optimizer import warmup_cosine

SEED = 20220429  # the day the paper appeared; the scenes of a run begin at seed 0, so none is shared
WIDTH, LAYERS, HEADS, POSITIONS = 192, 4, 6, 512
HEAD = WIDTH // HEADS  # 32
# The residual stream as it begins: what a token is, a note of what stood before it, where it stands.
TOKEN, NOTE, PLACE = slice(0, WIDTH - 2 * HEAD), slice(WIDTH - 2 * HEAD, WIDTH - HEAD), slice(WIDTH - HEAD, WIDTH)
OBJECT_DIMENSIONS = 40  # of the names of things, fewer than there are things (see spread_words)


# ------------------------------------------------------------------------------------------------ tokenizer
def train_tokenizer(texts: list[str], *, closing: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE with OPT's special ids: <s> 0, <pad> 1, </s> 2 (begins a text, as OPT's does), <unk> 3.

    closing: also end a text with </s> and begin it with <s>; CLIP's text tower reads its result at </s>.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=10, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    template = "<s> $A </s>" if closing else "</s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=None, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if closing else "</s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=POSITIONS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the model
def make_optimizer(modules: list[nn.Module], lr: float) -> torch.optim.AdamW:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
         {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.98), eps=1e-8,
    )  # fmt: skip


def packed_rows(tokenizer, first: int, rows: int, length: int) -> tuple[Tensor, int]:
    """(rows, length) token ids: documents one after the other, each row beginning with a document."""
    batch = []
    while len(batch) < rows:
        row, first = document_row(tokenizer, SEED, "train", first, length, include_novel=True)
        batch.append(row)
    return torch.tensor(batch), first


@torch.no_grad()
def spread_words(vectors: Tensor, tokenizer) -> None:
    """Token embeddings (V, D), in the dimensions TOKEN, far apart from the start: tied, they are the output weights
    too, and at the usual 0.02 no hidden state could predict one with confidence. The names of things all lie in a plane
    of OBJECT_DIMENSIONS: with more things than dimensions, what maps pictures of *some* things to their names maps
    those of the others too. A plural begins as its singular and one step, the same for all: a model that can name one
    tomato can name three."""
    width, length = TOKEN.stop, 0.17 * math.sqrt(OBJECT_DIMENSIONS)
    vectors.zero_()
    vectors[:, TOKEN] = length / math.sqrt(width) * torch.randn(len(vectors), width)
    plane = torch.linalg.qr(torch.randn(width, OBJECT_DIMENSIONS)).Q.T  # orthonormal rows
    in_plane = lambda count: 0.17 * torch.randn(count, OBJECT_DIMENSIONS) @ plane  # noqa: E731
    to_plural = in_plane(1)[0]
    for name in (*scenes.OBJECTS, *scenes.GROUNDS):
        one, many = (tokenizer(f" {word}", add_special_tokens=False).input_ids for word in (name, scenes.plural(name)))
        vectors[one[0], TOKEN] = in_plane(1)[0]
        if one != many and len(one) == len(many) == 1:
            vectors[many[0], TOKEN] = vectors[one[0], TOKEN] + to_plural


@torch.no_grad()
def place_lookup_heads(model: OPTForCausalLM) -> None:
    """An induction head from the start: the first head of layer 0, and that of layer 1. (OPT's attention scores are
    queries times keys; both heads get theirs from a handful of directions in the residual stream.)"""
    decoder, half = model.model.decoder, HEAD // 2
    # Positions as sines and cosines: one step back is a rotation of each pair, the same at every place.
    speeds = torch.logspace(math.log10(2.0), math.log10(0.02), half)  # radians a token
    angles = torch.arange(len(decoder.embed_positions.weight))[:, None] * speeds
    decoder.embed_positions.weight.zero_()
    decoder.embed_positions.weight[:, PLACE] = 0.2 * torch.cat([angles.sin(), angles.cos()], dim=1)
    cos, sin = speeds.cos().diag(), speeds.sin().diag()
    back = torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])  # (HEAD, HEAD)

    def random_directions() -> Tensor:  # (HEAD, TOKEN): a shadow of the token, enough to tell it from the others
        return torch.linalg.qr(torch.randn(TOKEN.stop, HEAD)).Q.T

    def fill(projection: nn.Linear, columns: slice, block: Tensor) -> None:  # of the first head
        projection.weight[:HEAD] = 0
        projection.weight[:HEAD, columns] = block

    def fill_out(projection: nn.Linear, rows: slice, block: Tensor) -> None:
        projection.weight[:, :HEAD] = 0
        projection.weight[rows, :HEAD] = block

    first, second = decoder.layers[0].self_attn, decoder.layers[1].self_attn
    shadow, copied, one = random_directions(), random_directions(), torch.eye(HEAD)
    fill(first.q_proj, PLACE, 2 * back)  # looks one token back …
    fill(first.k_proj, PLACE, 2 * one)
    fill(first.v_proj, TOKEN, 0.4 * shadow)  # … and notes what stands there
    fill_out(first.out_proj, NOTE, 0.4 * one)
    fill(second.q_proj, TOKEN, 2 * shadow)  # looks for a note of the token that stands here …
    fill(second.k_proj, NOTE, 2 * one)
    fill(second.v_proj, TOKEN, copied)  # … and copies the token that has it
    fill_out(second.out_proj, TOKEN, copied.T)


def read_documents(model: OPTForCausalLM, tokenizer, steps: int, lr: float) -> None:
    """Next-token prediction, `steps` batches of about 6000 tokens."""
    optimizer = make_optimizer([model], lr)
    device, first = model.device, 0
    bar = tqdm(range(steps), desc="OPT", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, 50)
        # Every eighth batch has full-length rows, so that the far positions are trained too.
        length, rows = (POSITIONS, 12) if step % 8 == 0 else (192, 32)
        input_ids, first = packed_rows(tokenizer, first, rows, length)
        input_ids = input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain_lm(out: Path, steps: int, device: torch.device) -> dict:
    """Next-token prediction on caption documents. Writes `out/opt`, and the tokenizer of `out/clip`."""
    began = time.time()
    drawn = (document(SEED, "train", 2**41 + i, include_novel=True, namings=False) for i in range(6000))
    corpus = list(drawn)  # without invented names: the tokenizer would learn whole ones
    # Every syllable is a token, one at the front of a word and one within.
    corpus += [front + syllable for syllable in SYLLABLES for front in ("", " ") for _ in range(200)]
    tokenizer = train_tokenizer(corpus, closing=False)
    train_tokenizer(corpus, closing=True).save_pretrained(out / "clip")
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=POSITIONS,
            dropout=0.0, attention_dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )
    ).to(device)  # fmt: skip
    spread_words(model.get_input_embeddings().weight, tokenizer)
    place_lookup_heads(model)
    read_documents(model, tokenizer, steps, lr=2e-3)
    model.eval()
    report = {"lm_parameters": sum(p.numel() for p in model.parameters()), "lm_seconds": round(time.time() - began)}
    held_out = [document(SEED, "test", i, include_novel=False) for i in range(300)]
    report["lm_test_perplexity"] = probes.perplexity(model.cpu(), tokenizer, held_out)
    named = [naming_lines(random.Random(f"recall {i}"), held_out=True) for i in range(200)]
    report["lm_recall_of_a_name"] = probes.recall(model, tokenizer, named)
    model.to(torch.float16).save_pretrained(out / "opt")  # half the bytes; from_pretrained(dtype=float32) widens it
    tokenizer.save_pretrained(out / "opt")
    return report
