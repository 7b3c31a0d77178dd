"""A platform of videos on loopback: channels, pages, sound and captions, each of which may be refused.

    with Platform({"/@oak/videos": ["a1"]}, fail={"/watch?v=a1": 404}) as server:
        from_network(listed, folder, ["youtube"], loopback=server.base)      # yt-dlp's own generic extractor
        fetch_captions("a1", limited_session(to_loopback(requests.Session(), server.base)))
"""
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

from requests.adapters import HTTPAdapter

PAGE = """<html><head><script type="application/ld+json">{{"@context": "https://schema.org", "@type": "VideoObject",
"name": "{}", "duration": "PT9S", "contentUrl": "{}", "author": "Oak"}}</script></head>
<body>"INNERTUBE_API_KEY": "k"</body></html>"""


class Loopback(ThreadingHTTPServer):
    "A server on a free port of this machine, for as long as a block lasts."

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.base = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Platform(Loopback):
    "/@<channel>/videos lists, /watch?v=<id> describes a video; an answer takes `slow` seconds."

    def __init__(self, channels, slow=0.0, fail=(), sounds=(), said=()):
        self.channels = channels        # path -> identifiers or addresses
        self.slow = slow                # seconds
        self.fail = dict(fail)          # path -> status
        self.sounds = dict(sounds)      # identifier -> bytes of an Ogg file; the others' sound is none
        self.said = dict(said)          # identifier -> captions: (start, seconds, text)
        self.asked = []                 # paths, in order
        super().__init__(Answer)

    def answer(self, path):
        "(kind, body) of what a path holds."
        name = path.rpartition("=")[2]
        if path in self.channels:
            links = [v if "://" in v or ":" in v else f"{self.base}/watch?v={v}" for v in self.channels[path]]
            items = "".join(f"<item><title>t</title><link>{link}</link></item>" for link in links)
            return "application/rss+xml", f'<?xml version="1.0"?><rss version="2.0"><channel>{items}</channel></rss>'
        if path == "/clip.mp4": return "video/mp4", "\0" * 2000
        if path.startswith("/sound/"): return "audio/ogg", self.sounds[path[len("/sound/"):-len(".ogg")]]
        if path.startswith("/captions"):
            cues = "".join(f'<text start="{s}" dur="{d}">{escape(escape(t))}</text>' for s, d, t in self.said[name])
            return "text/xml", f"<transcript>{cues}</transcript>"
        return "text/html", PAGE.format(name, f"{self.base}/sound/{name}.ogg" if name in self.sounds else f"{self.base}/clip.mp4")

    def player(self, name):
        "What the platform's player is told of the captions of a video."
        track = {"baseUrl": f"https://www.youtube.com/captions?v={name}", "name": {"runs": [{"text": "English"}]},
                 "languageCode": "en", "isTranslatable": False, "vssId": "a.en"}
        tracks = {"captionTracks": [track] if name in self.said else [], "translationLanguages": []}
        return {"playabilityStatus": {"status": "OK"}, "captions": {"playerCaptionsTracklistRenderer": tracks}}


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def put(self, kind, body):
        body = body.encode() if isinstance(body, str) else body
        if self.command != "HEAD":
            self.server.asked.append(self.path)
            time.sleep(self.server.slow)
        self.send_response(self.server.fail.get(self.path, 200))
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # who asked was killed
                self.wfile.write(body)

    def do_GET(self):
        self.put(*self.server.answer(self.path))

    do_HEAD = do_GET

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.put("application/json", json.dumps(self.server.player(body["videoId"])))


def to_loopback(session, base):
    "A requests session that sends to `base` what is meant for the platform, and to nobody else."

    class ToLoopback(HTTPAdapter):
        def send(self, request, **given):
            request.url = request.url.replace("https://www.youtube.com", base)
            assert request.url.startswith(base)
            return super().send(request, **given)

    session.trust_env = False
    session.mount("https://", ToLoopback())
    return session
