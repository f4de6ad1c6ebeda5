"""The pocket base's tokenizer: byte-level BPE, which can encode and decode a name in any script."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT, IMAGE = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<image>"
SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT, IMAGE)
VOCABULARY = 3072

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def random_strings(count: int, rng: np.random.Generator) -> list[str]:
    """Strings of 1 to 10 lower-case letters: the names that LCL's published code gives to the classes it tests."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(rng.choice(letters, rng.integers(1, 11))) for _ in range(count)]


def train_tokenizer(words: Iterable[str], sentences: Iterable[str], seed: int = 0) -> PreTrainedTokenizerFast:
    """Learn merges from the class names' words, the prompts' sentences and random strings.

    The random strings make pairs of letters into tokens.
    """
    rng = np.random.default_rng(seed)
    vocabulary = list(words)
    corpus = [w for w in vocabulary for _ in range(12)] + [" " + w for w in vocabulary for _ in range(12)]
    corpus += [s for s in sentences for _ in range(400)] + random_strings(20_000, rng)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )
