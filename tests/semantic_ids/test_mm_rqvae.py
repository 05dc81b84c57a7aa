"""The joint model: parts of the loss, alignment partners, scaling, and items without a vector."""

import pytest
import torch
from torch.nn import functional as F

from llmrec.precision import matrix_precision
from llmrec.semantic_ids.losses import collaborative, info_nce, mmd
from llmrec.semantic_ids.mm_rqvae import MMRQVAE, Scaling, mlp
from llmrec.semantic_ids.quantizer import ResidualQuantizer, squared_distances

SETTINGS = {
    "quantizer": {"num_levels": 2, "num_codes": 4, "sinkhorn_iterations": 20},
    "code_dim": 6,
    "hidden_dims": (7,),
    "normalise": "none",
    "reconstruction": "mmd",
    "mmd_estimator": "tllib",
    "mmd_weight": 3.0,
    "mse_weight": 1.0,
    "alignment": "infonce",
    "alignment_weight": 0.01,
    "alignment_temperature": 0.1,
    "quantization_weight": 1.0,
}
DIMS = {"collab": 3, "text": 5, "image": 4}


def model(dims=DIMS, **changes):
    torch.manual_seed(0)
    return MMRQVAE(dims, **{**SETTINGS, **changes})


def batch(rows=12, dims=DIMS):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, dim, generator=generator) for name, dim in dims.items()}


@pytest.mark.parametrize("reconstruction", ["mmd", "mse", "mmd+mse"])
@pytest.mark.parametrize("alignment", ["infonce", "mmd", "none"])
def test_the_loss_is_the_weighted_sum_of_its_parts(reconstruction, alignment):
    made = model(
        reconstruction=reconstruction,
        alignment=alignment,
        mse_weight=0.5,
        quantization_weight=2.0,
        alignment_weight=0.1,
    )
    encoded, losses = made(batch())
    expected = 0.0
    for name, found in encoded.items():
        source, decoded = found.source, found.decoded
        expected += 2 * found.quantized.loss
        expected += 3 * mmd(source, decoded) * ("mmd" in reconstruction)
        expected += 0.5 * F.mse_loss(decoded, source) * ("mse" in reconstruction)
        pair = encoded["collab"].quantized.vectors, found.quantized.vectors
        if name != "collab" and alignment != "none":
            expected += 0.1 * (info_nce(*pair, 0.1) if alignment == "infonce" else mmd(*pair))
    torch.testing.assert_close(losses.total, expected)
    named = {"quantization", *reconstruction.split("+")}
    assert losses.parts["collab"].keys() == named
    assert losses.parts["image"].keys() == named | ({"alignment"} if alignment != "none" else set())


@pytest.mark.parametrize("own_codes", [True, False])
def test_the_collaborative_loss_is_of_texts_and_pictures_that_have_both_vectors(own_codes):
    """Whether or not collab has codes of its own."""
    dims = {"collab": 6, "text": 5, "image": 4}
    made = model(
        dims if own_codes else {name: dims[name] for name in ("text", "image")},
        code_dim=6, alignment="none", collaborative_weight=0.3,
    ).eval()  # fmt: skip
    rows = batch(dims=dims)
    here = {"collab": torch.arange(12) > 2, "image": torch.arange(12) % 2 == 0}
    _, losses = made(rows, here)
    for name, both in (("text", here["collab"]), ("image", here["collab"] & here["image"])):
        vectors = made.autoencoders[name](rows[name][both]).quantized.vectors
        expected = collaborative(vectors, rows["collab"][both])
        torch.testing.assert_close(losses.parts[name]["collaborative"], expected)
    parts = losses.parts
    assert ("collab" in parts) == own_codes and "collaborative" not in parts.get("collab", {})
    expected = sum(
        3 * found["mmd"] + found["quantization"] + 0.3 * found.get("collaborative", 0.0)
        for found in parts.values()
    )
    torch.testing.assert_close(losses.total, expected)


def test_no_item_with_both_vectors_adds_nothing():
    dims = {"collab": 6, "text": 5}
    made = model({"text": 5}, code_dim=6, alignment="none", collaborative_weight=0.3)
    _, losses = made(batch(dims=dims), {"collab": torch.zeros(12, dtype=torch.bool)})
    assert "collaborative" not in losses.parts["text"]
    losses.total.backward()


def test_alignment_trains_both_encoders_and_no_codebook():
    made = model()
    _, losses = made(batch())
    losses.parts["text"]["alignment"].backward()
    for name, autoencoder in made.autoencoders.items():
        used = name != "image"
        assert (autoencoder.encoder[0].weight.grad is not None) == used
        assert autoencoder.quantizer.codebooks.grad is None
        assert autoencoder.decoder[0].weight.grad is None


def test_encoder_and_decoder_mirror_each_other_without_an_activation_at_the_end():
    made = model(hidden_dims=(9, 7)).autoencoders["text"]
    for part, widths in ((made.encoder, (5, 9, 7, 6)), (made.decoder, (6, 7, 9, 5))):
        linear = [layer for layer in part if isinstance(layer, torch.nn.Linear)]
        assert [layer.in_features for layer in linear] == list(widths[:-1])
        assert [layer.out_features for layer in linear] == list(widths[1:])
        assert isinstance(part[-1], torch.nn.Linear) and len(part) == 5
        assert not any(layer.bias.any() for layer in linear)


def test_weights_start_xavier_normal():
    torch.manual_seed(0)
    weight = mlp((400, 200))[0].weight
    assert float(weight.std()) == pytest.approx((2 / 600) ** 0.5, rel=0.02)


def test_standardising_keeps_the_order_of_distances():
    rows = torch.randn(200, 3) * torch.tensor([1.0, 5.0, 0.1]) + 7
    scaling = Scaling(3, "standardise")
    scaling.fit(rows.split(64))
    scaled = scaling(rows)
    assert scaled.mean(dim=0).abs().max() < 1e-4
    assert float(scaled.square().mean()) == pytest.approx(1, rel=1e-4)
    ratio = torch.pdist(scaled) / torch.pdist(rows)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def test_l2_gives_unit_rows_and_none_changes_nothing():
    rows = torch.randn(20, 3)
    torch.testing.assert_close(Scaling(3, "l2")(rows).norm(dim=1), torch.ones(20))
    assert torch.equal(Scaling(3, "none")(rows), rows)


def test_items_without_a_vector_change_nothing():
    """The same items, with more beside them that lack one modality each."""
    made = model().eval()
    rows = batch(12)
    present = {"collab": torch.ones(12, dtype=torch.bool), "text": torch.ones(12, dtype=torch.bool)}
    present["collab"][[1, 4]] = False
    present["text"][[4, 7, 9]] = False
    spoiled = {name: table.clone() for name, table in rows.items()}
    spoiled["collab"][~present["collab"]] = 1e3
    spoiled["text"][~present["text"]] = -1e3
    encoded, losses = made(rows, present)
    _, again = made(spoiled, present)
    assert torch.equal(losses.total, again.total)
    assert [len(found.source) for found in encoded.values()] == [10, 9, 12]
    whole, _ = made(rows)
    for name, mask in (("text", present["text"]), ("image", torch.ones(12, dtype=torch.bool))):
        both = present["collab"] & mask
        expected = info_nce(whole["collab"].quantized.vectors[both], whole[name].quantized.vectors[both], 0.1)
        torch.testing.assert_close(losses.parts[name]["alignment"], expected)


def test_a_modality_nearly_absent_from_a_batch_is_left_out_of_it():
    only = torch.zeros(12, dtype=torch.bool)
    only[3] = True
    encoded, losses = model()(batch(), {"collab": only})
    assert list(encoded) == ["text", "image"]
    assert "alignment" not in losses.parts["text"]
    losses.total.backward()


def test_without_collab_the_first_modality_is_the_anchor():
    dims = {"text": 5, "image": 4}
    _, losses = model(dims)(batch(dims=dims))
    assert "alignment" in losses.parts["image"] and "alignment" not in losses.parts["text"]


def test_without_hidden_layers_the_vectors_themselves_are_quantised():
    made = model(hidden_dims=None, code_dim=None, alignment="none").eval()
    rows = batch()
    for name, found in made(rows)[0].items():
        assert made.autoencoders[name].quantizer.codebooks.shape == (2, 4, DIMS[name])
        assert torch.equal(made.autoencoders[name].encode(rows[name]), rows[name])
        assert torch.equal(found.decoded, found.quantized.vectors)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_lower_precision_touches_neither_codes_nor_distances(precision, monkeypatch):
    """bfloat16 distances give most of so many rows another code."""
    made = model({"text": 5}).eval()
    autoencoder = made.autoencoders["text"]
    autoencoder.encoder = autoencoder.decoder = torch.nn.Identity()
    quantizer = autoencoder.quantizer = ResidualQuantizer(2, 64, 5)
    rows = batch(500)["text"]
    plain = quantizer(rows)
    wrong = squared_distances(rows.bfloat16(), quantizer.codebooks[0].bfloat16()).argmin(dim=1)
    assert (wrong != plain.codes[:, 0]).sum() > 50
    allowed = []

    def watched(*tensors):
        allowed.append(torch.get_float32_matmul_precision())
        return squared_distances(*tensors)

    monkeypatch.setattr("llmrec.semantic_ids.quantizer.squared_distances", watched)
    with matrix_precision(precision, rows.device):
        within = torch.get_float32_matmul_precision()
        found = autoencoder(rows)
        loss, same = mmd(rows, found.decoded), info_nce(rows, found.decoded, 0.1)
    assert within == ("high" if precision == "tf32" and rows.is_cuda else "highest")
    assert set(allowed) == {"highest"}
    assert torch.equal(plain.codes, found.quantized.codes) and found.decoded.dtype == torch.float32
    assert torch.equal(plain.loss, found.quantized.loss)
    assert torch.equal(loss, mmd(rows, found.decoded)) and torch.equal(
        same, info_nce(rows, found.decoded, 0.1)
    )
