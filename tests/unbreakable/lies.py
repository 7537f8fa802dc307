"""Mutations of every kind of file that is read, each loaded in a process that may hang, crash or eat memory.

    python tests/unbreakable/lies.py SOURCES CASES SEED

SOURCES is a folder with a valid file or folder of each kind (see `test_lied_to.py`). One line of JSON for each case on
stdout: kind, number, outcome, and what was said. Outcomes that are right: equal, refused (a TavError of one line that
names the file), and other, of content that no hash guards: it was read as what it now says. The others are findings.
"""

import contextlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tav_peft.adapter import Adapter
from tav_peft.errors import TavError
from tav_peft.formats import importing, official, read
from tav_peft.header import read_header
from tav_peft.inversion import Inversion
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.tensor_file import hash_tensors
from tav_peft.trail import Trail
from tav_peft.video.clip import Clip

SECONDS, MEMORY = 60, 2 << 30  # that a case may take
HASHED = {"adapter", "bundle", "peft", "resume", "inversion"}  # which must never load as something else
RIGHT = {"equal", "refused", "other"}
BASE: Any = None  # a pipeline that foreign files are read for


# -- what loading gives ------------------------------------------------------------------------------------


def _adapter(path: Path) -> str:
    read_header(path)
    for open_it in (Adapter.open, importing.read):
        with contextlib.suppress(TavError):
            open_it(path)
    made = read(path)
    return f"{made.fingerprint} {made.provenance.model_dump_json()} {hash_tensors(made.tensors)} {made.preview!r}"


def _exported(path: Path) -> str:
    return _foreign(path, None)


def _foreign(path: Path, base: Any = "the base") -> str:
    made = importing.read(path, BASE if base else None, caption="a man").adapter
    return f"{hash_tensors({name: made.tensors[name] for name in made.tensors})} {made.provenance.model_dump_json()}"


def _beside(path: Path) -> str:
    try:
        BASE.load_lora_weights(path, "lora")
        return hash_tensors({n: t for n, t in BASE.unet.state_dict().items() if "lora" in n})
    finally:
        if "lora" in BASE.adapters:
            BASE.unload_adapter("lora")


def _words(path: Path) -> str:
    try:
        BASE.load_textual_inversion(path)
        return hash_tensors({"words": BASE.text_encoder.get_input_embeddings().weight.detach()})
    finally:
        BASE.unload_textual_inversion()


def _base(path: Path, **options: Any) -> str:
    pipe = TuneAVideoPipeline.from_pretrained(path, **options)
    states = {}
    for part in ("unet", "vae", "text_encoder"):
        states |= {f"{part}.{name}": t.detach() for name, t in getattr(pipe, part).state_dict().items()}
    told = pipe.encode_prompts(["a man is skiing"]).text
    return f"{hash_tensors(states)} {hash_tensors({'text': told})} {dict(pipe.scheduler.config)}"


def _inversion(path: Path) -> str:
    made = Inversion.load(path)
    return f"{hash_tensors({'t': made.trajectory})} {made.num_inference_steps} {made.info}"


def _resume(path: Path) -> str:
    return hash_tensors(Trail(path / "a.safetensors").load_state("key") or {})


def _clip(path: Path) -> str:
    return Clip.read(path).fingerprint


def _run(path: Path) -> str:
    return hash_tensors(official.read(path, BASE, caption="a man").adapter.tensors)


# by kind: what is loaded, the files in it that are changed, the loader, and the share of all cases
KINDS: dict[str, tuple[str, str, Callable[[Path], str], int]] = {
    "adapter": ("adapter.safetensors", "", _adapter, 22),
    "bundle": ("bundle.safetensors", "", _adapter, 8),
    "peft": ("peft", "*", _adapter, 8),
    "recipe": ("recipe.yaml", "", lambda path: Recipe.load(path).to_yaml(), 18),
    "kohya": ("kohya.safetensors", "", _exported, 4),
    "foreign-lora": ("foreign.safetensors", "", _foreign, 6),
    "lora-beside": ("foreign.safetensors", "", _beside, 3),
    "words": ("words.safetensors", "", _words, 2),
    "inversion": ("inversion.safetensors", "", _inversion, 6),
    "resume": ("resume", "a.trail/*", _resume, 5),
    "mp4": ("clip.mp4", "", _clip, 4),
    "gif": ("clip.gif", "", _clip, 2),
    "pictures": ("pictures", "*", _clip, 1),
    "base-config": ("base", "**/*.json", _base, 4),
    "base-index": ("sharded", "unet/*.index.json", _base, 1),
    "base-weights": ("base", "*/*.safetensors", _base, 2),
    "tokenizer": ("base", "tokenizer/*", _base, 2),
    "single-file": ("single.safetensors", "", lambda p: _base(p, config=p.with_name("base")), 1),
    "single-ckpt": ("single.ckpt", "", lambda p: _base(p, config=p.with_name("base")), 1),
    "run-of-original": ("run.pth", "", _run, 1),
}

# -- mutations ---------------------------------------------------------------------------------------------

NUMBERS = [
    b"0",
    b"-1",
    b"1e400",
    b"NaN",
    b"1e9",
    b"9223372036854775808",
    b"4294967296",
    b"0.5",
    b"99999",
    b"1",
]
VALUES = [
    None, True, [], {}, "", -1, 0, 2**31, 2**63, 1e308, 0.5, "../../../../tmp/out", "/etc/passwd", "\0", "x" * 10000,
    "\u202e", [[[[[[]]]]]], {"a": {"b": None}}, "cuda", "__import__('os').system('true')", ["os", "system"], "nan",
]  # fmt: skip
SWAPS = [
    (rb"ctorch\._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n"),
    (rb"ccollections\nOrderedDict\n", b"cbuiltins\neval\n"),
    (rb"F16", b"F32"), (rb"F32", b"I64"), (rb"F32", b"F8_E4M3"), (rb"\.weight", b"/../../weight"),
    (rb"square", b"../../sq"), (rb"safetensors", b"../../../../etc/passwd"), (rb"\n", b"\n\t"), (rb": ", b": &a *a "),
    (rb"attn1", b"attn3"), (rb"\"shape\":\[", b'"shape":[999999999999,'), (rb"LORA", b"LOHA"),
]  # fmt: skip


def _bytes(draw: random.Random, data: bytes) -> bytes:
    """Change bytes without knowing what they mean."""
    at, size = draw.randrange(len(data) + 1), draw.choice([1, 1, 4, 64, 1000])
    way = draw.randrange(8)
    if way < 2:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    others = (
        data[:at],
        data[:at] + draw.randbytes(size) + data[at + size :],
        data[:at] + bytes(size) + data[at + size :],
        data[:at] + data[at + size :],
        data[:at] + data[at : at + size] * draw.choice([2, 50]) + data[at:],
        data + draw.randbytes(size),
    )
    return others[way - 2]


def _words_in(draw: random.Random, data: bytes) -> bytes:
    """Change numbers and names where there are any."""
    pattern, other = draw.choice([(rb"-?\d+(?:\.\d+)?", draw.choice(NUMBERS)), *SWAPS])
    places = list(re.finditer(pattern, data[:200_000]))
    if not places:
        return _bytes(draw, data)
    found = draw.choice(places)
    return data[: found.start()] + other + data[found.end() :]


def _json(draw: random.Random, value: Any) -> Any:
    """Put an unlikely value somewhere, or leave something out."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        match draw.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, draw.choice([key + "x", "../" + key, "", "__proto__"]): value[key]}
            case _:
                return {**value, key: _json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _json(draw, value[at]), *value[at + draw.choice([0, 1]) :]]
    if isinstance(value, str) and value[:1] in "{[" and value and draw.random() < 0.8:
        with contextlib.suppress(ValueError):
            return json.dumps(_json(draw, json.loads(value)))
    return draw.choice(VALUES)


def _structured(draw: random.Random, name: str, data: bytes) -> bytes:
    """Change a field of what the file says, and write it as its format is written."""
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(_json(draw, json.loads(data[8 : 8 + length]))).encode()
        said = draw.choice([len(header)] * 9 + [draw.choice([0, 2**40, 2**63, len(header) - 1, 99_999_999])])
        return said.to_bytes(8, "little") + header + data[8 + length :]
    if name.endswith(".json"):
        return json.dumps(_json(draw, json.loads(data))).encode()
    if name.endswith((".ckpt", ".pth")):
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for entry in old.namelist():
                inner = old.read(entry)
                new.writestr(entry, _words_in(draw, inner) if entry.endswith(".pkl") else inner)
        return made.getvalue()
    return _words_in(draw, data)


def mutated(draw: random.Random, name: str, data: bytes) -> bytes:
    """Change a file's content in one to three ways."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        way = draw.random()
        if not data:
            data = draw.randbytes(20)
        elif way < 0.4:
            data = _bytes(draw, data)
        elif way < 0.6:
            data = _words_in(draw, data)
        else:
            with contextlib.suppress(ValueError, zipfile.BadZipFile):
                data = _structured(draw, name, data)
    return data


# -- running them ------------------------------------------------------------------------------------------


def _outcome(kind: str, path: Path, file: Path, valid: str) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = KINDS[kind][2](path)
    except TavError as error:
        said = str(error)
        one_line = "\n" not in said or kind == "recipe"  # whose problems have a line each
        named = any(part in said for part in (file.name, path.name, file.parent.name))
        return ("refused" if one_line and named else "unclear"), said
    except MemoryError as error:
        return "memory", str(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"[:400]
    if loaded == valid:
        return "equal", ""
    return ("changed" if kind in HASHED else "other"), ""


def _watch(folder: Path, seen: list[str]) -> None:
    """Note what is written outside of a folder, and what is started."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"):
            seen.append(f"{event} {arguments[0]}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            target = str(arguments[0])
            if not os.path.abspath(target).startswith((str(folder), "/dev/")) and not target.isdecimal():
                seen.append(f"{event} {target}")

    sys.addaudithook(hook)


def work(sources: Path, kind: str, numbers: range, seed: int, told: int) -> None:
    """Load the cases of these numbers, and say what came of each."""
    folder = Path(tempfile.mkdtemp()).resolve()
    seen: list[str] = []
    try:
        shutil.copytree(sources, folder / "in")
        os.chdir(folder)
        _watch(folder, seen)
        start, files, load, _ = KINDS[kind]
        path = folder / "in" / start
        targets = sorted(each for each in path.glob(files) if each.is_file()) if files else [path]
        valid = load(path)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
        for number in numbers:
            draw = random.Random(f"{kind} {number} {seed}")
            target = draw.choice(targets)
            before = target.read_bytes()
            target.write_bytes(mutated(draw, target.name, before))
            del seen[:]
            outcome, said = _outcome(kind, path, target, valid)
            if seen:
                outcome, said = "escaped", "; ".join(seen)
            target.write_bytes(before)
            line = {
                "kind": kind,
                "number": number,
                "outcome": outcome,
                "said": f"{target.name}: {said}"[:600],
            }
            os.write(told, (json.dumps(line) + "\n").encode())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lines(sources: Path, kind: str, numbers: range, seed: int) -> Iterator[dict[str, Any]]:
    """Fork a worker for the cases; one that hangs or dies is replaced, and its case is a finding."""
    while numbers:
        reading, told = os.pipe()
        child = os.fork()
        if not child:
            for stream in (1, 2):  # what libraries print
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            code = 1
            with contextlib.suppress(BaseException):
                work(sources, kind, numbers, seed, told)
                code = 0
            os._exit(code)
        os.close(told)
        buffer, hung, next_number = b"", False, numbers.start
        while True:
            ready, _, _ = select.select([reading], [], [], SECONDS)
            hung = not ready
            piece = os.read(reading, 1 << 16) if ready else b""
            if not piece:
                break
            buffer += piece
            *whole, buffer = buffer.split(b"\n")
            for text in whole:
                line = json.loads(text)
                next_number = line["number"] + 1
                yield line
        os.close(reading)
        if hung:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        numbers = range(next_number, numbers.stop)
        if numbers:
            code = os.waitstatus_to_exitcode(status)
            outcome = "hang" if hung else "crash"
            yield {"kind": kind, "number": next_number, "outcome": outcome, "said": f"exit code {code}"}
            numbers = numbers[1:]


def main() -> None:
    """Run the cases of every kind."""
    global BASE
    sources, cases, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chosen = sys.argv[4:] or list(KINDS)
    torch.set_num_threads(1)
    BASE = TuneAVideoPipeline.from_pretrained(sources / "base")
    shares = sum(KINDS[kind][3] for kind in chosen)
    for kind in chosen:
        count = -(-cases * KINDS[kind][3] // shares)
        for line in _lines(sources, kind, range(count), seed):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
