"""Trains the tokenizer and packs the corpus: `python -m experiments.reference_model.tokenizer DATA OUT`.

Byte-level BPE with GPT-2's splitting rule, which llama.cpp knows as
`tokenizer.ggml.pre = gpt-2`; 4096 tokens keep the embedding from dominating a
model of 20M parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of a JSON-lines corpus file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            yield document["source"], document["text"]


def train(data: Path) -> PreTrainedTokenizerFast:
    """Learns the merges on every fourth training document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = (text for i, (_, text) in enumerate(texts(data / "train.jsonl")) if i % 4 == 0)
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, data: Path, out: Path) -> int:
    """Writes the training split as one uint16 token stream, documents ended by `END_OF_TEXT`."""
    end = tokenizer.eos_token_id
    stream: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            stream.append(np.array([*encoding.ids, end], np.uint16))
        batch.clear()

    for _, text in texts(data / "train.jsonl"):
        batch.append(text)
        if len(batch) == 512:
            flush()
    flush()
    np.save(out, np.concatenate(stream))
    return sum(map(len, stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that corpus.py wrote")
    parser.add_argument("out", type=Path, help="folder for the tokenizer")
    args = parser.parse_args()
    tokenizer = train(args.data)
    tokenizer.save_pretrained(args.out)
    print(f"{pack(tokenizer, args.data, args.data / 'train.npy'):,} tokens in {args.data / 'train.npy'}")


if __name__ == "__main__":
    main()
