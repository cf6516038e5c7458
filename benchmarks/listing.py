"""What it costs to list a prefix with many objects: ours beside plain paging and s3fs, in seconds and memory.

    python benchmarks/listing.py [--objects 100000] [--rounds 3]

The store is a process that serves pages made beforehand, 1,000 objects each, as S3 does. Each row is the fastest of
some rounds, which alternate, each a process of its own; imports are not timed. `plan` lists and makes the tasks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PAGE = 1000
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
    "<ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><Size>{size}</Size>"
    "<StorageClass>STANDARD</StorageClass></Contents>"
)
SOURCE = "s3://bucket/in"


def make_pages(objects: int) -> list[bytes]:
    """The answers to list_objects_v2, in order; the continuation token is a page's number."""
    pages = []
    for start in range(0, objects, PAGE):
        numbers = range(start, min(objects, start + PAGE))
        last = numbers.stop == objects
        token = "" if last else f"<NextContinuationToken>{len(pages) + 1}</NextContinuationToken>"
        entries = "".join(ENTRY.format(key=f"in/{number:07d}.tar", size=10240 + number) for number in numbers)
        pages.append(
            f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult xmlns='{NAMESPACE}'><Name>bucket</Name>"
            f"<Prefix>in/</Prefix><KeyCount>{len(numbers)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(not last).lower()}</IsTruncated>{token}{entries}</ListBucketResult>".encode()
        )
    return pages


def serve(objects: int, answer: Connection) -> None:
    """Serve the pages on a port that is sent to the caller; no object has a body, nor does the folder itself exist."""
    pages = make_pages(objects)
    one = make_pages(1)[0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            few = int(query.get("max-keys", [PAGE])[0]) < PAGE
            body = one if few else pages[int(query.get("continuation-token", ["0"])[0])]
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(200 if self.path.strip("/") == "bucket" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answer.send(server.server_port)
    server.serve_forever()


def plain() -> int:
    """boto3's pages, keeping names and sizes."""
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix="in/")
    return len([(item["Key"], item["Size"]) for page in pages for item in page["Contents"]])


def s3fs_find() -> int:
    """s3fs, as fsspec offers it."""
    import s3fs

    return len(s3fs.S3FileSystem(use_listings_cache=False).find("bucket/in", detail=True))


def list_files() -> int:
    """Ours."""
    from clip_index import storage

    return len(storage.list_files(SOURCE, (".tar",)))


def plan() -> int:
    """Ours, with all that comes before the first task is handed out."""
    from clip_index.readers import open_reader

    return len(open_reader(SOURCE, modality="image,text").plan(10_000))


def measure(function: Callable[[], int], objects: int, answer: Connection) -> None:
    """Send (seconds, seconds of CPU, MB that it added to the process) of a function."""
    import boto3  # noqa: F401 - what is imported first is not timed
    import s3fs  # noqa: F401

    from clip_index import readers  # noqa: F401

    def peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

    before, started, cpu = peak(), time.perf_counter(), time.process_time()
    found = function()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert found == objects, found
    answer.send((seconds, cpu, peak() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(options.objects, theirs), daemon=True)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}", "NO_PROXY": "127.0.0.1"}
    functions, rounds = (plain, s3fs_find, list_files, plan), []
    for _ in range(options.rounds):
        for function in functions:
            process = context.Process(target=measure, args=(function, options.objects, theirs))
            process.start()
            rounds.append((function, ours.recv()))
            process.join()
    best = {function: min(figures for name, figures in rounds if name is function) for function in functions}
    print(f"{options.objects:,} objects, {PAGE:,} a page\n{'':10} {'s':>6} {'CPU s':>6} {'x plain':>8} {'MB':>6}")
    for function, (seconds, cpu, megabytes) in best.items():
        share = seconds / best[plain][0]
        print(f"{function.__name__:10} {seconds:6.2f} {cpu:6.2f} {share:8.2f} {megabytes:6.0f}")
    server.terminate()


if __name__ == "__main__":
    main()
