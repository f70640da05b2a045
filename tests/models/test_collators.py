"""Collators of Hugging Face: rows are real tokens, and padding that moves them is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.errors import InputError

from ..laws.reference import close
from .library_rows import library

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest.importorskip("transformers")

LENGTHS = (5, 2, 7, 3)
TOKENS = [[(3 * i + 2 * t) % 9 + 2 for t in range(n)] for i, n in enumerate(LENGTHS)]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-4}


def tokenizer(side: str = "right") -> Any:
    """Eleven words, the first of them padding; nothing is loaded."""
    tokenizers = library("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 11)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    return library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[UNK]", padding_side=side
    )


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """A tiny network whose numbers are those of float32 in every dtype."""
    transformers = library("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        made = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=12,
        )
        made = transformers.BertModel(config, add_pooling_layer=False)
    return made.eval().to(dtype)


OUTPUTS = {"gpt2": "logits", "bert": "last_hidden_state"}
COLUMNS = {"input_ids": "input_ids", "attention_mask": "attention_mask"}


def items() -> list[dict[str, list[int]]]:
    return [{"input_ids": one, "attention_mask": [1] * len(one)} for one in TOKENS]


def alone(name: str, numbers: list[int]) -> Tensor:
    """J of each sequence by itself, without padding, in float64."""
    net = network(name, torch.float32).double()
    leaves = [p for p in net.parameters() if p.requires_grad]
    found = []
    for tokens in TOKENS:
        state = net(input_ids=torch.tensor([tokens]))[OUTPUTS[name]][..., numbers].flatten()
        for entry in state:
            parts = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
            found.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for g, p in zip(parts, leaves, strict=True)
                    ]
                )
            )
    return torch.stack(found)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("collator", ["padding", "language model"])
def test_rows_are_real_tokens(collator: str, name: str, dtype: torch.dtype):
    transformers = library("transformers")
    if collator == "padding":
        collate, columns = transformers.DataCollatorWithPadding(tokenizer(), pad_to_multiple_of=4), None
    else:  # labels are in the batch, too
        collate, columns = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False), COLUMNS
    batches = ntkops.Batches(items(), 2, columns=columns, collate=collate, mask="attention_mask")

    def few(raw: Any) -> Tensor:
        return raw[OUTPUTS[name]][..., [0, 3]]

    J = alone(name, [0, 3])
    K = ntkops.ntk(network(name, dtype), batches, output=few)
    assert K.offsets.tolist() == [0, *(2 * torch.tensor(LENGTHS).cumsum(0)).tolist()]
    close(K.to_dense(), J @ J.mT, TOLERANCES[dtype])
    close(ntkops.trace(K, method="exact").value, (J @ J.mT).trace(), TOLERANCES[dtype])
    v = torch.ones(len(J), 1, dtype=dtype)
    lazy = ntkops.ntk(network(name, dtype), batches, output=few, max_dense_bytes=0)
    close(lazy @ v, J @ (J.mT @ v.double()), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_padding_on_the_left_moves_positions(dtype: torch.dtype):
    collate = library("transformers").DataCollatorWithPadding(tokenizer("left"))
    batches = ntkops.Batches(items(), 2, collate=collate, mask="attention_mask")
    for name in OUTPUTS:
        with pytest.raises(InputError, match=r"padding of batch \d\['input_ids'\]"):
            ntkops.ntk(network(name, dtype), batches, output=OUTPUTS[name])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_forgotten_mask(dtype: torch.dtype):
    collate = library("transformers").DataCollatorWithPadding(tokenizer())
    options: dict[str, Any] = {"columns": {"input_ids": "input_ids"}, "collate": collate}
    forgotten = ntkops.Batches(items(), 2, mask="attention_mask", **options)
    with pytest.raises(InputError, match=r"padding of batch \d\['input_ids'\] changes"):
        ntkops.ntk(network("bert", dtype), forgotten, output=OUTPUTS["bert"])
    # What is causal does not see what comes behind.
    K = ntkops.ntk(network("gpt2", dtype), forgotten, output=OUTPUTS["gpt2"])
    assert K.shape[-1] == sum(LENGTHS) * 11
    with pytest.raises(InputError, match="nothing says which positions are real"):
        ntkops.ntk(
            network("bert", dtype), ntkops.Batches(items(), 2, collate=collate), output=OUTPUTS["bert"]
        )
