"""Writes text: with transformers where its model computes the same as model.py, else with it."""

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.console import UserError, warn
from model import GPT
from planner.machine import host_memory
from runtime.samples import Sampling, draw
from weights.checkpoint import Checkpoint, open_newest
from weights.families import family_of
from weights.hub import find_file, open_tokenizer, read_json, reading
from weights.huggingface import check_same, load_model, load_tokenizer, read_config, weight_files


def open_source(checkpoint_path: str | None, init_from: str | None, out_dir: Path) -> tuple:
    """Return the tokenizer of a checkpoint or of a model of Hugging Face, and what writes texts:
    generate(ids, max_new_tokens, how, end): ids (1, n) -> (1, n + max_new_tokens), or fewer where
    the text ends."""
    if (checkpoint_path is None) == (init_from is None):
        raise UserError("--checkpoint_path or --init_from is required, and not both")
    if init_from is not None:
        return open_released(init_from)
    checkpoint = open_newest(checkpoint_path, out_dir)
    return load_tokenizer(checkpoint), open_model(checkpoint)


def open_released(source: str) -> tuple:
    """Return the same for a folder or hub name; any model that transformers has without code of its
    own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with reading(f"init_from: {source}"):
        config = read_config(source)
        config._attn_implementation = None  # it can name code on the hub
        weight_files(source, getattr(config, "transformers_weights", None))  # raises for a pickle
        read_json(source, "tokenizer_config.json")  # raises where it brings code
        if file := find_file(source, "tokenizer.json"):
            open_tokenizer(file.read_bytes())
        safe = {"config": config, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        with torch.device("meta"):
            blank = AutoModelForCausalLM.from_config(**safe)
        device, dtype = choose_memory("it", blank)
        safe |= {"use_safetensors": True, "generation_config": GenerationConfig()}
        how = {"dtype": dtype, "output_loading_info": True}
        model, report = AutoModelForCausalLM.from_pretrained(source, **safe, **how)
        if missing := report["missing_keys"]:  # transformers would draw them
            raise ValueError(f"it lacks {min(missing)}")
    return tokenizer, partial(generate, model.to(device))


def open_model(checkpoint: Checkpoint) -> Callable[..., Tensor]:
    """Return what writes texts with a checkpoint: see `open_source`."""
    config = checkpoint.check_model()
    with torch.device("meta"):
        model = GPT(config).eval()
    device, dtype = choose_memory(str(checkpoint.path), model)
    try:
        check_same(config, family_of(config).theirs(config))
    except UserError as error:
        warn(f"{error}; generating with model.py, which is slower")
    else:
        return partial(generate, load_model(checkpoint, config, device, dtype))
    weights = {name: checkpoint.read(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return partial(generate_plain, model)


def generate(model, ids: Tensor, max_new_tokens: int, how: Sampling, end: int | None) -> Tensor:
    """Continue ids with transformers' model. At the last of its positions it resumes from the
    second half of the text."""
    limit = model.config.max_position_embeddings
    ids = ids.to(model.device)
    length = ids.shape[1] + max_new_tokens
    options = {"pad_token_id": 0, "eos_token_id": end, "do_sample": how.temperature > 0}
    if how.temperature > 0:
        options |= asdict(how)
    while ids.shape[1] < length:
        seen = ids
        if seen.shape[1] >= limit:
            seen = ids[:, -max(1, limit // 2) :]
        new = min(length - ids.shape[1], max(1, limit - seen.shape[1]))
        mask = torch.ones_like(seen)
        out = model.generate(seen, attention_mask=mask, max_new_tokens=new, **options)
        ids = torch.cat([ids, out[:, seen.shape[1] :]], dim=1)
        if ids[0, -1] == end:
            break
    return ids


@torch.no_grad()
def generate_plain(
    model: GPT, ids: Tensor, max_new_tokens: int, how: Sampling, end: int | None
) -> Tensor:
    """Continue ids with model.py, which sees as many of the last tokens as it has positions."""
    ids = ids.to(model.table.device)
    for _ in range(max_new_tokens):
        logits = model(ids[:, -model.config.max_position_embeddings :])[:, -1].float()
        ids = torch.cat([ids, draw(logits, how)], dim=1)
        if ids[0, -1] == end:
            break
    return ids


def choose_memory(what: str, model: nn.Module) -> tuple[str, torch.dtype]:
    """Return the device that a model is to be held on, a GPU if there is one, and its dtype: on a
    CPU fp32, or bf16 where that does not fit. Raises UserError where it does not."""
    device = "cpu"
    dtypes = [torch.float32, torch.bfloat16]
    has = free_memory()
    if torch.cuda.is_available():
        device = "cuda"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtypes = [torch.bfloat16 if bf16 else torch.float32]
        has = torch.cuda.mem_get_info()[0]
    sizes = [tensor.numel() for tensor in (*model.parameters(), *model.buffers())]
    for dtype in dtypes:
        needs = sum(sizes) * dtype.itemsize + 2 * 4 * max(sizes, default=0)  # one on its way, twice
        if needs <= has:
            return device, dtype
    raise UserError(
        f"{what} does not fit: its model needs {needs / 1e9:,.1f} GB of memory, and "
        f"{has / 1e9:,.1f} GB are free; use a larger machine"
    )


def free_memory() -> int:
    """Return the bytes of host memory that this machine has left, if it tells; or all it has."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", path.read_text()) if path.exists() else None
    return min(host_memory(), 1024 * int(found[1])) if found else host_memory()
