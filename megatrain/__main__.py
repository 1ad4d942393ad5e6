"""`megatrain COMMAND [key=value ...]`: picks the command, composes its configuration, gives the exit code.

Design choices:
- Nothing heavy is imported before it is known to be needed: `megatrain --help` answers at once.
- A MegatrainError is one line and its exit code; any other exception is a bug, keeps its traceback and exits 1.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from megatrain.errors import BAD_INPUT, DONE, InputError, MegatrainError

COMMANDS = {
    "prep": ("megatrain.data_prep.pipeline", "text to tokenized WebDataset shards"),
    "merge": ("megatrain.data_prep.merge", "several prepared sets to one, of links to their shards"),
    "train": ("megatrain.launcher", "train on this machine's ranks; continues what run_dir holds"),
    "eval": ("megatrain.evaluate.eval_command", "loss, perplexity and bits per byte of a checkpoint"),
    "generate": ("megatrain.evaluate.generate_command", "text from a checkpoint"),
    "export": ("megatrain.evaluate.export_command", "a checkpoint to a Hugging Face folder"),
    "import": ("megatrain.evaluate.import_command", "a Hugging Face folder to a run directory with its weights"),
    "average": ("megatrain.evaluate.average_command", "the mean of a run's last checkpoints"),
    "report": ("megatrain.observe.report", "one self-contained HTML page of a run"),
    "inspect": ("megatrain.inspect", "what a shard set or checkpoint holds, and whether it is whole"),
    "doctor": ("megatrain.doctor.command", "is this node, this cluster, fit to train"),
}
LAUNCHING = ("train", "doctor")
"""Commands that hand their arguments on to the processes they start."""


def usage() -> str:
    """What `megatrain --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            "megatrain COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "megatrain COMMAND --help lists a command's keys; exit codes: 0 done, 75 stopped with a checkpoint (start",
            "again), 2 bad input or configuration, 3 gave up or incomplete, 1 a bug.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(usage())
        return DONE if arguments else BAD_INPUT
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; legal: {', '.join(COMMANDS)}"
            raise InputError(f"no such command{hint}")
        from megatrain.compose import compose

        config = compose(command, rest)
        if config is None:
            return DONE
        module = importlib.import_module(COMMANDS[command][0])
        code: int = module.run(config, rest) if command in LAUNCHING else module.run(config)
    except MegatrainError as error:
        print(f"megatrain {command}: {error}", file=sys.stderr)
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
