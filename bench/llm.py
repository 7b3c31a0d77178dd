"""What does the door to language models cost? python bench/llm.py [--calls 2000] [--faults 0.05] [--latency 0.1]

A server on loopback, in a process of its own, answers each call after --latency seconds and fails the given share of
first calls (429, 5xx, dropped and closed connections, prose, half a JSON, wrong types). In turns, at the same
concurrency: a bare HTTP client that posts the same bodies to the same server without faults (the server's own limit),
and the door, which has each answer checked, counted and kept on disk. Then the door again: everything is kept, nothing
may be asked. Prints calls a second of both, their ratio, and what was lost or paid twice: neither may be more than 0.
"""
import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Literal

from _shared import BENCH, script
from pydantic import BaseModel

from deescal.engine.errors import DeescalError, InputError
from deescal.llm import Door, Question, ask_all

SERVER = Path(__file__).resolve().parents[1] / "tests/e2e/llm_server.py"
TASK = "Say whether this title belongs to a video of an encounter between police and the public."


class Mark(BaseModel):
    keep: bool
    score: int
    kind: Literal["police", "other"]
    why: str


class Server:
    "The server in a process of its own, so that it takes no time from the client's."
    def __init__(self, latency, faults): self.args = ["--latency", str(latency), "--faults", str(faults)]

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, str(SERVER), *self.args], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        self.url = self.process.stdout.readline().strip()
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def count(self):
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/count") as r: return json.load(r)


def questions(n): return [Question(f"v{i}", TASK,
    {"title": f"traffic stop number {i}, {i % 7} cars"}) for i in range(n)]


async def bare(url, bodies, concurrency):
    "Seconds that a bare client takes for all bodies."
    import httpx2
    todo = iter(bodies)
    async with httpx2.AsyncClient(timeout=60) as client:
        async def work():
            for body in todo: (await client.post(f"{url}/chat/completions", json=body)).raise_for_status()
        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return time.perf_counter() - start


def as_body(question):
    "What the door sends for a question, as near as a bare client needs it."
    from deescal.llm import prompt
    system, user = prompt(question)
    return {"model": "loopback", "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "max_tokens": 4096, "temperature": 0.0, "top_p": 0.95, "seed": 42, "response_format": {
                "type": "json_schema", "json_schema": {"name": "Mark", "schema": Mark.model_json_schema()}}}


def main(calls, faults, latency, concurrency):
    if min(calls, concurrency) < 1 or not 0 <= faults < 1 or latency < 0:
        raise InputError("no such load", BENCH,
            "give calls and concurrency from 1, faults from 0 up to 1, latency from 0")
    asked = questions(calls)
    warm = questions(2 * concurrency)
    with Server(latency, 0) as server:
        asyncio.run(bare(server.url, map(as_body, warm), concurrency))
        limit = calls / asyncio.run(bare(server.url, [as_body(q) for q in asked], concurrency))
        ask_all(Door("openai", "warm", server.url, concurrency=concurrency), warm, Mark)    # loads the libraries
        start = time.perf_counter()
        ask_all(Door("openai", "loopback", server.url, concurrency=concurrency), asked, Mark)
        plain = calls / (time.perf_counter() - start)
    with Server(latency, faults) as server, tempfile.TemporaryDirectory() as cache:
        door = Door("openai", "loopback", server.url, concurrency=concurrency, wait=0.2, cache=cache)
        start = time.perf_counter()
        answers, log = ask_all(door, asked, Mark)
        seconds = time.perf_counter() - start
        sent = server.count()
        start = time.perf_counter()
        again, _ = ask_all(door, asked, Mark)
        rerun, resent = time.perf_counter() - start, server.count()["calls"] - sent["calls"]
    failed = len(log) - calls
    lost = calls - int((answers["status"] == "ok").sum())
    print(f"{calls} questions, {concurrency} at once, {latency * 1000:g} ms a call at the server, {faults:.0%} faults")
    print(f"bare client, no faults: {limit:.1f} calls a second")
    print(f"door, no faults, nothing kept: {plain:.1f} calls a second, {plain / limit:.3f} of it")
    print(f"door, faults, all kept: {calls / seconds:.1f} answers a second, {calls / seconds / limit:.3f} of it")
    print(f"calls sent {sent['calls']}, logged {len(log)}, failed {failed}; at once at most {sent['most_at_once']}")
    print(f"door, asked again: {calls / rerun:.1f} answers a second, {resent} calls")
    print(f"lost {lost}, paid twice {sent['good twice']}")
    if lost or sent["good twice"] or resent or sent["calls"] != len(log) or not again.equals(answers):
        raise DeescalError("answers were lost, or paid for twice", BENCH,
            "this is a fault of the door: please report it")


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--calls", type=int, default=2000)
    args.add_argument("--faults", type=float, default=0.05)
    args.add_argument("--latency", type=float, default=0.1, help="seconds that the server takes for an answer")
    args.add_argument("--concurrency", type=int, default=16)
    script(main, **vars(args.parse_args()))
