"""README's pictures: the script that makes them draws what was logged and what was shown."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
from conftest import ROOT

from logger import run
from train import train

sys.path.append(str(ROOT / "docs" / "images"))
import make_pictures

SVG = "{http://www.w3.org/2000/svg}"
# stands for Chromium: its screenshot is the tags that TensorBoard has at the address
BROWSER = """#!{python}
import re, sys, urllib.request
address, page = sys.argv[-1], re.search("--screenshot=(.*?)\\n", "\\n".join(sys.argv) + "\\n")[1]
tags = address.split("#")[0] + "data/plugin/scalars/tags"
direct = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
open(page, "wb").write(direct.open(tags).read())
"""


def test_the_curve_is_what_the_newest_run_logged(tmp_path):
    losses = np.linspace(4, 1, 30) ** 2
    records = [{"step": 10 * n, "seconds": n**1.1, "loss": x} for n, x in enumerate(losses, 1)]
    for record in records[5::6]:
        record["val_loss"] = record["loss"] ** 1.1
    for name, lines in {"2026-01-02": records, "2025-12-31": records[:1]}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(text)
    command = ["--only", "loss", "--log_dir", str(tmp_path / "runs"), "--output", str(tmp_path)]
    assert run(make_pictures.main, command) == 0
    svg, found = ET.parse(tmp_path / "loss.svg"), []
    for name, key in [("training", "loss"), ("validation", "val_loss")]:
        path = svg.find(f".//{SVG}g[@id='{name}']/{SVG}path").get("d")
        rows = [(row["step"], row[key]) for row in records if key in row]
        points = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)]
        found += [row + point for row, point in zip(rows, points, strict=True)]
    step, loss, x, y = np.array(found).T
    for value, place in (step, x), (loss, y):  # both lines lie on the same straight scales
        assert np.abs(np.polyval(np.polyfit(value, place, 1), value) - place).max() < 0.01


def test_pictures_of_a_real_run(tiny_config, tmp_path, monkeypatch):
    """TensorBoard and generate.py --interactive are real, the browser only writes what it finds."""
    train(replace(tiny_config, max_iters=5, eval_interval=5))
    browser = tmp_path / "browser"
    browser.write_text(BROWSER.format(python=sys.executable))
    browser.chmod(0o755)
    monkeypatch.setattr(make_pictures, "TYPED", ("line 1", "/set temperature 0.5", "the fox"))
    best = f"{tiny_config.checkpoint_dir}/best_checkpoint.pt"
    command = ["--log_dir", tiny_config.log_dir, "--checkpoint", best, "--output", str(tmp_path)]
    command += ["--only", "loss", "tensorboard", "terminal"]  # test_playground.py has a browser
    assert run(make_pictures.main, [*command, "--browser", str(browser)]) == 0
    (tags,) = json.loads((tmp_path / "tensorboard.png").read_text()).values()
    assert {"loss/train", "loss/val", "lr"} <= set(tags)
    svg = (tmp_path / "terminal.svg").read_text("utf-8").replace("\xa0", " ")
    for line in ("generate.py --interactive", "line 1", "temperature 0.5", "the fox", "/quit"):
        assert line in svg.replace("&#160;", " ")
