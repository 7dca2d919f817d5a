import numpy as np

from clip_cid.method.packed_arrays import packed, unpacked


def test_arrays_of_all_types_and_shapes_come_back_as_they_were():
    arrays = [
        np.arange(7, dtype=np.int32),
        np.empty((0, 5), dtype=np.int64),
        np.array([[0.1, -np.inf], [np.nan, 3]]),
        np.zeros((3, 0, 2), dtype=np.float16),
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        np.array(5.0),
    ]
    for found, given in zip(unpacked(packed(arrays)), arrays, strict=True):
        assert (found.dtype, found.shape) == (given.dtype, given.shape)
        np.testing.assert_array_equal(found, given)
    assert unpacked(packed([])) == []


def test_of_a_mapped_file_the_arrays_are_views(tmp_path):
    np.save(tmp_path / "packed.npy", packed([np.arange(3, dtype=np.int16), np.arange(5, dtype=np.int64)]))
    mapped = np.load(tmp_path / "packed.npy", mmap_mode="r")
    for found, expected in zip(unpacked(mapped), (range(3), range(5)), strict=True):
        assert np.shares_memory(found, mapped)
        assert found.tolist() == list(expected)
