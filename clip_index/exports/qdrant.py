"""A collection in Qdrant: a point for each row, a named vector for each modality."""

from __future__ import annotations

from clip_index import storage
from clip_index.exports.rows import Rows
from clip_index.types import ClipIndexError, UsageError

_POINTS_AT_ONCE = 256


def write(rows: Rows, output: str, collection: str) -> list[str]:
    """Write a new collection of a server, or of the local mode's folder. Vectors are compared by cosine."""
    try:
        from qdrant_client import QdrantClient, models
        from qdrant_client.http.exceptions import ApiException
    except ImportError:
        raise UsageError("the format qdrant needs its library: pip install 'clip-index[qdrant]'") from None
    # without a question about its version first: what does not understand us says so
    place = {"url": output, "check_compatibility": False} if storage.is_url(output) else {"path": output}
    client = QdrantClient(**place)
    try:
        if client.collection_exists(collection):
            raise UsageError(f"{output} has a collection {collection!r}: name another one with --collection")
        sizes = {name: models.VectorParams(size=rows.dim, distance=models.Distance.COSINE) for name in rows.modalities}
        client.create_collection(collection, vectors_config=sizes)
        for numbers, payload, vectors in rows.points(_POINTS_AT_ONCE):
            held = {name: values.tolist() for name, values in vectors.items()}
            points = [
                models.PointStruct(id=number, vector={name: held[name][at] for name in held}, payload=payload[at])
                for at, number in enumerate(numbers)
            ]
            client.upsert(collection, points)
    except ApiException as error:
        raise ClipIndexError(f"Qdrant at {output} does not take the rows: {' '.join(str(error).split())}") from error
    finally:
        client.close()
    return []
