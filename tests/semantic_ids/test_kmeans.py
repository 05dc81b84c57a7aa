"""k-means against scikit-learn's."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from llmrec.errors import ConfigError
from llmrec.semantic_ids.config import LearnSemanticIdsConfig, size_bounds
from llmrec.semantic_ids.kmeans import (
    init_codebooks,
    kmeans,
    lloyd,
    nearest,
    plus_plus,
    relocated,
)
from llmrec.semantic_ids.quantizer import ResidualQuantizer, squared_distances


def blobs(clusters=8, each=30, dim=6, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    rows = np.repeat(centres, each, axis=0) + spread * rng.normal(size=(clusters * each, dim))
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(centres.astype(np.float32))


@pytest.mark.parametrize("rounds", [1, 3, 50])
def test_lloyd_equals_scikit_learn_from_the_same_seeds(rounds):
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seeds = rows[:12].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = KMeans(12, init=seeds.numpy(), n_init=1, max_iter=rounds, tol=0).fit(rows.numpy())
    found = lloyd(rows, seeds, rounds)
    np.testing.assert_allclose(found.numpy(), oracle.cluster_centers_, atol=1e-10)


def test_separated_groups_are_found():
    rows, centres = blobs()
    found = kmeans(rows, 8, 10, torch.Generator().manual_seed(0))
    assert float(torch.cdist(centres, found).min(dim=1).values.max()) < 0.05


def test_seeds_are_different_rows_as_long_as_there_are_any():
    rows = torch.tensor([[0.0, 0.1], [1.0, 0.3], [5.0, 0.7]]).repeat_interleave(10, dim=0)
    seeds = plus_plus(rows, 5, torch.Generator().manual_seed(3))
    assert seeds.shape == (5, 2) and len(seeds[:3].unique(dim=0)) == 3
    assert (seeds[:, None] == rows).all(dim=-1).any(dim=1).all()


def test_an_empty_cluster_takes_the_row_that_is_served_worst():
    rows = torch.tensor([[0.0], [0.2], [0.1], [9.0]])
    assert lloyd(rows, torch.tensor([[0.0], [100.0]]), 2).flatten().tolist() == pytest.approx([0.1, 9.0])


def test_each_level_is_fitted_to_what_the_levels_before_left():
    rows, _ = blobs(spread=0.3)
    made = ResidualQuantizer(3, 6, 6)
    init_codebooks(made, rows, 10, torch.Generator().manual_seed(0))
    residual, errors = rows, []
    for book in made.codebooks.detach():
        label = squared_distances(residual, book).argmin(dim=1)
        for code in range(6):
            own = residual[label == code]
            assert len(own) > 0
        residual = residual - book[label]
        errors.append(float(residual.square().sum()))
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]


def test_one_seed_gives_equal_bytes():
    rows, _ = blobs(spread=0.5)
    first, second = (kmeans(rows, 16, 10, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, kmeans(rows, 16, 10, torch.Generator().manual_seed(2)))


def test_more_seeds_are_never_looser():
    rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    loose = [
        float(nearest(rows, kmeans(rows, 20, 5, torch.Generator().manual_seed(2), restarts=tries))[0].sum())
        for tries in (1, 8)
    ]
    assert loose[1] < loose[0]


def error(rows: torch.Tensor, centres: torch.Tensor) -> float:
    return float(nearest(rows, centres)[0].mean())


def test_in_many_dimensions_one_cluster_does_not_swallow_all():
    """Next to nothing is left of a row that stood alone: as a centre it is nearer to all rows than others."""
    rows = torch.randn(1500, 600, generator=torch.Generator().manual_seed(1))
    first = kmeans(rows, 64, 10, torch.Generator().manual_seed(0))
    rows = rows - first[nearest(rows, first)[1]]
    plain = kmeans(rows, 64, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(nearest(rows, plain)[1]).max() > 0.8 * len(rows), "the state to be avoided"
    moved = kmeans(rows, 64, 10, torch.Generator().manual_seed(0), relocate_idle=True)
    sizes = torch.bincount(nearest(rows, moved)[1], minlength=64)
    assert sizes.max() < 0.1 * len(rows) and (sizes > 1).sum() > 45
    assert error(rows, moved) < error(rows, plain)


def test_idle_centres_move_to_where_the_error_is():
    """Four groups, and four seeds of which three are in one of them."""
    groups = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = (
        groups[:, None] + 0.1 * torch.randn(4, 25, 2, generator=torch.Generator().manual_seed(0))
    ).flatten(0, 1)
    seeds = rows[[0, 1, 2, 30]]
    found = lloyd(rows, relocated(rows, seeds), 10)
    assert error(rows, found) < 0.1 < error(rows, lloyd(rows, seeds, 10))
    assert torch.equal(relocated(rows, found), found), "nothing is gained by a move"


def test_blocks_change_no_label_and_no_centre(monkeypatch):
    rows = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = lloyd(rows, rows[:9].clone(), 4)
    monkeypatch.setattr("llmrec.semantic_ids.kmeans.BLOCK_ROWS", 37)
    torch.testing.assert_close(lloyd(rows, rows[:9].clone(), 4), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("items", "codes", "said"),
    [
        (80, 64, r"at least 2 items for each of 64 codes, and there are 80; .*num_codes of at most 40"),
        (60_000, 256, r"clusters of 50 to 200 items, which 256 codes and 60000 items do not .* at least 300"),
        (5000, 4, r"needs clusters of 50 to 200 items, which 4 codes and 5000 items do not allow"),
    ],
)
def test_sizes_that_no_clusters_can_have_are_told_as_soon_as_the_items_are_known(items, codes, said):
    with pytest.raises(ConfigError, match=said):
        size_bounds(items, codes)
    config = LearnSemanticIdsConfig(init="kmeans_constrained", num_codes=codes, kmeans_rows=10**6)
    with pytest.raises(ConfigError, match=said):
        config.check_items(items)
    with pytest.raises(ConfigError) as caught:
        size_bounds(items, codes)
    size_bounds(items, int(str(caught.value).rsplit(" ", 1)[1]))  # what is advised works
    LearnSemanticIdsConfig(num_codes=codes).check_items(items)


def test_bounded_clusters_keep_the_published_bounds(monkeypatch):
    library = pytest.importorskip("k_means_constrained")
    solvers = []

    class Watched(library.KMeansConstrained):
        def fit(self, *args):
            solvers.append(self)
            return super().fit(*args)

    monkeypatch.setattr(library, "KMeansConstrained", Watched)
    assert size_bounds(12_087, 256) == (23, 92)
    rows, _ = blobs(clusters=2, each=100, spread=0.3)
    rows = torch.cat([rows, rows[:1].repeat(60, 1)])
    made = ResidualQuantizer(1, 8, 6)
    generator = torch.Generator().manual_seed(0)
    init_codebooks(made, rows, 9, generator, method="kmeans_constrained", restarts=3)
    centres = made.codebooks.detach()[0]
    # Without bounds, the 60 copies would be one cluster and have a centre on them alone.
    plain = kmeans(rows, 8, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(nearest(rows, plain)[1]).max() >= 60
    assert centres.shape == (8, 6) and centres.isfinite().all()
    (solver,) = solvers
    assert (solver.n_init, solver.max_iter) == (3, 9)
    least, most = size_bounds(len(rows), 8)
    assert (least, most) == (solver.size_min, solver.size_max) == (16, 64)
    sizes = np.bincount(solver.labels_, minlength=8)
    assert len(sizes) == 8 and sizes.min() >= least and sizes.max() <= most
    np.testing.assert_allclose(centres.numpy(), solver.cluster_centers_, rtol=1e-6)
