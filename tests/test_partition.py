from __future__ import annotations

import faiss
import numpy as np
import pytest

from clip_index.partition import Partition, share, train

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(count, dim=8, centres=50, seed=0):
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(1).standard_normal((centres, dim)).astype(np.float32)
    return middle[rng.integers(0, centres, count)] + 0.2 * rng.standard_normal((count, dim)).astype(np.float32)


def distance(vectors, centroids, lists):
    return float(((vectors - centroids[lists]) ** 2).sum(1).mean())


def test_most_vectors_land_in_the_nearest_list_and_the_rest_near_it():
    sample = clusters(6000)
    parts = train(sample, 100)
    vectors = clusters(2000, seed=5)
    lists = parts.assign(vectors)
    nearest = faiss.knn(vectors, parts.centroids, 1)[1][:, 0]
    assert (lists == nearest).mean() > 0.9
    assert distance(vectors, parts.centroids, lists) < 1.05 * distance(vectors, parts.centroids, nearest)


def test_centroids_are_as_good_as_those_of_plain_k_means():
    sample, lists = clusters(6000), 100
    plain = faiss.Kmeans(8, lists, niter=10, seed=3, max_points_per_centroid=6000)
    plain.train(sample)
    parts = train(sample, lists)
    ours = distance(sample, parts.centroids, faiss.knn(sample, parts.centroids, 1)[1][:, 0])
    theirs = distance(sample, plain.centroids, faiss.knn(sample, plain.centroids, 1)[1][:, 0])
    assert len(parts.centroids) == lists
    assert ours < 1.1 * theirs


def test_copies_and_few_vectors():
    parts = train(np.ones((40, 4), np.float32), 10)
    assert parts.assign(np.ones((3, 4), np.float32)).shape == (3,)
    single = train(clusters(5), 1)
    np.testing.assert_allclose(single.centroids[0], clusters(5).mean(0), rtol=1e-5)
    assert list(single.assign(clusters(5))) == [0] * 5
    each = clusters(7)
    np.testing.assert_array_equal(each[Partition(each).assign(each)], each)


def test_a_gpu_is_asked_where_there_is_one(monkeypatch):
    asked = []
    kmeans = faiss.Kmeans
    parts = train(clusters(600), 10)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", lambda _, *args: asked.append("knn") or faiss.knn(*args), raising=False)
    monkeypatch.setattr(faiss, "Kmeans", lambda *args, gpu, **options: asked.append(gpu) or kmeans(*args, **options))
    np.testing.assert_array_equal(train(clusters(600), 10).centroids, parts.centroids)
    assert set(asked) == {"knn", True}


def test_lists_are_shared_in_proportion():
    assert list(share(10, np.array([50, 30, 20]))) == [5, 3, 2]
    assert list(share(4, np.array([1, 1, 98]))) == [0, 0, 4]
    assert list(share(3, np.array([1, 1, 1]))) == [1, 1, 1]
    assert share(7, np.array([3, 3, 3])).sum() == 7
