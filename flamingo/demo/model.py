"""The model behind the page: everything a tab asks of it, one visitor at a time.

What this file teaches: a page in a browser has many visitors and one model, and closing a gate changes that model. So
every question comes with all it depends on (pictures, texts, gates), nothing of it stays behind in the model, and a
lock makes the others wait meanwhile. What a visitor has chosen is kept beside the page's session, never here.
"""

import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from flamingo.classroom import scenes
from flamingo.data.chunks import Chunk
from flamingo.data.processor import FlamingoProcessor, pad_image_index
from flamingo.demo.answers import About, Gates, Look, Seen, Step
from flamingo.evaluation import attention
from flamingo.evaluation.captioning import NEW_TOKENS, continue_texts, encode_pictures
from flamingo.evaluation.few_shot import Query, prompt_text
from flamingo.evaluation.gates import gates_at
from flamingo.fast.device import pick_device
from flamingo.figures.heat_map import heat_map
from flamingo.interop.selfcheck import check_decoding
from flamingo.limits import plain_text
from flamingo.model.cross_attention import media_attention_mask
from flamingo.model.vlm import Flamingo
from flamingo.training.checkpoint import load_model

LIKELIEST = 5  # next tokens that are shown of each step


class DemoModel:
    """A run's model, loaded once for all visitors. Raises InputError if the folder holds no whole run."""

    def __init__(self, run: Path, device: str = "auto"):
        self._lock = threading.Lock()
        self.model, self.processor, self.config = load_model(run)
        self.model.to(pick_device(device))
        self.device = next(self.model.vision_tokenizer.parameters()).device
        looking = [name for name, module in self.model.lang_encoder.named_modules()
                   if hasattr(module, "gated_cross_attn_layer")]  # fmt: skip
        self.about = About(
            run=run,
            trained=self.model.gates(),
            layers=[int(name.rpartition(".")[2]) for name in looking],
            heads=self.config.fusion.heads,
            can_show_attention=attention.can_be_recorded(self.model),
            has_media_mask=isinstance(self.model, Flamingo),
        )
        check_decoding(self.model)

    @contextmanager
    def _alone(self, gates: Gates = None) -> Iterator[None]:
        """Inside, nobody else uses the model, and its gates are as given."""
        with self._lock, torch.no_grad(), gates_at(self.model, gates or [(None, None)] * len(self.about.trained)):
            yield

    def _latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, n, d)."""
        return encode_pictures(self.model, self.processor, pictures)

    def _tokens(self, chunks: Sequence[Chunk], open_end: bool = False) -> tuple[Tensor, list[bool]]:
        """(1, T_txt) ids of a text, and for each whether it is given rather than predicted."""
        for chunk in chunks:
            plain_text("the prompt", chunk.prompt, self.processor.tokenizer)
            plain_text("the text", chunk.caption, self.processor.tokenizer)
        ids, is_prompt = self.processor.encode_chunks(chunks, open_end=open_end)
        return torch.tensor([ids], device=self.device), is_prompt

    # -------------------------------------------------------------------------------------------------- captions
    def stream(self, picture: Image.Image, prompt: str, gates: Gates = None, *, seed: int = 0, **how) -> Iterator[str]:
        """The caption as it grows, token by token (beams are only known at the end). how: options of `generate`.

        The model is free again when it has spoken, however slowly the page takes what it has said.
        Raises InputError and ValueError for a prompt with special tokens, or one too long.
        """
        ids, _ = self._tokens([Chunk(0, prompt)], open_end=True)
        said: queue.Queue = queue.Queue()
        streamer = {} if how.get("num_beams", 1) > 1 else {"streamer": _Pieces(self.processor, said)}

        def work() -> None:
            try:
                with self._alone(gates):
                    torch.manual_seed(seed)
                    whole = self.model.generate(
                        ids, latents=self._latents([picture])[None], **({"max_new_tokens": NEW_TOKENS} | streamer | how)
                    )
                said.put(self.processor.decode_captions(whole, ids.shape[1])[0])
                said.put(None)
            except BaseException as error:  # an exit that a library asks for, too: raised again where somebody waits
                said.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (piece := said.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def caption(self, picture: Image.Image, prompt: str, gates: Gates = None, **how) -> str:
        """The caption at once."""
        *_, last = self.stream(picture, prompt, gates, **how)
        return last

    def steps(self, picture: Image.Image, prompt: str, caption: str, gates: Gates = None) -> list[Step]:
        """What was likely at every token of a caption, its <|endofchunk|> included."""
        ids, is_prompt = self._tokens([Chunk(0, prompt, caption)])
        with self._alone(gates):
            logits = self.model(ids, latents=self._latents([picture])[None]).logits[0].float()  # (T_txt, vocabulary)
        names = self.processor.tokenizer.convert_ids_to_tokens
        steps = []
        for place in range(is_prompt.index(False), len(is_prompt)):
            probabilities = logits[place - 1].softmax(dim=-1)
            top = probabilities.topk(LIKELIEST)
            likeliest = list(zip(map(readable, names(top.indices.tolist())), top.values.tolist(), strict=True))
            token = ids[0, place].item()
            steps.append(Step(readable(names([token])[0]), probabilities[token].item(), likeliest))
        return steps

    def few_shot(
        self, pictures: Sequence[Image.Image], examples: Sequence[Chunk], prompt: str, ways: Sequence[str]
    ) -> list[str]:
        """What it predicts after the last picture and the prompt, with the examples shown in each of these ways
        (`prompt_text` has them); `Chunk.picture` are numbers of the pictures."""
        query = Query(len(pictures) - 1, prompt, [])
        texts = [prompt_text(query, examples, way) for way in ways]
        for text in texts:
            self._tokens(text)
        with self._alone():
            return continue_texts(self.model, self.processor, self._latents(pictures), texts)

    # ------------------------------------------------------------------------------------------- looks and gates
    def looks(
        self, picture: Image.Image, prompt: str, caption: str, view: attention.View = attention.WHOLE
    ) -> list[attention.WordLook]:
        """Where it looked at each word of the caption, from the first to the last."""
        self._tokens([Chunk(0, prompt, caption)])
        with self._alone():
            return attention.word_looks(self.model, self.processor, [picture], [prompt], [caption], view=view)

    def look(
        self, picture: Image.Image, prompt: str, caption: str, word: int | None = None, *,
        names: Collection[str] = (), scene: scenes.Scene | None = None,
        layer: int | None = None, head: int | None = None,
    ) -> Look:  # fmt: skip
        """One of `looks`, drawn. word: its number; None: that of the first word among `names`, or of the first at all.

        scene: of the picture, to draw the true box of a thing that is named. layer, head: see `attention.View`.
        """
        looks = self.looks(picture, prompt, caption, attention.View(layer, head))
        words = [look.word for look in looks]
        if word is None:
            word = next((i for i, each in enumerate(words) if each in names), 0)
        if word >= len(words):
            return Look(words, None, heat_map(picture, attention.WordLook(0, "", torch.zeros(1, 1))))
        return Look(words, word, heat_map(picture, looks[word], scene))

    def losses(self, picture: Image.Image, prompt: str, caption: str, gates: Gates = None) -> tuple[float, float]:
        """Loss of a caption, nats per token: with the picture, and with the picture taken away."""
        ids, is_prompt = self._tokens([Chunk(0, prompt, caption)])
        labels = ids.masked_fill(torch.tensor([is_prompt], device=self.device), -100)
        with self._alone(gates):
            latents = self._latents([picture])[None]  # (B=1, T_img=1, n, d)
            seeing = self.model(ids, labels=labels, latents=latents).loss.item()
            return seeing, self.model(ids, labels=labels, blind=True).loss.item()

    def distance_to_language_model(self, picture: Image.Image, prompt: str, caption: str, gates: Gates = None) -> float:
        """The largest difference of any logit from that of the language model alone; 0.0: equal, bit for bit."""
        ids, _ = self._tokens([Chunk(0, prompt, caption)])
        with self._alone(gates):
            beside = self.model(ids, latents=self._latents([picture])[None]).logits
            alone = self.model.lang_encoder(input_ids=ids, use_cache=False).logits
        return (beside - alone).abs().max().item()

    # -------------------------------------------------------------------------------------------- who sees what
    def who_sees_what(self, text: str, pictures: Sequence[Image.Image]) -> tuple[Seen, str]:
        """A text with <image> tags: its media mask, and how the model goes on with it.

        Raises ValueError if tags and pictures disagree, or there is no room for the prediction.
        """
        inputs = self.processor(images=[list(pictures)] if pictures else None, text=[text]).to(self.device)
        ids = inputs["input_ids"]  # (1, T_txt)
        index = pad_image_index([range(len(pictures))]).to(self.device)  # (1, T_img)
        found = media_attention_mask(inputs["media_locations"], index, self.config.fusion.only_immediate_media)
        mask = found.sees_image if found.mask is None else found.mask  # (1, T_txt, T_img)
        with self._alone():
            shown = {"pixel_values": inputs["pixel_values"]} if pictures else {"blind": True}
            whole = self.model.generate(ids, max_new_tokens=NEW_TOKENS, **shown)
        tokens = [readable(token) for token in self.processor.tokenizer.convert_ids_to_tokens(ids[0].tolist())]
        seen = Seen(tokens, mask[0, :, : len(pictures)].tolist())
        return seen, self.processor.decode_captions(whole, ids.shape[1])[0]


class _Pieces(BaseStreamer):
    """Puts the caption so far into a queue at every token."""

    def __init__(self, processor: FlamingoProcessor, said: queue.Queue):
        self.processor, self.said, self.ids = processor, said, None

    def put(self, value: Tensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self.said.put(self.processor.decode_captions(torch.tensor([self.ids]), 0)[0])

    def end(self) -> None:
        """The whole caption follows from the result."""


def readable(token: str) -> str:
    """A token as people read it: byte-level tokenizers write a space as Ġ and a line's end as Ċ."""
    return token.replace("Ġ", "·").replace("▁", "·").replace("Ċ", "↵")
