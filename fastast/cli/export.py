"""``fastast export``."""

from __future__ import annotations

from fastast.cli.options import parser_of
from fastast.train.deploy import deploy


def main(argv: list[str]) -> None:
    """Writes a run as one file that needs nothing of this library."""
    parser = parser_of("export")
    parser.add_argument("checkpoint", type=str, help="run directory or model.safetensors")
    parser.add_argument("out", type=str, help="a .onnx or .pt2 file")
    options = parser.parse_args(argv)
    notes = deploy(options.checkpoint, options.out)
    print(
        f"Wrote {options.out}: frames [1, time, mel bins] to logits [1, classes]; "
        f"{notes['activation']} makes probabilities of them"
    )
