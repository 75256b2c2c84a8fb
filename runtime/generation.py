"""Writes text: with transformers where its model computes the same as model.py, else with it."""

import re
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from model import GPT
from planner.machine import host_memory
from runtime.checkpoint import Checkpoint, open_newest
from runtime.console import UserError, warn
from runtime.families import NotInTransformers
from runtime.huggingface import assign, check_same, load_model, load_tokenizer, not_loaded
from runtime.samples import draw


def open_source(checkpoint_path: str | None, init_from: str | None, out_dir: Path) -> tuple:
    """The tokenizer of a checkpoint or of a model of Hugging Face, and `open_for(length)`, which
    gives what writes texts of so many tokens: see `open_model`."""
    if (checkpoint_path is None) == (init_from is None):
        raise UserError("--checkpoint_path or --init_from is required, and not both")
    if init_from is not None:
        return open_released(init_from)
    checkpoint = open_newest(checkpoint_path, out_dir)
    return load_tokenizer(checkpoint), partial(open_model, checkpoint)


def open_released(source: str) -> tuple:
    """As `open_source`, for a folder or hub name; any model that transformers has without code of
    its own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer, config = (
            AutoTokenizer.from_pretrained(source),
            AutoConfig.from_pretrained(source),
        )
        with torch.device("meta"):
            blank = AutoModelForCausalLM.from_config(config)
        sizes = [parameter.numel() for parameter in blank.parameters()]
        device, dtype = choose_memory(source, sizes)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    except UserError:
        raise
    except Exception as error:  # transformers raises no narrower one for what a file can hold
        raise not_loaded(source, error) from None
    return tokenizer, lambda length: partial(generate, model)


def open_model(checkpoint: Checkpoint, length: int) -> Callable[..., Tensor]:
    """generate(ids, max_new_tokens, temperature, top_k, end) for texts of `length` tokens: ids
    (1, n) -> (1, n + max_new_tokens), or fewer where the text ends."""
    config = checkpoint.check_model()
    sizes = [prod(checkpoint.tensors[name]["shape"]) for name in checkpoint.weights]
    device, dtype = choose_memory(str(checkpoint.path), sizes)
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
        logits = model(ids[:, -model.config.max_position_embeddings :])[:, -1].float()
        ids = torch.cat([ids, draw(logits, temperature, top_k)], dim=1)
        if ids[0, -1] == end:
            break
    return ids


def choose_memory(what: str, sizes: list[int]) -> tuple[str, torch.dtype]:
    """The device that a model with tensors of these sizes is to be held on, a GPU if there is one,
    and its dtype: on a CPU fp32, or bf16 where that does not fit. UserError where it does not."""
    device, dtypes, has = "cpu", [torch.float32, torch.bfloat16], free_memory()
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtypes = "cuda", [torch.bfloat16 if bf16 else torch.float32]
        has = torch.cuda.mem_get_info()[0]
    for dtype in dtypes:
        needs = sum(sizes) * dtype.itemsize + 2 * 4 * max(sizes, default=0)  # one on its way, twice
        if needs <= has:
            return device, dtype
    raise UserError(
        f"{what} does not fit: its model needs {needs / 1e9:,.1f} GB of memory, and "
        f"{has / 1e9:,.1f} GB are free; use a larger machine"
    )


def free_memory() -> int:
    """Bytes of host memory that this machine has left, if it tells; or all that it has."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", path.read_text()) if path.exists() else None
    return min(host_memory(), 1024 * int(found[1])) if found else host_memory()
