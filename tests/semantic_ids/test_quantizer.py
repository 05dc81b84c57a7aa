"""The residual quantiser against plain loops, and the facts its gradients rest on."""

import pytest
import torch
from vector_quantize_pytorch import ResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from llmrec.semantic_ids.kmeans import code_clusters
from llmrec.semantic_ids.quantizer import (
    NO_OTHER,
    Neighbours,
    ResidualQuantizer,
    rotate,
    sinkhorn,
    squared_distances,
)


def quantizer(levels=3, codes=5, dim=4, **settings):
    torch.manual_seed(0)
    made = ResidualQuantizer(levels, codes, dim, **settings).double()
    with torch.no_grad():
        made.codebooks.normal_()
    return made


def latents(rows=11, dim=4, seed=1):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(made, latent, weight):
    """Codes, sums and loss of each row, one level after the other."""
    codes, sums, loss = [], [], 0.0
    for row in latent:
        residual, chosen, total = row, [], torch.zeros_like(row)
        for book in made.codebooks.detach():
            best = min(range(len(book)), key=lambda k: float((residual - book[k]).square().sum()))
            loss += (1 + weight) * float((residual - book[best]).square().sum())
            total, residual = total + book[best], residual - book[best]
            chosen.append(best)
        codes.append(chosen)
        sums.append(total)
    return torch.tensor(codes), torch.stack(sums), loss


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_codes_sums_and_loss_equal_plain_loops(reduce):
    made = quantizer(reduce=reduce, commitment_weight=0.3).eval()
    latent = latents()
    codes, sums, loss = by_hand(made, latent, 0.3)
    found = made(latent)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.vectors, sums, rtol=0, atol=1e-12)
    count = len(latent) * (3 * 4 if reduce == "mean" else 1)
    assert float(found.loss) == pytest.approx(loss / count, rel=1e-12)


def test_what_is_left_after_the_sum_of_codes_is_the_last_residual():
    made, latent = quantizer().eval(), latents()
    found = made(latent)
    last_codes = made.codebooks[-1][found.codes[:, -1]]
    torch.testing.assert_close(
        latent - found.vectors, found.residuals[:, -1] - last_codes, rtol=0, atol=1e-12
    )


def test_the_gradient_of_the_sum_goes_straight_through():
    made, latent = quantizer(), latents().requires_grad_()
    weight = latents(seed=2)
    (made(latent).vectors * weight).sum().backward()
    torch.testing.assert_close(latent.grad, weight)
    assert made.codebooks.grad is None


def test_only_the_first_level_pulls_the_input_and_every_level_trains_its_own_codebook():
    made, latent = quantizer(commitment_weight=0.3, commitment="first").eval(), latents().requires_grad_()
    found = made(latent)
    found.loss.backward()
    first = made.codebooks.detach()[0][found.codes[:, 0]]
    numbers = latent.numel() * 3
    torch.testing.assert_close(latent.grad, 0.3 * 2 * (latent.detach() - first) / numbers, rtol=0, atol=1e-12)
    for level in range(3):
        expected = torch.zeros_like(made.codebooks[level])
        for row, code in enumerate(found.codes[:, level]):
            residual = found.residuals[row, level]
            expected[code] += 2 * (made.codebooks.detach()[level, code] - residual) / numbers
        torch.testing.assert_close(made.codebooks.grad[level], expected, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_published_way_of_writing_it():
    """There each level returns r + SG(q - r), and the next one gets r minus that."""
    made, latent = quantizer(commitment_weight=0.3, commitment="first").eval(), latents().requires_grad_()
    found = made(latent)
    (found.loss + found.vectors.square().sum()).backward()
    mine, books = latent.grad.clone(), made.codebooks.grad.clone()
    latent.grad = made.codebooks.grad = None
    residual, total, losses = latent, 0, []
    for level, book in enumerate(made.codebooks):
        q = book[found.codes[:, level]]
        losses.append((residual.detach() - q).square().mean() + 0.3 * (residual - q.detach()).square().mean())
        q = residual + (q - residual).detach()
        residual, total = residual - q, total + q
    (sum(losses) / len(losses) + total.square().sum()).backward()
    torch.testing.assert_close(mine, latent.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(books, made.codebooks.grad, rtol=0, atol=1e-12)


def test_sinkhorn_equals_alternate_scaling_of_the_whole_matrix():
    distances = squared_distances(latents(40), latents(6, seed=3))
    middle = (distances.max() + distances.min()) / 2
    half = distances.max() - middle + 1e-5
    share = torch.exp(-((distances - middle) / half) / 0.05)
    share = share / share.sum()
    for _ in range(20):
        share = share / share.sum(dim=1, keepdim=True) / 40
        share = share / share.sum(dim=0, keepdim=True) / 6
    torch.testing.assert_close(sinkhorn(distances, 0.05, 20), share * 40, rtol=1e-10, atol=1e-14)


def test_sinkhorn_gives_every_code_an_equal_share_of_the_batch():
    distances = squared_distances(latents(200, 8), latents(16, 8, seed=3)).float()
    share = sinkhorn(distances, 0.003, 50)
    assert share.dtype == torch.float64 and share.isfinite().all()
    torch.testing.assert_close(share.sum(dim=0), torch.full((16,), 200 / 16, dtype=torch.float64))
    count = torch.bincount(share.argmax(dim=1), minlength=16)
    nearest = torch.bincount(distances.argmin(dim=1), minlength=16)
    assert count.min() >= 8 and count.max() <= 18
    assert nearest.min() < 5


def test_the_last_level_spreads_in_training_and_takes_the_nearest_otherwise():
    made, latent = quantizer(levels=2, codes=10), latents(400)
    with torch.no_grad():
        made.codebooks[1, 1:] += 20
    training = made.train()(latent).codes
    nearest = made.eval()(latent).codes
    assert set(training[:, 1].tolist()) == set(range(10)) and set(nearest[:, 1].tolist()) == {0}
    assert torch.equal(nearest, by_hand(made, latent, 0.25)[0])
    assert torch.equal(training[:, 0], nearest[:, 0])
    made.spread_levels = []
    assert torch.equal(made.train()(latent).codes, nearest)


def test_every_level_or_none_spreads_on_demand():
    everywhere, latent = quantizer(levels=2, codes=10, sinkhorn="all"), latents(400)
    nowhere = quantizer(levels=2, codes=10, sinkhorn="none")
    assert torch.equal(nowhere.train()(latent).codes, nowhere.eval()(latent).codes)
    count = torch.stack([torch.bincount(codes, minlength=10) for codes in everywhere(latent).codes.T])
    assert count.min() >= 15 and count.max() <= 80


def test_gradients_of_all_levels_equal_equation_5():
    """r_l is the input less the codes before it, and only codes are held fixed."""
    made, latent = quantizer(commitment_weight=0.3, reduce="sum").eval(), latents().requires_grad_()
    found = made(latent)
    found.loss.backward()
    mine, books = latent.grad.clone(), made.codebooks.grad.clone()
    latent.grad = made.codebooks.grad = None
    residual, loss = latent, 0
    for level, book in enumerate(made.codebooks):
        q = book[found.codes[:, level]]
        loss = loss + (residual.detach() - q).square().sum() + 0.3 * (residual - q.detach()).square().sum()
        residual = residual - q.detach()
    (loss / len(latent)).backward()
    torch.testing.assert_close(mine, latent.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(books, made.codebooks.grad, rtol=0, atol=1e-12)


def test_codes_and_sums_equal_those_of_vector_quantize_pytorch():
    made, latent = quantizer(levels=4, codes=16, dim=6).float().eval(), latents(200, 6).float()
    oracle = ResidualVQ(dim=6, num_quantizers=4, codebook_size=16).eval()
    for layer, book in zip(oracle.layers, made.codebooks.detach()):
        layer._codebook.embed.data.copy_(book[None])
        layer._codebook.initted.fill_(True)
    sums, codes, _ = oracle(latent[None])
    found = made(latent)
    assert torch.equal(found.codes, codes[0])
    torch.testing.assert_close(found.vectors, sums[0], rtol=1e-5, atol=1e-6)


def test_the_rotation_equals_that_of_vector_quantize_pytorch():
    latent, target = latents(50, 6).requires_grad_(), latents(50, 6, seed=2)
    weight = latents(50, 6, seed=3)
    mine, theirs = rotate(latent, target), rotate_to(latent, target)
    torch.testing.assert_close(mine, target)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    first = torch.autograd.grad((mine * weight).sum(), latent)[0]
    second = torch.autograd.grad((theirs * weight).sum(), latent)[0]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    still = torch.zeros(1, 6, requires_grad=True)
    assert torch.equal(torch.autograd.grad(rotate(still, target[:1]).sum(), still)[0], torch.ones(1, 6))


def test_the_rotation_is_what_the_estimator_of_that_name_does():
    made, latent = quantizer(estimator="rotation"), latents().requires_grad_()
    found, weight = made(latent), latents(seed=2)
    sums = made.lookup(found.codes).detach().sum(dim=1)
    torch.testing.assert_close(found.vectors, sums)
    expected = torch.autograd.grad((rotate(latent, sums) * weight).sum(), latent)[0]
    torch.testing.assert_close(torch.autograd.grad((found.vectors * weight).sum(), latent)[0], expected)
    assert not torch.allclose(expected, weight), "and not straight through"
    short = (0.1 * latents(4)).requires_grad_()
    turned = torch.autograd.grad(rotate(short, sums[:4]).sum(), short)[0]
    assert not torch.allclose(turned, torch.ones_like(turned)), "vectors shorter than 1 are turned too"


def test_codebooks_begin_within_one_over_their_size_and_follow_gradients_or_means():
    torch.manual_seed(0)
    made = ResidualQuantizer(2, 50, 40)
    books = made.codebooks.detach()
    assert books.abs().max() <= 1 / 50 and books.abs().max() > 0.99 / 50
    assert abs(float(books.mean())) < 0.05 / 50 and made.codebooks.requires_grad
    assert not ResidualQuantizer(2, 5, 4, codebook_update="ema").codebooks.requires_grad
    assert made.commitment_weight == 0.25, "what the release and van den Oord et al. have"


def test_distances_are_those_of_torch():
    rows, book = latents(7), latents(5, seed=3)
    torch.testing.assert_close(squared_distances(rows, book), torch.cdist(rows, book).square())


def test_running_means_follow_their_formula():
    made, batches = quantizer(codebook_update="ema", ema_decay=0.8), [latents(30, seed=k) for k in range(3)]
    made.place(slice(None), slice(None), made.codebooks.detach().clone())
    size, total = torch.ones(3, 5, dtype=torch.float64), made.codebooks.detach().clone()
    for latent in batches:
        found = made.train()(latent)
        assert not found.loss.requires_grad
        for level in range(3):
            for code in range(5):
                own = found.residuals[found.codes[:, level] == code, level]
                size[level, code] = 0.8 * size[level, code] + 0.2 * len(own)
                total[level, code] = 0.8 * total[level, code] + 0.2 * own.sum(dim=0)
        torch.testing.assert_close(made.codebooks.detach(), total / size[..., None])
    before = made.codebooks.detach().clone()
    made.eval()(batches[0])
    assert torch.equal(made.codebooks.detach(), before)


def test_the_running_mean_of_a_code_that_was_placed_anew_starts_from_one_row():
    made = quantizer(levels=2, codebook_update="ema", ema_decay=0.8, sinkhorn="none").train()
    made.place(slice(None), slice(None), made.codebooks.detach().clone())
    for seed in range(6):
        made(latents(40, seed=seed))
    size, starts = made.size[1].clone(), made.codebooks.detach()[1].clone()
    assert size[[0, 2]].min() > 2, "each stands for more than one row by now"
    size[[0, 2]], starts[[0, 2]] = 1.0, latents(2, seed=9)
    made.place(1, torch.tensor([0, 2]), starts[[0, 2]])
    assert torch.equal(made.codebooks.detach()[1], starts)
    found = made(latents(40, seed=10))
    for code in range(5):
        own = found.residuals[found.codes[:, 1] == code, 1]
        total = 0.8 * size[code] * starts[code] + 0.2 * own.sum(dim=0)
        expected = total / (0.8 * size[code] + 0.2 * len(own))
        torch.testing.assert_close(made.codebooks.detach()[1, code], expected)
        assert len(own) or code not in (0, 2), "what was placed gets something"


def test_restart_moves_dead_codes_to_residuals_and_leaves_the_others():
    made, latent = quantizer().eval(), latents()
    before = made.codebooks.detach().clone()
    residuals = made(latent).residuals
    used = torch.ones(3, 5, dtype=torch.bool)
    used[1, 2] = used[1, 4] = False
    made.restart(used, residuals, torch.Generator().manual_seed(0))
    assert torch.equal(made.codebooks[used], before[used])
    for code in (2, 4):
        assert (made.codebooks[1, code] == residuals[:, 1]).all(dim=1).any()


def test_dead_codes_take_a_row_each_as_far_as_there_are_any():
    made = quantizer(levels=1, codes=8)
    used = torch.zeros(1, 8, dtype=torch.bool)
    before = made.codebooks.detach().clone()
    residuals = latents(rows=6)[:, None]
    made.restart(used, residuals, torch.Generator().manual_seed(0))
    placed = made.codebooks.detach()[0]
    assert len(placed[:6].unique(dim=0)) == 6 and torch.equal(placed[6:], before[0, 6:])
    for row in residuals[:, 0]:
        assert (placed[:6] == row).all(dim=1).any()


def test_a_code_that_gets_nothing_stays_however_long():
    made = ResidualQuantizer(1, 2, 3, sinkhorn="none", codebook_update="ema", ema_decay=0.5).train()
    made.place(0, slice(None), torch.tensor([[0.0, 0.0, 0.0], [50.0, 50.0, 50.0]]))
    rows = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(400):
        made(rows)
    assert torch.allclose(made.codebooks[0, 1], torch.tensor(50.0), atol=0.1)
    assert torch.allclose(made.codebooks[0, 0], rows.mean(dim=0), atol=1e-5)
    made(torch.full((16, 3), 40.0))  # and it follows again as soon as it gets something
    assert torch.allclose(made.codebooks[0, 1], torch.tensor(40.0), atol=0.1)


CLUSTERS = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
"""Of 3 levels with 5 codes; the last level's second code is alone."""


def neighbours(seed=0):
    return Neighbours(CLUSTERS, torch.Generator().manual_seed(seed), torch.device("cpu"))


def test_a_code_draws_every_other_one_of_its_cluster_equally_often_and_never_itself():
    codes = torch.arange(5)[:, None].expand(-1, 3).repeat(4000, 1)
    drawn = neighbours().draw(codes)
    for level, clusters in enumerate(CLUSTERS.tolist()):
        for code, cluster in enumerate(clusters):
            found = drawn[codes[:, level] == code, level]
            others = [k for k in range(5) if clusters[k] == cluster and k != code]
            assert set(found.tolist()) == set(others or [NO_OTHER])
            for other in others:
                assert abs((found == other).double().mean() - 1 / len(others)) < 0.03


def test_the_loss_of_diversity_is_that_of_a_loop_over_rows_and_levels():
    made, latent = quantizer().eval(), latents()
    made.neighbours = neighbours(3)
    found = made(latent)
    target = neighbours(3).draw(found.codes)
    expected, books = 0.0, made.codebooks.detach()
    for codes, others in zip(found.codes.tolist(), target.tolist()):
        for level, (code, other) in enumerate(zip(codes, others)):
            if other == NO_OTHER:
                continue
            rest = [k for k in range(5) if k != code]
            similar = {k: torch.exp(books[level, code] @ books[level, k]) for k in rest}
            expected -= float(torch.log(similar[other] / sum(similar.values())))
    assert (target == NO_OTHER).any()
    assert float(found.diversity) == pytest.approx(expected / found.codes.numel(), abs=1e-12)
    made.neighbours = None
    assert made(latent).diversity is None


def test_diversity_moves_codes_and_not_the_encoder():
    made, latent = quantizer(), latents().requires_grad_()
    made.neighbours = neighbours()
    made(latent).diversity.backward()
    assert latent.grad is None and made.codebooks.grad.abs().sum(dim=2).gt(0).all()


def test_clusters_of_codes_hold_near_codes_and_as_many_as_they_may():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(32).remainder(4).expand(2, -1)
    centres = 5 * torch.randn(4, 6, generator=generator)
    books = centres[group] + 0.1 * torch.randn(2, 32, 6, generator=generator)
    found = code_clusters(books, 4, 20, generator)
    assert found.shape == (2, 32) and found.dtype == torch.int64
    for own, clusters in zip(group, found):
        assert len({*zip(own.tolist(), clusters.tolist())}) == 4
    lone = torch.cat([torch.zeros(1, 31, 6), torch.full((1, 1, 6), 9.0)], dim=1)
    assert code_clusters(lone, 4, 20, generator)[0].bincount().min() >= 4  # half of their mean
