"""The rows of the table that transformers, peft, timm and torchvision build: tiny, nothing loaded."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Row

VOCABULARY, LENGTH = 7, 3


def library(name: str) -> Any:
    """Import a library of models, also beside a torchvision that was built for another torch."""
    while True:
        try:
            importlib.import_module("torchvision")
        except ImportError:
            break
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _OPERATORS.define(f"{missing[1]}() -> ()")  # a name is enough: nothing here calls it
        else:
            break
    return importlib.import_module(name)


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


# ------------------------------------------------------------------------------------------- inputs


def words(count: int) -> dict[str, Tensor]:
    """Make sequences of one length."""
    return {"input_ids": torch.randint(0, VOCABULARY, (count, LENGTH))}


def padded(count: int) -> dict[str, Tensor]:
    """Make sequences of several lengths with their mask."""
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 1, 2])[torch.arange(count) % 3, None]).long()
    return {"input_ids": torch.randint(1, VOCABULARY, (count, LENGTH)) * mask, "attention_mask": mask}


def pairs(count: int) -> dict[str, Tensor]:
    """Make sequences for an encoder and a decoder."""
    return {**words(count), "decoder_input_ids": torch.randint(0, VOCABULARY, (count, 2))}


def labelled(count: int) -> dict[str, Tensor]:
    """Make sequences with the token that follows each."""
    ids = torch.randint(0, VOCABULARY, (count, LENGTH))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def images(size: int) -> Callable[[int], Tensor]:
    """Make images."""
    return lambda count: torch.randn(count, 3, size, size)


def pixels(size: int) -> Callable[[int], dict[str, Tensor]]:
    """Make images under the keyword of transformers."""
    return lambda count: {"pixel_values": torch.randn(count, 3, size, size)}


# ------------------------------------------------------------------------------------- transformers

SMALL: dict[str, dict[str, Any]] = {
    "GPT2": dict(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "Bert": dict(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=LENGTH,
    ),
    "Llama": dict(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "ViT": dict(
        image_size=4,
        patch_size=2,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
    ),
    "ResNet": dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2),
    "T5": dict(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    ),
    "Mamba": dict(
        vocab_size=VOCABULARY,
        hidden_size=6,
        state_size=3,
        num_hidden_layers=1,
        expand=2,
        conv_kernel=2,
        time_step_rank=2,
    ),
}


def transformer(family: str, kind: str, attention: str | None = None, **options: Any) -> nn.Module:
    """Build a tiny model of a family, such as ``transformer("GPT2", "LMHeadModel", "eager")``."""
    transformers = library("transformers")
    config = getattr(transformers, f"{family}Config")(**{**SMALL[family], **options})
    if attention is not None:
        config._attn_implementation = attention
    return getattr(transformers, f"{family}{kind}")(config)


class TokenLosses(nn.Module):
    """The loss of each token of a language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids).logits  # (B, T, vocabulary)
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def adapted(family: str, modules: list[str], dora: bool = False) -> nn.Module:
    """Build a language model with low-rank adapters whose second factor is not zero."""
    peft = library("peft")
    config = peft.LoraConfig(r=2, target_modules=modules, use_dora=dora, fan_in_fan_out=family == "GPT2")
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = peft.get_peft_model(transformer(family, kind, "eager"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def _logits(raw: Any) -> Tensor:
    return raw.logits


def _hidden(raw: Any) -> Tensor:
    return raw.last_hidden_state


LOGITS: dict[str, Any] = {"options": {"output": "logits"}, "state": _logits}
SINGLE: dict[str, Any] = {"precision": torch.float32, "note": "computes in float32 inside: held to that"}
HIDDEN: dict[str, Any] = {"options": {"output": "last_hidden_state"}, "state": _hidden}


def _language(attention: str | None) -> list[Row]:
    """GPT-2, BERT, Llama and ViT with one implementation of attention."""
    label = attention or "default"
    inside: dict[str, Any] = {} if attention == "sdpa" else {"precision": torch.float32}  # its softmax
    return [
        Row(f"GPT-2 {label}", partial(transformer, "GPT2", "LMHeadModel", attention), words, **LOGITS),
        Row(
            f"BERT classifier, padding mask, {label}",
            partial(transformer, "Bert", "ForSequenceClassification", attention),
            padded,
            samples="loop",
            **LOGITS,
        ),
        Row(
            f"Llama {label}",
            partial(transformer, "Llama", "ForCausalLM", attention),
            words,
            **LOGITS,
            **SINGLE,
        ),
        Row(f"ViT {label}", partial(transformer, "ViT", "Model", attention), pixels(4), **HIDDEN, **inside),
    ]


TRANSFORMERS = [
    *_language("eager"),
    *_language("sdpa"),
    Row("GPT-2 eager, padding mask", partial(transformer, "GPT2", "LMHeadModel", "eager"), padded, **LOGITS),
    Row(
        "Llama eager, tied embeddings",
        partial(transformer, "Llama", "ForCausalLM", "eager", tie_word_embeddings=True),
        words,
        **LOGITS,
        **SINGLE,
    ),
    Row("ResNet eval()", partial(transformer, "ResNet", "ForImageClassification"), pixels(8), **LOGITS),
    Row(
        "T5 encoder-decoder eager",
        partial(transformer, "T5", "ForConditionalGeneration", "eager"),
        pairs,
        **LOGITS,
        **SINGLE,
    ),
    Row(
        "T5 encoder-decoder default",
        partial(transformer, "T5", "ForConditionalGeneration"),
        pairs,
        **LOGITS,
        **SINGLE,
    ),
    Row(
        "Mamba, plain formulas",
        partial(transformer, "Mamba", "ForCausalLM"),
        words,
        samples="loop",
        **LOGITS,
        **SINGLE,
    ),
    Row(
        "GPT-2 loss of each token",
        lambda: TokenLosses(transformer("GPT2", "LMHeadModel", "eager")),
        labelled,
    ),
]

# --------------------------------------------------------------------------------------------- peft

PEFT = [
    Row("GPT-2 with LoRA (peft)", partial(adapted, "GPT2", ["c_attn"]), words, **LOGITS),
    Row("Llama with LoRA (peft)", partial(adapted, "Llama", ["q_proj", "v_proj"]), words, **LOGITS, **SINGLE),
    Row(
        "Llama with DoRA (peft)",
        partial(adapted, "Llama", ["q_proj", "v_proj"], dora=True),
        words,
        engine="autograd",
        precision=torch.float32,
        **LOGITS,
        note="consistent, but DoRA detaches its norm: not the true derivative, as `check_operator` says",
    ),
]

# --------------------------------------------------------------------------------------------- timm


def timm_model(name: str, **options: Any) -> nn.Module:
    """Build a model of timm with random weights."""
    return library("timm").create_model(name, pretrained=False, num_classes=2, **options)


TIMM = [
    Row(
        "timm ViT",
        partial(
            timm_model, "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2
        ),
        images(8),
    ),
    Row(
        "timm ResNet",
        partial(timm_model, "resnet18", layers=(1, 1, 1, 1), channels=(4, 4, 4, 4), stem_width=4),
        images(16),
    ),
    Row(
        "timm ConvNeXt",
        partial(timm_model, "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)),
        images(32),
    ),
    Row(
        "timm MobileNetV3",
        partial(timm_model, "mobilenetv3_small_050"),
        images(32),
        samples_given=2,
    ),
]

# -------------------------------------------------------------------------------------- torchvision


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """Build a model of torchvision with random weights."""
    return getattr(library("torchvision.models"), name)(**options)


TORCHVISION = [
    Row(
        "torchvision ResNet-18 eval(), first stage and head",
        partial(torchvision_model, "resnet18", num_classes=2),
        images(32),
        options={"params": ["conv1.*", "bn1.*", "layer1.*", "fc.*"]},
        samples_given=2,
    ),
    Row(
        "torchvision ViT",
        partial(
            torchvision_model,
            "VisionTransformer",
            image_size=8,
            patch_size=4,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=8,
            num_classes=2,
        ),
        images(8),
    ),
    Row(
        "torchvision MobileNetV3",
        partial(torchvision_model, "mobilenet_v3_small", num_classes=2),
        images(32),
        samples_given=2,
    ),
]

LIBRARY_ROWS = [*TRANSFORMERS, *PEFT, *TIMM, *TORCHVISION]

# One of each kind, quick ones: with every run of the test suite, where the libraries are installed.
DOZEN = [
    row
    for row in LIBRARY_ROWS
    if row.name
    in {
        "GPT-2 sdpa",
        "BERT classifier, padding mask, eager",
        "Llama eager, tied embeddings",
        "ViT eager",
        "ResNet eval()",
        "T5 encoder-decoder default",
        "Mamba, plain formulas",
        "GPT-2 loss of each token",
        "GPT-2 with LoRA (peft)",
        "Llama with DoRA (peft)",
        "timm ConvNeXt",
        "torchvision ViT",
    }
]
