"""Vectors from a file: joined to the right items, or refused with what was got and expected."""

import json
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save

from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ArtifactMismatchError, DataError
from llmrec.files import save_arrays
from llmrec.interactions import catalog_of

RAW_IDS = ["b", "a", "c"]
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
TABLE = np.concatenate([np.zeros((1, 2), np.float32), ROWS])


def parquet(path, ids, vectors, **others):
    pq.write_table(pa.table({"item_id": ids, "vector": vectors, **others}), path)
    return str(path)


def tensors(path, metadata=None, **arrays):
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata)
    return str(path)


@pytest.mark.parametrize("kind", ["float", "double", "half", "fixed", "large", "int"])
def test_parquet_rows_are_joined_by_raw_id_whatever_their_order(tmp_path, kind):
    types = {
        "float": pa.list_(pa.float32()),
        "double": pa.list_(pa.float64()),
        "half": pa.list_(pa.float16()),
        "fixed": pa.list_(pa.float32(), 2),
        "large": pa.large_list(pa.float32()),
        "int": pa.list_(pa.int32()),
    }
    values = [list(map(np.float16, row)) if kind == "half" else row for row in ROWS[[2, 0, 1]].tolist()]
    path = parquet(tmp_path / "v.parquet", ["c", "b", "a"], pa.array(values, types[kind]))
    vectors, missing = read_vectors(path, RAW_IDS, "text")
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, TABLE)
    assert not missing.any() and missing.shape == (4,)


def test_whole_number_and_dictionary_ids_match_raw_ids_as_text(tmp_path):
    for number, ids in enumerate((pa.array([30, 10, 20]), pa.array(["30", "10", "20"]).dictionary_encode())):
        path = parquet(tmp_path / f"{number}.parquet", ids, ROWS[[2, 0, 1]].tolist())
        assert np.array_equal(read_vectors(path, ["10", "20", "30"], "text")[0], TABLE)


def test_text_ids_of_any_arrow_type_match(tmp_path):
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.string_view())):
        ids = pa.array(["c", "b", "a"], kind)
        path = parquet(tmp_path / f"{number}.PARQUET", ids, ROWS[[2, 0, 1]].tolist())
        assert np.array_equal(read_vectors(path, RAW_IDS, "text")[0], TABLE)


def test_vectors_in_several_chunks_are_read_one_after_another(tmp_path):
    """Together they may be more than 2^31 numbers, which one list column cannot hold."""
    path, rows = tmp_path / "v.parquet", [ROWS[2].tolist(), None, ROWS[0].tolist()]
    table = pa.table({"item_id": ["c", "a", "b"], "vector": pa.array(rows, pa.list_(pa.float32()))})
    pq.write_table(table, path)
    chunked = pa.concat_tables([table.slice(n, 1) for n in range(3)])
    assert chunked["vector"].num_chunks == 3
    with mock.patch.object(pq, "read_table", lambda *_, **__: chunked):
        vectors, missing = read_vectors(str(path), RAW_IDS, "text")
    assert np.array_equal(vectors, TABLE * [[1], [1], [0], [1]]) and missing.tolist() == [0, 0, 1, 0]


def test_bfloat16_tensors_are_read(tmp_path):
    table = torch.from_numpy(TABLE).to(torch.bfloat16)
    torch_save({"vectors": table}, tmp_path / "v.safetensors")
    (tmp_path / "v.ids.json").write_text("\ufeff" + json.dumps(RAW_IDS), encoding="utf-8")
    vectors, _ = read_vectors(str(tmp_path / "v.safetensors"), RAW_IDS, "text")
    assert vectors.dtype == np.float32 and np.array_equal(vectors, TABLE)


def test_spaces_around_ids_are_left_out_as_in_tables(tmp_path):
    path = parquet(tmp_path / "v.parquet", [" b", "a ", "c"], ROWS.tolist())
    assert np.array_equal(read_vectors(path, RAW_IDS, "text")[0], TABLE)


def test_a_null_vector_says_that_the_item_has_none(tmp_path):
    kinds = [pa.list_(pa.float32())]
    if int(pa.__version__.split(".")[0]) >= 26:  # 25 cannot read back a null list of fixed size
        kinds.append(pa.list_(pa.float32(), 2))
    for kind in kinds:
        path = parquet(tmp_path / "v.parquet", RAW_IDS, pa.array([[1.0, 2.0], None, [5.0, 6.0]], kind))
        vectors, missing = read_vectors(path, RAW_IDS, "image")
        assert missing.tolist() == [False, False, True, False]
        assert vectors.tolist() == [[0, 0], [1, 2], [0, 0], [5, 6]]


def test_rows_of_items_outside_the_data_set_are_left_out_with_a_warning(tmp_path, caplog):
    path = parquet(tmp_path / "v.parquet", ["z", *RAW_IDS], [[9.0, 9.0], *ROWS.tolist()])
    assert np.array_equal(read_vectors(path, RAW_IDS, "text")[0], TABLE)
    assert "1 rows" in caplog.text and "left out" in caplog.text


def test_tensor_rows_are_identified_by_catalogue_or_id_list_or_number(tmp_path):
    save_arrays(tmp_path / "own.safetensors", catalog_of(RAW_IDS), vectors=TABLE)
    assert np.array_equal(read_vectors(str(tmp_path / "own.safetensors"), RAW_IDS, "text")[0], TABLE)

    listed = tensors(tmp_path / "listed.safetensors", vectors=TABLE[[0, 3, 1, 2]].astype(np.float64))
    (tmp_path / "listed.ids.json").write_text(json.dumps(["c", "b", "a"]))
    assert np.array_equal(read_vectors(listed, RAW_IDS, "text")[0], TABLE)

    numbered = tensors(tmp_path / "numbered.safetensors", vectors=TABLE)
    found, _ = read_vectors(numbered, ["2", "3", "1"], "collab")
    assert np.array_equal(found[1:], ROWS[[1, 2, 0]])


def test_missing_flags_of_a_tensor_file_are_kept_and_their_rows_emptied(tmp_path):
    flags = np.array([False, False, True, False])
    path = tmp_path / "v.safetensors"
    save_arrays(path, catalog_of(RAW_IDS), vectors=TABLE, missing=flags)
    vectors, missing = read_vectors(str(path), RAW_IDS, "text")
    assert np.array_equal(missing, flags)
    assert not vectors[2].any() and np.array_equal(vectors[3], TABLE[3])


def two_nans(rows):
    rows = rows.copy()
    rows[1, 0], rows[2, 1] = np.nan, np.inf
    return rows


WRONG_PARQUET = {
    "a missing item": ({"ids": ["b", "a"], "vectors": ROWS[:2].tolist()}, "no row for 1 of 3 items.*'c'"),
    "another data set": ({"ids": ["x", "y", "z"]}, "no row for 3 of 3 items.*'b'.*3 rows for items"),
    "a repeated item": ({"ids": ["b", "a", "a"]}, "names item 'a' more than once"),
    "an item without id": ({"ids": ["b", None, "c"]}, "row 2 has no item_id"),
    "fractional ids": ({"ids": [1.0, 2.0, 3.0]}, "item_id .* must hold text or whole numbers, got double"),
    "NaN": ({"vectors": two_nans(ROWS).tolist()}, "NaN.* for 2 items, the first is 'a'"),
    "overflow": ({"vectors": [[1e300, 0.0]] * 3}, "infinite numbers .*3 items"),
    "null inside": ({"vectors": [[1.0, None], [1.0, 2.0], [1.0, 2.0]]}, "null.* 1 items, the first is 'b'"),
    "ragged": ({"vectors": [[1.0, 2.0], [1.0], [1.0, 2.0]]}, r"row 2 \(item 'a'\).* 1 numbers, expected 2"),
    "empty": ({"vectors": pa.array([[], [], []], pa.list_(pa.float32()))}, "0 numbers, expected at least 1"),
    "no vector at all": ({"vectors": pa.array([None] * 3, pa.list_(pa.float32()))}, "no vector for any"),
    "text": ({"vectors": ["[1, 2]"] * 3}, "must hold lists of numbers, got string"),
}


@pytest.mark.parametrize("case", WRONG_PARQUET)
def test_wrong_parquet_is_refused(tmp_path, case):
    change, message = WRONG_PARQUET[case]
    content = {"ids": RAW_IDS, "vectors": ROWS.tolist(), **change}
    path = parquet(tmp_path / "v.parquet", content["ids"], content["vectors"])
    with pytest.raises((DataError, ArtifactMismatchError), match=f"(?s)^text.*{message}") as caught:
        read_vectors(path, RAW_IDS, "text vectors")
    assert "v.parquet" in str(caught.value) and "\n" not in str(caught.value)


WRONG_TENSORS = {
    "too few rows": ({"vectors": TABLE[:3]}, "has 3 rows, expected 4"),
    "no padding row": ({"vectors": np.concatenate([ROWS, ROWS[:1]])}, "row 0 .* must be zero"),
    "no ids": ({"vectors": TABLE}, "does not say which row is which item.*v.ids.json"),
    "another catalogue": ({"vectors": TABLE, "metadata": {"catalog": "f" * 64}}, "belongs to catalogue ffff"),
    "another name": ({"emb": TABLE}, "no tensor 'vectors', it holds emb"),
    "whole numbers": ({"vectors": TABLE.astype(np.int64)}, "must be float32, got I64"),
    "one dimension": ({"vectors": TABLE[:, 0]}, r"must be \(N \+ 1, D\), got shape \(4,\)"),
    "bad flags": ({"vectors": TABLE, "missing": np.zeros(3, bool)}, r"missing .* must be bool \(4,\)"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensor_file_is_refused(tmp_path, case):
    content, message = WRONG_TENSORS[case]
    path = tensors(tmp_path / "v.safetensors", **content)
    with pytest.raises((DataError, ArtifactMismatchError), match=f"(?s)^text.*{message}"):
        read_vectors(path, RAW_IDS, "text vectors")


def test_nan_in_a_tensor_file_names_the_item(tmp_path):
    bad = TABLE.copy()
    bad[2, 0] = np.nan
    save_arrays(tmp_path / "v.safetensors", catalog_of(RAW_IDS), vectors=bad)
    with pytest.raises(DataError, match=r"NaN.*'a'"):
        read_vectors(str(tmp_path / "v.safetensors"), RAW_IDS, "text")


def test_an_id_list_of_another_length_is_refused(tmp_path):
    path = tensors(tmp_path / "v.safetensors", vectors=TABLE)
    (tmp_path / "v.ids.json").write_text('["b", "a"]')
    with pytest.raises(ArtifactMismatchError, match=r"has 4 rows, expected 3"):
        read_vectors(path, RAW_IDS, "text")
    (tmp_path / "v.ids.json").write_text('{"b": 1}')
    with pytest.raises(DataError, match=r"must be a JSON list"):
        read_vectors(path, RAW_IDS, "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.npy", b"x", "must be a .parquet file .* or a .safetensors file"),
        ("v.parquet", b"not parquet at all", "cannot be read as parquet"),
        ("v.safetensors", b"not safetensors", "cannot be read as safetensors"),
        ("v.parquet", None, "does not exist"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_vectors(str(tmp_path / name), RAW_IDS, "text")


def test_absent_columns_are_named(tmp_path):
    pq.write_table(pa.table({"asin": RAW_IDS, "vector": ROWS.tolist()}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"no column item_id, its columns are asin, vector"):
        read_vectors(str(tmp_path / "v.parquet"), RAW_IDS, "text")


@pytest.mark.real_data
def test_the_published_vectors_load_by_row_number_once_their_padding_row_is_zero(real_data, tmp_path):
    raw_ids = [str(number) for number in range(1, 12_087)]
    path = real_data / "beauty" / "published_sasrec_mme_sid.safetensors"
    with pytest.raises(ArtifactMismatchError, match=r"Set it to zero if it is padding"):
        read_vectors(str(path), raw_ids, "collab vectors")
    rows = load_file(path)["vectors"].copy()
    rows[0] = 0
    vectors, missing = read_vectors(tensors(tmp_path / "v.safetensors", vectors=rows), raw_ids, "collab")
    assert np.array_equal(vectors, rows) and not missing.any()
