"""Loads a folder that `megatrain export` wrote with transformers alone, and continues a prompt.

python examples/generate_with_transformers.py FOLDER PROMPT
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging


def main() -> int:
    """The command line."""
    if len(sys.argv) != 3:
        print("python examples/generate_with_transformers.py FOLDER PROMPT", file=sys.stderr)
        return 2
    folder, prompt = sys.argv[1:]
    set_seed(0)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
