"""The model card of an exported model, and its way to the Hugging Face hub."""

from dataclasses import asdict
from math import prod
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token

from common.console import UserError
from runtime.metrics import perplexity, read_records
from weights.checkpoint import Checkpoint
from weights.hub import reading

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gigagpt
---

# {name}

A {family} of {parameters:,} parameters, trained with gigaGPT.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

With this configuration in `config.yaml` it was trained by `python train.py config.yaml`:

```yaml
{configuration}```
"""


def write_card(checkpoint: Checkpoint, folder: Path, name: str, family: str, dtype: str) -> None:
    """Writes README.md: what the model is, its data, the tokens it has seen, its losses and its
    configuration. `name` is that of the folder or of the hub's repository."""
    config = checkpoint.config
    table = {
        "layers, width, heads": f"{config.depth}, {config.width}, {config.heads}",
        "vocabulary, positions": f"{config.vocab_size:,}, {config.max_position_embeddings:,}",
        "weights": dtype,
        "data": config.dataset,
        "started from": config.init_from or "random weights",
        "steps, tokens seen": f"{checkpoint.step:,}, {checkpoint.tokens:,}",
    }
    if checkpoint.recent:
        table["loss of the last step"] = f"{checkpoint.recent[-1][0]:.4f} nats a token"
    for record in read_records(checkpoint.path.parent / "metrics.jsonl"):
        if record["step"] == checkpoint.step and record.get("val_loss") is not None:
            loss = record["val_loss"]
            table["validation loss"] = f"{loss:.4f} nats a token, perplexity {perplexity(loss):.2f}"
    text = CARD.format(
        name=name,
        family=family,
        parameters=sum(prod(checkpoint.tensors[name]["shape"]) for name in checkpoint.weights),
        table="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        configuration=yaml.safe_dump(asdict(config), sort_keys=False),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def check_token() -> None:
    """Raises UserError where this machine has no token of the hub."""
    if get_token() is None:
        raise UserError("push_to needs a token of the Hugging Face hub: hf auth login, or HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Uploads the folder to a model repository of the hub, which is made if need be; returns its
    address."""
    api = HfApi()
    with reading(f"{folder} is written, but not pushed to {repository}"):
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    return str(url)
