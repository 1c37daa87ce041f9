"""llama.cpp, by the package xllamacpp, timed in a process and an environment of its own by generate.py.

That environment has neither torch nor our library, so this file imports nothing of either.
"""

import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def serve(path: str, n_threads: str, n_parallel: str, n_context: str) -> int:
    """Answer each line on stdin, {"prompts": [ids, ...], "n": new tokens}, with what it took."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the library prints too
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_gpu_layers, params.n_parallel = 0, int(n_parallel)
    params.n_ctx = int(n_context) * int(n_parallel)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(n_threads)
    server = xllamacpp.Server(params)
    fixed = {"temperature": 0.0, "ignore_eos": True, "cache_prompt": False}

    def complete(prompt: list[int], n: int) -> dict[str, Any]:
        return server.handle_completions({"prompt": prompt, "n_predict": n, **fixed})

    print(json.dumps({"xllamacpp": xllamacpp.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with ThreadPoolExecutor(len(asked["prompts"])) as threads:
            started = time.perf_counter()
            found = list(threads.map(complete, asked["prompts"], [asked["n"]] * len(asked["prompts"])))
            seconds = time.perf_counter() - started
        first_s = found[0]["timings"]["prompt_ms"] / 1000
        print(json.dumps({"seconds": seconds, "first_s": first_s}), file=answers, flush=True)
    return 0
