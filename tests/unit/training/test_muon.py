import pytest
import torch

from ultrathink.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    result = orthogonalize(matrices).float()
    assert result.shape == matrices.shape
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.5
    assert singular.max() < 1.35
    # The directions are those of the exact polar factor.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95


def test_step_equals_the_published_update() -> None:
    """Against the rule written out: Nesterov momentum, orthogonalized, scaled by shape."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(24, 8))
    expected = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    buffer = torch.zeros_like(expected)
    for _ in range(3):
        gradient = torch.randn(24, 8)
        weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        nesterov = 0.1 * gradient + 0.9 * buffer
        direction = orthogonalize(nesterov[None])[0].float()
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * (24 / 8) ** 0.5 * direction
    assert torch.allclose(weight, expected, atol=1e-2)


def test_fused_matrices_are_orthogonalized_apart() -> None:
    torch.manual_seed(2)
    gradient = torch.randn(24, 16)
    fused = torch.nn.Parameter(torch.zeros(24, 16))
    fused.grad = gradient.clone()
    Muon([fused], lr=1.0, row_splits={fused: (16, 8)}).step()
    parts = []
    for piece in gradient.split([16, 8]):
        part = torch.nn.Parameter(torch.zeros_like(piece))
        part.grad = piece.clone()
        Muon([part], lr=1.0).step()
        parts.append(part.detach())
    assert torch.allclose(fused, torch.cat(parts), atol=1e-2)
    whole = torch.nn.Parameter(torch.zeros(24, 16))
    whole.grad = gradient.clone()
    Muon([whole], lr=1.0).step()
    assert not torch.allclose(fused, whole, atol=1e-2)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="Muon updates matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_each_matrix_of_a_stack_moves_as_if_it_were_alone() -> None:
    """Experts: ``[E, R, C]``, each with the row splits of a fused projection."""
    torch.manual_seed(3)
    gradient = torch.randn(5, 24, 16)
    stack = torch.nn.Parameter(torch.zeros(5, 24, 16))
    stack.grad = gradient.clone()
    Muon([stack], lr=1.0, row_splits={stack: (16, 8)}).step()
    for number in range(5):
        alone = torch.nn.Parameter(torch.zeros(24, 16))
        alone.grad = gradient[number].clone()
        Muon([alone], lr=1.0, row_splits={alone: (16, 8)}).step()
        assert torch.allclose(stack[number], alone, atol=1e-2)
