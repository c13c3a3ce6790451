"""Newton and Schulz' iteration."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from stages.train.optimizers import muon
from stages.train.optimizers.muon import COEFFICIENTS, ITERATIONS, MIN_NORM, native_dtype, orthogonalize


def matrices(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    (matrix,) = matrices(shape)
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    (result,) = orthogonalize([matrix])
    inner = u.T @ result.double() @ vt.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-5, rtol=0)
    assert 0.6 < inner.diagonal().min() <= inner.diagonal().max() < 1.25


def test_it_is_torchs_iteration_in_another_precision():
    for matrix in matrices((5, 9), (9, 5), (4, 4)):
        theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, ITERATIONS, MIN_NORM).float()
        torch.testing.assert_close(orthogonalize([matrix], torch.bfloat16)[0].float(), theirs, atol=2**-5, rtol=0)
        torch.testing.assert_close(orthogonalize([matrix])[0], theirs, atol=2**-5, rtol=0)


def test_scale_does_not_matter_and_nothing_stays_nothing():
    (matrix,) = matrices((5, 9))
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(orthogonalize([scale * matrix])[0], orthogonalize([matrix])[0])
    assert torch.equal(orthogonalize([torch.zeros(3, 4)])[0], torch.zeros(3, 4))


def test_batching_changes_only_rounding(monkeypatch):
    mixed = matrices((5, 9), (9, 5), (4, 4), (5, 9), (2, 3))
    separate = [orthogonalize([matrix])[0] for matrix in mixed]
    for batched in (orthogonalize(mixed), None):
        if batched is None:
            monkeypatch.setattr(muon, "MAX_ELEMENTS", 50)
            batched = orthogonalize(mixed)
        for one, other in zip(batched, separate, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_cpu_computes_in_float32_always():
    assert native_dtype(torch.device("cpu")) == torch.float32
    assert native_dtype(torch.device("mps")) == torch.float32
    assert orthogonalize(matrices((2, 3)))[0].dtype == torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_computes_in_bfloat16_from_ampere_on(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_dtype(torch.device("cuda", 0)) == dtype
