"""Embed on a Spark cluster, with the arguments of `clip-index embed`.

    spark-submit --master yarn --conf spark.executor.cores=8 pipelines/spark_embed.py s3://bucket/tars s3://bucket/out

The workers read and write the storage themselves; docs/cluster.md says how they get the package, and a GPU each.
"""

import sys

from clip_index.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:], "--executor", "spark"]))
