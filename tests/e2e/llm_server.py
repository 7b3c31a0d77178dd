"""A language model's server on loopback that speaks Gemini's generateContent and OpenAI's chat completions, and fails.

    with LLMServer(fault=lambda prompt, nth: "503" if nth == 0 else None) as server:
        Door("openai", "any", server.openai)     # or Door("google", "any", server.google)

It answers what fits the schema that it is asked for; `answer(prompt, body)` says what else. `fault(prompt, nth)` names
a fault for the nth call (from 0) with that prompt: see `FAULTS`. As a program it serves until its input ends:
python tests/e2e/llm_server.py [--latency 0.05] [--faults 0.05]; its first line is its address, GET /count its counts.
"""
import argparse
import asyncio
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate

HINT = re.compile(r"\n\nAn earlier answer was refused:[^\n]*$")     # what a retry adds to the same question
FAULTS = {
    "429": "too many calls; Retry-After: 1", "429 date": "the same, as an HTTP date", "429 bare": "the same, no header",
    "429 long": "Retry-After: a day", "quota": "the account is used up", "500": "", "503": "", "401": "", "404": "",
    "400": "", "413": "", "timeout": "no answer while the client waits",
    "hang": "no answer until the server ends, nothing counted",
    "drop": "the connection ends in the middle of the body", "close": "it ends before the first byte",
    "page": "200 with a page of HTML", "prose": "text, no JSON", "half": "half a JSON", "types": "wrong types",
    "extra": "a field that nobody asked for", "loop": "a phrase until the token limit", "length": "cut at the limit",
    "loop inside": "valid JSON, a loop in it", "refused": "the model declines", "empty": "no text at all",
    "echo": "a 400 whose body and headers repeat the request's headers", "redirect": "to another address"}
PAID = {"prose", "half", "types", "extra", "loop", "length", "loop inside", "refused", "empty"}
RANDOM = ("429 bare", "500", "503", "drop", "prose", "half", "types", "close")


def example(schema, defs=None):
    "The simplest value that fits a JSON schema."
    defs = defs or schema.get("$defs", {})
    if "$ref" in schema: return example(defs[schema["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in schema: return example(schema["anyOf"][0], defs)
    if "enum" in schema or "const" in schema: return schema["enum"][0] if "enum" in schema else schema["const"]
    kind = schema.get("type")
    if kind == "object": return {k: example(v, defs) for k, v in schema.get("properties", {}).items()}
    if kind == "array": return [example(schema["items"], defs)] if "items" in schema else []
    return {"boolean": True, "integer": int(schema.get("minimum", 1)), "number": float(schema.get("minimum", 1)),
            "null": None}.get(kind, "said")


def read_call(path, body):
    "What a request asks, in either shape: (prompt without the hint of a retry, system text, schema, media)."
    if "generateContent" in path:
        parts = [p for c in body["contents"] for p in c["parts"]]
        system = "".join(p["text"] for p in body.get("systemInstruction", {}).get("parts", []))
        schema = body.get("generationConfig", {}).get("responseJsonSchema", {})
        text, media = "".join(p.get("text", "") for p in parts), [p["inlineData"] for p in parts if "inlineData" in p]
    else:
        said = {m["role"]: m["content"] for m in body["messages"]}
        parts = said["user"] if isinstance(said["user"], list) else [{"type": "text", "text": said["user"]}]
        system, schema = said.get("system", ""), body.get("response_format", {}).get("json_schema", {}).get("schema",
            {})
        text = "".join(p.get("text", "") for p in parts)
        media = [p["input_audio"] for p in parts if p["type"] == "input_audio"]
    return HINT.sub("", text), system, schema, media


def shaped(path, text, finish, prompt_tokens, thinking=0):
    "An answer's body in the shape of the API that was called. Tokens: one for four characters."
    out = max(1, len(text) // 4)
    if "generateContent" in path:
        usage = {"promptTokenCount": prompt_tokens, "candidatesTokenCount": out, "totalTokenCount": prompt_tokens + out}
        if thinking: usage |= {"thoughtsTokenCount": thinking}
        reasons = {"stop": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}
        return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "index": 0,
                                "finishReason": reasons[finish]}],
                "usageMetadata": usage, "modelVersion": "loopback", "responseId": "r1"}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": out + thinking,
             "total_tokens": prompt_tokens + out + thinking}
    if thinking: usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
    return {"id": "r1", "object": "chat.completion", "created": 1, "model": "loopback", "usage": usage, "choices": [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}]}


def error_body(path, status, message, code=None):
    if "generateContent" in path:
        status_name = {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 500: "INTERNAL", 401: "UNAUTHENTICATED",
                       404: "NOT_FOUND"}.get(status, "INVALID_ARGUMENT")
        details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [
            {"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}] if code == "insufficient_quota" else []
        return {"error": {"code": status, "message": message, "status": status_name, "details": details}}
    return {"error": {"message": message, "type": code, "code": code}}


def heard_answer(*turns, speakers=None):
    "What a model that listens answers: turns of (start as MM:SS, text, number of the voice)."
    speakers = speakers or [{"voice": v, "name": "", "company": "", "position": p, "role": ""} for v, p in (
        (1, "Officer"), (2, ""))]
    return json.dumps({"turns": [{"start": s, "text": t, "voice": v} for s, t, v in turns], "speakers": speakers})


class LLMServer:
    def __init__(self, answer=None, fault=None, latency=0.0, thinking=0, slow=3.0):
        self.answer, self.fault, self.latency, self.thinking, self.slow = answer, fault, latency, thinking, slow
        self.calls = []             # one dictionary a call: prompt, system, media, headers, body, fault, at (seconds)
        self.seen, self.paid, self.good = Counter(), Counter(), Counter()
        self.at_once, self.most_at_once = 0, 0
        self.keep_calls = True

    async def reply(self, path, headers, body):
        "(status, headers, body as bytes, how many bytes of it are sent before the connection ends or None)."
        prompt, system, schema, media = read_call(path, body)
        nth, self.seen[prompt] = self.seen[prompt], self.seen[prompt] + 1
        fault = self.fault(prompt, nth) if self.fault else None
        if fault is not None and fault not in FAULTS: raise ValueError(f"no fault is called {fault!r}")
        if self.keep_calls:
            self.calls.append({"prompt": prompt, "system": system, "media": media, "headers": headers, "body": body,
                               "fault": fault, "at": time.monotonic(), "path": path})
        if fault == "hang": await asyncio.Event().wait()
        if self.latency: await asyncio.sleep(self.latency)
        def failed(status, code=None, **more): return status, more, json.dumps(
            error_body(path, status, f"loopback says {status}", code)).encode(), None
        if fault in ("500", "503", "404", "400", "401", "413"):
            return failed(int(fault), "invalid_api_key" if fault == "401" else "loopback_error")
        if fault == "429": return failed(429, "rate_limit", **{"Retry-After": "1"})
        if fault == "429 date": return failed(429, "rate_limit", **{"Retry-After": formatdate(time.time() + 2,
            usegmt=True)})
        if fault == "429 bare": return failed(429, "rate_limit")
        if fault == "429 long": return failed(429, "rate_limit", **{"Retry-After": "86400"})
        if fault == "quota": return failed(429, "insufficient_quota")
        if fault == "redirect": return 307, {"Location": self.redirect}, b"", None
        if fault == "timeout": await asyncio.sleep(self.slow)
        if fault == "close": return 200, {}, b"", 0
        if fault == "page": return 200, {"Content-Type": "text/html"}, b"<html>busy</html>", None
        if fault == "echo":
            return 400, {"X-Echo": re.sub(r"[^ -~]", "", str(headers))}, json.dumps(
                error_body(path, 400, f"you sent {headers}", str(headers))).encode(), None
        value = example(schema)
        text, finish = self.answer(prompt, body) if self.answer else json.dumps(value), "stop"
        if fault == "prose": text = "Sure! Here is what I think: it is relevant."
        if fault == "half": text = json.dumps(value)[:-2]
        if fault == "types": text = json.dumps({k: {"not": "this"} for k in value})
        if fault == "extra": text = json.dumps(value | {"note": "an extra"})
        if fault == "loop": text, finish = '{"reason": "' + "hey, " * 4000, "length"
        if fault == "length": text, finish = json.dumps(value)[:-1], "length"
        if fault == "loop inside": text = json.dumps({k: "hey, " * 400 if v == "said" else v for k, v in value.items()})
        if fault == "refused": text, finish = "", "content_filter"
        if fault == "empty": text = ""
        whole = json.dumps(shaped(path, text, finish, len(system + prompt) // 4, self.thinking)).encode()
        if fault == "drop": return 200, {}, whole, len(whole) // 2
        self.paid[prompt] += 1
        self.good[prompt] += fault not in PAID
        return 200, {}, whole, None

    async def serve(self, reader, writer):
        "Requests of one connection, one after the other, until it ends."
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").split("\r\n")
                headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines if x)}
                path = first.split(" ")[1]
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    if path == "/count": status, more, body, cut = 200, {}, json.dumps(self.count()).encode(), None
                    else: status, more, body, cut = await self.reply(path, headers, json.loads(raw))
                finally: self.at_once -= 1
                more = {"Content-Type": "application/json", "Content-Length": len(body)} | more
                if cut == 0: return
                head = "".join(f"{k}: {v}\r\n" for k, v in more.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode("latin-1") + body[:cut])
                await writer.drain()
                if cut is not None: return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError): pass
        finally: writer.close()

    def count(self):
        return {"calls": sum(self.seen.values()), "prompts": len(self.seen), "paid": sum(self.paid.values()),
                "good": len(self.good), "good twice": sum(n > 1 for n in self.good.values()),
                "most_at_once": self.most_at_once}

    async def _main(self, started):
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=2**27)
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        async with server:
            await self._end.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}: task.cancel()

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), daemon=True)
        self._thread.start()
        started.wait()
        self.google, self.openai = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}/v1"
        self.redirect = f"http://localhost:{self.port}/elsewhere"
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


def random_faults(share):
    "A fault for that share of first calls, the same whenever and in whatever order they come."
    def fault(prompt, nth):
        h = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
        return RANDOM[h % len(RANDOM)] if nth == 0 and (h >> 8) % 10_000 < 10_000 * share else None
    return fault


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--latency", type=float, default=0.0)
    args.add_argument("--faults", type=float, default=0.0)
    args = args.parse_args()
    with LLMServer(fault=random_faults(args.faults), latency=args.latency) as server:
        server.keep_calls = False
        print(server.openai, flush=True)
        sys.stdin.read()
