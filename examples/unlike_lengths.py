"""How alike are sentences of unlike length to a small transformer, word by word?

They are padded within a batch, as a DataLoader's collate_fn does it; only real words have rows.

Run as: python examples/unlike_lengths.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ntkops

SENTENCES = [
    "the cat sat on the mat",
    "the dog sat",
    "a cat and a dog ran on the mat in the sun",
    "in the sun a dog ran",
]
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


class Tagger(nn.Module):
    """Two tags a word; padding is masked in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, 16, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.tags = nn.Linear(16, 2)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        padding = None if real is None else ~real
        return self.tags(self.layer(self.words(tokens), src_key_padding_mask=padding))


def collate(sentences: list[str]) -> dict[str, Tensor]:
    """Number the words and pad with zeros."""
    numbers = [torch.tensor([WORDS.index(word) + 1 for word in one.split()]) for one in sentences]
    tokens = nn.utils.rnn.pad_sequence(numbers, batch_first=True)
    return {"tokens": tokens, "real": tokens != 0}


def main() -> None:
    torch.manual_seed(0)
    model = Tagger()
    batches = ntkops.Batches(SENTENCES, 2, collate=collate, mask="real")
    names = {"axes": ("word", "tag")}
    K = ntkops.ntk(model, batches, **names, outputs={"tag": "trace"})  # (words, words)
    print(f"{K.shape[-1]} words in {K.num_samples} sentences, which begin at rows {K.offsets.tolist()[:-1]}")
    last = int(K.offsets[1]) - 1
    part = K.submatrix([0, last], [0, last]).to_dense()
    cosine = part[0, 1] / (part[0, 0] * part[1, 1]).sqrt()
    print(f"the first and the last word of the first sentence: cosine {cosine:.2f}")
    whole = ntkops.ntk(model, batches, **names, outputs={"word": "trace", "tag": "trace"}).to_dense()
    scale = whole.diagonal().rsqrt()
    print("sentences, word by word in their order:")
    for row in scale[:, None] * whole * scale:
        print("  " + " ".join(f"{entry:.2f}" for entry in row.tolist()))
    forgotten = ntkops.Batches(SENTENCES, 2, columns={"tokens": "tokens"}, collate=collate, mask="real")
    try:
        ntkops.ntk(model, forgotten)
    except ntkops.errors.InputError as error:
        print(f"without its mask: {error}")


if __name__ == "__main__":
    main()
