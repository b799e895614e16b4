"""Text and pictures → tensors, and back to text.

What this file teaches: what a Flamingo reads. Every picture is announced by one token, every caption is closed by
another, and between them may stand a *prompt* (a cue, a question), which is given to the model and has no loss:

    <image>{prompt} {caption}<|endofchunk|><image>{prompt} {caption}<|endofchunk|>…

`FlamingoProcessor(images=…, text=…)` is for users, who write such texts out; `encode_chunks` is for training and
evaluation, which also have to know which tokens are the prompt.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from flamingo.data.chunks import EOC_TOKEN, MEDIA_TOKEN, Chunk
from flamingo.data.preprocess import Picture, Preprocess, as_pil, is_picture
from flamingo.errors import InputError
from flamingo.interop.threads import one_at_a_time

# A conversation as the text the model is trained on: what the user says is the prompt, what the assistant says the
# caption. (Jinja, as transformers has it.)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ ' ' + message.content | trim }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ ' ' + part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<|endofchunk|>{% endif %}"
    "{% endfor %}"
)
CHAT_TEMPLATE_FILE = "chat_template.jinja"
OF_A_TEXT = {
    "padding", "padding_side", "truncation", "max_length", "length", "add_special_tokens", "return_attention_mask",
    "device",
}  # fmt: skip


def add_flamingo_tokens(tokenizer) -> None:
    """Add <|endofchunk|> and <image> (in this order, as open_flamingo does) and see that there is a pad token."""
    tokenizer.add_tokens([EOC_TOKEN, MEDIA_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: the attention mask separates padding from text


def refuse_options(what: str, options: dict, known: set[str]) -> None:
    """Raises InputError for an option, other than None, that is not known."""
    if unknown := sorted(name for name, value in options.items() if value is not None and name not in known):
        raise InputError(f"{what} has no option {unknown[0]}={options[unknown[0]]!r:.60}")


class FlamingoProcessor(ProcessorMixin):
    """A tokenizer with the two added tokens, and the vision encoder's way of preparing a picture.

    Args:
        tokenizer: a Hugging Face tokenizer; `add_flamingo_tokens` has been called on it.
        image_processor: PIL pictures → (N, C, H, W).

    Raises TypeError without the second: what flamingo-mini calls `FlamingoProcessor(config)` is here
    `FlamingoModel(config).processor`, because what prepares a picture comes with the encoder's weights.
    """

    def __init__(self, tokenizer, image_processor: Preprocess | None = None, device=None):
        if image_processor is None or device is not None:
            raise TypeError(
                "FlamingoProcessor takes a tokenizer and what prepares a picture; the processor of a config or a model "
                "is FlamingoModel(config).processor or model.processor, and inputs.to(device) moves what it returns"
            )
        # ProcessorMixin (which a pipeline requires) would insist on one of transformers' own image processors.
        self.chat_template = CHAT_TEMPLATE
        self.tokenizer, self.image_processor = tokenizer, image_processor
        tokenizer.padding_side = "left"  # where a pipeline fills up the texts of a batch that are to go on

    vision_processor = property(lambda self: self.image_processor)  # flamingo-mini's name for it

    # Of whatever tokenizer there is now: a user may set its pad token, or exchange it.
    media_token_id = property(lambda self: self.tokenizer.convert_tokens_to_ids(MEDIA_TOKEN))
    eoc_token_id = property(lambda self: self.tokenizer.convert_tokens_to_ids(EOC_TOKEN))
    pad_token_id = property(lambda self: self.tokenizer.pad_token_id)
    begin_ids = property(lambda self: list(self._ids("")))  # OPT's </s>, of GPT-2 nothing

    def _ids(self, text: str | list[str], **how) -> list:
        """The tokenizer's, one thread at a time: that of tokenizers 0.22 fails if a second comes (already borrowed)."""
        with one_at_a_time(self.tokenizer):
            return self.tokenizer(text, **how).input_ids

    # ----------------------------------------------------------------------------------------- load and save
    @classmethod
    def from_pretrained(
        cls, folder_or_hub_name: str | Path, *, subfolder: str = "", chat_template: str | None = None, **hub_options
    ) -> "FlamingoProcessor":
        """The processor that was saved with a model. Raises InputError when there is none, or for an option that has no
        meaning here (sizes and norms of pictures are the vision encoder's)."""
        from transformers import AutoTokenizer

        from flamingo.files import OF_A_HUB, PASSED_ALONG, find_folder

        if "_from_pipeline" not in hub_options:  # which passes the model's options too
            refuse_options("FlamingoProcessor.from_pretrained", hub_options, OF_A_HUB | PASSED_ALONG | {"use_fast"})
        folder = find_folder(folder_or_hub_name, hub_options) / subfolder
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no tokenizer: {str(error).splitlines()[0]}") from error
        processor = cls(tokenizer, Preprocess.load(folder))
        if chat_template is not None:
            processor.chat_template = chat_template
        elif (folder / CHAT_TEMPLATE_FILE).is_file():
            processor.chat_template = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
        return processor

    def save_pretrained(self, folder: str | Path, push_to_hub: bool = False, **hub_options) -> None:
        """Write the tokenizer, `preprocessor_config.json` and, if it is not the usual one, the chat template."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save(folder)
        if self.chat_template != CHAT_TEMPLATE:
            (folder / CHAT_TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(hub_options.pop("repo_id", folder.name), **hub_options)

    def to_dict(self) -> dict:
        """What `print` shows beside the tokenizer."""
        return {"image_processor": self.image_processor.settings, "processor_class": type(self).__name__}

    model_input_names = property(lambda self: ["input_ids", "attention_mask", "media_locations", "pixel_values"])

    # ------------------------------------------------------------------------------------ what users call
    def __call__(
        self,
        images: Picture | Sequence | None = None,
        text: str | Sequence[str] | None = None,
        *,
        videos: None = None,
        audio: None = None,
        return_tensors: str = "pt",
        text_kwargs: dict | None = None,
        **text_options,
    ) -> BatchFeature:
        """Pictures and texts → what `FlamingoModel` takes.

        Args:
            images: PIL pictures, files, or arrays of numpy or torch: one, a list (dealt out in order to the <image>
                tags of the texts), or for each text a list or None.
            text: one or several, with an <image> for each picture; "<image>" for each picture if not given.
            text_options, text_kwargs: those of `encode_text`. videos, audio: None (transformers passes them).

        Returns input_ids, attention_mask, media_locations (B, T_txt), and pixel_values (B, T_img, 1, C, H, W) if there
        are pictures, 0 where a text has fewer than T_img. Raises ValueError when pictures and tags disagree,
        InputError for an option that has no meaning here.
        """
        if videos is not None or audio is not None:
            raise ValueError("a Flamingo takes images and text, no videos or audio")
        if text is None and images is None:
            raise ValueError("give images, text or both")
        pictures = None if images is None else [images] if is_picture(images) else list(images)
        if text is None:
            text = [MEDIA_TOKEN * (1 if is_picture(entry) else len(entry or ())) for entry in pictures]
        texts = [text] if isinstance(text, str) else list(text)
        text_options |= text_kwargs or {}
        refuse_options("FlamingoProcessor", text_options, OF_A_TEXT)
        given = {name: text_options[name] for name in OF_A_TEXT & text_options.keys()}
        inputs = self.encode_text(texts, return_tensors=return_tensors, **given)
        if pictures is not None:
            inputs["pixel_values"] = self._pixels_by_text(self._deal_out(pictures, texts)).to(given.get("device"))
        return inputs

    def encode_text(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool | None = None,
        max_length: int | None = None,
        length: int | None = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        return_tensors: str = "pt",
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Texts → input_ids, attention_mask, media_locations (B, T_txt).

        Args:
            padding: texts of unequal length are filled up to the longest; "max_length": to max_length tokens.
            padding_side: left to generate, right to train.
            truncation: cut texts to max_length; by default if that is given and no length of padding.
            length: fill up or cut every text to this many tokens. device: where the tensors are to be.
            add_special_tokens: begin a text as the language model was trained, if with a token of its own.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' (torch) is offered")
        if length is not None:
            padding, truncation, max_length = "max_length", True, length
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("the batch is empty: give at least one text")
        known = (True, False, "longest", "max_length", "do_not_pad")
        if padding not in known or (padding == "max_length" and max_length is None):
            raise ValueError(
                f"padding={padding!r} with max_length={max_length}: give one of {known}, the fourth with it"
            )
        rows = [self._ids(one, add_special_tokens=add_special_tokens) for one in texts]
        if truncation or (truncation is None and padding != "max_length"):
            rows = [row[:max_length] for row in rows]
        if padding in (False, "do_not_pad") and len({len(row) for row in rows}) > 1:
            raise ValueError("texts of unequal length need padding=True to stand in one tensor")
        input_ids, attention_mask = self.pad(rows, padding_side, max_length if padding == "max_length" else 0)
        read = {"input_ids": input_ids, "media_locations": self.get_media_locations(input_ids)}
        read |= {"attention_mask": attention_mask} if return_attention_mask else {}
        return BatchFeature({name: tensor.to(device) for name, tensor in read.items()})

    def get_media_locations(self, input_ids: Tensor) -> Tensor:
        """(B, T_txt) bool: where the <image> tokens are."""
        return input_ids == self.media_token_id

    def prepare_caption(self, caption: str) -> str:
        """A caption as the model is trained on it: `<image> a dog<|endofchunk|>`."""
        return f"{MEDIA_TOKEN} {caption.strip()}{EOC_TOKEN}"

    def prepare_captions(self, captions: Sequence[str]) -> list[str]:
        return [self.prepare_caption(caption) for caption in captions]

    def remove_tags(self, text: str | Sequence[str]) -> str | list[str]:
        """Text without <image>, <|endofchunk|> and other special tokens."""
        if not isinstance(text, str):
            return [self.remove_tags(one) for one in text]
        for token in (MEDIA_TOKEN, EOC_TOKEN, *self.tokenizer.all_special_tokens):
            text = text.replace(token, "")
        return text.strip()

    _remove_tags = remove_tags

    def preprocess_images(self, pictures: Picture | Iterable[Picture]) -> Tensor:
        """N pictures (see `__call__`) → (N, F=1, C, H, W)."""
        pictures = [pictures] if is_picture(pictures) else pictures
        return self.image_processor.all(map(as_pil, pictures))[:, None]

    def batch_decode(self, sequences: Tensor, skip_special_tokens: bool = True, **options) -> list[str]:
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **options)

    def decode(self, sequence: Tensor, skip_special_tokens: bool = True, **options) -> str:
        return self.tokenizer.decode(sequence, skip_special_tokens=skip_special_tokens, **options)

    def post_process_image_text_to_text(
        self, generated: Tensor, skip_special_tokens: bool = True, **options
    ) -> list[str]:
        """What transformers' pipeline calls: generated ids → texts."""
        return self.batch_decode(generated, skip_special_tokens=skip_special_tokens, **options)

    def _deal_out(self, pictures: list, texts: list[str]) -> list[list]:
        """The pictures of each text, as many as it has tags."""
        tags = [text.count(MEDIA_TOKEN) for text in texts]
        if any(entry is None for entry in pictures) or not any(is_picture(entry) for entry in pictures):
            if len(pictures) != len(texts):
                raise ValueError(f"pictures for {len(pictures)} texts, but {len(texts)} texts")
            dealt = [[entry] if is_picture(entry) else list(entry or ()) for entry in pictures]
        else:
            left, dealt = list(pictures), []
            for count in tags:
                dealt.append(left[:count])
                left = left[count:]
            dealt[-1] = dealt[-1] + left  # too many: an error below, of the last text
        for i, (count, own) in enumerate(zip(tags, dealt, strict=True)):
            if count != len(own):
                raise ValueError(f"text {i} has {count} {MEDIA_TOKEN} tags but {len(own)} pictures: give one for each")
        return dealt

    def _pixels_by_text(self, dealt: list[list]) -> Tensor:
        rows = [self.preprocess_images(own) if own else None for own in dealt]  # (T, 1, C, H, W) each
        shown = [row for row in rows if row is not None]
        if not shown:
            raise ValueError("there are pictures, but no text has an <image> tag")
        pixels = shown[0].new_zeros(len(rows), max(map(len, shown)), *shown[0].shape[1:])
        for i, row in enumerate(rows):
            if row is not None:
                pixels[i, : len(row)] = row
        return pixels

    # -------------------------------------------------------------------------- for training and evaluation
    def encode_chunks(self, chunks: Sequence[Chunk], *, open_end: bool = False) -> tuple[list[int], list[bool]]:
        """A text → its token ids, and for each whether it belongs to a *prompt*: given, so that no loss is on it.

        open_end: leave the last chunk without caption and <|endofchunk|>, for the model to finish.
        """
        return self.encode_texts([chunks], open_end=open_end)[0]

    def encode_texts(
        self, texts: Sequence[Sequence[Chunk]], *, open_end: bool = False
    ) -> list[tuple[list[int], list[bool]]]:
        """`encode_chunks` of each: all strings in one call of the tokenizer, which costs more than a caption does."""
        parts = (part for text in texts for chunk in text for part in (chunk.prompt, chunk.caption) if part)
        strings = list(dict.fromkeys(f" {part}" for part in parts))
        # A text in which </s> or <image> are letters like any other: the special tokens are put in by us alone.
        letters = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids = dict(zip(strings, self._ids(strings, **letters), strict=True)) if strings else {}
        begin, image, end = self.begin_ids, self.media_token_id, self.eoc_token_id
        encoded = []
        for text in texts:
            row, is_prompt = list(begin), [True] * len(begin)
            for i, chunk in enumerate(text):
                given = [image] if chunk.picture is not None else []
                given += ids[f" {chunk.prompt}"] if chunk.prompt else []
                target = ids[f" {chunk.caption}"] if chunk.caption else []
                if chunk.picture is not None or chunk.closed:
                    target = [*target, end]
                if open_end and i == len(text) - 1:
                    target = []
                row += given + target
                is_prompt += [True] * len(given) + [False] * len(target)
            encoded.append((row, is_prompt))
        return encoded

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right", least: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids of unequal length → input_ids and attention_mask (B, T_txt). Left for generation.

        least: T_txt is at least this."""
        length, pad = max(least, *(len(row) for row in rows)), self.pad_token_id
        if pad is None:
            raise ValueError("the tokenizer has no pad token: set processor.tokenizer.pad_token")
        input_ids = torch.full((len(rows), length), pad)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            input_ids[i, where] = torch.tensor(row, dtype=torch.long)
            attention_mask[i, where] = 1
        return input_ids, attention_mask

    def decode_captions(self, generated: Tensor, prompt_length: int) -> list[str]:
        """What was generated after the prompt, up to <|endofchunk|>, without special tokens."""
        captions = []
        for row in generated[:, prompt_length:].tolist():
            if self.eoc_token_id in row:
                row = row[: row.index(self.eoc_token_id)]
            captions.append(self.tokenizer.decode(row, skip_special_tokens=True).strip())
        return captions


def pad_image_index(rows: Sequence[Sequence[int]]) -> Tensor:
    """The pictures of each text, as rows of the bank → image_index (B, T_img), -1 for an empty slot."""
    index = torch.full((len(rows), max([1, *map(len, rows)])), -1)
    for i, row in enumerate(rows):
        index[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return index
