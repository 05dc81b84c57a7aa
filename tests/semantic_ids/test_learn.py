"""The stage from end to end on a small world whose modalities share their groups of items."""

import dataclasses
import json
import logging
from itertools import permutations

import numpy as np
import pytest
import torch
from test_mm_rqvae import DIMS, SETTINGS, batch
from torch.nn import functional as F
from worlds import interactions, two_communities

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.errors import ArtifactMismatchError, ConfigError, DataError, TrainingError
from llmrec.finished import fingerprint
from llmrec.pipeline import run_stage
from llmrec.semantic_ids import kmeans as kmeans_module
from llmrec.semantic_ids import mm_rqvae, train
from llmrec.semantic_ids import quantizer as quantizer_module
from llmrec.semantic_ids.assign import assign, frozen, separate
from llmrec.semantic_ids.config import LearnSemanticIdsConfig, size_bounds
from llmrec.semantic_ids.kmeans import code_clusters, kmeans
from llmrec.semantic_ids.learn import ItemRows, learn_semantic_ids, model_settings
from llmrec.semantic_ids.losses import collaborative, info_nce, mmd
from llmrec.semantic_ids.mm_rqvae import MMRQVAE
from llmrec.semantic_ids.train import TrainingItems, cluster_codes, fit, initialise, num_batches, train_epoch

NUM_ITEMS = 240
SMALL = LearnSemanticIdsConfig(
    num_levels=3,
    num_codes=16,
    code_dim=12,
    hidden_dims=(24,),
    reconstruction="mmd+mse",
    epochs=30,
    batch_size=80,
    learning_rate=3e-3,
    log_every_epochs=10,
)


def clustered(num_items=NUM_ITEMS, groups=12, seed=0):
    """Items of one group have similar vectors in every modality; users like two groups each."""
    rng = np.random.default_rng(seed)
    group = np.arange(num_items) % groups
    made = {}
    for name, dim in {"collab": 8, "text": 20, "image": 14}.items():
        centres = rng.normal(size=(groups, dim))
        rows = centres[group] + 0.4 * rng.normal(size=(num_items, dim))
        made[name] = np.concatenate([np.zeros((1, dim)), rows]).astype(np.float32)
    members = [np.flatnonzero(group == number) + 1 for number in range(groups)]
    sequences = []
    for user in range(60):
        liked = np.concatenate([members[user % groups], members[(user + 5) % groups]])
        sequences.append(rng.permutation(liked)[:8].tolist())
    return interactions(sequences, num_items), made


def artefacts(data, made, missing=None):
    collab = CollabEmbeddings(catalog=data.catalog, provider="precomputed", vectors=made["collab"])
    rest = {name: table for name, table in made.items() if name != "collab"}
    flags = {name: np.zeros(data.num_items + 1, dtype=bool) for name in rest} | (missing or {})
    encoders = {name: {} for name in rest}
    return collab, ContentEmbeddings(catalog=data.catalog, vectors=rest, missing=flags, encoders=encoders)


@pytest.fixture(scope="module")
def learned():
    data, made = clustered()
    return learn_semantic_ids(SMALL, data, *artefacts(data, made)), data, made


def test_every_item_gets_codes_and_codebooks_are_used(learned):
    ids, data, _ = learned
    assert ids.modalities == ("collab", "text", "image") and ids.catalog == data.catalog
    for name, codes in ids.codes.items():
        assert codes.shape == (NUM_ITEMS + 1, 3) and codes.dtype == np.int64 and not codes[0].any()
        assert ids.codebooks[name].shape == (3, 16, 12) and ids.codebooks[name].dtype == np.float32
        assert min(level["utilisation"] for level in ids.quality["modalities"][name]["levels"]) > 0.8
    alone = [found["collision_rate"] for found in ids.quality["modalities"].values()]
    assert ids.quality["joined"]["collision_rate"] < 0.2 * min(alone)


def test_training_lowers_the_loss_and_reconstructs(learned):
    ids, _, _ = learned
    assert [row["epoch"] for row in ids.log] == [10, 20, 30]
    assert ids.log[-1]["loss"] < 0.9 * ids.log[0]["loss"]
    assert set(ids.log[0]["parts"]["text"]) == {"mmd", "mse", "quantization", "alignment"}
    for found in ids.quality["modalities"].values():
        assert found["reconstruction_error"] < 0.5


def test_codes_keep_the_order_of_distances_and_random_codes_do_not(learned):
    for found in learned[0].quality["modalities"].values():
        tau = found["tau"]
        assert tau["num_samples"] == 60 * 5
        assert tau["latent"] > 0.3 and tau["decoded"] > 0.3 and abs(tau["random_codes"]) < 0.2


def test_items_of_one_group_share_first_codes(learned):
    ids, _, _ = learned
    group = np.arange(NUM_ITEMS) % 12
    for codes in ids.codes.values():
        first = codes[1:, 0]
        same = (first[:, None] == first)[group[:, None] == group].mean()
        other = (first[:, None] == first)[group[:, None] != group].mean()
        assert same > 5 * other


def test_the_frozen_quantiser_gives_the_exported_codes_alone_or_in_company(learned):
    ids, _, made = learned
    for name, codes in assign(ids, made).items():
        assert np.array_equal(codes[1:], ids.codes[name][1:])
    few = assign(ids, {"text": made["text"][[7]]})
    assert np.array_equal(few["text"], ids.codes["text"][[7]])


def test_codes_survive_the_disk(learned, tmp_path):
    ids, _, made = learned
    ids.save(tmp_path)
    loaded = SemanticIds.load(tmp_path)
    assert loaded.quality == ids.quality and loaded.log == ids.log
    assert np.array_equal(assign(loaded, {"image": made["image"]})["image"][1:], ids.codes["image"][1:])


def test_vectors_that_do_not_fit_are_refused(learned):
    ids, _, made = learned
    with pytest.raises(
        ArtifactMismatchError, match=r"text vectors of shape \(5, 3\) do not fit.*text \(n, 20\)"
    ):
        assign(ids, {"text": np.zeros((5, 3), dtype=np.float32)})
    bare = dataclasses.replace(ids, model={}, state={})
    with pytest.raises(ArtifactMismatchError, match="saved without the quantiser"):
        assign(bare, made)


def test_one_seed_gives_equal_files_and_another_seed_others(tmp_path):
    data, made = clustered(num_items=80)
    config = dataclasses.replace(SMALL, epochs=4, log_every_epochs=2, num_codes=8)
    inputs = (data, *artefacts(data, made))
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(prints))
        ids = learn_semantic_ids(dataclasses.replace(config, seed=seed), *inputs)
        folder = tmp_path / name
        folder.mkdir()
        ids.save(folder)
        prints.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert prints[0] == prints[1] and prints[0] != prints[2]


def test_valid_and_test_items_change_no_byte():
    data, made = clustered()
    changed = data.item.copy()
    changed[data.split > 0] = changed[data.split > 0] % data.num_items + 1
    config = dataclasses.replace(SMALL, epochs=2, log_every_epochs=1)
    before = learn_semantic_ids(config, data, *artefacts(data, made))
    after = learn_semantic_ids(config, dataclasses.replace(data, item=changed), *artefacts(data, made))
    assert before.quality == after.quality and before.log == after.log
    for name in before.modalities:
        assert np.array_equal(before.codes[name], after.codes[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"reconstruction": "mmd"},
        {"reconstruction": "mse", "alignment": "mmd"},
        {"alignment": "none", "sinkhorn": "none", "normalise": "l2"},
        {"init": "random", "rq_reduce": "sum", "normalise": "none"},
        {"num_levels": 1, "hidden_dims": (), "mmd_estimator": "unbiased", "restart_dead_codes": False},
        {"codebook_update": "ema", "ema_decay": 0.8, "estimator": "rotation", "sinkhorn": "all"},
        {"commitment": "first", "include_pad": True, "precision": "bfloat16"},
        {"precision": "tf32", "kmeans_restarts": 3, "kmeans_rows": 40},
        {
            "codebook_update": "gradient",
            "diversity_weight": 0.1,
            "diversity_clusters": 4,
            "include_pad": True,
        },
        {"code_dim": 8, "collaborative_weight": 0.5},
    ],
)
def test_every_option_runs(changes):
    data, made = clustered(num_items=80)
    config = dataclasses.replace(SMALL, epochs=3, log_every_epochs=1, min_utilisation=0.0, **changes)
    ids = learn_semantic_ids(config, data, *artefacts(data, made))
    assert len(ids.log) == 3 and json.dumps(ids.quality, allow_nan=False)


def test_half_precision_learns_within_an_epoch():
    """Encoders that stood still until its end would leave the loss of later batches as it was."""
    data, made = clustered()
    config = dataclasses.replace(SMALL, epochs=2, log_every_epochs=1, batch_size=8, min_utilisation=0.0)
    full, half = (
        learn_semantic_ids(dataclasses.replace(config, precision=one), data, *artefacts(data, made))
        for one in ("float32", "bfloat16")
    )
    assert half.log[-1]["loss"] == pytest.approx(full.log[-1]["loss"], rel=0.05)


def test_restarts_keep_codes_alive():
    data, made = clustered()
    config = dataclasses.replace(SMALL, init="random", epochs=20, min_utilisation=0.0)
    used = {}
    for restart in (True, False):
        ids = learn_semantic_ids(
            dataclasses.replace(config, restart_dead_codes=restart), data, *artefacts(data, made)
        )
        used[restart] = ids.quality["modalities"]["text"]["levels"][0]["utilisation"]
    assert used[True] > used[False] + 0.2


def test_codes_that_nothing_trained_are_not_handed_on():
    """What the last epoch left dead stays so, and the log and the judgement say it alike."""
    data, made = clustered()
    config = dataclasses.replace(SMALL, init="random", epochs=2, log_every_epochs=1, min_utilisation=0.0)
    plain = learn_semantic_ids(config, data, *artefacts(data, made))
    once = dataclasses.replace(config, epochs=1)
    never = dataclasses.replace(once, restart_dead_codes=False)
    first, same = (learn_semantic_ids(one, data, *artefacts(data, made)) for one in (once, never))
    for name in plain.modalities:
        assert np.array_equal(first.codebooks[name], same.codebooks[name])
        # Random codes: most are dead after one epoch, and live again after the next.
        dead = [level["utilisation"] for level in first.quality["modalities"][name]["levels"]]
        alive = [level["utilisation"] for level in plain.quality["modalities"][name]["levels"]]
        assert min(alive) > min(dead)


def test_a_subset_of_modalities_and_a_missing_one():
    data, made = clustered(num_items=80)
    collab, content = artefacts(data, made)
    config = dataclasses.replace(SMALL, epochs=2, log_every_epochs=1, modalities=("image", "collab"))
    assert learn_semantic_ids(config, data, collab, content).modalities == ("collab", "image")
    del made["image"]
    with pytest.raises(ConfigError, match=r"asks for image, but there are vectors for collab, text only"):
        learn_semantic_ids(config, data, *artefacts(data, made))


def test_one_modality_has_no_alignment_and_says_so(caplog):
    data, made = clustered(num_items=80)
    config = dataclasses.replace(SMALL, epochs=2, log_every_epochs=1, modalities=("text",))
    with caplog.at_level(logging.INFO, logger="llmrec"):
        ids = learn_semantic_ids(config, data, *artefacts(data, made))
    assert "no alignment loss, as there is one modality (text)" in caplog.text
    assert "alignment" not in ids.log[0]["parts"]["text"]
    for changes, name in (
        ({"alignment": "mmd"}, "alignment"),
        ({"alignment_weight": 0.1}, "alignment_weight"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}.* has no effect with one modality \(text\)"):
            learn_semantic_ids(dataclasses.replace(config, **changes), data, *artefacts(data, made))


def test_items_without_a_vector_get_codes_but_are_not_trained_on():
    data, made = clustered(num_items=120)
    missing = np.zeros(121, dtype=bool)
    missing[3::7] = True
    zeroed, filled = dict(made), dict(made)
    zeroed["image"] = np.where(missing[:, None], 0, made["image"]).astype(np.float32)
    filled["image"] = np.where(missing[:, None], 50, made["image"]).astype(np.float32)
    config = dataclasses.replace(SMALL, epochs=3, log_every_epochs=3)
    first, second = (
        learn_semantic_ids(config, data, *artefacts(data, tables, {"image": missing}))
        for tables in (zeroed, filled)
    )
    assert first.quality["modalities"]["image"]["num_items"] == 120 - missing.sum()
    assert first.quality["modalities"] == second.quality["modalities"]
    for name in first.modalities:
        assert np.array_equal(first.codebooks[name], second.codebooks[name])
    assert len(np.unique(first.codes["image"][missing], axis=0)) == 1


def test_collapse_is_an_error_with_the_numbers():
    data, made = clustered()
    config = dataclasses.replace(
        SMALL,
        num_codes=64,
        init="random",
        restart_dead_codes=False,
        sinkhorn="none",
        epochs=2,
        log_every_epochs=1,
    )
    message = r"codebooks collapsed: share of codes used per level 0\.\d+, .*at least 0\.5.*=64; fewer codes"
    with pytest.raises(TrainingError, match=message):
        learn_semantic_ids(config, data, *artefacts(data, made))


def test_more_codes_than_items_is_an_error_with_advice():
    data, made = clustered(num_items=80)
    config = dataclasses.replace(SMALL, num_codes=256)
    with pytest.raises(ConfigError, match=r"collab vector \(80\), got 256; .*num_codes=8$"):
        learn_semantic_ids(config, data, *artefacts(data, made))


def test_equal_vectors_are_an_error():
    data, made = clustered(num_items=80)
    made["text"][1:] = 1.0
    config = dataclasses.replace(SMALL, num_codes=8)
    with pytest.raises(DataError, match="all 80 text vectors are equal"):
        learn_semantic_ids(config, data, *artefacts(data, made))


def test_a_loss_that_is_not_a_number_stops_the_run():
    data, made = clustered(num_items=80)
    config = dataclasses.replace(SMALL, num_codes=8, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) in epoch \d+; lower"):
        learn_semantic_ids(config, data, *artefacts(data, made))


def test_catalogues_must_be_the_same():
    data, made = clustered(num_items=80)
    collab, content = artefacts(data, made)
    with pytest.raises(ArtifactMismatchError, match="different catalogues"):
        learn_semantic_ids(SMALL, two_communities(), collab, content)


@pytest.mark.parametrize(
    ("num_items", "batch_size", "expected"),
    [(12101, 1024, 12), (1024, 1024, 1), (3, 2, 1), (2, 2, 1), (9, 2, 4)],
)
def test_batches_are_of_equal_size_and_never_a_single_item(num_items, batch_size, expected):
    assert num_batches(num_items, batch_size) == expected
    sizes = [len(part) for part in torch.arange(num_items).tensor_split(expected)]
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1


def test_the_pipeline_runs_and_remembers_the_stage(tmp_path):
    data, made = clustered(num_items=80)
    inputs = []
    for artefact in (data, *artefacts(data, made)):
        folder = tmp_path / artefact.stage
        inputs.append(run_stage(passing_on(artefact), SMALL, (), folder))
    config = dataclasses.replace(SMALL, epochs=2, log_every_epochs=1, num_codes=8)
    first = run_stage(learn_semantic_ids, config, tuple(inputs), tmp_path / "learn_semantic_ids")
    again = run_stage(learn_semantic_ids, config, tuple(inputs), tmp_path / "learn_semantic_ids")
    assert fingerprint(first) == fingerprint(again) and first.modalities == ("collab", "text", "image")


def passing_on(artefact):
    """A stage that returns what it is given."""

    def stage(config):
        return artefact

    stage.__name__ = artefact.stage
    stage.__annotations__ = {"return": type(artefact)}
    return stage


def test_residual_k_means_needs_no_training_and_reconstructs():
    data, made = clustered()
    config = LearnSemanticIdsConfig(method="rkmeans", num_levels=3, num_codes=16)
    ids = learn_semantic_ids(config, data, *artefacts(data, made))
    assert ids.log == [] and {name: table.shape[2] for name, table in ids.codebooks.items()} == {
        "collab": 8,
        "text": 20,
        "image": 14,
    }
    for name, found in ids.quality["modalities"].items():
        assert found["reconstruction_error"] < 0.15 and found["tau"]["latent"] > 0.7
        assert found["tau"]["latent"] == found["tau"]["decoded"]
        assert np.array_equal(assign(ids, {name: made[name]})[name][1:], ids.codes[name][1:])


def test_residual_k_means_is_k_means_level_by_level():
    data, made = clustered()
    config = LearnSemanticIdsConfig(
        method="rkmeans", num_levels=2, num_codes=8, modalities=("text",), normalise="none"
    )
    ids = learn_semantic_ids(config, data, *artefacts(data, made))
    generator, residual = torch.Generator().manual_seed(0), torch.from_numpy(made["text"][1:])
    for level in range(2):
        centres = kmeans(residual, 8, 10, generator, relocate_idle=True)
        assert np.array_equal(ids.codebooks["text"][level], centres.numpy())
        residual = residual - centres[torch.cdist(residual, centres).argmin(dim=1)]


def test_a_batch_without_two_vectors_of_any_modality_is_passed_over():
    rows = {"text": torch.randn(40, 6)}
    there = {"text": torch.arange(40) < 3}
    items = TrainingItems(vectors=rows, present=there, device=torch.device("cpu"))
    config = LearnSemanticIdsConfig(batch_size=4, num_codes=4, num_levels=2)
    model = MMRQVAE({"text": 6}, **SETTINGS)
    loss, *_ = train_epoch(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        config,
        items,
        np.random.default_rng(0),
        torch.Generator(),
    )
    assert np.isfinite(loss)


def test_repaired_collisions_are_gone_and_others_keep_their_codes():
    data, made = clustered()
    config = LearnSemanticIdsConfig(method="rkmeans", num_levels=2, num_codes=16, modalities=("text",))
    plain = learn_semantic_ids(config, data, *artefacts(data, made))
    repaired = learn_semantic_ids(
        dataclasses.replace(config, repair_collisions=True), data, *artefacts(data, made)
    )
    assert plain.quality["modalities"]["text"]["collision_rate"] > 0.05
    before, after = plain.codes["text"][1:], repaired.codes["text"][1:]
    # A first code with more items than last codes cannot tell all of them apart.
    expected = sum(max(0, count - 16) for count in np.bincount(before[:, 0]))
    assert repaired.quality["modalities"]["text"]["collision_rate"] == pytest.approx(expected / NUM_ITEMS)
    assert np.array_equal(before[:, 0], after[:, 0]) and (before[:, 1] != after[:, 1]).any()


def test_collisions_are_repaired_at_the_least_distance_in_all():
    torch.manual_seed(0)
    settings = {**SETTINGS, "hidden_dims": None, "code_dim": None, "alignment": "none"}
    autoencoder = frozen(MMRQVAE({"text": 3}, **settings), "text")
    rows = torch.randn(4, 3, dtype=torch.float64)
    autoencoder.quantizer.codebooks.data.normal_()
    codes = np.array([[1, 2], [1, 2], [1, 2], [1, 0]])
    repaired = separate(autoencoder, rows.numpy(), codes)
    first, last = autoencoder.quantizer.codebooks.detach()
    cost = (rows - first[1])[:, None].sub(last).square().sum(dim=2)
    best = min(permutations(range(4)), key=lambda dealt: float(cost[range(4), dealt].sum()))
    assert repaired.tolist() == [[1, code] for code in best] and best != tuple(range(4))


OWN = LearnSemanticIdsConfig(
    num_levels=3,
    num_codes=8,
    code_dim=6,
    hidden_dims=(9, 7),
    normalise="l2",
    reconstruction="mmd+mse",
    mmd_estimator="unbiased",
    mmd_weight=1.5,
    mse_weight=0.7,
    alignment="infonce",
    alignment_weight=0.3,
    alignment_temperature=0.4,
    commitment_weight=0.6,
    commitment="first",
    quantization_weight=2.5,
    rq_reduce="sum",
    sinkhorn="all",
    sinkhorn_eps=0.05,
    sinkhorn_iterations=11,
    codebook_update="ema",
    ema_decay=0.9,
    estimator="rotation",
    init="kmeans_constrained",
    kmeans_iterations=13,
    kmeans_restarts=4,
    kmeans_rows=40,
    epochs=2,
    learning_rate=0.02,
    weight_decay=0.25,
)
"""No two numbers are equal, and none is a default."""


def model_of(config, dims=DIMS):
    torch.manual_seed(0)
    return MMRQVAE(**model_settings(config, dims))


def test_the_loss_takes_each_setting_by_its_name():
    made = model_of(OWN).eval()
    rows = batch()
    encoded, losses = made(rows)
    expected = 0.0
    for name, found in encoded.items():
        torch.testing.assert_close(found.source, F.normalize(rows[name]))
        coded, vectors = found.quantized, found.quantized.vectors
        chosen = made.autoencoders[name].quantizer.lookup(coded.codes)
        expected += 2.5 * 0.6 * (coded.residuals - chosen).square().sum() / len(vectors)
        expected += 1.5 * mmd(found.source, found.decoded, estimator="unbiased")
        expected += 0.7 * F.mse_loss(found.decoded, found.source)
        if name != "collab":
            expected += 0.3 * info_nce(encoded["collab"].quantized.vectors, vectors, 0.4)
    torch.testing.assert_close(losses.total, expected)


def test_the_quantiser_takes_each_setting_by_its_name(monkeypatch):
    made = model_of(OWN)
    for name, dim in DIMS.items():
        autoencoder = made.autoencoders[name]
        linear = [layer for layer in autoencoder.encoder if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in linear] == [9, 7, 6] and linear[0].in_features == dim
        found = autoencoder.quantizer
        assert found.codebooks.shape == (3, 8, 6) and not found.codebooks.requires_grad
        assert (found.commitment_weight, found.ema_decay) == (0.6, 0.9)
        assert (found.commitment, found.reduce, found.estimator) == ("first", "sum", "rotation")
    asked = []

    def watched(distances, eps, iterations):
        asked.append((eps, iterations))
        return sinkhorn(distances, eps, iterations)

    sinkhorn = quantizer_module.sinkhorn
    monkeypatch.setattr(quantizer_module, "sinkhorn", watched)
    made.train()(batch())
    assert asked == [(0.05, 11)] * 3 * len(DIMS)


def test_other_choices_reach_the_model_too():
    config = dataclasses.replace(
        SMALL,
        normalise="none",
        reconstruction="mmd",
        alignment="mmd",
        commitment="all",
        sinkhorn="none",
        codebook_update="gradient",
    )
    made = model_of(config)
    found = made.autoencoders["text"].quantizer
    assert found.codebooks.requires_grad and found.ema_decay is None and found.spread_levels == []
    assert (found.commitment, found.reduce, found.estimator) == ("all", "mean", "straight_through")
    assert (made.alignment, made.mmd_estimator) == ("mmd", "tllib")
    off = {"collaborative": 0.0, "diversity": 0.0}
    assert made.weights == {"mmd": 3.0, "mse": 1.0, "quantization": 1.0, "alignment": 0.01, **off}
    assert made.reconstruction == ["mmd"]
    encoded, losses = made.eval()(batch())
    assert losses.parts["text"].keys() == {"quantization", "mmd", "alignment"}
    assert torch.equal(encoded["text"].source, batch()["text"])


@pytest.mark.parametrize("init", ["kmeans", "kmeans_constrained"])
@pytest.mark.parametrize("method", ["mm_rqvae", "rkmeans"])
def test_k_means_gets_its_rows_rounds_and_seeds_from_the_settings(method, init, monkeypatch):
    calls = []

    def plain(rows, num_clusters, iterations, generator, *, restarts, relocate_idle):
        calls.append(("kmeans", rows, num_clusters, iterations, restarts, relocate_idle))
        return rows[:num_clusters]

    def constrained(rows, num_clusters, bounds, iterations, restarts, generator, asked_by):
        calls.append(("kmeans_constrained", rows, num_clusters, iterations, restarts, None))
        assert bounds == size_bounds(len(rows), num_clusters) and asked_by.endswith("'kmeans_constrained'")
        return rows[:num_clusters], None

    monkeypatch.setattr(kmeans_module, "kmeans", plain)
    monkeypatch.setattr(kmeans_module, "constrained", constrained)
    config = LearnSemanticIdsConfig(
        method=method,
        init=init,
        num_levels=2,
        num_codes=8,
        kmeans_iterations=13,
        kmeans_restarts=4,
        kmeans_rows=40,
    )
    made = model_of(config, {"text": 5})
    vectors = batch(60)["text"]
    table = TrainingItems(vectors={"text": vectors}, present={}, device=vectors.device)
    initialise(made, config, table)
    latent = made.autoencoders["text"].encode(vectors).detach()
    moved = None if init == "kmeans_constrained" else method == "rkmeans"
    for which, rows, *given in calls:
        assert which == init and given == [8, 13, 4, moved]
        assert len(rows) == 40
    assert len(calls) == 2
    drawn = torch.cdist(calls[0][1], latent).argmin(dim=1)
    torch.testing.assert_close(calls[0][1], latent[drawn])
    assert len(drawn.unique()) == 40
    for book, call in zip(made.autoencoders["text"].quantizer.codebooks, calls):
        assert torch.equal(book, call[1][:8])


def test_the_optimiser_gets_step_size_and_weight_decay_from_the_settings(monkeypatch):
    seen = []

    def still(model, optimizer, *_):
        """Zero gradients: the weights only decay."""
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        seen.append((optimizer.param_groups, before))
        return 0.0, {}, {}

    made = model_of(OWN, {"text": 5})
    weights = [weight for weight in made.parameters() if weight.requires_grad]
    monkeypatch.setattr(train, "train_epoch", still)
    vectors = batch(60)["text"]
    fit(made, OWN, TrainingItems(vectors={"text": vectors}, present={}, device=vectors.device))
    assert len(seen) == 2
    for groups, _ in seen:
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.02, 0.25)]
    for weight, before in zip(weights, seen[-1][1]):
        torch.testing.assert_close(weight.detach(), before * (1 - 0.02 * 0.25))


def test_the_padding_row_is_an_item_only_on_demand():
    """It then counts as having a vector in every modality."""
    rng = np.random.default_rng(0)
    items = {}
    for name, absent in (("collab", [0]), ("text", [0]), ("image", [0, 1])):
        vectors = rng.normal(size=(5, DIMS[name])).astype(np.float32)
        vectors[absent] = 0
        items[name] = ItemRows(vectors, vectors.any(axis=1))
    made = model_of(OWN)
    without, with_pad = (TrainingItems.of(items, made, include_pad=pad) for pad in (False, True))
    assert (len(without), len(with_pad)) == (4, 5)
    for name, rows in items.items():
        assert np.array_equal(without.vectors[name], rows.vectors[1:])
        assert np.array_equal(with_pad.vectors[name], rows.vectors)
        assert not rows.present[0], "what is given is left as it is"
    assert without.present.keys() == with_pad.present.keys() == {"image"}
    assert without.present["image"].tolist() == [False, True, True, True]
    assert with_pad.present["image"].tolist() == [True, False, True, True, True]
    assert without.with_vector("image").tolist() == [1, 2, 3]
    assert with_pad.with_vector("image").tolist() == [0, 2, 3, 4]
    assert with_pad.with_vector("text").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("include_pad", [False, True])
def test_the_scaling_is_fitted_to_the_padding_row_only_on_demand(include_pad):
    data, made = clustered(num_items=40)
    config = dataclasses.replace(
        SMALL, epochs=1, num_codes=4, min_utilisation=0.0, include_pad=include_pad, modalities=("text",)
    )
    ids = learn_semantic_ids(config, data, *artefacts(data, made))
    rows = made["text"] if include_pad else made["text"][1:]
    np.testing.assert_allclose(
        ids.state["autoencoders.text.scaling.mean"], rows.mean(axis=0), rtol=1e-4, atol=1e-6
    )


def letter(**changes):
    """Both losses of LETTER, for the text codes of the small world."""
    base = dataclasses.replace(
        SMALL,
        modalities=("text",), alignment="none", reconstruction="mse", code_dim=8, num_levels=2,
        codebook_update="gradient", restart_dead_codes=False, min_utilisation=0.0, epochs=40,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def picked_out(ids, made):
    """Share of items whose own collaborative vector is among the ten that their codes' sums are most like."""
    sums = sum(book[ids.codes["text"][1:, level]] for level, book in enumerate(ids.codebooks["text"]))
    score = sums @ made["collab"][1:].T
    own = np.diag(score)[:, None]
    return float(((score > own).sum(axis=1) < 10).mean())


def test_the_collaborative_loss_teaches_codes_of_texts_what_users_do():
    """Collaborative vectors that texts tell, but in another way than distances between texts do."""
    data, made = clustered()
    rng = np.random.default_rng(1)
    turned = made["text"] @ rng.normal(size=(20, 8)).astype(np.float32)
    made["collab"] = turned / turned[1:].std()
    without = learn_semantic_ids(letter(), data, *artefacts(data, made))
    taught = learn_semantic_ids(letter(collaborative_weight=1.0), data, *artefacts(data, made))
    assert picked_out(taught, made) > 2 * picked_out(without, made)
    assert taught.modalities == ("text",)
    values = [row["parts"]["text"]["collaborative"] for row in taught.log]
    assert values == sorted(values, reverse=True) and values[-1] < 0.8 * values[0]


def test_items_without_a_collaborative_vector_teach_nothing(monkeypatch):
    data, made = clustered()
    config = letter(collaborative_weight=1.0, epochs=2)
    unknown = dict(made, collab=made["collab"].copy())
    unknown["collab"][1:200] = 0
    table = {"collab": ItemRows.of("collab", *artefacts(data, unknown), data.num_items)}
    assert np.array_equal(table["collab"].present, unknown["collab"].any(axis=1))
    taught = []

    def watched(vectors, teacher):
        taught.append(teacher)
        return collaborative(vectors, teacher)

    monkeypatch.setattr(mm_rqvae, "collaborative", watched)
    learn_semantic_ids(config, data, *artefacts(data, unknown))
    rows = torch.cat(taught)
    assert len(rows) == 2 * 41 and rows.any(dim=1).all()  # all that have one, in each of two epochs


def test_nothing_to_learn_from_collaborative_vectors_is_an_error():
    data, made = clustered()
    unknown = dict(made, collab=np.zeros_like(made["collab"]))
    with pytest.raises(DataError, match=r"collaborative_weight: no item has both a collaborative vector"):
        learn_semantic_ids(letter(collaborative_weight=1.0), data, *artefacts(data, unknown))


def test_every_epoch_and_seed_has_clusters_and_draws_of_its_own(monkeypatch):
    drawn = []

    def watched(books, num_clusters, iterations, generator):
        drawn.append(generator.initial_seed())
        return code_clusters(books, num_clusters, iterations, generator)

    monkeypatch.setattr(train, "code_clusters", watched)
    config = letter(modalities=("text", "image"), diversity_weight=0.1, diversity_clusters=4)
    made = model_of(config, {"text": 20, "image": 14})
    targets = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        cluster_codes(made, dataclasses.replace(config, seed=seed), epoch)
        quantizer = made.autoencoders["text"].quantizer
        targets.append(quantizer.neighbours.draw(torch.zeros(50, 2, dtype=torch.int64)))
    assert len(set(drawn)) == 6 and drawn[:2] == drawn[6:]
    assert torch.equal(targets[0], targets[3])
    assert not torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])


def test_codes_that_are_no_numbers_stop_the_run_before_they_are_put_into_clusters():
    config = letter(diversity_weight=0.1, diversity_clusters=4)
    made = model_of(config, {"text": 20})
    with torch.no_grad():
        made.autoencoders["text"].quantizer.codebooks[0, 3] = float("nan")
    with pytest.raises(
        TrainingError, match=r"codes became NaN or infinite in epoch 4; lower .*learning_rate"
    ):
        cluster_codes(made, config, 5)


def test_diversity_brings_the_codes_of_a_cluster_together():
    data, made = clustered()
    inputs = data, *artefacts(data, made)
    plain, spread = (
        learn_semantic_ids(letter(**changes), *inputs)
        for changes in ({}, {"diversity_weight": 1.0, "diversity_clusters": 4})
    )
    assert "diversity" not in plain.log[-1]["parts"]["text"]
    values = [row["parts"]["text"]["diversity"] for row in spread.log]
    assert values[-1] < 0.9 * values[0]
    level_of = [ids.quality["modalities"]["text"]["levels"][0]["perplexity"] for ids in (plain, spread)]
    assert all(found > 4 for found in level_of)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_dim": 9}, r"code_dim must be the width of these \(8\), got 9"),
        ({"modalities": None}, r"there are neither; set up encode_items, or set it to 0"),
    ],
)
def test_collaborative_vectors_that_codes_cannot_learn_from_are_refused(changes, message):
    data, made = clustered()
    if "modalities" in changes:
        made = {"collab": made["collab"]}
    config = letter(collaborative_weight=1.0, **changes)
    with pytest.raises(ConfigError, match=rf"^learn_semantic_ids\.collaborative_weight .*{message}"):
        learn_semantic_ids(config, data, *artefacts(data, made))
