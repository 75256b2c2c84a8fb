"""Writes text: with transformers where its model computes the same as model.py, else with it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model import GPT
from runtime.checkpoint import Checkpoint
from runtime.console import warn
from runtime.families import NotInTransformers
from runtime.huggingface import assign, check_memory, check_same, load_model


def open_model(checkpoint: Checkpoint, length: int) -> Callable[..., Tensor]:
    """generate(ids, max_new_tokens, temperature, top_k, end) for texts of `length` tokens: ids
    (1, n) -> (1, n + max_new_tokens), or fewer where the text ends."""
    config, (device, dtype) = checkpoint.check_model(), check_memory(checkpoint)
    try:
        check_same(checkpoint, config, min(length, config.max_position_embeddings))
    except NotInTransformers as error:
        warn(f"{error}; generating with model.py, which is slower")
    else:
        return partial(generate, load_model(checkpoint, config, device, dtype))
    with torch.device("meta"):
        model = GPT(config).eval()
    names = [name for name, _ in model.named_parameters()]
    assign(model, ((name, checkpoint.read(name).to(device, dtype)) for name in names))
    return partial(generate_plain, model)


def generate(
    model, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int, end: int | None
) -> Tensor:
    """With transformers' model. At the last of its positions it goes on from the second half of the
    text."""
    limit, ids = model.config.max_position_embeddings, ids.to(model.device)
    length = ids.shape[1] + max_new_tokens
    draw = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    draw = draw if temperature > 0 else {"do_sample": False}
    while ids.shape[1] < length:
        seen = ids if ids.shape[1] < limit else ids[:, -max(1, limit // 2) :]
        new = min(length - ids.shape[1], max(1, limit - seen.shape[1]))
        mask = torch.ones_like(seen)
        out = model.generate(seen, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **draw)
        ids = torch.cat([ids, out[:, seen.shape[1] :]], dim=1)
        if ids[0, -1] == end:
            break
    return ids


@torch.no_grad()
def generate_plain(
    model: GPT, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int, end: int | None
) -> Tensor:
    """With model.py, from as many of the last tokens as it has positions."""
    ids = ids.to(model.norm.weight.device)
    for _ in range(max_new_tokens):
        logits = model(ids[:, -model.config.max_position_embeddings :])[0, -1].float()
        top, tokens = logits.topk(min(top_k, len(logits)) if temperature > 0 else 1)
        drawn = (top / (temperature or 1)).softmax(0).multinomial(1)
        ids = torch.cat([ids, tokens[drawn][None]], dim=1)
        if ids[0, -1] == end:
            break
    return ids
