"""`dinoreg export`: what it asks for and says."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

ENDINGS = {"safetensors": ".safetensors", "dinov2": "_dinov2.pth", "hf": "_hf", "timm": "_timm", "onnx": ".onnx"}
OPENED_BY = {
    "safetensors": 'dinoreg.load_backbone("{}")',
    "dinov2": 'torch.hub.load("facebookresearch/dinov2", NAME, pretrained=False).load_state_dict(torch.load("{}"))',
    "hf": 'transformers.AutoModel.from_pretrained("{}")',
    "timm": 'timm.create_model("local-dir:{}", pretrained=True)',
    "onnx": 'onnxruntime.InferenceSession("{}").run(None, {{"images": normalised}})',
}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `dinoreg export`."""
    parser.add_argument("weights", metavar="WEIGHTS", help="the backbone: a file, a folder or hf:ORG/NAME")
    parser.add_argument("--format", required=True, choices=ENDINGS, help="see below")
    parser.add_argument("--output", metavar="PATH", type=Path, help="what to write (default: like WEIGHTS, here)")
    parser.add_argument("--overwrite", action="store_true", help="write even where there is something")
    parser.add_argument("--trust", action="store_true", help="open WEIGHTS even where that may run code of its maker's")


def main(asked: Namespace) -> int:
    """Export as the command line says."""
    from dinoreg.models.export import demand_free, export
    from dinoreg.models.weights import load_backbone

    path = Path(asked.weights.removeprefix("hf:"))
    stem = path.resolve().name if path.is_dir() else path.name if asked.weights.startswith("hf:") else path.stem
    output = asked.output or Path(stem + ENDINGS[asked.format])
    demand_free(output, asked.format, asked.overwrite)
    model = load_backbone(asked.weights, trust=asked.trust)
    print(f"found {model.found}", flush=True)
    for note in export(model, asked.format, output, asked.overwrite):
        print(f"note: {note}")
    print(f"wrote {output}; open it by {OPENED_BY[asked.format].format(output)}")
    return 0
