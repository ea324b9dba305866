"""Links in the documentation lead somewhere, the files that it names exist, and its Python code runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:tests|tools|pipeline|model|native|base|recipes|docker)/[\w./-]+)`", page.read_text()
    )
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


@pytest.mark.parametrize("page", ["README.md", "docs/loader.md"])
def test_code_with_the_loader_runs(page: str, dataset: Path, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(code) == 1
    script = code[0].replace("data/imagenet", str(dataset)).replace("data/mine", str(dataset))
    # as on a GPU with ImageNet, but for the device and the size; each batch is kept
    script = script.replace(', device="gpu"', "").replace("global_batch=128", "global_batch=8")
    script = re.sub(r"^( +)\.\.\. *(#.*)?$", r"\1seen.append((images, labels))", script, flags=re.MULTILINE)
    script = script.replace("    split =", "    seen = []\n    split =").replace(
        "    data,", "    seen = []\n    data,"
    )
    path = tmp_path / "mine.py"
    path.write_text(script)
    names = runpy.run_path(str(path), run_name="__main__")
    plan, batches = names["plan"], names["seen"]
    trained = plan.steps_per_epoch * names.get("epochs", 1)
    assert trained and len(batches) > trained - ("val" not in names)
    train = names["train" if "val" in names else "reader"]
    for step, (images, labels) in enumerate(batches[:trained]):
        assert images.shape == (8, 3, 224, 224)
        assert images.is_contiguous(memory_format=torch.channels_last)
        order = plan.order(step // plan.steps_per_epoch)
        first = step % plan.steps_per_epoch * 8
        assert labels.tolist() == [train.read(int(index))[1] for index in order[first : first + 8]]
    if "val" in names:
        labels = [label for _, some in batches[trained:] for label in some.tolist()]
        assert labels == [names["val"].read(index)[1] for index in range(len(names["val"]))]
