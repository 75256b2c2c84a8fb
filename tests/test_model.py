import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import loss
import ops
from loss import IGNORE, cross_entropy
from model import GPT, Attention, GPTConfig, Head, Norm
from planner.costs import count


def small(**changes) -> GPT:
    shape = {"width": 32, "depth": 2, "heads": 2, "vocab_size": 27, "max_position_embeddings": 64}
    return build(GPTConfig(**shape | changes))


def tokens(rows: int, length: int, vocab_size: int = 27) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count(bias):
    config = GPTConfig(width=96, depth=5, heads=3, vocab_size=1001, bias=bias)
    matrices = (1001 + 2048) * 96 + 5 * 12 * 96**2
    vectors = 5 * (2 + 2 + 3 + 1 + 4 + 1) * 96 + 2 * 96 if bias else (5 * 2 + 1) * 96
    assert count(config) == matrices + vectors


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"width": 30, "heads": 4}, "heads: 4 does not divide width 30"),
        ({"depth": 0}, "depth: 0 is not from 1 to 10,000"),
        ({"dropout": 1.0}, "dropout: 1.0 is not in"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads: 3 does not divide heads 4"),
        ({"width": 12, "heads": 4, "positions": "rotary"}, "rotary positions need an even width 3"),
        ({"rope_theta": 0.5}, "rope_theta: 0.5 is not in"),
        ({"mlp_width": 0}, "mlp_width: 0 is not from 1 to"),
    ],
)
def test_impossible_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**shape)


def test_units_own_every_parameter_once():
    model = small()
    owned = [p for unit in model.layers().values() for p in unit.parameters()]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


def test_initial_weights():
    model = small(width=256, heads=4, depth=8, init_std=0.03)
    block = model.decoder[3]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.03, rel=0.02)
    for residual in (block.attn.proj, block.mlp.proj):
        assert residual.weight.std().item() == pytest.approx(0.03 / math.sqrt(16), rel=0.02)
    assert not block.mlp.fc.bias.any()
    assert (block.ln_1.weight == 1).all()
    assert not torch.equal(block.attn.qkv.weight, model.decoder[4].attn.qkv.weight)


def test_initial_weights_are_a_function_of_seed_and_unit():
    model = GPT(GPTConfig(width=32, depth=2, heads=2, vocab_size=27))
    layers = {name: model.build_layer(name, seed=5) for name in model.layers()}
    torch.manual_seed(123)  # must not matter, nor must the order
    drawn = torch.rand(3)
    torch.manual_seed(123)
    for name in reversed(layers):
        again = model.build_layer(name, seed=5)
        for a, b in zip(layers[name].parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(torch.rand(3), drawn)  # and nothing else is drawn from
    other = model.build_layer("decoder.1", seed=6)
    assert not torch.equal(layers["decoder.1"].mlp.fc.weight, other.mlp.fc.weight)


class Gained(Attention):
    """What a reader adds to a layer: a parameter with a value, and one that is drawn."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gain = nn.Parameter(torch.full((config.heads,), 0.5))
        self.drawn = nn.Parameter(torch.randn(3))


def test_parameters_that_a_reader_adds(monkeypatch):
    monkeypatch.setattr("model.Attention", Gained)
    with torch.device("meta"):
        model = GPT(GPTConfig(width=32, depth=2, heads=2, vocab_size=27))
    first, again = (model.build_layer("decoder.0", seed=1).attn for _ in range(2))
    assert torch.equal(first.gain, torch.full((2,), 0.5))
    assert torch.equal(first.drawn, again.drawn)
    other = model.build_layer("decoder.1", seed=1).attn
    assert not torch.equal(first.drawn, other.drawn)


def test_causal():
    model, ids = small().eval(), tokens(1, 16)
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 27
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("ours", [False, True])
def test_nothing_as_large_as_a_mask_per_head_is_made(ours, monkeypatch):
    """The original built the causal mask as batch × heads × length × length."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    monkeypatch.setattr(ops, "SCORES", 2**16)
    monkeypatch.setattr(ops, "_is_fast_in_blocks", lambda length: True)
    model = small(max_position_embeddings=512)
    if ours:
        model.bfloat16()
    ids = tokens(2, 512)
    with Watch():
        model(ids, ids).backward()
    assert 0 < largest < 512 * 512


@pytest.mark.parametrize("shape", [(2, 3, 64, 16), (1, 4, 50, 32), (3, 2, 7, 8), (1, 1, 1, 8)])
def test_attention_in_blocks(shape, monkeypatch):
    """As near to the exact result as PyTorch's, also with scores far beyond bf16's digits."""
    monkeypatch.setattr(ops, "QUERIES", 16)
    monkeypatch.setattr(ops, "SCORES", 2000)
    monkeypatch.setattr(ops, "_is_fast_in_blocks", lambda length: True)
    (batch, heads, length, width), dtype = shape, torch.bfloat16
    qkv = (3 * torch.randn(batch, length, 3, heads, width)).to(dtype)
    y_grad = torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)

    def results(attend, dtype):
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        q, k, v = (part.transpose(1, 2) for part in leaf.unbind(2))
        y = attend(q, k, v, is_causal=True, dropout_p=0.0)
        y.backward(y_grad.to(dtype))
        return y.detach().double(), leaf.grad.double()

    exact = results(F.scaled_dot_product_attention, torch.float64)
    usual = results(F.scaled_dot_product_attention, dtype)
    for theirs, found, right in zip(usual, results(ops.attention, dtype), exact, strict=True):
        rounding = torch.finfo(dtype).eps * right.norm()
        assert (found - right).norm() <= max(1.5 * (theirs - right).norm(), rounding)


@pytest.mark.parametrize("keys", [{}, {"bias": False}, {"norm": "rmsnorm"}])
def test_lean_norms(keys):
    """As near to the result in fp32 as the model's own, and nothing but the input is kept."""
    x, y_grad = (torch.randn(2, 50, 32).bfloat16() for _ in range(2))

    def results(dtype, lean=False):
        norm = Norm(GPTConfig(width=32, depth=1, heads=2, **keys)).to(dtype)
        leaf, kept = x.to(dtype, copy=True).requires_grad_(), {}
        with torch.no_grad():
            for weight in norm.parameters():
                weight.copy_(torch.linspace(-2, 2, 32))

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        functions = nullcontext() if lean else ops.plain()
        with functions, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = norm(leaf)
        y.backward(y_grad.to(dtype))
        assert not lean or sum(kept.values()) < 1.5 * x.nbytes
        return [t.double() for t in (y.detach(), leaf.grad, *(w.grad for w in norm.parameters()))]

    plain, lean = (results(torch.bfloat16, lean) for lean in (False, True))
    for theirs, found, right in zip(plain, lean, results(torch.float32), strict=True):
        assert (found - right).norm() <= 1.02 * (theirs - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_lookup_sums_in_fp32(dtype, in_place):
    """300 equal tokens would be 256 in bf16; a main_grad gets what autograd would."""
    model = small().to(dtype)
    table = model.embedding.tokens.weight
    table.grad_dtype = torch.float32
    if in_place:
        table.main_grad = torch.ones(27, 32)
    ids, ones = torch.full((6, 50), 5), torch.ones(6, 50, 32, dtype=dtype)
    for _ in range(2):
        model.embedding(ids).backward(ones)
    expected = torch.zeros(27, 32).index_fill_(0, torch.tensor([5]), 600)
    if in_place:
        assert table.grad is None
        assert torch.equal(table.main_grad, expected + 1)
    else:
        assert torch.equal(table.grad, expected)


class Capped(Head):
    """A head that a reader changed: a soft cap with a parameter of its own, and a bias."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.cap = nn.Parameter(torch.full((1,), 0.7))
        self.bias = nn.Parameter(torch.linspace(-0.1, 0.1, config.vocab_size))

    def forward(self, x, table):
        return self.cap * torch.tanh(super().forward(x, table) / self.cap) + self.bias


class Scaled(Head):
    """A head whose table is not the embedding's own."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((config.vocab_size, 1), 1.5))

    def forward(self, x, table):
        return super().forward(2 * x, table * self.scale)


@pytest.mark.parametrize("head", [Head, Capped, Scaled])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_loss_in_chunks(head, rows, tied, in_place, monkeypatch):
    """Loss and gradients over micro-batches equal those of a plain loop, whatever the head, and so
    does the loss of an evaluation."""
    monkeypatch.setattr("model.Head", head)
    plain, ours = (small(tied_head=tied) for _ in range(2))
    monkeypatch.setattr(loss, "CHUNK", {"cpu": rows})
    monkeypatch.setattr(loss, "USUAL_VOCABULARY", 27)
    tables = {ours.embedding.tokens.weight, ours.table} if in_place else ()
    for table in tables:
        table.grad = torch.zeros_like(table)
        table.main_grad = table.grad
    for part in range(2):
        ids, targets = tokens(3, 64).roll(part, 1), tokens(3, 64).roll(part + 1, 1)
        targets[1, 5:9] = IGNORE
        logits = plain(ids).flatten(0, 1)
        expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        (expected / 384).backward()
        found = ours(ids, targets, tokens=384)
        found.backward()
        assert found.item() == pytest.approx(expected.item() / 384, rel=1e-6)
        with torch.no_grad():
            assert ours(ids, targets, tokens=384).item() == pytest.approx(found.item(), rel=1e-6)
    for table in tables:
        assert table.grad is table.main_grad
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert a.grad.any(), name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("cached", [1, 300, 10**6])
def test_loss_in_cache(cached, monkeypatch):
    """In bf16 a few rows at a time: as near to fp32's as bf16 is, whatever their number."""
    monkeypatch.setattr(loss, "CACHED", cached)
    logits, targets = torch.randn(50, 101, dtype=torch.bfloat16), torch.arange(50)
    targets[7:9] = IGNORE
    expected = logits.float()
    right = cross_entropy(expected, targets, 48)
    found = cross_entropy(logits, targets, 48)
    assert found.item() == pytest.approx(right.item(), rel=1e-6)
    assert torch.equal(logits, expected.bfloat16())


def test_dropout_masks_are_a_function_of_the_seed():
    model, ids = small(dropout=0.3), tokens(2, 32)
    first = model(ids, ids, dropout_seed=1)
    torch.rand(5)  # the global generator's state must not matter
    assert model(ids, ids, dropout_seed=1) == first
    assert model(ids, ids, dropout_seed=2) != first
    model.eval()
    assert model(ids, ids, dropout_seed=1) == model(ids, ids, dropout_seed=2)


def test_layers_one_by_one_equal_the_whole():
    """How a streaming engine runs the model."""
    model, ids = small(dropout=0.3), tokens(2, 32)
    model.seed_dropout(7, 0)
    x = model.embed(ids)
    for i, block in enumerate(model.decoder):
        model.seed_dropout(7, i + 1)
        x = block(x)
    assert model.loss(x, ids) == model(ids, ids, dropout_seed=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_with_aligned_rows(dtype):
    """As F.linear, bit for bit."""
    x, weight = torch.randn(2, 5, 32).to(dtype), torch.randn(97, 32).to(dtype)
    logits = ops.aligned_linear(x, weight)
    assert logits.stride() == (5 * 128, 128, 1)
    assert torch.equal(logits, F.linear(x, weight))
