"""Sample texts: what the model makes of `sample_prompts` while it trains, in any engine."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from common.console import UserError
from common.tokens import Tokens
from configuration import Configuration
from engines.base import Engine
from weights.huggingface import decode, encode, make_tokenizer

NEW_TOKENS = 64  # that are added to a prompt
PADDING = 64  # texts are padded to multiples of it


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from the top_k likeliest, and of these from the likeliest that
    together have the probability top_p (Holtzman et al. 2020); at temperature 0 the likeliest."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0


def draw(logits: Tensor, how: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Returns the next token (texts, 1) of each text from its logits (texts, vocab_size)."""
    count = min(how.top_k, logits.shape[1]) if how.temperature > 0 else 1
    top, tokens = logits.topk(count)
    probabilities = (top / (how.temperature or 1)).softmax(1)
    likelier = probabilities.cumsum(1) - probabilities
    kept = probabilities.where(likelier < how.top_p, 0)
    return tokens.gather(1, kept.multinomial(1, generator=generator))


@torch.no_grad()
def next_logits(engine: Engine, texts: list[Tensor]) -> Tensor:
    """Returns the logits of the token that follows each text, (texts, vocab_size), fp32 on the CPU;
    a text is ids (length,), at most max_position_embeddings. Every process must call it."""
    rows = []
    for ids in texts:  # a few lengths only, which a GPU's kernels and torch.compile prefer
        length = ceil(len(ids) / PADDING) * PADDING
        length = min(length, engine.config.max_position_embeddings)
        rows.append(F.pad(ids, (0, length - len(ids)))[None].to(engine.device))
    with engine.evaluating():
        logits = engine.last_logits(rows, [len(ids) - 1 for ids in texts])
        return torch.stack(logits).float().cpu()


class Samples:
    """The prompts of a run. Raises UserError where the data have no tokenizer, or one that can't
    encode a prompt."""

    def __init__(self, config: Configuration, tokens: Tokens):
        self.config = config
        self.prompts = []
        if config.sample_prompts:
            folder = tokens.path.parent
            if tokens.tokenizer is None:
                raise UserError(f"sample_prompts need a tokenizer.json, and {folder} has none")
            self.tokenizer = make_tokenizer(folder, tokens.tokenizer, config.vocab_size)
            self.prompts = [encode(self.tokenizer, text)[0] for text in config.sample_prompts]

    def write(self, engine: Engine, track: Callable) -> list[str]:
        """Returns each prompt with what follows it, with the same draws every time. Every process
        must call it."""
        texts = self.prompts
        draws = torch.Generator().manual_seed(self.config.seed)
        for _ in track(range(NEW_TOKENS if texts else 0), "writing samples", "token"):
            seen = [text[-self.config.max_position_embeddings :] for text in texts]
            logits = next_logits(engine, seen).nan_to_num()  # weights may not be finite
            drawn = draw(logits, Sampling(), draws)
            texts = [torch.cat(pair) for pair in zip(texts, drawn, strict=True)]
        return [self._decode(text) for text in texts]

    def _decode(self, text: Tensor) -> str:
        """Returns what was written up to the first end of text after the prompt."""
        ids = text.tolist()
        end = self.tokenizer.eos_token_id
        begin = len(ids) - NEW_TOKENS
        length = ids.index(end, begin) if end in ids[begin:] else len(ids)
        return decode(self.tokenizer, ids[:length])
