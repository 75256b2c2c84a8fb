import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configuration import Configuration
from engines import attention
from engines.attention import block_attention
from engines.base import has_block_attention, prepare_compute
from engines.lean import use_lean_norms
from loss import IGNORE, aligned_linear, cross_entropy, cross_entropy_in_cache
from model import GPT, GPTConfig, Norm
from planner.costs import count


def small(**changes) -> GPT:
    config = GPTConfig(
        **{"width": 32, "depth": 2, "heads": 2, "vocab_size": 27, "max_position_embeddings": 64}
        | changes
    )
    model = GPT(config)
    for unit in model.layers():
        model.init_layer(unit, seed=0)
    return model


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
    models = [GPT(GPTConfig(width=32, depth=2, heads=2, vocab_size=27)) for _ in range(2)]
    torch.manual_seed(123)  # must not matter, nor must the order
    for unit in models[0].layers():
        models[0].init_layer(unit, seed=5)
    for unit in reversed(models[1].layers()):
        models[1].init_layer(unit, seed=5)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    models[1].init_layer("decoder.1", seed=6)
    assert not torch.equal(*(m.decoder[1].mlp.fc.weight for m in models))


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

    monkeypatch.setattr(attention, "SCORES", 2**16)
    model = small(max_position_embeddings=512)
    for block in model.decoder if ours else []:
        block.attn.attend = block_attention
    ids = tokens(2, 512)
    with Watch():
        model(ids, ids).backward()
    assert 0 < largest < 512 * 512


@pytest.mark.parametrize("shape", [(2, 3, 64, 16), (1, 4, 50, 32), (3, 2, 7, 8), (1, 1, 1, 8)])
def test_attention_in_blocks(shape, monkeypatch):
    """As near to the exact result as PyTorch's, also with scores far beyond bf16's digits."""
    monkeypatch.setattr(attention, "ROWS", 16)
    monkeypatch.setattr(attention, "SCORES", 2000)
    (batch, heads, length, width), dtype = shape, torch.bfloat16
    qkv = (3 * torch.randn(batch, length, 3, heads, width)).to(dtype)
    y_grad = torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)

    def results(attend, dtype):
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        y = attend(
            *(part.transpose(1, 2) for part in leaf.unbind(2)), is_causal=True, dropout_p=0.0
        )
        y.backward(y_grad.to(dtype))
        return y.detach().double(), leaf.grad.double()

    exact = results(F.scaled_dot_product_attention, torch.float64)
    for theirs, found, right in zip(
        results(F.scaled_dot_product_attention, dtype),
        results(block_attention, dtype),
        exact,
        strict=True,
    ):
        rounding = torch.finfo(dtype).eps * right.norm()
        assert (found - right).norm() <= max(1.5 * (theirs - right).norm(), rounding)


@pytest.mark.parametrize("keys", [{}, {"bias": False}, {"norm": "rmsnorm"}])
def test_lean_norms(keys):
    """As near to the result in fp32 as the model's own, and nothing but the input is kept."""
    x, y_grad = (torch.randn(2, 50, 32).bfloat16() for _ in range(2))

    def results(lean, dtype):
        norm = Norm(GPTConfig(width=32, depth=1, heads=2, **keys)).to(dtype)
        leaf, kept = x.to(dtype, copy=True).requires_grad_(), {}
        with torch.no_grad():
            for weight in norm.parameters():
                weight.copy_(torch.linspace(-2, 2, 32))
        if lean:
            use_lean_norms(norm)

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = norm(leaf)
        y.backward(y_grad.to(dtype))
        assert not lean or sum(kept.values()) < 1.5 * x.nbytes
        return [t.double() for t in (y.detach(), leaf.grad, *(w.grad for w in norm.parameters()))]

    plain, lean = (results(lean, torch.bfloat16) for lean in (False, True))
    for theirs, found, right in zip(plain, lean, results(False, torch.float32), strict=True):
        assert (found - right).norm() <= 1.02 * (theirs - right).norm()


def test_functions_of_a_changed_model_stay():
    """What is made faster are PyTorch's functions, not those that a user has put in their place."""
    config = Configuration(width=64, depth=1, heads=2, precision="bf16", backend="CPU")
    model, changed = GPT(config), GPT(config)
    places = [("norm", "layer_norm"), ("decoder.0.attn", "attend"), ("", "cross_entropy")]
    for path, name in places:
        setattr(changed.get_submodule(path), name, min)
    for each in (model, changed):
        prepare_compute(config, each)
    assert all(getattr(changed.get_submodule(path), name) is min for path, name in places)
    assert model.norm.layer_norm is not F.layer_norm
    assert model.cross_entropy is cross_entropy_in_cache
    assert (model.decoder[0].attn.attend is block_attention) == has_block_attention(config)


def test_a_lookup_has_the_gradient_of_its_rows():
    """In bf16 summed in fp32, where 300 equal tokens would be 256."""
    whole, rows = (small().bfloat16() for _ in range(2))
    rows.embedding.sparse_grad = True
    ids, ones = torch.full((6, 50), 5), torch.ones(6, 50, 32, dtype=torch.bfloat16)
    for model in (whole, rows):
        model.embedding.tokens.weight.grad_dtype = torch.float32
        model.embedding(ids).backward(ones)
    expected = torch.zeros(27, 32).index_fill_(0, torch.tensor([5]), 300)
    assert rows.embedding.tokens.weight.grad.is_sparse
    assert torch.equal(rows.embedding.tokens.weight.grad.to_dense(), expected)
    assert torch.equal(rows.embedding(ids), whole.embedding(ids))


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_loss_in_chunks(rows, monkeypatch):
    ids, targets = tokens(3, 64), tokens(3, 64).roll(1, 0)
    targets[1, 5:9] = IGNORE
    plain, chunked = small(), small()
    expected = F.cross_entropy(
        plain(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (expected / 100).backward()
    monkeypatch.setattr(GPT, "loss_rows", rows)
    loss = chunked(ids, targets)
    (loss / 100).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, a), b in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert chunked(ids, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_table_is_summed_in_place(rows, tied, monkeypatch):
    """Over micro-batches, with the tokens of all; without these nothing but backward() adds."""
    plain, ours = (small(tied_head=tied) for _ in range(2))
    monkeypatch.setattr(GPT, "loss_rows", rows)
    for part in range(3):
        ids, targets = tokens(2, 64).roll(part, 1), tokens(2, 64).roll(part + 1, 1)
        expected = F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten(), reduction="sum")
        (expected / 384).backward()
        loss, place = ours(ids, targets, tokens=384), ours.table.grad
        loss.backward()
        assert loss.item() == pytest.approx(expected.item() / 384, rel=1e-6)
        assert place is None or ours.table.grad.data_ptr() == place.data_ptr()
    before = ours.table.grad.clone()
    ours(ids, targets)
    assert torch.equal(ours.table.grad, before)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("cached", [1, 300, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_cache(cached, dtype, monkeypatch):
    monkeypatch.setattr("loss.CACHED", cached)
    logits, targets = torch.randn(50, 101, dtype=dtype), torch.arange(50)
    targets[7:9] = IGNORE
    expected, gradient = cross_entropy(logits.clone(), targets)
    found, same = cross_entropy_in_cache(logits, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert same is logits and torch.equal(same, gradient)


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
    """As F.linear, gradients too, bit for bit; and the loss of a model is the same."""
    x, weight = torch.randn(2, 5, 32).to(dtype), torch.randn(97, 32).to(dtype)
    results = []
    for linear in (F.linear, aligned_linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        logits = linear(*inputs)
        logits.square().sum().backward()
        results.append([logits, *(t.grad for t in inputs)])
    assert logits.stride() == (5 * 128, 128, 1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    losses = []
    for linear in (F.linear, aligned_linear):
        model = GPT(GPTConfig(width=32, depth=1, heads=2, vocab_size=97))
        for layer in model.layers():
            model.init_layer(layer, 0)
        model.to(dtype).head_linear = linear
        model.loss_rows = 4
        ids = torch.arange(20).view(2, 10)
        loss = model(ids, ids)
        loss.backward()
        losses.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
