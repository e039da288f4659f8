"""Pooling of jagged lists equals a plain loop over rows, forward and gradients, and never loses a parameter's gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from triptych.embeddings.pooling import TargetAttention, pool_mean, pool_sum, repeat_rows

jagged = st.lists(st.integers(0, 6), min_size=0, max_size=9)


def vectors(lengths: list[int], dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target, list vectors and lengths, in float64."""
    generator = torch.Generator().manual_seed(seed)
    target_BD, vector_MD = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for rows in (len(lengths), sum(lengths)))
    return target_BD.requires_grad_(), vector_MD.requires_grad_(), torch.tensor(lengths, dtype=torch.int64)


def attention(dim: int, positions: int, seed: int = 0, layers: tuple[int, ...] = (7, 5)) -> TargetAttention:
    """Random everywhere: also in what is 0 or 1 at first."""
    torch.manual_seed(seed)
    module = TargetAttention(dim, layers, positions).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def plain(module: TargetAttention, target_BD: torch.Tensor, vector_MD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """DIN's eq. 3 as it is written: row by row, place by place, the MLP over [e, t, e - t, e * t]."""
    pooled, start = [], 0
    for target, length in zip(target_BD, lengths, strict=True):
        total = target * 0
        for place in range(length):
            value = vector_MD[start + place]
            key = value if module.place_PD is None else value + module.place_PD[length - 1 - place]
            hidden = F.linear(torch.cat([key, target, key - target, key * target]), module.first.weight, module.first.bias)
            total = total + module.rest(hidden) * value
        pooled.append(total)
        start += length
    return torch.stack(pooled) if pooled else target_BD * 0


def padded(module: TargetAttention, target_BD: torch.Tensor, vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """The same on padded lists [B, longest, D], with a mask."""
    longest = max(1, int(lengths_B.max()))
    place_BL = torch.arange(longest).expand(len(lengths_B), -1)
    known_BL = place_BL < lengths_B.unsqueeze(1)
    value_BLD = torch.zeros(*known_BL.shape, vector_MD.shape[1], dtype=vector_MD.dtype).masked_scatter(known_BL.unsqueeze(2), vector_MD)
    key_BLD = value_BLD
    if module.place_PD is not None:
        key_BLD = value_BLD + module.place_PD[(lengths_B.unsqueeze(1) - 1 - place_BL).clamp(min=0)]
    target_BLD = target_BD.unsqueeze(1).expand_as(key_BLD)
    mixed = torch.cat([key_BLD, target_BLD, key_BLD - target_BLD, key_BLD * target_BLD], dim=2)
    weight_BL1 = module.rest(module.first(mixed)) * known_BL.unsqueeze(2)
    return (weight_BL1 * value_BLD).sum(dim=1)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of an uneven sum of the output, so that no column is like another."""
    weight = torch.arange(1, output.numel() + 1, dtype=output.dtype).view_as(output).cos()
    return list(torch.autograd.grad((output * weight).sum(), inputs, materialize_grads=True))


@settings(deadline=None)
@given(jagged, st.sampled_from([torch.int32, torch.int64]), st.sampled_from([1, 3, 16]))
def test_sum_and_mean_equal_a_loop(lengths: list[int], lengths_type: torch.dtype, dim: int) -> None:
    _, vector_MD, lengths_B = vectors(lengths, dim)
    parts = vector_MD.split(lengths)
    for pool, plainly in ((pool_sum, lambda part: part.sum(0)), (pool_mean, lambda part: part.sum(0) / max(1, len(part)))):
        expected = torch.stack([plainly(part) for part in parts]) if parts else vector_MD.new_zeros(0, dim, requires_grad=True)
        found = pool(vector_MD, lengths_B.to(lengths_type))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, [vector_MD]), gradients(expected, [vector_MD]) if parts else [vector_MD * 0])


@settings(deadline=None)
@given(jagged)
def test_repeated_rows_equal_a_loop(lengths: list[int]) -> None:
    target_BD, _, lengths_B = vectors(lengths, 3)
    expected = [target_BD[row] for row, length in enumerate(lengths) for _ in range(length)]
    found = repeat_rows(target_BD, lengths_B, sum(lengths))
    torch.testing.assert_close(found, torch.stack(expected) if expected else target_BD.new_zeros(0, 3), check_stride=False)
    torch.testing.assert_close(
        gradients(found, [target_BD])[0], gradients(torch.stack(expected), [target_BD])[0] if expected else target_BD * 0
    )


def test_gradients_agree_with_finite_differences_twice() -> None:
    target_BD, vector_MD, lengths_B = vectors([2, 0, 3, 1], 3)
    assert torch.autograd.gradcheck(lambda x: pool_mean(x, lengths_B), vector_MD)
    assert torch.autograd.gradgradcheck(lambda x: pool_sum(x**3, lengths_B), vector_MD)
    assert torch.autograd.gradgradcheck(lambda x: repeat_rows(x**3, lengths_B, 6), target_BD)


@settings(deadline=None, max_examples=60)
@given(jagged, st.sampled_from([0, 6, 11]), st.sampled_from([1, 4]), st.integers(0, 3))
def test_attention_equals_eq_3_of_din(lengths: list[int], positions: int, dim: int, seed: int) -> None:
    module = attention(dim, positions, seed)
    target_BD, vector_MD, lengths_B = vectors(lengths, dim, seed)
    inputs = [target_BD, vector_MD, *module.parameters()]
    found, expected = module(target_BD, vector_MD, lengths_B), plain(module, target_BD, vector_MD, lengths)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)
    if lengths:
        torch.testing.assert_close(padded(module, target_BD, vector_MD, lengths_B), expected)


@pytest.mark.parametrize("layers", [(36,), (64, 32)])
def test_attention_in_float32_equals_padded_float64_at_the_size_of_training(layers: tuple[int, ...]) -> None:
    lengths = torch.randint(0, 50, (512,), generator=torch.Generator().manual_seed(1)).tolist()
    module = attention(16, 50, layers=layers)
    target_BD, vector_MD, lengths_B = vectors(lengths, 16)
    expected = padded(module, target_BD, vector_MD, lengths_B)
    slopes = gradients(expected, [target_BD, vector_MD, *module.parameters()])
    single = [target_BD.detach().float().requires_grad_(), vector_MD.detach().float().requires_grad_()]
    module = module.float()
    found = module(*single, lengths_B)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    for one, other in zip(gradients(found, [*single, *module.parameters()]), slopes, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("positions", [0, 5])
def test_without_any_list_the_output_and_every_gradient_are_0(lengths: list[int], positions: int) -> None:
    module = attention(4, positions)
    target_BD, vector_MD, lengths_B = vectors(lengths, 4)
    pooled_BD = module(target_BD, vector_MD, lengths_B)
    assert pooled_BD.shape == (len(lengths), 4) and not pooled_BD.any()
    pooled_BD.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_places_count_from_the_end_so_a_list_may_lose_its_oldest() -> None:
    module = attention(4, 6)
    target_BD, vector_MD, _ = vectors([6], 4)
    long, short = (module.activation(target_BD, vector_MD[6 - n :], torch.tensor([n])) for n in (6, 2))
    torch.testing.assert_close(long[-2:], short)
    assert not torch.allclose(module.activation(target_BD, vector_MD.flip(0), torch.tensor([6])).flip(0), long)


def test_without_positions_the_order_within_a_list_means_nothing() -> None:
    module = attention(4, 0)
    target_BD, vector_MD, lengths_B = vectors([5], 4)
    torch.testing.assert_close(module(target_BD, vector_MD.flip(0), lengths_B), module(target_BD, vector_MD, lengths_B))


def test_a_row_does_not_depend_on_the_others_of_its_batch() -> None:
    module, lengths = attention(4, 6), [3, 0, 6, 1]
    target_BD, vector_MD, lengths_B = vectors(lengths, 4)
    together = module(target_BD, vector_MD, lengths_B)
    for row, part in enumerate(vector_MD.split(lengths)):
        torch.testing.assert_close(module(target_BD[row : row + 1], part, lengths_B[row : row + 1])[0], together[row])


def test_bf16_is_near_float32_and_keeps_the_type_of_the_vectors() -> None:
    torch.manual_seed(0)
    module = TargetAttention(16, positions=6)
    target_BD, vector_MD, lengths_B = vectors([6, 0, 4, 1] * 8, 16)
    target_BD, vector_MD = target_BD.detach().float(), vector_MD.detach().float().requires_grad_()
    exact = module(target_BD, vector_MD, lengths_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(target_BD, vector_MD, lengths_B)
    assert rough.dtype == torch.float32
    (exact_slope,), (rough_slope,) = gradients(exact, [vector_MD]), gradients(rough, [vector_MD])
    for one, other in ((rough, exact), (rough_slope, exact_slope)):
        assert 0 < (one - other).norm() / other.norm() < 0.02  # bf16 has 8 bits


def test_equal_seeds_give_equal_modules_and_runs() -> None:
    target_BD, vector_MD, lengths_B = vectors([4, 0, 6] * 50, 8)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        module = TargetAttention(8, positions=6).double()
        pooled_BD = module(target_BD, vector_MD, lengths_B)
        runs.append([pooled_BD, *gradients(pooled_BD, [target_BD, vector_MD, *module.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
