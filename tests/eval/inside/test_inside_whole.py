"""`dinoreg-eval inside`: every experiment on a pair of networks, on one page, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from objects import write_objects
from planted import planted_network, write_planted_classes

from dinoreg.models.weights import save_backbone
from eval.cli import main
from eval.suites import EXPERIMENTS

NUMBERS = ["1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.9", "1.10", "1.11", "1.12", "1.13", "2"]
NUMBERS += [*(f"L{number}" for number in range(1, 9)), *(f"D{number}" for number in range(1, 8)), "5"]
SMALL = [
    "artifacts.zoom=1", "artifacts.images=0", "artifacts.train_images=0", "artifacts.probe_images=20",
    "artifacts.probe_iterations=20", "artifacts.c_steps=2", "artifacts.c_iterations=20", "artifacts.draws=1",
    "artifacts.photos=1", "artifacts.resampled_images=8",
    "attention.zoom=1", "attention.images=0", "attention.photos=1",
    "features.zoom=1", "features.images=0", "features.photos=1",
    "discovery.photos=1", "discovery.blocks=[-1]", "discovery.biases=[0,-0.3]",
    "decoupling.zoom=1", "decoupling.images=0", "decoupling.photos=1",
    "knockout.zoom=1", "knockout.images=16", "knockout.layers=1", "knockout.photos=1", "knockout.masked_images=2",
    "knockout.left_out_images=1", "knockout.steps=2", "knockout.orders=1", "knockout.probe=knn",
    "test-time-registers.zoom=1", "test-time-registers.images=16", "test-time-registers.photos=1",
    "test-time-registers.probe=knn", "test-time-registers.top_k=1",
]  # fmt: skip


def test_one_command_tells_of_two_networks_what_both_papers_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without registers patches of the marker's colour are outliers; with them a register takes that over."""
    weights = {}
    for name, registers, home in (("plain", 0, "patches"), ("registers", 2, "registers")):
        model = planted_network(registers=registers, home=home, gather=2)
        weights[name] = tmp_path / f"{name}.safetensors"
        save_backbone(weights[name], model.state_dict(), model.config, {})
    images, boxes = write_planted_classes(tmp_path / "images", 6, 6, rate=0.04), tmp_path / "boxes"
    write_objects(boxes, 6)
    words = ["inside", "--weights", str(weights["plain"]), "--compare", str(weights["registers"]), "--preset", "quick"]
    words += ["--data-images", str(images), "--data-boxes", str(boxes), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main([*words, "--cache", str(tmp_path / "cache"), *SMALL])
    said = capsys.readouterr().out
    assert left.value.code == 0, said
    page = tmp_path / "out" / "plain" / "inside.html"
    assert f"to look at: {page}" in said
    content = page.read_text()
    missing = [number for number in NUMBERS if f'id="finding-{number.replace(".", "-")}"' not in content]
    assert missing == []
    text = re.sub(r"<style>.*?</style>|data:image/[^\"]*|<[^>]*>", " ", content, flags=re.DOTALL)
    assert not re.search(r"\b(nan|None|e[+-]\d\d)\b", text)
    assert text.count("stands on") == 1 + content.count('id="finding-')  # also over the list
    results = {
        name: {
            suite: json.loads((tmp_path / "out" / name / suite / "results.json").read_text()) for suite in EXPERIMENTS
        }
        for name in weights
    }
    shares = [results[name]["artifacts"]["scores"]["outlier_share"]["value"] for name in weights]
    assert 2 < shares[0] < 6 and shares[1] == 0
    figures = list((page.parent / "figures").glob("*.png"))
    assert len(figures) > 15 and all(figure.with_suffix(".pdf").is_file() for figure in figures)
