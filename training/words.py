"""Builds the CLIP tokenizer of the embedded pipeline from the captions of its world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

SUFFIX = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def _merges(captions: Iterable[str]) -> list[tuple[str, str]]:
    """Learn byte pairs until every word of ``captions`` is one token."""
    trained = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, False)]
    )
    trained.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix=SUFFIX, show_progress=False)
    )
    pairs = json.loads(trained.to_str())["model"]["merges"]
    return [(pair[0], pair[1]) for pair in pairs]


def build(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Save a CLIP tokenizer to ``folder`` and return it.

    The vocabulary is laid out as CLIP's: all bytes, all bytes that end a word, the merges in order, the two
    special tokens. So any text has tokens, and each word of the world is exactly one.
    """
    merges = _merges(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + SUFFIX for a in alphabet), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer.from_pretrained(
        str(folder), bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=77
    )
    kept = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    shutil.rmtree(folder)
    tokenizer.save_pretrained(str(folder))
    # Newer libraries save tokenizer.json alone; older ones and other tools read these two.
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    return CLIPTokenizer.from_pretrained(str(folder))
