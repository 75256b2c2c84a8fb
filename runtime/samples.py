"""Sample texts: what the model makes of `sample_prompts` while it trains, in any engine."""

from collections.abc import Callable

import torch
from torch import Tensor

from configuration import Configuration
from engines.base import Engine
from runtime.console import UserError
from runtime.tokens import Tokens

LENGTH = 64  # tokens that are added to a prompt
TEMPERATURE, TOP_K = 0.8, 200  # as sample.py's


def draw(
    logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None = None
) -> Tensor:
    """The next token (texts, 1) of each text from its logits (texts, vocab_size), one of the top_k
    likeliest; at temperature 0 the likeliest."""
    top, tokens = logits.topk(min(top_k, logits.shape[1]) if temperature > 0 else 1)
    drawn = (top / (temperature or 1)).softmax(1).multinomial(1, generator=generator)
    return tokens.gather(1, drawn)


class Samples:
    """The prompts of a run. Raises UserError where the data have no tokenizer, or one that can't
    encode a prompt."""

    def __init__(self, config: Configuration, tokens: Tokens):
        self.config, self.prompts = config, []
        if config.sample_prompts:
            from runtime.huggingface import encode, make_tokenizer  # transformers is slow to import

            folder = tokens.path.parent
            if tokens.tokenizer is None:
                raise UserError(f"sample_prompts need a tokenizer.json, and {folder} has none")
            self.tokenizer = make_tokenizer(folder, tokens.tokenizer, config.vocab_size)
            self.prompts = [encode(self.tokenizer, text)[0] for text in config.sample_prompts]

    def write(self, engine: Engine, watch: Callable) -> list[str]:
        """Continues each prompt, with the same draws every time; `watch` wraps the tokens. Every
        process must call it."""
        texts = self.prompts
        draws = torch.Generator().manual_seed(self.config.seed)
        for _ in watch(range(LENGTH if texts else 0), "writing samples", "token"):
            seen = [text[-self.config.max_position_embeddings :] for text in texts]
            logits = engine.next_logits(seen).nan_to_num()  # weights may not be finite
            drawn = draw(logits, TEMPERATURE, TOP_K, draws)
            texts = [torch.cat([text, new]) for text, new in zip(texts, drawn, strict=True)]
        pairs = zip(texts, self.prompts, strict=True)
        return [self._decode(text, len(prompt)) for text, prompt in pairs]

    def _decode(self, text: Tensor, begin: int) -> str:
        """Up to the first end of text after the prompt."""
        ids, end = text.tolist(), self.tokenizer.eos_token_id
        length = ids.index(end, begin) if end in ids[begin:] else len(ids)
        return self.tokenizer.decode(ids[:length], skip_special_tokens=True)
