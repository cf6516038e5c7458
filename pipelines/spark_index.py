"""Build an index too large for one machine with autofaiss's distributed build, on the session of the cluster.

    spark-submit --master yarn pipelines/spark_index.py EMBEDDINGS INDEX [--memory 64G] [--parts 8]

EMBEDDINGS is what `clip-index embed` wrote; INDEX gets `image.index`, or with several parts a file for each.
"""

import argparse

from pyspark.sql import SparkSession

from clip_index.autofaiss_compat import opq_keywords

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings")
    parser.add_argument("index")
    parser.add_argument("--modality", choices=("image", "text"), default="image")
    parser.add_argument("--memory", default="16G", help="what the index may take in memory")
    parser.add_argument("--index_key", help="instead of the one that autofaiss chooses")
    parser.add_argument("--parts", type=int, default=1, help="files that the index is split into")
    options = parser.parse_args()
    session = SparkSession.builder.appName("clip-index").getOrCreate()

    import autofaiss

    folder = {"image": "img_emb", "text": "text_emb"}[options.modality]
    with opq_keywords():  # the index is trained here, and filled by the executors
        autofaiss.build_index(
            f"{options.embeddings}/{folder}",
            index_path=f"{options.index}/{options.modality}.index",
            index_infos_path=f"{options.index}/{options.modality}.json",
            metric_type="ip",
            max_index_memory_usage=options.memory,
            index_key=options.index_key,
            distributed="pyspark",
            temporary_indices_folder=f"{options.index}/parts",
            nb_indices_to_keep=options.parts,
        )
