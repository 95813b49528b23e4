# SPDX-License-Identifier: MIT
"""Search of the archive, streamed from index shards on disk, compared with faiss's flat index in memory.

1.28 million photos (the paper's index) with 768 half-precision numbers each, 80 names, the best 500 photos per name;
`--quick` takes 4,000 photos.
"""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common import paired_medians, report, resident_memory
from namedmask.archive import read_shards, top_photos
from namedmask.index import shard_path

DIMS, NAMES, BEST, SHARD = 768, 80, 500, 16384


def text_embeddings() -> np.ndarray:
    """Random L2-normalized rows, float32 [NAMES, DIMS]."""
    text = np.random.default_rng(1).standard_normal((NAMES, DIMS), np.float32)
    return text / np.linalg.norm(text, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory, quick):
    """An index folder with random L2-normalized rows, and its number of photos."""
    folder = tmp_path_factory.mktemp("index")
    photos, size = (4_000, 1_500) if quick else (1_280_000, SHARD)
    rng = np.random.default_rng(0)
    for shard, first in enumerate(range(0, photos, size)):
        n = min(size, photos - first)
        image = rng.standard_normal((n, DIMS), np.float32)
        image /= np.linalg.norm(image, axis=1, keepdims=True)
        photo = np.arange(first, first + n)
        save_file({"image": image.astype(np.float16), "photo": photo}, shard_path(folder, shard))
    return folder, photos


def test_top_photos(benchmark, index, quick):
    folder, photos = index
    text = text_embeddings()

    def ours():
        return top_photos(read_shards(folder), text, BEST)

    results = ours()
    calls = {"ours, from disk": ours}
    rows = []
    try:
        import faiss
    except ImportError as error:
        rows.append({"method": f"faiss: absent ({error})"})
    else:
        flat = faiss.IndexScalarQuantizer(DIMS, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        full = faiss.IndexFlatIP(DIMS)
        for image, _ in read_shards(folder):
            flat.add(image.astype(np.float32))
            full.add(image.astype(np.float32))
        scores, numbers = full.search(text, BEST)
        for entries, s, n in zip(results, scores, numbers, strict=True):
            np.testing.assert_allclose([entry.score for entry in entries], s, atol=2e-6)
            assert len({entry.photo for entry in entries} & set(n.tolist())) >= BEST - 2  # ties at the end may differ
        calls["faiss IndexFlatIP, float32 in memory"] = lambda: full.search(text, BEST)
        calls["faiss fp16 flat, in memory"] = lambda: flat.search(text, BEST)
    seconds = paired_medians(calls, rounds=3, seconds=120)
    benchmark.pedantic(ours, rounds=1)
    flops = 2 * photos * DIMS * NAMES
    for method, s in seconds.items():
        rows.append(
            {
                "method": method,
                "s": s,
                "million photos/s": photos / s / 1e6,
                "GFLOP/s": flops / s / 1e9,
                "time / ours": s / seconds["ours, from disk"],
            }
        )
    rows.append({"method": "sgemm alone, one block in cache", "GFLOP/s": _sgemm_rate()})
    for shards in (1,) if quick else (1, len(list(folder.glob("*.safetensors")))):
        rows.append({"method": f"peak memory over {shards} shards, MiB", "MiB": peak_memory(folder, shards)})
    report(f"archive: the best {BEST} of {photos} photos for {NAMES} names", rows)


def peak_memory(folder: Path, shards: int) -> float:
    """Peak resident memory in MiB of a new process that searches the first shards."""
    command = [sys.executable, __file__, str(folder), str(shards)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _sgemm_rate() -> float:
    import torch

    a, b = torch.randn(4096, DIMS), torch.randn(DIMS, NAMES)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    return 20 * 2 * a.numel() * NAMES / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":  # the process that peak_memory starts
    top_photos(itertools.islice(read_shards(Path(sys.argv[1])), int(sys.argv[2])), text_embeddings(), BEST)
    print(resident_memory())
