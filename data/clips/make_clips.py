"""Make the clips of this folder: voices by espeak-ng, music by sox, mixed here, encoded by ffmpeg.

    python data/clips/make_clips.py [folder]

All of it is fiction, written for this project. Each clip is a list of lines `(speaker, pause, text, heard)`: `pause` is
the seconds between the line before and this one (negative: they overlap), `heard` is what the platform's captions make
of it (None: the text itself). `music` is its loudness (root mean square), `invented` a cue where nobody speaks. Needs
espeak-ng, sox and ffmpeg on PATH.
"""
import csv
import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RATE = 16000          # samples a second, what Whisper and the voice detector take
NOISE = 0.0006        # a microphone is never at exact zero
VOICES = {            # one espeak-ng voice a speaker: (voice, words a minute, pitch)
    "officer_1": ("en-us", 165, 38), "officer_2": ("en-gb-x-rp", 160, 45), "officer_3": ("en-us+m3", 158, 30),
    "civilian_1": ("en-us+f3", 178, 62), "civilian_2": ("en-gb+f2", 172, 70), "civilian_3": ("en-us+m5", 185, 52),
    "civilian_4": ("en-gb-scotland+f4", 175, 60), "host_1": ("en-us+f5", 182, 66), "host_2": ("en-gb+m1", 170, 50),
    "instructor_1": ("en-us+m7", 165, 42)}
ROLES = {"officer": "officer", "civilian": "civilian", "host": "other", "instructor": "other"}

CLIPS = {
    "youtube_9101": {"lines": [
        ("officer_1", 0.6,
         "Good evening, ma'am. I'm Officer Hale with the city police. "
         "I stopped you because your left tail light is out.",
         None),
        ("civilian_1", 0.5, "Are you serious? I just came from work and I'm tired. Why are you picking on me?",
         "are you serious i just came from work and i'm tired why are you picking a me"),
        ("officer_1", 0.5,
         "I hear you, it has been a long day. May I see your license and registration, please?", None),
        ("civilian_1", 0.4, "Fine. It's in the glove box. I'm reaching for it now, don't shoot me over a light bulb.",
         "find it's in the glove box i'm reaching for now don't shoot me over a light bulb"),
        ("officer_1", 0.6,
         "Take your time. Nobody is in trouble tonight. I'll write a warning and you can fix it this week.",
         "take your time nobody is in trouble tonight i'll write a morning and you can fix it this week"),
        ("civilian_1", 0.5, "Okay. Thank you for being decent about it.",
         "okay thank you for being descent about it")]},
    "youtube_9102": {"music": 0.030, "lines": [
        ("officer_2", 4.5,
         "Police, good evening. Could you turn the music down? Your neighbours have called three times.", None),
        ("civilian_3", 0.4, "Man, it's my birthday. They always complain, they hate me.",
         "man it's my birthday they always complain the eight me"),
        ("officer_2", 0.5, "Happy birthday. I am not here to end your party, I only need it quieter after eleven.",
         "happy birthday i am not here to end your party i only need it quieter after 11"),
        ("civilian_3", 0.4, "And if I say no, what are you going to do, arrest me?",
         "and if i say no what you gonna do arrest me"),
        ("officer_2", 0.5, "I'd rather not. If I have to come back there will be a citation. Help me out here.",
         "i'd rather not if i have to come back there will be a station help me here"),
        ("civilian_3", 0.5, "All right, all right. I'll close the windows and turn it down.",
         "all right alright i'll close the window and turn it down")]},
    "youtube_9103": {"invented": [(10.0, 12.5, "thanks for watching")], "lines": [
        ("officer_3", 0.5, "Sir, step away from the other driver. I'm Deputy Marsh, I need you both calm.", None),
        ("civilian_2", 0.4, "He hit my car and he won't give me his insurance!",
         "he hit my car and you won't give me his insurance"),
        ("officer_3", 9.0, "Thanks for waiting. He has given me his insurance card. Here are the details for you.",
         "thanks for waiting he has given me his insurance card here are the details for you"),
        ("civilian_2", 0.4, "Well, that took long enough. He should apologise to me as well.",
         "well that took long enough he should apologize to me as well"),
        ("officer_3", 0.5,
         "I understand you're upset. Let's get you home safe first, the rest is for the insurers.",
         "i understand you're upset let's get you home save first the rest is for the ensure us")]},
    "youtube_9104": {"lines": [
        ("officer_1", 0.5, "Folks, one at a time, please. Who called nine one one?",
         "folks one at a time please who called 911"),
        ("civilian_4", 0.4, "I did, officer. She took my bicycle and she won't give it back.",
         "i did officer she took my bicycle and she won't give it back"),
        ("civilian_1", -1.4, "That's a lie, he lent it to me, I have the message right here!",
         "that's a lie he went to me i have the message here"),
        ("officer_1", 0.3, "Stop. Both of you take a breath. You will each get your turn, I promise.",
         "stop both of you take a breath you'll each get your turn i promise"),
        ("civilian_1", 0.4, "Okay. Look at the phone. It says keep it until Friday.",
         "okay look at the phone it says keep it till friday"),
        ("officer_1", -0.6, "Thank you. That helps. Sir, would you agree that she brings it back on Friday?",
         "thank you that helps so would you agree that she brings it back on friday"),
        ("civilian_4", 0.4, "I suppose so. Friday is fine.", "i suppose so friday's fine")]},
    "youtube_9105": {"lines": [
        ("officer_2", 0.6, "Hello there. You have been sitting on this bench a while. Are you all right?", None),
        ("civilian_3", 0.5, "Hey, hey. Leave me alone. I'm not hurting anybody.",
         "hey " * 64 + "leave me alone i'm not hurting anybody"),
        ("officer_2", 2.2, "You're not in trouble. It's very cold and I was worried about you. What's your name?",
         "you're not in trouble it's very cold and i was worried about you what's your name"),
        ("civilian_3", 0.6, "Ray. They closed the shelter early and I have nowhere to go.",
         "they closed the shelter early and i have no where to go"),
        ("officer_2", 0.5, "Thanks, Ray. I can call another shelter and drive you there, if you want to.",
         "thanks ray i can call another shelter and drive you there if you want to"),
        ("civilian_3", 0.5, "Yeah. Yeah, that would be good. Thank you.", "yeah that would be good thank you")]},
    "youtube_9106": {"music": 0.045, "lines": [
        ("host_1", 3.5, "Tired of losing your keys? Meet Key Finder Pro, the little tag that sings when you clap.",
         "tired of losing your keys meet keyfinder pro the little tag that sings when you clap"),
        ("host_1", 0.4,
         "Use the code blue light at checkout and save twenty per cent. Order today, this offer ends on Sunday!",
         "use the code blue light at checkout and save 20% order today this offer ends on sunday")]},
    "youtube_9107": {"lines": [
        ("host_2", 0.5,
         "Welcome back to the kitchen. Today we are making a simple onion soup for a cold evening.", None),
        ("host_1", 0.4, "And what do we start with, chef?", None),
        ("host_2", 0.4,
         "Slice four onions, melt the butter, and let them turn golden very slowly, about forty minutes.",
         "slice for onions melt the butter and let them turn golden very slowly about 40 minutes"),
        ("host_1", 0.4, "It smells wonderful already.", None)]},
    "youtube_9108": {"lines": [
        ("instructor_1", 0.5,
         "Welcome to the police driving range. Today's exercise is the cone course and the emergency stop.", None),
        ("officer_3", 0.5, "Copy. What speed do you want at the first gate?", None),
        ("instructor_1", 0.5,
         "Forty at the gate, brake in a straight line, then steer. Remember, eyes up, hands at nine and three.",
         "40 at the gate brake in a straight line then steer remember eyes up hands at nine and three"),
        ("officer_3", 0.5, "Understood. Going on your signal.", None)]},
}


def command(*arguments: str, data: bytes | None = None) -> bytes:
    return subprocess.run(arguments, input=data, capture_output=True, check=True).stdout


def resample(wav: Path) -> np.ndarray:
    raw = command("ffmpeg", "-v", "error", "-i", str(wav), "-ac", "1", "-ar", str(RATE), "-f", "f32le", "-")
    return np.frombuffer(raw, np.float32)


def voice(speaker: str, text: str, folder: Path) -> np.ndarray:
    name, speed, pitch = VOICES[speaker]
    wav = folder / "line.wav"
    command("espeak-ng", "-v", name, "-s", str(speed), "-p", str(pitch), "-w", str(wav), text)
    samples = resample(wav)
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    samples = samples[loud[0]:loud[-1] + 1]                 # espeak-ng ends each line with some silence
    return 0.5 * samples / np.abs(samples).max()


def music(seconds: float, folder: Path) -> np.ndarray:
    wav = folder / "music.wav"
    chords = (("C3", "E4"), ("G2", "B3"), ("A2", "C4"), ("F2", "A3"))
    notes = [("synth", "2", "pluck", low, "pluck", high) for low, high in chords]
    for number, note in enumerate(notes):
        command("sox", "-R", "-n", "-r", str(RATE), str(folder / f"note{number}.wav"), *note, "remix", "-")
    command("sox", *[str(folder / f"note{number}.wav") for number in range(len(notes))], str(wav), "repeat", "10")
    return resample(wav)[:int(seconds * RATE)]


def layout(clip: dict, folder: Path) -> list[dict]:
    end, turns = 0.0, []
    for speaker, pause, text, heard in clip["lines"]:
        samples = voice(speaker, text, folder)
        start = round(end + pause, 2)
        end = round(start + len(samples) / RATE, 2)
        turns.append({"speaker": speaker, "start": start, "end": end, "text": text, "samples": samples,
                      "heard": heard or re.sub(r"[^\w' ]", "", text).lower()})
    return turns


def mix(clip: dict, turns: list[dict], folder: Path, seed: int) -> np.ndarray:
    audio = np.random.default_rng(seed).normal(0, NOISE, int((turns[-1]["end"] + 1.0) * RATE)).astype(np.float32)
    for turn in turns:
        first = int(turn["start"] * RATE)
        audio[first:first + len(turn["samples"])] += turn["samples"]
    if "music" in clip:
        tune = music(len(audio) / RATE, folder)
        audio[:len(tune)] += clip["music"] / np.sqrt(np.mean(tune ** 2)) * tune
    return np.clip(audio, -1, 1)


def cues(clip: dict, turns: list[dict], words_a_line: int = 7) -> list[tuple[float, float, str]]:
    lines = []
    for turn in turns:
        words = turn["heard"].split()
        step = (turn["end"] - turn["start"]) / len(words)
        for first in range(0, len(words), words_a_line):
            part = words[first:first + words_a_line]
            begin = turn["start"] + first * step
            lines.append((begin, begin + len(part) * step, " ".join(part)))
    lines += clip.get("invented", [])
    if "music" in clip:
        lines.append((0.5, 3.0, "[Music]"))
    return sorted(lines)


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600):02d}:{int(seconds // 60) % 60:02d}:{seconds % 60:06.3f}"


def rolling(lines: list) -> str:
    """As YouTube writes captions that its recogniser made: two lines roll, and each line is shown again."""
    blocks, before = ["WEBVTT\nKind: captions\nLanguage: en\n"], " "
    for begin, end, text in lines:
        words = html.escape(text, quote=False).split(" ")
        step = (end - begin) / len(words)
        timed = words[0] + "".join(f"<{clock(begin + n * step)}><c> {word}</c>" for n, word in enumerate(words) if n)
        blocks.append(f"{clock(begin)} --> {clock(end - 0.01)} align:start position:0%\n{before}\n{timed}\n")
        before = html.escape(text, quote=False)
        blocks.append(f"{clock(end - 0.01)} --> {clock(end)} align:start position:0%\n{before}\n \n")
    return "\n".join(blocks)


def plain(lines: list) -> str:
    return "\n".join(["WEBVTT\n"] + [f"{clock(begin)} --> {clock(end)}\n{html.escape(text, quote=False)}\n"
                                     for begin, end, text in lines])


def main(target: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, (name, clip) in enumerate(CLIPS.items()):
            turns = layout(clip, folder)
            samples = mix(clip, turns, folder, number).astype("<f4").tobytes()
            command("ffmpeg", "-v", "error", "-y", "-f", "f32le", "-ar", str(RATE), "-ac", "1", "-i", "-",
                    "-map_metadata", "-1",
                    "-fflags", "+bitexact", "-flags:a", "+bitexact", "-c:a", "libvorbis", "-q:a", "2",
                    str(target / f"{name}.ogg"), data=samples)
            write = rolling if number % 2 == 0 else plain
            (target / f"{name}.en.vtt").write_text(write(cues(clip, turns)), encoding="utf-8")
            rows += [(name, turn["start"], turn["end"], turn["speaker"], ROLES[turn["speaker"].split("_")[0]],
                      turn["text"]) for turn in turns]
    with open(target / "reference.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("clip", "start_s", "end_s", "speaker", "role", "text"))
        out.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
